//! Products of float32 in the processor's matrix unit, which multiplies bf16: every number is cut into three parts that add up to it, and
//! of the nine products of parts the six that float32 can tell are summed, in float32. What is left out is below 2^-25 of a product, but for
//! numbers near the end of the range: below 2^-110 their last parts are lost, as the unit takes what is below 2^-126 for zero. For
//! gradients only: log-probabilities have the same bits on every processor.
//!
//! Every sum has one order over k, so rows and threads change no bit; another processor does.

use super::blocks::{Out, Sizes};
use super::brain::Left;
use super::pairs::Pairs;
use crate::ops::amx::{Amx, PAIRS, PARTS, ROWS, Registers, SQUARE, Vector};
use crate::ops::lanes::Element;
use crate::ops::parallel;
use crate::ops::storage::{Shared, written};
use std::cell::RefCell;
use std::ops::Range;

/// Numbers along k that one instruction takes.
pub(super) const STEP: usize = 2 * PAIRS;
/// Vectors of a square's left or right operand in a step: its parts, of two registers each.
pub(super) const VECTORS: usize = PARTS * SQUARE;
/// Most numbers along k whose products are summed before they are added to the others.
const DEPTH: usize = 512;
/// Most rows that go over a panel together: with it, they lie in a level-2 cache.
const BLOCK: usize = 8 * SQUARE;
/// Columns that are cut together.
const PANEL: usize = 2 * SQUARE;
/// Pieces of a product for every thread, if it is large enough: each cuts its operands itself, so more are more work.
const PIECES: usize = 2;

