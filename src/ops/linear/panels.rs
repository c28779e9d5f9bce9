//! The dense product for many rows: both operands rearranged into panels that the caches hold and the registers stream.
//! The order of every sum is that of `dot`; only who is computed next to whom differs.

use super::dot::{Shape, fold};
use crate::ops::lanes::{Body, Element, Isa, Kernel, LANES, add_products, widen_tail};
use crate::ops::parallel;
use crate::ops::storage::Shared;

/// Rows of a register tile.
const HEIGHT: usize = 6;
/// Columns of a weight panel, at most.
const COLUMNS_MAX: usize = 64;
/// Bytes of a weight panel: half of a small level-2 cache.
const PANEL_BYTES: usize = 512 << 10;
/// Steps of sixteen along k that a register tile takes before the next columns: six rows of it and four columns fit a level-1 cache.
const STEPS: usize = 32;

/// y = x W^T on contiguous row-major slices.
pub(super) fn product<E: Element>(body: Body, x: &[f32], weight: &[E], y: &mut [f32], shape: Shape) {
    let steps = shape.k.div_ceil(LANES);
    let mut rows = vec![0.0; shape.rows * steps * LANES];
    parallel::for_each_chunk(&mut rows, HEIGHT * steps * LANES, |index, out| {
        let first = index * HEIGHT;
        let height = HEIGHT.min(shape.rows - first);
        interleave(&x[first * shape.k..][..height * shape.k], shape.k, height, out);
    });
    let columns = columns_at_a_time(shape, steps);
    let y = &Shared::new(y);
    parallel::for_each(shape.columns.div_ceil(columns), |index| {
        let first = index * columns;
        let last = shape.columns.min(first + columns);
        let weight = &weight[first * shape.k..last * shape.k];
        let width = if body.is_wide() { 4 } else { 1 };
        let weight = &body.run(Widen { weight, k: shape.k, steps, width });
        let panel = Panel { body, rows: &rows, weight, y, shape, first, last, steps };
        if body.is_wide() { panel.compute::<4>() } else { panel.compute::<1>() }
    });
}

/// As many as the cache takes, but no fewer than three pieces a thread.
fn columns_at_a_time(shape: Shape, steps: usize) -> usize {
    let cached = PANEL_BYTES / (steps * LANES * size_of::<f32>());
    let shared = shape.columns.div_ceil(3 * parallel::threads());
    cached.min(shared).clamp(8, COLUMNS_MAX).next_multiple_of(4)
}

/// `height` rows of k numbers to `[steps, height, 16]`, zeros after the end of a row.
fn interleave(x: &[f32], k: usize, height: usize, out: &mut [f32]) {
    for (r, row) in x.chunks_exact(k).enumerate() {
        let slots = out.chunks_exact_mut(LANES).skip(r).step_by(height);
        row.chunks(LANES).zip(slots).for_each(|(part, slot)| slot[..part.len()].copy_from_slice(part));
    }
}

/// Columns `[columns, k]` in f32 as `[columns / width][steps, width, 16]`, filled up with columns of zeros.
struct Widen<'a, E> {
    weight: &'a [E],
    k: usize,
    steps: usize,
    width: usize,
}

impl<E: Element> Kernel for Widen<'_, E> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> Vec<f32> {
        let Self { weight, k, steps, width } = self;
        let count = weight.len() / k;
        let mut out = vec![0.0; count.next_multiple_of(width) * steps * LANES];
        for (column, w) in weight.chunks_exact(k).enumerate() {
            let strip = &mut out[column / width * width * steps * LANES..];
            let (full, tail) = w.as_chunks();
            let mut slots = strip.as_chunks_mut::<LANES>().0.iter_mut().skip(column % width).step_by(width);
            for (w, slot) in full.iter().zip(&mut slots) {
                isa.store(E::widen(isa, w), slot);
            }
            if let (false, Some(slot)) = (tail.is_empty(), slots.next()) {
                isa.store(widen_tail(isa, tail), slot);
            }
        }
        out
    }
}

