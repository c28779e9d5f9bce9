//! The gradients of packed attention: the weights are computed again, the rows of one segment and key head by one thread.
//! With P = softmax(S) and dP = dO V^T: dV = P^T dO, dS = P (dP - sum(P dP)), dQ = scale dS K, dK = scale dS^T Q.

use super::rows::Heads;
use crate::ops::lanes::{Body, Isa, Kernel, LANES, add_products, store_part, widen_part};
use std::ops::Range;

/// Queries and positions of a square tile of weights.
const TILE: usize = 64;
/// Rows that go through the registers together.
const HEIGHT: usize = 4;

/// Row-major numbers whose rows start `stride` apart.
#[derive(Clone, Copy)]
struct Rows<'a> {
    all: &'a [f32],
    stride: usize,
}

/// The left operand of a product as it lies: that of row r at step s is `all[r * across + s * along]`.
#[derive(Clone, Copy)]
struct Strip<'a> {
    all: &'a [f32],
    across: usize,
    along: usize,
}

impl<'a> Rows<'a> {
    /// These rows are those of the product.
    fn by_row(self) -> Strip<'a> {
        Strip { all: self.all, across: self.stride, along: 1 }
    }

    /// These rows are its steps.
    fn by_step(self) -> Strip<'a> {
        Strip { all: self.all, across: 1, along: self.stride }
    }
}

/// What one segment and key head read and give: `[len, share, head_dim]` queries and output gradients, `[len, head_dim]` the rest.
pub(super) struct Segment<'a> {
    pub(super) body: Body,
    pub(super) shape: &'a Heads,
    pub(super) len: usize,
    /// Copies the query `(row, head of the group)` or its output gradient.
    pub(super) q: &'a dyn Fn(usize, usize) -> &'a [f32],
    pub(super) dout: &'a dyn Fn(usize, usize) -> &'a [f32],
    pub(super) k: &'a dyn Fn(usize) -> &'a [f32],
    pub(super) v: &'a dyn Fn(usize) -> &'a [f32],
}

/// The gradients of one segment and key head, rows padded to `width` and their number to whole tiles.
pub(super) struct Gradients {
    pub(super) width: usize,
    /// `[share][len, width]`
    pub(super) dq: Vec<Vec<f32>>,
    /// `[len, width]`
    pub(super) dk: Vec<f32>,
    /// `[len, width]`
    pub(super) dv: Vec<f32>,
}

impl Segment<'_> {
    pub(super) fn gradients(&self) -> Gradients {
        let Self { body, shape, len, .. } = *self;
        let width = shape.head_dim.next_multiple_of(LANES);
        let padded = len.next_multiple_of(TILE);
        let share = shape.heads / shape.kv_heads;
        let k = gather(len, width, self.k);
        let v = gather(len, width, self.v);
        let [kt, vt] = [&k, &v].map(|x| body.run(Turn { x, width }));
        let (dk, dv) = (vec![0.0; padded * width], vec![0.0; padded * width]);
        let mut out = Gradients { width, dq: Vec::with_capacity(share), dk, dv };
        for head in 0..share {
            let q = gather(len, width, &|row| (self.q)(row, head));
            let dout = gather(len, width, &|row| (self.dout)(row, head));
            let mut dq = vec![0.0; padded * width];
            for first in (0..len).step_by(TILE) {
                let tile = QueryTile { body, shape, len, width, first, q: &q, dout: &dout, k: &k, kt: &kt, vt: &vt };
                tile.add_to(&mut dq[first * width..][..TILE * width], &mut out.dk, &mut out.dv);
            }
            out.dq.push(dq);
        }
        out
    }
}

/// `[len, head_dim]` to `[whole tiles, width]`, padded with zeros.
fn gather<'a>(len: usize, width: usize, row: &dyn Fn(usize) -> &'a [f32]) -> Vec<f32> {
    let mut out = vec![0.0; len.next_multiple_of(TILE) * width];
    for (index, out) in out.chunks_exact_mut(width).take(len).enumerate() {
        let row = row(index);
        out[..row.len()].copy_from_slice(row);
    }
    out
}

/// `[rows, width]` to `[width, rows]`, both whole lanes.
struct Turn<'a> {
    x: &'a [f32],
    width: usize,
}

