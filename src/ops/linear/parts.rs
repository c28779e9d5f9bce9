//! Numbers of float32 cut into three of bf16 that add up to them, laid out as the matrix unit reads them. What is multiplied is the
//! business of [`super::split`].
#![allow(unsafe_code)]

use std::arch::x86_64::*;
use std::ops::Range;

use super::blocks::Sizes;
use super::brain::Left;
use super::pairs::Pairs;
use super::split::{STEP, VECTORS};
use crate::ops::amx::{PAIRS, PARTS, ROWS, SQUARE, Vector};
use crate::ops::lanes::{Avx512, Element, Isa, LANES, widen_part};

impl Pairs {
    /// c += sums.
    pub(super) fn add(self, sums: &[f32], c: &mut [f32]) {
        // SAFETY: `self` is proof of the features.
        unsafe { add(sums, c) }
    }

    /// The parts of `numbers` along k of some `rows`, square after square of 32, to `[square][step, PARTS, 32 rows]`, zeros for those
    /// that are not there.
    pub(super) fn cut_left(
        self,
        a: Left<'_>,
        sizes: Sizes,
        rows: Range<usize>,
        numbers: Range<usize>,
        out: &mut [Vector],
    ) {
        match a {
            Left::Rows(a) => {
                let a = &a[rows.start * sizes.k..rows.end * sizes.k];
                // SAFETY: `self` is proof of the features.
                unsafe { cut_rows(self.isa(), a, sizes.k, numbers, out) }
            }
            Left::Columns(a) => {
                let a = Lines { all: &a[numbers.start * sizes.rows..numbers.end * sizes.rows], across: sizes.rows };
                // SAFETY: the same.
                unsafe { cut_columns(self.isa(), a, rows, out) }
            }
        }
    }

    /// The parts of some columns of `b` `[k, across]`, square after square of 32, to `[square][step, PARTS, 2, 16 pairs]`, zeros for those
    /// that are not there.
    pub(super) fn cut_right<E: Element>(self, b: &[E], across: usize, columns: Range<usize>, out: &mut [Vector]) {
        let len = out.len() / columns.len().div_ceil(SQUARE);
        for step in 0..len / VECTORS {
            // SAFETY: `self` is proof of the features.
            unsafe { cut_step(self.isa(), Lines { all: b, across }, columns.clone(), step, out) }
        }
    }
}

/// c += sums.
#[target_feature(enable = "avx512f,avx512bw")]
fn add(sums: &[f32], c: &mut [f32]) {
    c.iter_mut().zip(sums).for_each(|(c, sum)| *c += sum);
}

/// Lines of numbers that follow each other along k.
#[derive(Clone, Copy)]
struct Lines<'a, E> {
    all: &'a [E],
    across: usize,
}

impl<'a, E> Lines<'a, E> {
    /// Some columns of a line; none after the last line.
    #[inline(always)]
    fn part(self, index: usize, columns: &Range<usize>) -> &'a [E] {
        self.all.get(index * self.across..).and_then(|line| line.get(columns.clone())).unwrap_or_default()
    }
}

/// Some rows of a transpose.
#[target_feature(enable = "avx512f,avx512bw")]
fn cut_columns(isa: Avx512, a: Lines<'_, f32>, rows: Range<usize>, out: &mut [Vector]) {
    let len = out.len() / rows.len().div_ceil(SQUARE);
    for step in 0..len / VECTORS {
        cut_step(isa, a, rows.clone(), step, out);
        for square in out.chunks_exact_mut(len) {
            for register in square[step * VECTORS..][..VECTORS].as_chunks_mut::<ROWS>().0 {
                let mut pairs = [_mm512_setzero_ps(); LANES];
                for (pairs, out) in pairs.iter_mut().zip(&*register) {
                    // SAFETY: sixteen readable pairs.
                    *pairs = unsafe { _mm512_load_ps(out.0.as_ptr().cast()) };
                }
                for (pairs, out) in isa.transpose(pairs).into_iter().zip(register) {
                    store(_mm512_castps_si512(pairs), out);
                }
            }
        }
    }
}

