//! Products in bf16 of small operands that one thread makes and multiplies at once in the processor's matrix unit: what attention
//! consists of. Sums have the order of [`Registers::multiply_bf16`], whatever the number of rows.

use super::blocks::{Line, Sizes, WIDTH};
use super::brain::Left;
pub(in crate::ops) use super::pairs::Stored;
use super::pairs::{Pair, Pairs};
use crate::ops::amx::{Amx, Hints, PAIRS, ROWS, Registers};
use crate::ops::parameter::Precision;
use crate::ops::storage::Shared;

/// Columns of a right operand and of a product.
pub(in crate::ops) const COLUMNS: usize = WIDTH;

/// A processor with the unit.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Small {
    pairs: Pairs,
    amx: Amx,
}

/// A left operand `[rows, k]`: strip after strip of `height` rows, `[pairs / 16, height, 16]`, filled up with zeros.
#[derive(Default)]
pub(in crate::ops) struct Strips {
    height: usize,
    /// Pairs of a row.
    steps: usize,
    pairs: Vec<Pair>,
}

/// A right operand `[k, COLUMNS]`, in pairs along k, filled up with zeros.
#[derive(Default)]
pub(in crate::ops) struct Panel(Vec<Line<Pair>>);

/// Ready to multiply left operands of as many rows as one was asked for.
pub(in crate::ops) struct Multiplier(Registers);

impl Small {
    /// Where `precision` asks for it and the processor has it.
    pub(in crate::ops) fn of(precision: Precision) -> Option<Self> {
        match precision {
            Precision::F32 => None,
            Precision::Bf16 => Some(Self { pairs: Pairs::detect()?, amx: Amx::detect()? }),
        }
    }

    /// Rows of a strip where there are `rows` in all.
    fn height(rows: usize) -> usize {
        rows.clamp(1, ROWS)
    }

    /// Rows of a product whose left operand has `rows`: whole strips.
    pub(in crate::ops) fn whole(rows: usize) -> usize {
        rows.next_multiple_of(Self::height(rows))
    }

    pub(in crate::ops) fn multiplier(self, rows: usize) -> Multiplier {
        Multiplier(self.amx.registers(Self::height(rows), 4 * PAIRS))
    }

    /// Rounds `x` `[rows, k]`. After the last row of the last strip there may be what was there before.
    pub(in crate::ops) fn left(self, x: &[f32], k: usize, strips: &mut Strips) {
        let rows = x.len() / k;
        let (height, steps) = (Self::height(rows), k.div_ceil(2).next_multiple_of(PAIRS));
        *strips = Strips { height, steps, pairs: std::mem::take(&mut strips.pairs) };
        if !k.is_multiple_of(2 * PAIRS) {
            // Rows do not fill their places.
            strips.pairs.clear();
        }
        strips.pairs.resize(Self::whole(rows) * steps, 0);
        for (index, strip) in strips.pairs.chunks_exact_mut(height * steps).enumerate() {
            self.pairs.lay_out(Left::Rows(x), Sizes { rows, columns: 0, k }, index * height, 0..steps, strip);
        }
    }

    /// `rows` `[COLUMNS, k]` turned. In the place of those that are not there may be what was there before.
    pub(in crate::ops) fn turned(self, rows: Stored<'_>, k: usize, panel: &mut Panel) {
        panel.0.resize(k.div_ceil(2).next_multiple_of(PAIRS), Line::default());
        self.pairs.turn_stored(rows, k, &mut panel.0);
    }

    /// The columns of `rows` `[COLUMNS, columns]` from `first` on, and whether all numbers are finite.
    pub(in crate::ops) fn right(self, rows: Stored<'_>, first: usize, panel: &mut Panel) -> bool {
        panel.0.resize(COLUMNS / 2, Line::default());
        self.pairs.pack_stored(rows, first, &mut panel.0)
    }
}

impl Multiplier {
    /// The product of operands of equal k to `out` `[rows, COLUMNS]`, the rows of whole strips.
    pub(in crate::ops) fn multiply(&self, left: &Strips, right: &Panel, out: &mut [f32]) {
        let turn = if left.height == ROWS { 2 * ROWS } else { left.height };
        let rows = out.len() / COLUMNS;
        let out = Shared::new(out);
        for first in (0..rows).step_by(turn) {
            let count = turn.min(rows - first);
            // SAFETY: nobody else has `out`.
            #[allow(unsafe_code)]
            let target = unsafe { out.target(first * COLUMNS, COLUMNS, count, COLUMNS) };
            let strips = &left.pairs[first * left.steps..][..count * left.steps];
            self.0.multiply_bf16(strips, &right.0, &target, Hints::default());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use crate::ops::samples::{check_bits, check_close, numbers};
    use half::bf16;

    #[test]
    fn products_are_those_of_rounded_numbers_whatever_the_number_of_rows() {
        let Some(small) = Small::of(Precision::Bf16) else { return };
        let round = |x: &f32| bf16::from_f32(*x);
        for (rows, k, range) in [(1, 64, (0, 64)), (3, 9, (5, 64)), (16, 20, (0, 33)), (40, 128, (40, 41))] {
            let a = numbers(1, rows * k);
            let stored: Vec<bf16> = numbers(2, COLUMNS * k).iter().map(round).collect();
            let b: [&[bf16]; COLUMNS] = std::array::from_fn(|row| &stored[row * k..][..k]);
            let run = |a: &[f32], k: usize, right: &Panel| {
                let (mut left, count) = (Strips::default(), a.len() / k);
                small.left(a, k, &mut left);
                let mut out = vec![7.0; Small::whole(count) * COLUMNS];
                small.multiplier(count).multiply(&left, right, &mut out);
                out.truncate(count * COLUMNS);
                out
            };
            let product = |x: &f32, y: bf16| f64::from(round(x).to_f32()) * f64::from(y.to_f32());
            let check = |a: &[f32], k: usize, right: &Panel, b: &dyn Fn(usize, usize) -> bf16| {
                let sum = |i: usize| {
                    a[i / COLUMNS * k..][..k].iter().enumerate().map(|(j, x)| product(x, b(j, i % COLUMNS))).sum()
                };
                let expected: Vec<f64> = (0..rows * COLUMNS).map(sum).collect();
                let all = run(a, k, right);
                check_close(&format!("{rows}x{k}"), &all, &expected, 1e-6 * k as f64);
                for (row, expected) in all.chunks(COLUMNS).enumerate() {
                    check_bits(&format!("row {row} of {rows}"), &run(&a[row * k..][..k], k, right), expected);
                }
            };
            let there = |row: usize| (range.0..range.1).contains(&row);
            let mut right = Panel::default();
            small.turned(Stored { rows: &b, range }, k, &mut right);
            check(&a, k, &right, &|j, column| if there(column) { b[column][j] } else { bf16::ZERO });
            for first in (0..k).step_by(COLUMNS) {
                let mut right = Panel::default();
                assert!(small.right(Stored { rows: &b, range }, first, &mut right));
                let column = |row: usize, column: usize| b[row].get(first + column).copied().filter(|_| there(row));
                check(&numbers(3, rows * COLUMNS), COLUMNS, &right, &|j, i| column(j, i).unwrap_or_default());
            }
        }
    }
}
