//! C += A B by outer products: what the gradients of a linear layer need, with either operand as it lies in memory.
//! Every element is one chain of fused multiply-adds in order of k, so neither threads nor tiles change a bit.

use crate::ops::lanes::{Body, Element, Isa, Kernel, LANES, add_products, widen_tail};
use crate::ops::parallel;
use crate::ops::storage::Shared;

/// Rows of a register tile.
pub(super) const HEIGHT: usize = 6;
/// Vectors in a row of a panel of B.
const VECTORS: usize = 4;
/// Columns of a panel of B.
pub(super) const WIDTH: usize = VECTORS * LANES;
/// Steps along k before the next tile: so much of a panel of B stays in a level-1 cache.
pub(super) const STEPS: usize = 128;
/// Rows of C that a thread takes at a time.
pub(super) const ROWS: usize = 16 * HEIGHT;

/// `[rows, k]` as it lies in memory.
#[derive(Clone, Copy)]
pub(super) enum Left<'a> {
    /// Row after row.
    Rows(&'a [f32]),
    /// The transpose `[k, rows]`, row after row.
    Columns(&'a [f32]),
}

/// Sizes of one product: C `[rows, columns]`, A `[rows, k]`, B `[k, columns]`.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) k: usize,
}

/// c += a b, all contiguous.
pub(super) fn add_product<E: Element>(body: Body, c: &mut [f32], a: Left<'_>, b: &[E], sizes: Sizes) {
    let Sizes { rows, columns, k } = sizes;
    let (Left::Rows(all) | Left::Columns(all)) = a;
    assert!(all.len() == rows * k && b.len() == k * columns && c.len() == rows * columns);
    if c.is_empty() || k == 0 {
        return;
    }
    let mut left = vec![0.0; rows * k];
    parallel::for_each_chunk(&mut left, HEIGHT * k, |index, out| tile(a, sizes, index * HEIGHT, out));
    let mut right = vec![0.0; columns.div_ceil(WIDTH) * WIDTH * k];
    parallel::for_each_chunk(&mut right, WIDTH * k, |index, out| {
        body.run(Widen { b, columns, first: index * WIDTH, out });
    });
    let (panels, c) = (columns.div_ceil(WIDTH), &Shared::new(c));
    parallel::for_each(panels * rows.div_ceil(ROWS), |index| {
        let (panel, first) = (index % panels, index / panels * ROWS);
        let last = rows.min(first + ROWS);
        let piece = Piece {
            body,
            c,
            left: &left[first * k..last * k],
            right: &right[panel * WIDTH * k..][..WIDTH * k],
            first,
            column: panel * WIDTH,
            sizes,
        };
        piece.compute();
    });
}

/// Rows from `first` on to `[k, height]`: what a register tile reads at each step lies together.
fn tile(a: Left<'_>, Sizes { rows, k, .. }: Sizes, first: usize, out: &mut [f32]) {
    let height = out.len() / k;
    match a {
        Left::Rows(a) => {
            for (r, row) in a[first * k..][..out.len()].chunks_exact(k).enumerate() {
                out.iter_mut().skip(r).step_by(height).zip(row).for_each(|(out, x)| *out = *x);
            }
        }
        // Whole tiles by a move of known size.
        Left::Columns(a) if height == HEIGHT => {
            for (out, step) in out.as_chunks_mut::<HEIGHT>().0.iter_mut().zip(a.chunks_exact(rows)) {
                out.copy_from_slice(&step[first..first + HEIGHT]);
            }
        }
        Left::Columns(a) => {
            for (out, step) in out.chunks_exact_mut(height).zip(a.chunks_exact(rows)) {
                out.copy_from_slice(&step[first..first + height]);
            }
        }
    }
}

/// Columns from `first` on as `[k, WIDTH]` in f32, zeros after the last column.
struct Widen<'a, E> {
    b: &'a [E],
    columns: usize,
    first: usize,
    out: &'a mut [f32],
}

impl<E: Element> Kernel for Widen<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let width = WIDTH.min(self.columns - self.first);
        for (out, row) in self.out.chunks_exact_mut(WIDTH).zip(self.b.chunks_exact(self.columns)) {
            let (full, tail) = row[self.first..self.first + width].as_chunks();
            let mut slots = out.as_chunks_mut::<LANES>().0.iter_mut();
            for (x, slot) in full.iter().zip(&mut slots) {
                isa.store(E::widen(isa, x), slot);
            }
            if let (false, Some(slot)) = (tail.is_empty(), slots.next()) {
                isa.store(widen_tail(isa, tail), slot);
            }
        }
    }
}

