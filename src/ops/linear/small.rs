//! Products in bf16 of small operands that one thread makes and multiplies at once in the processor's matrix unit: what attention
//! consists of. Sums have the order of [`Registers::multiply_bf16`], whatever the number of rows.

use super::blocks::{Line, Sizes, WIDTH};
use super::brain::{Left, Right};
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

    /// Rounds the transpose of `x` `[COLUMNS, k]`.
    pub(in crate::ops) fn right_turned(self, x: &[f32], k: usize, panel: &mut Panel) {
        panel.0.resize(k.div_ceil(2).next_multiple_of(PAIRS), Line::default());
        self.pairs.pack(Right::Columns(x), Sizes { rows: 0, columns: COLUMNS, k }, 0, &mut panel.0);
    }

    /// Rounds the columns of `x` `[k, columns]` from `first` on. After the last one there may be what was there before.
    pub(in crate::ops) fn right(self, x: &[f32], columns: usize, first: usize, panel: &mut Panel) {
        let k = x.len() / columns;
        panel.0.resize(k.div_ceil(2).next_multiple_of(PAIRS), Line::default());
        self.pairs.pack(Right::Rows(x), Sizes { rows: 0, columns, k }, first, &mut panel.0);
    }

    /// [`Small::right_turned`] of rows of bf16.
    pub(in crate::ops) fn right_turned_stored(self, rows: Stored<'_>, k: usize, panel: &mut Panel) {
        panel.0.resize(k.div_ceil(2).next_multiple_of(PAIRS), Line::default());
        self.pairs.turn_stored(rows, k, &mut panel.0);
    }

    /// [`Small::right`] of rows of bf16; whether all numbers are finite.
    pub(in crate::ops) fn right_stored(self, rows: Stored<'_>, first: usize, panel: &mut Panel) -> bool {
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
        for (rows, k) in [(1, 64), (3, 9), (16, 20), (40, 128), (96, 64)] {
            let (a, b) = (numbers(1, rows * k), numbers(2, COLUMNS * k));
            let round = |x: f32| f64::from(bf16::from_f32(x).to_f32());
            let sum = |row: usize, column: usize| -> f64 {
                (0..k).map(|i| round(a[row * k + i]) * round(b[column * k + i])).sum()
            };
            let expected: Vec<f64> = (0..rows * COLUMNS).map(|i| sum(i / COLUMNS, i % COLUMNS)).collect();
            let run = |a: &[f32], right: &Panel| {
                let (mut left, count) = (Strips::default(), a.len() / k);
                small.left(a, k, &mut left);
                let mut out = vec![7.0; Small::whole(count) * COLUMNS];
                small.multiplier(count).multiply(&left, right, &mut out);
                out.truncate(count * COLUMNS);
                out
            };
            let mut right = Panel::default();
            small.right_turned(&b, k, &mut right);
            let all = run(&a, &right);
            check_close(&format!("{rows}x{k}"), &all, &expected, 1e-6 * k as f64);
            for (row, expected) in all.chunks(COLUMNS).enumerate() {
                check_bits(&format!("row {row} of {rows}"), &run(&a[row * k..][..k], &right), expected);
            }
            // The same columns after some others.
            let mut wide = vec![1.0; k * (COLUMNS + 10)];
            for (i, row) in wide.chunks_exact_mut(COLUMNS + 10).enumerate() {
                row[10..].iter_mut().enumerate().for_each(|(column, x)| *x = b[column * k + i]);
            }
            small.right(&wide, COLUMNS + 10, 10, &mut right);
            check_bits("rows", &run(&a, &right), &all);
        }
    }
}