/// Some rows of k numbers each.
#[target_feature(enable = "avx512f,avx512bw")]
fn cut_rows(isa: Avx512, a: &[f32], k: usize, numbers: Range<usize>, out: &mut [Vector]) {
    let order = order(|i| i % LANES, |i| i >= LANES);
    let a = Lines { all: a, across: k };
    let len = numbers.len().div_ceil(STEP) * VECTORS;
    for (square, out) in out.chunks_exact_mut(len.max(1)).enumerate() {
        for row in 0..SQUARE {
            let index = square * SQUARE + row;
            let (line, next) = (a.part(index, &numbers), a.part(index + 1, &numbers));
            for (step, out) in out.chunks_exact_mut(VECTORS).enumerate() {
                ask(next, step * STEP);
                let vector = |half| widen_part(isa, line.get(step * STEP + half * LANES..).unwrap_or_default());
                let (low, high) = (cut(vector(0)), cut(vector(1)));
                for part in 0..PARTS {
                    store(_mm512_permutex2var_epi16(low[part], order, high[part]), &mut out[part * SQUARE + row]);
                }
            }
        }
    }
}

/// One step of some columns: pairs of neighbours along k.
#[target_feature(enable = "avx512f,avx512bw")]
fn cut_step<E: Element>(isa: Avx512, b: Lines<'_, E>, columns: Range<usize>, step: usize, out: &mut [Vector]) {
    let order = order(|i| i / 2, |i| i % 2 == 1);
    let len = out.len() / columns.len().div_ceil(SQUARE);
    for pair in 0..PAIRS {
        let index = step * STEP + 2 * pair;
        let (even, odd) = (b.part(index, &columns), b.part(index + 1, &columns));
        let (even_ahead, odd_ahead) = (b.part(index + STEP, &columns), b.part(index + STEP + 1, &columns));
        for (square, out) in out.chunks_exact_mut(len).enumerate() {
            ask(even_ahead, square * SQUARE);
            ask(odd_ahead, square * SQUARE);
            let out = &mut out[step * VECTORS..][..VECTORS];
            for half in 0..2 {
                let vector =
                    |line: &[E]| widen_part(isa, line.get(square * SQUARE + half * LANES..).unwrap_or_default());
                let (even, odd) = (cut(vector(even)), cut(vector(odd)));
                for part in 0..PARTS {
                    let pairs = _mm512_permutex2var_epi16(even[part], order, odd[part]);
                    store(pairs, &mut out[part * SQUARE + half * PAIRS + pair]);
                }
            }
        }
    }
}

/// Asks for 32 numbers of a line that is cut soon: each line begins in another page, where the processor foresees nothing.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn ask<E>(line: &[E], first: usize) {
    for half in [0, LANES] {
        _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_add(first + half).cast());
    }
}

/// Three parts of numbers, each in the high half of its lane, whose low half is not theirs: what is nearest to a number, what is nearest to
/// the rest, and the rest. Of numbers that would become infinite the first part is cut off instead.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn cut(x: __m512) -> [__m512i; PARTS] {
    let (high, half) = (_mm512_set1_epi32(0xffff_0000_u32.cast_signed()), _mm512_set1_epi32(0x8000));
    let size = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(i32::MAX));
    let fits = _mm512_cmplt_epi32_mask(size, _mm512_set1_epi32(0x7f7f_8000));
    let first = _mm512_mask_add_epi32(_mm512_castps_si512(x), fits, _mm512_castps_si512(x), half);
    let rest = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(first, high)));
    let second = _mm512_add_epi32(_mm512_castps_si512(rest), half);
    let last = _mm512_sub_ps(rest, _mm512_castsi512_ps(_mm512_and_si512(second, high)));
    [first, second, _mm512_castps_si512(last)]
}

/// Which high halves of two vectors make the 32 halves of a vector of pairs: the number of each, and whether it is of the second.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn order(number: impl Fn(usize) -> usize, is_second: impl Fn(usize) -> bool) -> __m512i {
    let order: [u16; 2 * LANES] =
        std::array::from_fn(|i| (2 * number(i) + 1 + if is_second(i) { 2 * LANES } else { 0 }) as u16);
    // SAFETY: 32 readable numbers.
    unsafe { _mm512_loadu_si512(order.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn store(pairs: __m512i, out: &mut Vector) {
    // SAFETY: sixteen writable pairs.
    unsafe { _mm512_store_si512(out.0.as_mut_ptr().cast(), pairs) };
}
