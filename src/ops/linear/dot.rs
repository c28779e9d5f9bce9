//! The micro-kernels of the dense product: register tiles of dot products, all in the order `linear` promises.

use crate::ops::lanes::{Body, Element, Isa, Kernel, LANES, widen_tail};
use crate::ops::parallel;
use crate::ops::storage::Shared;

/// Columns that a thread takes at a time.
const COLUMNS: usize = 32;

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
    let y = &Shared::new(y);
    parallel::for_each(shape.columns.div_ceil(COLUMNS), |index| {
        let first = index * COLUMNS;
        let last = shape.columns.min(first + COLUMNS);
        body.run(Columns { x, weight, y, shape, first, last });
    });
}

/// Columns `first..last` of every row, the weights widened on the way into the registers.
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
        let mut column = self.first;
        while column < self.last {
            let left = self.last - column;
            column += match (I::WIDE, self.shape.rows) {
                (true, 1..=3) if left >= 8 => self.strip::<I, 3, 8>(isa, column),
                (true, _) if left >= 4 => self.strip::<I, 6, 4>(isa, column),
                (false, _) if left >= 2 => self.strip::<I, 2, 2>(isa, column),
                _ => self.strip::<I, 6, 1>(isa, column),
            };
        }
    }
}

impl<E: Element> Columns<'_, E> {
    /// C columns of every row, at most R rows at a time; returns C.
    #[inline(always)]
    fn strip<I: Isa, const R: usize, const C: usize>(&self, isa: I, column: usize) -> usize {
        let rows = self.shape.rows;
        let mut row = 0;
        while row < rows {
            row += match R.min(rows - row) {
                1 => self.tile::<I, 1, C>(isa, row, column),
                2 => self.tile::<I, 2, C>(isa, row, column),
                3 => self.tile::<I, 3, C>(isa, row, column),
                4 => self.tile::<I, 4, C>(isa, row, column),
                5 => self.tile::<I, 5, C>(isa, row, column),
                _ => self.tile::<I, 6, C>(isa, row, column),
            };
        }
        C
    }

    #[inline(always)]
    fn tile<I: Isa, const R: usize, const C: usize>(&self, isa: I, row: usize, column: usize) -> usize {
        let k = self.shape.k;
        let x: [&[f32]; R] = std::array::from_fn(|r| &self.x[(row + r) * k..][..k]);
        let w: [&[E]; C] = std::array::from_fn(|c| &self.weight[(column + c) * k..][..k]);
        let sums = dots(isa, x, w);
        for (r, sums) in sums.into_iter().enumerate() {
            let start = (row + r) * self.shape.columns + column;
            // SAFETY: columns belong to one index of the loop in `product` each, so no other thread has this part.
            #[allow(unsafe_code)]
            unsafe { self.y.part(start, C) }.copy_from_slice(&sums);
        }
        R
    }
}

/// The dot products of R rows with C columns, all of one length.
#[inline(always)]
fn dots<I: Isa, E: Element, const R: usize, const C: usize>(isa: I, x: [&[f32]; R], w: [&[E]; C]) -> [[f32; C]; R] {
    let x = x.map(|x| x.as_chunks::<LANES>());
    let w = w.map(|w| w.as_chunks::<LANES>());
    let mut sums = [[isa.splat(0.0); C]; R];
    for i in 0..x[0].0.len() {
        let w = w.map(|(w, _)| E::widen(isa, &w[i]));
        for (sums, (x, _)) in sums.iter_mut().zip(x) {
            let x = isa.load(&x[i]);
            for (sum, w) in sums.iter_mut().zip(w) {
                *sum = isa.fma(x, w, *sum);
            }
        }
    }
    if !x[0].1.is_empty() {
        let w = w.map(|(_, w)| widen_tail(isa, w));
        for (sums, (_, x)) in sums.iter_mut().zip(x) {
            let x = widen_tail(isa, x);
            for (sum, w) in sums.iter_mut().zip(w) {
                *sum = isa.fma(x, w, *sum);
            }
        }
    }
    sums.map(|sums| {
        let mut out = [0.0; C];
        let (fours, rest) = sums.as_chunks();
        let (out_fours, out_rest) = out.as_chunks_mut();
        fours.iter().zip(out_fours).for_each(|(sums, out)| *out = isa.sum4(*sums));
        rest.iter().zip(out_rest).for_each(|(sum, out)| *out = isa.sum(*sum));
        out
    })
}
