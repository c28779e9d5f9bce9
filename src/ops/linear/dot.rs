//! The dense product for few rows: dot products of rows with columns as they lie in memory, widened in the registers.
//! Bound by reading the weight, so every column is read once, as several streams a thread.

use super::panels;
use crate::ops::lanes::{Body, Element, Isa, Kernel, LANES, widen_tail};
use crate::ops::parallel;
use crate::ops::storage::Shared;

/// From this many rows on, rearranging both operands into panels pays.
const ROWS_PANELS: usize = 24;
/// Columns that a thread takes at a time, at most: enough for eight streams of dozens of KiB.
const COLUMNS_MAX: usize = 256;
/// How far ahead of use the weight is asked for; the hardware alone stops at each 4 KiB boundary.
const PREFETCH_BYTES: usize = 2048;

/// Sizes of one product: `x` `[rows, k]`, `weight` `[columns, k]`, `y` `[rows, columns]`.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) k: usize,
}

/// y = x W^T on contiguous row-major slices.
pub(super) fn product<E: Element>(body: Body, x: &[f32], weight: &[E], y: &mut [f32], shape: Shape) {
    assert!(x.len() == shape.rows * shape.k && weight.len() == shape.columns * shape.k);
    assert!(y.len() == shape.rows * shape.columns);
    if shape.rows == 0 || shape.k == 0 {
        return; // no sums, or sums of nothing
    }
    if shape.rows >= ROWS_PANELS {
        return panels::product(body, x, weight, y, shape);
    }
    let y = &Shared::new(y);
    let size = shape.columns.div_ceil(4 * parallel::threads()).next_multiple_of(8).min(COLUMNS_MAX);
    parallel::for_each(shape.columns.div_ceil(size), |index| {
        let first = index * size;
        let last = shape.columns.min(first + size);
        body.run(Columns { x, weight, y, shape, first, last });
    });
}

/// Columns `first..last` of every row.
struct Columns<'a, E> {
    x: &'a [f32],
    weight: &'a [E],
    y: &'a Shared<'a, f32>,
    shape: Shape,
    first: usize,
    last: usize,
}

impl<E: Element> Kernel for Columns<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        // As many running sums as the registers hold, and enough to hide the latency of the addition.
        match (I::WIDE, self.shape.rows) {
            (true, 1..=3) => self.streams::<I, 8>(isa),
            (true, _) => self.streams::<I, 4>(isa),
            (false, 1) => self.streams::<I, 4>(isa),
            (false, 2..=3) => self.streams::<I, 2>(isa),
            (false, _) => self.streams::<I, 1>(isa),
        }
    }
}

// No closure here or below touches a vector: rustc compiles closures without the instruction set of the kernel around them.
impl<E: Element> Columns<'_, E> {
    /// Cuts the columns into C streams that advance together, and a rest.
    #[inline(always)]
    fn streams<I: Isa, const C: usize>(&self, isa: I) {
        let each = (self.last - self.first) / C;
        for i in 0..each {
            let mut columns = [self.first + i; C];
            for (c, column) in columns.iter_mut().enumerate() {
                *column += c * each;
            }
            self.strip(isa, columns);
        }
        for column in self.first + each * C..self.last {
            self.strip(isa, [column]);
        }
    }

    /// C columns of all rows, at most six rows at a time.
    #[inline(always)]
    fn strip<I: Isa, const C: usize>(&self, isa: I, columns: [usize; C]) {
        let rows = self.shape.rows;
        if rows <= 3 {
            match rows {
                1 => self.tile::<I, 1, C>(isa, 0, columns),
                2 => self.tile::<I, 2, C>(isa, 0, columns),
                _ => self.tile::<I, 3, C>(isa, 0, columns),
            }
            return;
        }
        if C > 4 {
            return; // never asked for
        }
        let height = rows.div_ceil(rows.div_ceil(6));
        for row in (0..rows).step_by(height) {
            match height.min(rows - row) {
                1 => self.tile::<I, 1, C>(isa, row, columns),
                2 => self.tile::<I, 2, C>(isa, row, columns),
                3 => self.tile::<I, 3, C>(isa, row, columns),
                4 => self.tile::<I, 4, C>(isa, row, columns),
                5 => self.tile::<I, 5, C>(isa, row, columns),
                _ => self.tile::<I, 6, C>(isa, row, columns),
            }
        }
    }

    #[inline(always)]
    fn tile<I: Isa, const R: usize, const C: usize>(&self, isa: I, row: usize, columns: [usize; C]) {
        let k = self.shape.k;
        let x: [&[f32]; R] = std::array::from_fn(|r| &self.x[(row + r) * k..][..k]);
        let w: [&[E]; C] = columns.map(|column| &self.weight[column * k..][..k]);
        for (r, sums) in dots(isa, x, w).into_iter().enumerate() {
            for (column, sum) in columns.into_iter().zip(sums) {
                // SAFETY: columns belong to one index of the loop in `product` each, so no other thread has this element.
                #[allow(unsafe_code)]
                let out = unsafe { self.y.part((row + r) * self.shape.columns + column, 1) };
                out[0] = sum;
            }
        }
    }
}

/// The dot products of R rows with C columns, all of one length.
#[inline(always)]
fn dots<I: Isa, E: Element, const R: usize, const C: usize>(isa: I, x: [&[f32]; R], w: [&[E]; C]) -> [[f32; C]; R] {
    let x = x.map(|x| x.as_chunks::<LANES>());
    let w = w.map(|w| w.as_chunks::<LANES>());
    let steps = x[0].0.len();
    let (x_full, w_full) = (x.map(|x| &x.0[..steps]), w.map(|w| &w.0[..steps]));
    let mut sums = [[isa.splat(0.0); C]; R];
    for i in 0..steps {
        let mut w = [isa.splat(0.0); C];
        for (w, from) in w.iter_mut().zip(&w_full) {
            isa.prefetch(from.as_ptr().cast::<u8>().wrapping_add(i * size_of::<[E; LANES]>() + PREFETCH_BYTES));
            *w = E::widen(isa, &from[i]);
        }
        for (x, sums) in x_full.iter().zip(&mut sums) {
            add_products(isa, isa.load(&x[i]), &w, sums);
        }
    }
    if !x[0].1.is_empty() {
        let mut tails = [isa.splat(0.0); C];
        for ((_, w), tail) in w.iter().zip(&mut tails) {
            *tail = widen_tail(isa, w);
        }
        for ((_, x), sums) in x.iter().zip(&mut sums) {
            add_products(isa, widen_tail(isa, x), &tails, sums);
        }
    }
    let mut out = [[0.0; C]; R];
    for (sums, out) in sums.iter().zip(&mut out) {
        *out = fold(isa, sums);
    }
    out
}

/// One step of the running sums of one row.
#[inline(always)]
pub(super) fn add_products<I: Isa, const C: usize>(isa: I, x: I::V, w: &[I::V; C], sums: &mut [I::V; C]) {
    for (sum, w) in sums.iter_mut().zip(w) {
        *sum = isa.fma(x, *w, *sum);
    }
}

/// The results of one row from its running sums.
#[inline(always)]
pub(super) fn fold<I: Isa, const C: usize>(isa: I, sums: &[I::V; C]) -> [f32; C] {
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