/// Some rows of C for one panel of B.
struct Piece<'a> {
    body: Body,
    c: &'a Shared<'a, f32>,
    /// `[rows / 6][k, 6]`, the last tile narrower.
    left: &'a [f32],
    /// `[k, WIDTH]`
    right: &'a [f32],
    first: usize,
    column: usize,
    sizes: Sizes,
}

impl Piece<'_> {
    fn compute(&self) {
        let k = self.sizes.k;
        for start in (0..k).step_by(STEPS) {
            let steps = start..k.min(start + STEPS);
            let right = &self.right.as_chunks().0[steps.clone()];
            for (index, left) in self.left.chunks(HEIGHT * k).enumerate() {
                let row = self.first + index * HEIGHT;
                match left.len() / k {
                    1 => self.tile::<1>(row, &left.as_chunks().0[steps.clone()], right),
                    2 => self.tile::<2>(row, &left.as_chunks().0[steps.clone()], right),
                    3 => self.tile::<3>(row, &left.as_chunks().0[steps.clone()], right),
                    4 => self.tile::<4>(row, &left.as_chunks().0[steps.clone()], right),
                    5 => self.tile::<5>(row, &left.as_chunks().0[steps.clone()], right),
                    _ => self.tile::<HEIGHT>(row, &left.as_chunks().0[steps.clone()], right),
                }
            }
        }
    }

    /// R rows from `row` on, some steps of their sums.
    fn tile<const R: usize>(&self, row: usize, left: &[[f32; R]], right: &[[f32; WIDTH]]) {
        let width = WIDTH.min(self.sizes.columns - self.column);
        let mut sums: [&mut [f32]; R] = std::array::from_fn(|r| {
            let start = (row + r) * self.sizes.columns + self.column;
            // SAFETY: rows and panels belong to one index of the loop in `add_product` each, so no other thread has this part,
            // and the rows of a tile do not overlap.
            #[allow(unsafe_code)]
            let c = unsafe { self.c.part(start, width) };
            c
        });
        if width == WIDTH {
            return self.advance(left, right, sums);
        }
        // A panel that is not full: its sums rest in full rows meanwhile.
        let mut full = [[0.0; WIDTH]; R];
        for (full, sums) in full.iter_mut().zip(&sums) {
            full[..width].copy_from_slice(sums);
        }
        self.advance(left, right, full.each_mut().map(|row| &mut row[..]));
        for (full, sums) in full.iter().zip(&mut sums) {
            sums.copy_from_slice(&full[..width]);
        }
    }

    fn advance<const R: usize>(&self, left: &[[f32; R]], right: &[[f32; WIDTH]], sums: [&mut [f32]; R]) {
        if self.body.is_wide() {
            self.body.run(Advance::<R, VECTORS> { left, right, sums });
        } else {
            self.body.run(Advance::<R, 1> { left, right, sums });
        }
    }
}

/// Some steps of the sums of one tile, C vectors at a time.
struct Advance<'a, const R: usize, const C: usize> {
    left: &'a [[f32; R]],
    right: &'a [[f32; WIDTH]],
    /// WIDTH each.
    sums: [&'a mut [f32]; R],
}

impl<const R: usize, const C: usize> Kernel for Advance<'_, R, C> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        for first in (0..VECTORS).step_by(C) {
            let mut sums = [[isa.splat(0.0); C]; R];
            for (sums, kept) in sums.iter_mut().zip(self.sums.iter()) {
                for (sum, kept) in sums.iter_mut().zip(&kept.as_chunks().0[first..]) {
                    *sum = isa.load(kept);
                }
            }
            for (left, right) in self.left.iter().zip(self.right) {
                let mut columns = [isa.splat(0.0); C];
                for (column, right) in columns.iter_mut().zip(&right.as_chunks().0[first..]) {
                    *column = isa.load(right);
                }
                for (left, sums) in left.iter().zip(&mut sums) {
                    add_products(isa, isa.splat(*left), &columns, sums);
                }
            }
            for (sums, kept) in sums.iter().zip(self.sums.iter_mut()) {
                for (sum, kept) in sums.iter().zip(&mut kept.as_chunks_mut().0[first..]) {
                    isa.store(*sum, kept);
                }
            }
        }
    }
}