thread_local! {
    /// Room for the operands of a thread's pieces: less than two megabytes, not to be cleared for every product.
    static OPERANDS: RefCell<[Vec<Vector>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// A processor with the unit.
#[derive(Clone, Copy)]
pub(super) struct Split {
    amx: Amx,
    pairs: Pairs,
}

/// Some rows and columns of a product, in whole squares but at its ends.
struct Piece {
    rows: Range<usize>,
    columns: Range<usize>,
}

impl Piece {
    /// The ranges that squares take of rows or columns.
    fn squares(range: &Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let end = range.end;
        range.clone().step_by(SQUARE).map(move |start| start..end.min(start + SQUARE))
    }
}

impl Split {
    pub(super) fn detect() -> Option<Self> {
        Some(Self { amx: Amx::detect()?, pairs: Pairs::detect()? })
    }

    /// a b for `b` `[k, columns]`: `[rows, columns]`.
    pub(super) fn product<E: Element>(self, a: Left<'_>, b: &[E], sizes: Sizes) -> Vec<f32> {
        // SAFETY: every piece writes all of its sums, and they are everything.
        #[allow(unsafe_code)]
        unsafe {
            written(sizes.rows * sizes.columns, |c| Product { split: self, a, b, sizes }.compute(&Out::Fresh(c)))
        }
    }

    /// c += a b, as [`Split::product`].
    pub(super) fn add_product<E: Element>(self, c: &mut [f32], a: Left<'_>, b: &[E], sizes: Sizes) {
        assert!(c.len() == sizes.rows * sizes.columns);
        Product { split: self, a, b, sizes }.compute(&Out::Added(&Shared::new(c)));
    }
}

/// a b.
struct Product<'a, E> {
    split: Split,
    a: Left<'a>,
    b: &'a [E],
    sizes: Sizes,
}

impl<E: Element> Product<'_, E> {
    /// Every sum to `out`, from several threads.
    fn compute(&self, out: &Out<'_>) {
        let Sizes { rows, columns, k } = self.sizes;
        let (Left::Rows(all) | Left::Columns(all)) = self.a;
        assert!(all.len() == rows * k && self.b.len() == k * columns);
        if rows == 0 || columns == 0 {
            return;
        }
        let blocks = rows.div_ceil(BLOCK);
        let each = rows.div_ceil(blocks).next_multiple_of(SQUARE);
        let groups = (PIECES * parallel::threads()).div_ceil(blocks).min(columns.div_ceil(PANEL));
        let across = columns.div_ceil(groups).next_multiple_of(PANEL);
        let groups = columns.div_ceil(across);
        let lens = [each, PANEL].map(|len| len / SQUARE * depth(k).div_ceil(STEP) * VECTORS);
        parallel::for_each(blocks * groups, |index| {
            let part = |index: usize, each: usize, all: usize| all.min(index * each)..all.min((index + 1) * each);
            let piece =
                Piece { rows: part(index % blocks, each, rows), columns: part(index / blocks, across, columns) };
            OPERANDS.with_borrow_mut(|operands| {
                for (operand, len) in operands.iter_mut().zip(lens) {
                    operand.resize(operand.len().max(len), Vector::default());
                }
                for start in (0..k.max(1)).step_by(depth(k)) {
                    let out = match out {
                        Out::Fresh(c) if start == 0 => Out::Fresh(c),
                        Out::Fresh(c) | Out::Added(c) => Out::Added(c),
                    };
                    self.sum(start..k.min(start + depth(k)), &piece, operands, &out);
                }
            });
        });
    }

    /// The sums of a piece over some numbers along k.
    fn sum(&self, numbers: Range<usize>, piece: &Piece, [left, right]: &mut [Vec<Vector>; 2], out: &Out<'_>) {
        let Split { amx, pairs } = self.split;
        let across = self.sizes.columns;
        let b = &self.b[numbers.start * across..numbers.end * across];
        let len = numbers.len().div_ceil(STEP) * VECTORS;
        let square = |index: usize| index * len..(index + 1) * len;
        let squares = |range: &Range<usize>| 0..range.len().div_ceil(SQUARE) * len;
        pairs.cut_left(self.a, self.sizes, piece.rows.clone(), numbers, &mut left[squares(&piece.rows)]);
        let registers = amx.registers(ROWS, 4 * PAIRS);
        for start in piece.columns.clone().step_by(PANEL) {
            let panel = start..piece.columns.end.min(start + PANEL);
            pairs.cut_right(b, across, panel.clone(), &mut right[squares(&panel)]);
            for (row, rows) in Piece::squares(&piece.rows).enumerate() {
                for (column, columns) in Piece::squares(&panel).enumerate() {
                    let operands = [&left[square(row)], &right[square(column)]];
                    self.multiply(&registers, operands, &Piece { rows: rows.clone(), columns }, out);
                }
            }
        }
    }

    /// The sums of a square, to their place in `out`.
    fn multiply(&self, registers: &Registers, [left, right]: [&[Vector]; 2], square: &Piece, out: &Out<'_>) {
        let across = self.sizes.columns;
        let place = |row: usize| row * across + square.columns.start;
        let is_whole = [square.rows.len(), square.columns.len()] == [SQUARE; 2];
        // SAFETY: every square has a place of its own, which is written before something is added to it.
        #[allow(unsafe_code)]
        unsafe {
            if let (Out::Fresh(c), true) = (out, is_whole) {
                let target = c.target(place(square.rows.start), across, SQUARE, SQUARE);
                return registers.multiply_parts(left, right, &target);
            }
            let mut sums = [[0.0; SQUARE]; SQUARE];
            let shared = Shared::new(sums.as_flattened_mut());
            registers.multiply_parts(left, right, &shared.target(0, SQUARE, SQUARE, SQUARE));
            for (sums, row) in sums.iter().zip(square.rows.clone()) {
                let sums = &sums[..square.columns.len()];
                match out {
                    Out::Fresh(c) => c.write(place(row), sums),
                    Out::Added(c) => self.split.pairs.add(sums, c.part(place(row), sums.len())),
                }
            }
        }
    }
}

