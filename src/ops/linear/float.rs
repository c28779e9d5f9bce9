//! The operands of [`blocks`] in float32: weights of every type widened, sums in chains of fused multiply-adds.

use super::blocks::{Left, Line, Multiply, Order, Product, Sizes, Turn, VECTORS, WIDTH, lines, tiles};
use crate::ops::lanes::{Body, Element, Isa, Kernel, LANES, add_products, widen_part};

/// y = x W^T in the order of `dot`: `x` `[rows, k]`, `weight` `[columns, k]` to `[rows, columns]`.
pub(super) fn product<E: Element>(body: Body, x: &[f32], weight: &[E], sizes: Sizes) -> Vec<f32> {
    let Sizes { columns, k, .. } = sizes;
    assert!(x.len() == sizes.rows * k && weight.len() == columns * k);
    let product = Product { multiply: body, left: Left::Rows(x), sizes, order: Order::Lanes };
    let pack = |column: usize, panel: &mut [Line<f32>]| {
        let last = columns.min(column + WIDTH);
        body.run(Transpose { weight: &weight[column * k..last * k], k, panel });
    };
    product.fresh(pack)
}

/// a b in one chain a sum: `a` `[rows, k]`, `b` `[k, columns]` to `[rows, columns]`.
pub(super) fn outer_product<E: Element>(body: Body, a: &[f32], b: &[E], sizes: Sizes) -> Vec<f32> {
    assert!(a.len() == sizes.rows * sizes.k && b.len() == sizes.k * sizes.columns);
    let product = Product { multiply: body, left: Left::Rows(a), sizes, order: Order::Chain };
    product.fresh(|column, panel| body.run(Widen { b, columns: sizes.columns, first: column, panel }))
}

/// c += aT b: `a` `[k, rows]`, `b` `[k, columns]`, `c` `[rows, columns]`.
pub(super) fn add_outer_product(body: Body, c: &mut [f32], a: &[f32], b: &[f32], sizes: Sizes) {
    let Sizes { rows, columns, k } = sizes;
    assert!(a.len() == rows * k && b.len() == k * columns && c.len() == rows * columns);
    let tiles = tiles(rows, k, |step, first, numbers: &mut [f32]| {
        numbers.copy_from_slice(&a[step * rows + first..][..numbers.len()]);
    });
    let product = Product { multiply: body, left: Left::Tiles(&tiles), sizes, order: Order::Chain };
    product.add(c, |column, panel| body.run(Widen { b, columns, first: column, panel }));
}

/// Columns `[columns, k]` of a weight to a panel, in the order of [`Order::Lanes`].
struct Transpose<'a, E> {
    weight: &'a [E],
    k: usize,
    panel: &'a mut [Line<f32>],
}

impl<E: Element> Kernel for Transpose<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { weight, k, panel } = self;
        let mut starts = [0; LANES];
        for chain in Order::Lanes.chains(k) {
            starts[chain.lane] = chain.start;
        }
        for (vector, columns) in weight.chunks(LANES * k).enumerate() {
            for step in 0..k.div_ceil(LANES) {
                let width = LANES.min(k - step * LANES);
                let mut block = [isa.splat(0.0); LANES];
                for (lanes, column) in block.iter_mut().zip(columns.chunks_exact(k)) {
                    let part = &column[step * LANES..step * LANES + width];
                    *lanes = widen_part(isa, part);
                }
                let block = isa.transpose(block);
                for (lane, start) in block.iter().zip(&starts).take(width) {
                    isa.store(*lane, &mut panel[start + step].0[vector]);
                }
            }
        }
    }
}

/// Columns from `first` on of `b` `[k, columns]` to a panel.
struct Widen<'a, E> {
    b: &'a [E],
    columns: usize,
    first: usize,
    panel: &'a mut [Line<f32>],
}

impl<E: Element> Kernel for Widen<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let width = WIDTH.min(self.columns - self.first);
        for (line, row) in self.panel.iter_mut().zip(self.b.chunks_exact(self.columns)) {
            let (full, tail) = row[self.first..self.first + width].as_chunks();
            for (x, slot) in full.iter().zip(line.0.iter_mut()) {
                isa.store(E::widen(isa, x), slot);
            }
            if let (false, Some(slot)) = (tail.is_empty(), line.0.get_mut(full.len())) {
                isa.store(widen_part(isa, tail), slot);
            }
        }
    }
}

impl Multiply for Body {
    type Number = f32;

    fn advance<const R: usize>(self, turn: Turn<'_, f32>) {
        if self.is_wide() { self.run(Advance::<R, VECTORS>(turn)) } else { self.run(Advance::<R, 1>(turn)) }
    }
}

/// A turn of R rows, C vectors of each at a time.
struct Advance<'a, const R: usize, const C: usize>(Turn<'a, f32>);

impl<const R: usize, const C: usize> Kernel for Advance<'_, R, C> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Turn { left, right, sums: kept, parts } = self.0;
        for part in parts {
            let (numbers, across, along) = left.numbers::<R>(part);
            let (right, level, merged) = (lines(right, part), part.level(), part.merged());
            for vector in (0..VECTORS).step_by(C) {
                let mut sums = [[isa.splat(0.0); C]; R];
                if !part.starts() {
                    for (sums, kept) in sums.iter_mut().zip(&kept[level]) {
                        for (sum, kept) in sums.iter_mut().zip(&kept.0[vector..vector + C]) {
                            *sum = isa.load(kept);
                        }
                    }
                }
                for (step, line) in right.iter().enumerate() {
                    let mut columns = [isa.splat(0.0); C];
                    for (column, line) in columns.iter_mut().zip(&line.0[vector..vector + C]) {
                        *column = isa.load(line);
                    }
                    for (r, sums) in sums.iter_mut().enumerate() {
                        // SAFETY: the numbers of R rows of the part exist, and it has as many steps as lines.
                        #[allow(unsafe_code)]
                        let number = unsafe { *numbers.get_unchecked(r * across + step * along) };
                        add_products(isa, isa.broadcast(number), &columns, sums);
                    }
                }
                for finished in kept[level - merged..level].iter().rev() {
                    for (sums, finished) in sums.iter_mut().zip(finished) {
                        for (sum, finished) in sums.iter_mut().zip(&finished.0[vector..vector + C]) {
                            *sum = isa.add(*sum, isa.load(finished));
                        }
                    }
                }
                for (sums, kept) in sums.iter().zip(&mut kept[level - merged]) {
                    for (sum, kept) in sums.iter().zip(&mut kept.0[vector..vector + C]) {
                        isa.store(*sum, kept);
                    }
                }
            }
        }
    }
}
