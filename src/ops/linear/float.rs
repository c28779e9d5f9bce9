//! The operands of [`blocks`] in float32: weights of every type widened, sums in chains of fused multiply-adds.

use super::blocks::{HEIGHT, Left, Line, Multiply, Order, Product, ROWS, Sizes, Steps, Strip, VECTORS, WIDTH};
use crate::ops::lanes::{Body, Element, Isa, Kernel, LANES, add_products, widen_part};
use crate::ops::parallel;
use crate::ops::storage::{Shared, written};

/// y = x W^T in the order of `dot`: `x` `[rows, k]`, `weight` `[columns, k]` to `[rows, columns]`.
pub(super) fn product<E: Element>(body: Body, x: &[f32], weight: &[E], sizes: Sizes) -> Vec<f32> {
    let Sizes { columns, k, .. } = sizes;
    assert!(x.len() == sizes.rows * k && weight.len() == columns * k);
    let product = Product { multiply: body, left: Left::Rows(x), sizes, order: Order::Lanes };
    let pack = |column: usize, panel: &mut [Line<f32>]| {
        let last = columns.min(column + WIDTH);
        body.run(Turn { weight: &weight[column * k..last * k], k, panel });
    };
    fresh(&product, pack)
}

/// a b in one chain a sum: `a` `[rows, k]`, `b` `[k, columns]` to `[rows, columns]`.
pub(super) fn outer_product<E: Element>(body: Body, a: &[f32], b: &[E], sizes: Sizes) -> Vec<f32> {
    assert!(a.len() == sizes.rows * sizes.k && b.len() == sizes.k * sizes.columns);
    let product = Product { multiply: body, left: Left::Rows(a), sizes, order: Order::Chain };
    fresh(&product, |column, panel| body.run(Widen { b, columns: sizes.columns, first: column, panel }))
}

/// c += aT b: `a` `[k, rows]`, `b` `[k, columns]`, `c` `[rows, columns]`.
pub(super) fn add_outer_product(body: Body, c: &mut [f32], a: &[f32], b: &[f32], sizes: Sizes) {
    let Sizes { rows, columns, k } = sizes;
    assert!(a.len() == rows * k && b.len() == k * columns && c.len() == rows * columns);
    let tiles = parallel::filled(rows * k, ROWS * k, |index, out: &mut [f32]| tiles(a, sizes, index * ROWS, out));
    let product = Product { multiply: body, left: Left::Tiles(&tiles), sizes, order: Order::Chain };
    add(&product, c, |column, panel| body.run(Widen { b, columns, first: column, panel }));
}

/// The result of `product` in memory of its own.
pub(super) fn fresh<M: Multiply>(
    product: &Product<'_, M>,
    pack: impl Fn(usize, &mut [Line<M::Number>]) + Sync,
) -> Vec<f32> {
    let Sizes { rows, columns, .. } = product.sizes;
    // SAFETY: every sum is handed out once, to one place of its own.
    #[allow(unsafe_code)]
    unsafe {
        written(rows * columns, |c| {
            product.compute(pack, |row, column, sums| c.write(row * columns + column, sums));
        })
    }
}

/// The result of `product` added to `c`.
pub(super) fn add<M: Multiply>(
    product: &Product<'_, M>,
    c: &mut [f32],
    pack: impl Fn(usize, &mut [Line<M::Number>]) + Sync,
) {
    let (columns, c) = (product.sizes.columns, &Shared::new(c));
    product.compute(pack, |row, column, sums| {
        // SAFETY: every sum is handed out once, so no other thread has this part.
        #[allow(unsafe_code)]
        let c = unsafe { c.part(row * columns + column, sums.len()) };
        c.iter_mut().zip(sums).for_each(|(c, sum)| *c += sum);
    });
}

/// The rows from `first` on of aT for `a` `[k, rows]`, to tiles `[k, HEIGHT]`, the last narrower.
fn tiles(a: &[f32], Sizes { rows, k, .. }: Sizes, first: usize, out: &mut [f32]) {
    let count = out.len() / k;
    for (step, row) in a.chunks_exact(rows).enumerate() {
        let (whole, rest) = row[first..first + count].as_chunks::<HEIGHT>();
        for (tile, numbers) in whole.iter().enumerate() {
            out[tile * HEIGHT * k + step * HEIGHT..][..HEIGHT].copy_from_slice(numbers);
        }
        out[whole.len() * HEIGHT * k + step * rest.len()..][..rest.len()].copy_from_slice(rest);
    }
}

/// Columns `[columns, k]` of a weight to a panel, in the order of [`Order::Lanes`].
struct Turn<'a, E> {
    weight: &'a [E],
    k: usize,
    panel: &'a mut [Line<f32>],
}

impl<E: Element> Kernel for Turn<'_, E> {
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

    fn advance<const R: usize>(self, steps: Steps<'_, f32>) {
        if self.is_wide() { self.run(Advance::<R, VECTORS>(steps)) } else { self.run(Advance::<R, 1>(steps)) }
    }
}

/// The steps of R rows, C vectors of each at a time.
struct Advance<'a, const R: usize, const C: usize>(Steps<'a, f32>);

impl<const R: usize, const C: usize> Kernel for Advance<'_, R, C> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Steps { left: Strip { numbers, across, along }, right, sums: kept, level, first, merged } = self.0;
        assert!(right.is_empty() || numbers.len() > (R - 1) * across + (right.len() - 1) * along);
        for vector in (0..VECTORS).step_by(C) {
            let mut sums = [[isa.splat(0.0); C]; R];
            if !first {
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
                    // SAFETY: below the last row and step, whose index is checked above.
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