/// Numbers along k that are summed together: about as many each time.
fn depth(k: usize) -> usize {
    k.div_ceil(k.div_ceil(DEPTH).max(1)).max(1).next_multiple_of(STEP)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use crate::ops::samples::{check_bits, numbers, with_threads};

    fn turned(x: &[f32], columns: usize) -> Vec<f32> {
        (0..columns).flat_map(|column| x.iter().skip(column).step_by(columns).copied()).collect()
    }

    /// Sizes that end in the middle of squares, panels, blocks of rows and depths.
    const SIZES: [(usize, usize, usize); 7] =
        [(1, 1, 1), (32, 64, 32), (33, 65, 3), (300, 31, 70), (40, 200, 513), (70, 34, 1100), (5, 7, 0)];

    #[test]
    fn sums_are_as_near_as_those_of_float32_in_every_layout() {
        let Some(split) = Split::detect() else { return };
        for (rows, columns, k) in SIZES {
            let (a, b, c) = (numbers(1, rows * k), numbers(2, k * columns), numbers(3, rows * columns));
            let at = turned(&a, k);
            let sizes = Sizes { rows, columns, k };
            let got = split.product(Left::Rows(&a), &b, sizes);
            check_bits("a turned", &split.product(Left::Columns(&at), &b, sizes), &got);
            let [mut added, mut turned] = [(); 2].map(|()| c.clone());
            split.add_product(&mut added, Left::Rows(&a), &b, sizes);
            split.add_product(&mut turned, Left::Columns(&at), &b, sizes);
            check_bits("a turned, added", &turned, &added);
            for i in 0..rows * columns {
                let (row, column) = (i / columns, i % columns);
                let terms = (0..k).map(|i| f64::from(a[row * k + i]) * f64::from(b[i * columns + column]));
                let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                // Chains of float32 stay within this, too; without any of the parts it would be a hundred times as much.
                let near = |got: f32, sum: f64, size: f64| (f64::from(got) - sum).abs() <= 3e-7 * size;
                let c = f64::from(c[i]);
                assert!(near(got[i], sum, size), "{rows}x{k}x{columns}: {} is not {sum}", got[i]);
                assert!(
                    near(added[i], c + sum, c.abs() + size),
                    "{rows}x{k}x{columns}: {} is not {}",
                    added[i],
                    c + sum
                );
            }
        }
    }

    #[test]
    fn a_product_with_one_is_the_number() {
        let Some(split) = Split::detect() else { return };
        let len = 70;
        let mut one = vec![0.0; len * len];
        one.iter_mut().step_by(len + 1).for_each(|x| *x = 1.0);
        let mut a = numbers(1, len * len);
        let ends = [f32::MAX, -f32::MAX, f32::from_bits(0x7f7f_7fff), f32::from_bits(0x7f7f_8000), 1e-30, 16_777_215.0];
        a[..6].copy_from_slice(&ends);
        let sizes = Sizes { rows: len, columns: len, k: len };
        check_bits("from the left", &split.product(Left::Rows(&a), &one, sizes), &a);
        check_bits("from the right", &split.product(Left::Rows(&one), &a, sizes), &a);
    }

    #[test]
    fn products_of_numbers_with_all_bits_are_those_of_float32() {
        let Some(split) = Split::detect() else { return };
        for bits in [0x3f80_ffff_u32, 0x3fff_ffff, 0x3f80_8001, 0xbf80_7fff, 0x3f81_0101] {
            let x = f32::from_bits(bits);
            let got = split.product(Left::Rows(&[x]), &[x], Sizes { rows: 1, columns: 1, k: 1 })[0];
            assert!((got - x * x).abs() <= f32::EPSILON * x * x, "{x:e} squared is {got:e}");
            // A sum that is there is rounded once.
            let mut sums = [1.0];
            let (a, b) = ([2.0_f32.powi(-15); 2048], [2.0_f32.powi(-16); 2048]);
            split.add_product(&mut sums, Left::Rows(&a), &b, Sizes { rows: 1, columns: 1, k: 2048 });
            assert!((sums[0] - 1.0 - 2.0_f32.powi(-20)).abs() <= f32::EPSILON, "{sums:?}");
        }
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        let Some(split) = Split::detect() else { return };
        for strange in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::from_bits(0x7f80_0001)] {
            let sizes = Sizes { rows: 2, columns: 1, k: 40 };
            let mut a = numbers(1, 80);
            a[17] = strange;
            let got = split.product(Left::Rows(&a), &numbers(2, 40), sizes);
            assert_eq!(got.iter().map(|x| x.is_finite()).collect::<Vec<_>>(), [false, true], "{strange}");
        }
    }

    #[test]
    fn rows_and_threads_change_no_bit() {
        let Some(split) = Split::detect() else { return };
        let (rows, columns, k) = (301, 90, 600);
        let (a, b) = (numbers(1, rows * k), numbers(2, k * columns));
        let run = |a: &[f32]| {
            let sizes = Sizes { rows: a.len() / k, columns, k };
            let mut c = split.product(Left::Rows(a), &b, sizes);
            split.add_product(&mut c, Left::Rows(a), &b, sizes);
            c
        };
        let expected = with_threads(1, || run(&a));
        for threads in [2, 3] {
            check_bits(&format!("{threads} threads"), &with_threads(threads, || run(&a)), &expected);
        }
        for row in [0, 40, 300] {
            check_bits(&format!("row {row}"), &run(&a[row * k..][..k]), &expected[row * columns..][..columns]);
        }
    }
}