/// Columns `first..last` of every row.
struct Panel<'a> {
    body: Body,
    /// `[rows / 6][steps, 6, 16]`, the last tile narrower.
    rows: &'a [f32],
    /// What [`Widen`] made of the columns.
    weight: &'a [f32],
    y: &'a Shared<'a, f32>,
    shape: Shape,
    first: usize,
    last: usize,
    steps: usize,
}

impl Panel<'_> {
    fn compute<const C: usize>(&self) {
        let strips = self.weight.len() / (C * self.steps * LANES);
        for row in (0..self.shape.rows).step_by(HEIGHT) {
            match self.shape.rows - row {
                1 => self.tile::<1, C>(row, strips),
                2 => self.tile::<2, C>(row, strips),
                3 => self.tile::<3, C>(row, strips),
                4 => self.tile::<4, C>(row, strips),
                5 => self.tile::<5, C>(row, strips),
                _ => self.tile::<HEIGHT, C>(row, strips),
            }
        }
    }

    /// R rows from `row` on with all columns here, `strips` times C of them.
    fn tile<const R: usize, const C: usize>(&self, row: usize, strips: usize) {
        let k = self.steps * LANES;
        let x: &[[[f32; LANES]; R]] = self.rows[row * k..][..R * k].as_chunks().0.as_chunks().0;
        let w: &[[[f32; LANES]; C]] = self.weight.as_chunks().0.as_chunks().0;
        let mut sums = vec![[[[0.0; LANES]; C]; R]; strips];
        let size = self.steps.div_ceil(self.steps.div_ceil(STEPS));
        for (block, x) in x.chunks(size).enumerate() {
            for (w, sums) in w.chunks_exact(self.steps).zip(&mut sums) {
                self.body.run(Advance { x, w: &w[block * size..], sums });
            }
        }
        for (strip, sums) in sums.iter().enumerate() {
            let column = self.first + strip * C;
            let count = C.min(self.last - column);
            for (r, dots) in self.body.run(Fold { sums }).iter().enumerate() {
                let start = (row + r) * self.shape.columns + column;
                // SAFETY: columns belong to one index of the loop in `product` each, so no other thread has this part.
                #[allow(unsafe_code)]
                let out = unsafe { self.y.part(start, count) };
                out.copy_from_slice(&dots[..count]);
            }
        }
    }
}

/// Some steps of the running sums of one register tile, which rest in memory between two blocks of steps.
struct Advance<'a, const R: usize, const C: usize> {
    x: &'a [[[f32; LANES]; R]],
    w: &'a [[[f32; LANES]; C]],
    sums: &'a mut [[[f32; LANES]; C]; R],
}

impl<const R: usize, const C: usize> Kernel for Advance<'_, R, C> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let mut sums = [[isa.splat(0.0); C]; R];
        for (sum, kept) in sums.as_flattened_mut().iter_mut().zip(self.sums.as_flattened()) {
            *sum = isa.load(kept);
        }
        for (x, w) in self.x.iter().zip(self.w) {
            let mut columns = [isa.splat(0.0); C];
            for (column, w) in columns.iter_mut().zip(w) {
                *column = isa.load(w);
            }
            for (x, sums) in x.iter().zip(&mut sums) {
                add_products(isa, isa.load(x), &columns, sums);
            }
        }
        for (sum, kept) in sums.as_flattened().iter().zip(self.sums.as_flattened_mut()) {
            isa.store(*sum, kept);
        }
    }
}

/// The results of one register tile.
struct Fold<'a, const R: usize, const C: usize> {
    sums: &'a [[[f32; LANES]; C]; R],
}

impl<const R: usize, const C: usize> Kernel for Fold<'_, R, C> {
    type Output = [[f32; C]; R];

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> [[f32; C]; R] {
        let mut out = [[0.0; C]; R];
        for (kept, out) in self.sums.iter().zip(&mut out) {
            let mut sums = [isa.splat(0.0); C];
            for (sum, kept) in sums.iter_mut().zip(kept) {
                *sum = isa.load(kept);
            }
            *out = fold(isa, &sums);
        }
        out
    }
}