impl Kernel for Turn<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> Vec<f32> {
        let Self { x, width } = self;
        let rows = x.len() / width;
        let mut out = vec![0.0; x.len()];
        for row in (0..rows).step_by(LANES) {
            for column in (0..width).step_by(LANES) {
                let mut block = [isa.splat(0.0); LANES];
                for (i, lanes) in block.iter_mut().enumerate() {
                    *lanes = widen_part(isa, &x[(row + i) * width + column..]);
                }
                for (i, lanes) in isa.transpose(block).iter().enumerate() {
                    store_part(isa, *lanes, &mut out[(column + i) * rows + row..]);
                }
            }
        }
        out
    }
}

/// Some queries of one head.
struct QueryTile<'a> {
    body: Body,
    shape: &'a Heads,
    len: usize,
    width: usize,
    /// Position of the first query.
    first: usize,
    /// `[len, width]`
    q: &'a [f32],
    dout: &'a [f32],
    k: &'a [f32],
    /// `[width, len]`
    kt: &'a [f32],
    vt: &'a [f32],
}

impl QueryTile<'_> {
    /// Adds what these queries give to `dq` `[TILE, width]`, `dk` and `dv` `[len, width]`.
    fn add_to(&self, dq: &mut [f32], dk: &mut [f32], dv: &mut [f32]) {
        let (width, body, scale) = (self.width, self.body, self.shape.scale);
        let rows = TILE.min(self.len - self.first);
        let start = self.shape.seen(self.first).start / TILE * TILE;
        let span = (self.first + TILE) - start;
        let mut weights = self.product(self.rows(self.q), self.kt, start, span);
        for row in 0..rows {
            let seen = self.seen(row, start);
            body.run(Softmax { scores: &mut weights[row * span..][..span], seen, scale });
        }
        weights[rows * span..].fill(0.0);
        let mut slopes = self.product(self.rows(self.dout), self.vt, start, span);
        for row in 0..rows {
            let (weights, slopes) = (&weights[row * span..][..span], &mut slopes[row * span..][..span]);
            body.run(Slopes { weights, slopes, scale });
        }
        slopes[rows * span..].fill(0.0);
        for tile in (0..span).step_by(TILE) {
            let out = (start + tile) * width..(start + tile + TILE) * width;
            let left = |all| Rows { all, stride: span }.by_step();
            self.add_product(&mut dv[out.clone()], left(&weights[tile..]), self.rows(self.dout), TILE);
            self.add_product(&mut dk[out], left(&slopes[tile..]), self.rows(self.q), TILE);
        }
        let slopes = Rows { all: &slopes, stride: span }.by_row();
        self.add_product(dq, slopes, Rows { all: &self.k[start * width..], stride: width }, span);
    }

    /// Those of these queries of `all` `[len, width]`.
    fn rows<'a>(&self, all: &'a [f32]) -> Rows<'a> {
        Rows { all: &all[self.first * self.width..][..TILE * self.width], stride: self.width }
    }

    /// Positions of the span from `start` on that query `row` sees.
    fn seen(&self, row: usize, start: usize) -> Range<usize> {
        let seen = self.shape.seen(self.first + row);
        seen.start - start..seen.end - start
    }

    /// `[TILE, span]`: the products of `left` `[TILE, width]` with the columns from `start` on of `right` `[width, len]`.
    fn product(&self, left: Rows<'_>, right: &[f32], start: usize, span: usize) -> Vec<f32> {
        let mut out = vec![0.0; TILE * span];
        let right = Rows { all: &right[start..], stride: right.len() / self.width };
        add_product(self.body, &mut out, span, left.by_row(), right, self.width);
        out
    }

    /// `out` `[TILE, width]` += the product over `steps` rows of `right`.
    fn add_product(&self, out: &mut [f32], left: Strip<'_>, right: Rows<'_>, steps: usize) {
        add_product(self.body, out, self.width, left, right, steps);
    }
}

/// `out` `[TILE, columns]` += the product of TILE rows of `left` and the first `steps` rows of `right`.
fn add_product(body: Body, out: &mut [f32], columns: usize, left: Strip<'_>, right: Rows<'_>, steps: usize) {
    for row in (0..TILE).step_by(HEIGHT) {
        let mut column = 0;
        while column < columns {
            let at = Tile { out: &mut *out, row, column, columns, left, right, steps };
            column += LANES
                * match (columns - column) / LANES {
                    4.. if body.is_wide() => body.run(at.of::<4>()),
                    2.. if body.is_wide() => body.run(at.of::<2>()),
                    _ => body.run(at.of::<1>()),
                };
        }
    }
}

