//! The dense product for few rows: dot products of rows with columns as they lie in memory, widened in the registers.
//! Bound by reading the weight, so every column is read once, as several streams a thread.

use super::blocks::Sizes;
use super::float;
use crate::ops::lanes::{Body, Element, Isa, Kernel, LANES, add_products, widen_part};
use crate::ops::parallel;
use crate::ops::storage::Shared;

/// From this many rows on, rearranging the weight into panels pays.
const ROWS_PANELS: usize = 24;
/// Columns that a thread takes at a time, at most: enough for eight streams of dozens of KiB.
const COLUMNS_MAX: usize = 256;
/// How far ahead of use the weight is asked for; the hardware alone stops at each 4 KiB boundary.
const PREFETCH_BYTES: usize = 2048;

/// y = x W^T on contiguous row-major slices: `x` `[rows, k]`, `weight` `[columns, k]` to `[rows, columns]`.
pub(super) fn product<E: Element>(body: Body, x: &[f32], weight: &[E], sizes: Sizes) -> Vec<f32> {
    assert!(x.len() == sizes.rows * sizes.k && weight.len() == sizes.columns * sizes.k);
    if sizes.rows >= ROWS_PANELS {
        return float::product(body, x, weight, sizes);
    }
    let mut out = vec![0.0; sizes.rows * sizes.columns];
    if out.is_empty() || sizes.k == 0 {
        return out; // no sums, or sums of nothing
    }
    let y = &Shared::new(&mut out);
    let size = sizes.columns.div_ceil(4 * parallel::threads()).next_multiple_of(8).min(COLUMNS_MAX);
    parallel::for_each(sizes.columns.div_ceil(size), |index| {
        let first = index * size;
        let last = sizes.columns.min(first + size);
        Columns { body, x, weight, y, sizes, first, last }.compute();
    });
    out
}

/// Columns `first..last` of every row.
struct Columns<'a, E> {
    body: Body,
    x: &'a [f32],
    weight: &'a [E],
    y: &'a Shared<'a, f32>,
    sizes: Sizes,
    first: usize,
    last: usize,
}

impl<E: Element> Columns<'_, E> {
    fn compute(&self) {
        // As many running sums as the registers hold, and enough to hide the latency of the addition.
        match (self.body.is_wide(), self.sizes.rows) {
            (true, 1..=3) => self.streams::<3, 8>(),
            (true, _) => self.streams::<6, 4>(),
            (false, 1) => self.streams::<1, 4>(),
            (false, _) => self.streams::<3, 2>(),
        }
    }

    /// Cuts the columns into C streams that advance together, and a rest; R rows at a time at most.
    fn streams<const R: usize, const C: usize>(&self) {
        let each = (self.last - self.first) / C;
        for i in 0..each {
            self.strip::<R, C>(std::array::from_fn(|c| self.first + c * each + i));
        }
        for column in self.first + each * C..self.last {
            self.strip::<3, 1>([column]);
        }
    }

    /// C columns of all rows.
    fn strip<const R: usize, const C: usize>(&self, columns: [usize; C]) {
        let rows = self.sizes.rows;
        let height = rows.div_ceil(rows.div_ceil(R));
        for row in (0..rows).step_by(height) {
            match height.min(rows - row) {
                1 => self.tile::<1, C>(row, columns),
                2 => self.tile::<2, C>(row, columns),
                3 => self.tile::<3, C>(row, columns),
                _ if const { R <= 3 } => unreachable!("a tile has at most R rows"),
                4 => self.tile::<4, C>(row, columns),
                5 => self.tile::<5, C>(row, columns),
                _ => self.tile::<6, C>(row, columns),
            }
        }
    }

    fn tile<const R: usize, const C: usize>(&self, row: usize, columns: [usize; C]) {
        let k = self.sizes.k;
        let x: [&[f32]; R] = std::array::from_fn(|r| &self.x[(row + r) * k..][..k]);
        let w = columns.map(|column| &self.weight[column * k..][..k]);
        let dots: [[f32; C]; R] = self.body.run(Dots { x, w });
        for (r, dots) in dots.into_iter().enumerate() {
            for (column, dot) in columns.into_iter().zip(dots) {
                // SAFETY: columns belong to one index of the loop in `product` each, so no other thread has this element.
                #[allow(unsafe_code)]
                let out = unsafe { self.y.part((row + r) * self.sizes.columns + column, 1) };
                out[0] = dot;
            }
        }
    }
}

/// The dot products of R rows with C columns, all of one length.
struct Dots<'a, E, const R: usize, const C: usize> {
    x: [&'a [f32]; R],
    w: [&'a [E]; C],
}

impl<E: Element, const R: usize, const C: usize> Kernel for Dots<'_, E, R, C> {
    type Output = [[f32; C]; R];

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> [[f32; C]; R] {
        let steps = self.x[0].len() / LANES;
        let x = self.x.map(|x| &x.as_chunks::<LANES>().0[..steps]);
        let w = self.w.map(|w| &w.as_chunks::<LANES>().0[..steps]);
        let mut sums = [[isa.splat(0.0); C]; R];
        for i in 0..steps {
            let mut columns = [isa.splat(0.0); C];
            for (column, w) in columns.iter_mut().zip(&w) {
                isa.prefetch(w.as_ptr().cast::<u8>().wrapping_add(i * size_of::<[E; LANES]>() + PREFETCH_BYTES));
                *column = E::widen(isa, &w[i]);
            }
            for (x, sums) in x.iter().zip(&mut sums) {
                add_products(isa, isa.load(&x[i]), &columns, sums);
            }
        }
        if self.x[0].len() > steps * LANES {
            let mut columns = [isa.splat(0.0); C];
            for (column, w) in columns.iter_mut().zip(&self.w) {
                *column = widen_part(isa, &w[steps * LANES..]);
            }
            for (x, sums) in self.x.iter().zip(&mut sums) {
                add_products(isa, widen_part(isa, &x[steps * LANES..]), &columns, sums);
            }
        }
        let mut out = [[0.0; C]; R];
        for (sums, out) in sums.iter().zip(&mut out) {
            *out = fold(isa, sums);
        }
        out
    }
}

/// The results of one row from its running sums.
#[inline(always)]
fn fold<I: Isa, const C: usize>(isa: I, sums: &[I::V; C]) -> [f32; C] {
    let mut out = [0.0; C];
    let (fours, rest) = sums.as_chunks();
    let (out_fours, out_rest) = out.as_chunks_mut();
    for (sums, out) in fours.iter().zip(out_fours) {
        *out = isa.sum4(*sums);
    }
    for (sum, out) in rest.iter().zip(out_rest) {
        *out = isa.sum(*sum);
    }
    out
}
