//! The dense product for many rows: both operands rearranged into panels that the caches hold and the registers stream.
//! The order of every sum is that of `dot`; only who is computed next to whom differs.

use super::dot::{Shape, add_products, fold};
use crate::ops::lanes::{Body, Element, Isa, Kernel, LANES, widen_tail};
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
        body.run(Panel { rows: &rows, weight, y, shape, first, steps });
    });
}

/// As many as the cache takes, but no fewer than three pieces a thread.
fn columns_at_a_time(shape: Shape, steps: usize) -> usize {
    let cached = PANEL_BYTES / (steps.max(1) * LANES * size_of::<f32>());
    let shared = shape.columns.div_ceil(3 * parallel::threads());
    cached.min(shared).clamp(8, COLUMNS_MAX).next_multiple_of(4)
}

/// `height` rows of k numbers to `[steps, height, 16]`, zeros after the end of a row.
fn interleave(x: &[f32], k: usize, height: usize, out: &mut [f32]) {
    for (r, row) in x.chunks_exact(k.max(1)).enumerate() {
        let slots = out.chunks_exact_mut(LANES).skip(r).step_by(height);
        row.chunks(LANES).zip(slots).for_each(|(part, slot)| slot[..part.len()].copy_from_slice(part));
    }
}

/// Some columns, from `first` on, of every row.
struct Panel<'a, E> {
    /// `[rows / 6][steps, 6, 16]`, the last tile narrower.
    rows: &'a [f32],
    /// `[columns here, k]`
    weight: &'a [E],
    y: &'a Shared<'a, f32>,
    shape: Shape,
    first: usize,
    steps: usize,
}

impl<E: Element> Kernel for Panel<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        if I::WIDE { self.columns::<I, 4>(isa) } else { self.columns::<I, 1>(isa) }
    }
}

impl<E: Element> Panel<'_, E> {
    #[inline(always)]
    fn columns<I: Isa, const C: usize>(&self, isa: I) {
        let weight = self.widen::<I, C>(isa);
        let mut sums = vec![0.0; HEIGHT * LANES * weight.len() / (self.steps * LANES).max(1)];
        for row in (0..self.shape.rows).step_by(HEIGHT) {
            let tile = Tile { row, weight: &weight, sums: &mut sums };
            match self.shape.rows - row {
                1 => self.tile::<I, 1, C>(isa, tile),
                2 => self.tile::<I, 2, C>(isa, tile),
                3 => self.tile::<I, 3, C>(isa, tile),
                4 => self.tile::<I, 4, C>(isa, tile),
                5 => self.tile::<I, 5, C>(isa, tile),
                _ => self.tile::<I, HEIGHT, C>(isa, tile),
            }
        }
    }

    /// The columns in f32 as `[columns / C][steps, C, 16]`, filled up with columns of zeros.
    #[inline(always)]
    fn widen<I: Isa, const C: usize>(&self, isa: I) -> Vec<f32> {
        let k = self.shape.k;
        let count = self.weight.len() / k.max(1);
        let mut out = vec![0.0; count.next_multiple_of(C) * self.steps * LANES];
        for (column, w) in self.weight.chunks_exact(k.max(1)).enumerate() {
            let strip = &mut out[column / C * C * self.steps * LANES..];
            let (full, tail) = w.as_chunks();
            let mut slots = strip.as_chunks_mut::<LANES>().0.iter_mut().skip(column % C).step_by(C);
            for (w, slot) in full.iter().zip(&mut slots) {
                isa.store(E::widen(isa, w), slot);
            }
            if let (false, Some(slot)) = (tail.is_empty(), slots.next()) {
                isa.store(widen_tail(isa, tail), slot);
            }
        }
        out
    }

    /// R rows with all columns here.
    #[inline(always)]
    fn tile<I: Isa, const R: usize, const C: usize>(&self, isa: I, tile: Tile<'_>) {
        let k = self.steps * LANES;
        let x = &self.rows[tile.row * k..][..R * k];
        let x: &[[[f32; LANES]; R]] = x.as_chunks().0.as_chunks().0;
        let blocks = self.steps.div_ceil(STEPS).max(1);
        let size = self.steps.div_ceil(blocks).max(1);
        for (block, x) in x.chunks(size).enumerate() {
            let done = (block + 1) * size >= self.steps;
            let strips = tile.weight.chunks_exact(C * k).zip(tile.sums.chunks_exact_mut(HEIGHT * C * LANES));
            for (index, (strip, kept)) in strips.enumerate() {
                let w: &[[[f32; LANES]; C]] = strip.as_chunks().0.as_chunks().0;
                let kept: &mut [[[f32; LANES]; C]] = kept.as_chunks_mut().0.as_chunks_mut().0;
                let mut sums = [[isa.splat(0.0); C]; R];
                if block > 0 {
                    for (sum, kept) in sums.as_flattened_mut().iter_mut().zip(kept.as_flattened()) {
                        *sum = isa.load(kept);
                    }
                }
                for (x, w) in x.iter().zip(&w[block * size..]) {
                    let mut columns = [isa.splat(0.0); C];
                    for (column, w) in columns.iter_mut().zip(w) {
                        *column = isa.load(w);
                    }
                    for (x, sums) in x.iter().zip(&mut sums) {
                        add_products(isa, isa.load(x), &columns, sums);
                    }
                }
                if done {
                    self.finish(isa, tile.row, index * C, &sums);
                } else {
                    for (sum, kept) in sums.as_flattened().iter().zip(kept.as_flattened_mut()) {
                        isa.store(*sum, kept);
                    }
                }
            }
        }
    }

    /// Folds and writes the sums of one tile; `column` counts from `first`.
    #[inline(always)]
    fn finish<I: Isa, const R: usize, const C: usize>(&self, isa: I, row: usize, column: usize, sums: &[[I::V; C]; R]) {
        let count = C.min(self.weight.len() / self.shape.k - column);
        for (r, sums) in sums.iter().enumerate() {
            let start = (row + r) * self.shape.columns + self.first + column;
            // SAFETY: columns belong to one index of the loop in `product` each, so no other thread has this part.
            #[allow(unsafe_code)]
            let out = unsafe { self.y.part(start, count) };
            out.copy_from_slice(&fold(isa, sums)[..count]);
        }
    }
}

/// What a tile of rows works with.
struct Tile<'a> {
    row: usize,
    weight: &'a [f32],
    /// `[columns / C][6, C, 16]`: running sums between two blocks of steps.
    sums: &'a mut [f32],
}