/// HEIGHT rows of the result from `row` on, some vectors from `column` on.
struct Tile<'a> {
    out: &'a mut [f32],
    row: usize,
    column: usize,
    columns: usize,
    left: Strip<'a>,
    right: Rows<'a>,
    steps: usize,
}

impl<'a> Tile<'a> {
    fn of<const C: usize>(self) -> Sized<'a, C> {
        Sized(self)
    }
}

/// A tile of C vectors; runs to C.
struct Sized<'a, const C: usize>(Tile<'a>);

impl<const C: usize> Kernel for Sized<'_, C> {
    type Output = usize;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> usize {
        let Tile { out, row, column, columns, left, right, steps } = self.0;
        let mut sums = [[isa.splat(0.0); C]; HEIGHT];
        for (r, sums) in sums.iter_mut().enumerate() {
            let kept = out[(row + r) * columns + column..][..C * LANES].as_chunks().0;
            sums.iter_mut().zip(kept).for_each(|(sum, kept)| *sum = isa.load(kept));
        }
        let strips: [&[f32]; HEIGHT] = std::array::from_fn(|r| &left.all[(row + r) * left.across..]);
        for step in 0..steps {
            let mut vectors = [isa.splat(0.0); C];
            let b = right.all[step * right.stride + column..][..C * LANES].as_chunks().0;
            vectors.iter_mut().zip(b).for_each(|(vector, b)| *vector = isa.load(b));
            for (strip, sums) in strips.iter().zip(&mut sums) {
                add_products(isa, isa.broadcast(strip[step * left.along]), &vectors, sums);
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let kept = out[(row + r) * columns + column..][..C * LANES].as_chunks_mut().0;
            sums.iter().zip(kept).for_each(|(sum, kept)| isa.store(*sum, kept));
        }
        C
    }
}

/// Scores, not yet scaled, to weights; zeros where nothing is seen.
struct Softmax<'a> {
    scores: &'a mut [f32],
    seen: Range<usize>,
    scale: f32,
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { scores, seen, scale } = self;
        scores[..seen.start].fill(f32::NEG_INFINITY);
        scores[seen.end..].fill(f32::NEG_INFINITY);
        let scores = scores.as_chunks_mut::<LANES>().0;
        let mut max = isa.splat(f32::NEG_INFINITY);
        for scores in scores.iter_mut() {
            let scaled = isa.mul(isa.load(scores), isa.splat(scale));
            isa.store(scaled, scores);
            max = isa.max(max, scaled);
        }
        let mut lanes = [0.0; LANES];
        isa.store(max, &mut lanes);
        let max = isa.splat(lanes.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b)));
        let mut sum = isa.splat(0.0);
        for scores in scores.iter_mut() {
            let weight = isa.exp(isa.sub(isa.load(scores), max));
            isa.store(weight, scores);
            sum = isa.add(sum, weight);
        }
        let inverse = isa.splat(1.0 / isa.sum(sum));
        for scores in scores.iter_mut() {
            isa.store(isa.mul(isa.load(scores), inverse), scores);
        }
    }
}

/// The gradient of the weights to that of the scores before they were scaled.
struct Slopes<'a> {
    weights: &'a [f32],
    slopes: &'a mut [f32],
    scale: f32,
}

impl Kernel for Slopes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let weights = self.weights.as_chunks::<LANES>().0;
        let slopes = self.slopes.as_chunks_mut::<LANES>().0;
        let mut sum = isa.splat(0.0);
        for (weights, slopes) in weights.iter().zip(slopes.iter()) {
            sum = isa.fma(isa.load(weights), isa.load(slopes), sum);
        }
        let mean = isa.splat(isa.sum(sum));
        let scale = isa.splat(self.scale);
        for (weights, slopes) in weights.iter().zip(slopes) {
            let centred = isa.sub(isa.load(slopes), mean);
            isa.store(isa.mul(isa.mul(isa.load(weights), centred), scale), slopes);
        }
    }
}
