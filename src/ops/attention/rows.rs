//! The arithmetic of attention rows: online softmax over tiles that start at absolute multiples of a constant.
//! A row's sums run over positions in order, so neither its neighbours nor the cut of its sequence can change a bit.

use crate::ops::lanes::{Isa, Kernel, LANES, widen_tail};
use crate::ops::storage::Shared;
use std::ops::Range;

/// Positions of a tile. Part of the definition of the result: the softmax is rescaled at tile ends.
pub(super) const TILE: usize = 64;

/// What all rows share.
pub(super) struct Heads {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) window: Option<usize>,
    pub(super) scale: f32,
}

impl Heads {
    /// The positions that `position` sees.
    fn seen(&self, position: usize) -> Range<usize> {
        let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        first..position + 1
    }
}

/// Keys and values of consecutive positions inside of one tile, `[head_dim]` each.
pub(super) struct Span<'a> {
    keys: [&'a [f32]; TILE],
    values: [&'a [f32]; TILE],
    end: usize,
}

impl<'a> Span<'a> {
    /// The next position.
    #[inline(always)]
    pub(super) fn push(&mut self, key: &'a [f32], value: &'a [f32]) {
        self.keys[self.end] = key;
        self.values[self.end] = value;
        self.end += 1;
    }
}

/// Consecutive tokens `rows` of one sequence, the first at `position`, with all query heads that read `kv_head`.
pub(super) struct Rows<'a, F> {
    pub(super) shape: &'a Heads,
    /// `[T, heads, head_dim]`
    pub(super) q: &'a [f32],
    /// `[T, heads, head_dim]`
    pub(super) out: &'a Shared<'a, f32>,
    pub(super) rows: Range<usize>,
    pub(super) position: usize,
    pub(super) kv_head: usize,
    /// Pushes the keys and values of some positions.
    pub(super) fetch: F,
}

/// What a query keeps from tile to tile.
struct State {
    /// `[queries, head_dim rounded up to lanes]`: sums of e^(score - max) * value.
    sums: Vec<f32>,
    /// `[queries]`: sixteen partial sums of e^(score - max).
    weights: Vec<[f32; LANES]>,
    /// `[queries]`: the largest score so far.
    max: Vec<f32>,
    /// `[queries, TILE]`: scores of the current tile, then e^(score - max).
    scores: Vec<[f32; TILE]>,
    /// `[head_dim rounded up, TILE]`: keys of the current tile, turned.
    turned: Vec<[f32; TILE]>,
    /// Queries in the order the kernels read them: for every few of them, `[head_dim, few]`.
    queries: Vec<f32>,
}

impl<'a, F: Fn(Range<usize>, &mut Span<'a>)> Kernel for Rows<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let head_dim = self.shape.head_dim;
        let share = self.shape.heads / self.shape.kv_heads;
        let count = self.rows.len() * share;
        let few = if I::WIDE { 6 } else { 2 };
        let mut state = self.start(few);
        let mut span = Span { keys: [&[]; TILE], values: [&[]; TILE], end: 0 };
        let positions = self.shape.seen(self.position).start..self.position + self.rows.len();
        for tile in positions.start / TILE..positions.end.div_ceil(TILE) {
            let first = tile * TILE;
            let fetched = positions.start.max(first)..positions.end.min(first + TILE);
            span.end = fetched.start - first;
            (self.fetch)(fetched.clone(), &mut span);
            turn(isa, &span.keys, fetched.start - first..fetched.end - first, &mut state.turned, head_dim);
            for start in (0..count).step_by(few) {
                let group = start..count.min(start + few);
                let seen = |query: usize| {
                    let seen = self.shape.seen(self.position + query / share);
                    seen.start.max(first) - first..seen.end.clamp(first, first + TILE) - first
                };
                state.scores(isa, group.clone(), head_dim, self.shape.scale);
                group.clone().for_each(|query| state.weigh(isa, query, seen(query)));
                if group.clone().all(|query| seen(query) == (0..TILE)) {
                    state.add_values(isa, group, &span.values, 0..TILE);
                } else {
                    // One by one, so that no query multiplies a value it does not see, not even by zero.
                    group.for_each(|query| state.add_values(isa, query..query + 1, &span.values, seen(query)));
                }
            }
        }
        for query in 0..count {
            let head = self.kv_head * share + query % share;
            let at = ((self.rows.start + query / share) * self.shape.heads + head) * head_dim;
            // SAFETY: a row and key head belong to one piece of work each, so no other thread has these elements.
            #[allow(unsafe_code)]
            let out = unsafe { self.out.part(at, head_dim) };
            state.finish(isa, query, out);
        }
    }
}

impl<F> Rows<'_, F> {
    fn start(&self, few: usize) -> State {
        let head_dim = self.shape.head_dim;
        let share = self.shape.heads / self.shape.kv_heads;
        let count = self.rows.len() * share;
        let padded = head_dim.next_multiple_of(LANES);
        let mut queries = vec![0.0; count * head_dim];
        for (index, group) in queries.chunks_mut(few * head_dim).enumerate() {
            let size = group.len() / head_dim;
            for i in 0..size {
                let query = index * few + i;
                let head = self.kv_head * share + query % share;
                let q = &self.q[((self.rows.start + query / share) * self.shape.heads + head) * head_dim..][..head_dim];
                group.iter_mut().skip(i).step_by(size).zip(q).for_each(|(out, q)| *out = *q);
            }
        }
        State {
            sums: vec![0.0; count * padded],
            weights: vec![[0.0; LANES]; count],
            max: vec![f32::NEG_INFINITY; count],
            scores: vec![[0.0; TILE]; count],
            turned: vec![[0.0; TILE]; padded],
            queries,
        }
    }
}

/// `turned[d][j]` = `keys[j][d]` for the positions j in `range`; rounded outwards to whole vectors, filled with zeros.
#[inline(always)]
fn turn<I: Isa>(isa: I, keys: &[&[f32]; TILE], range: Range<usize>, turned: &mut [[f32; TILE]], head_dim: usize) {
    for j in (range.start / LANES * LANES..range.end).step_by(LANES) {
        for d in (0..head_dim).step_by(LANES) {
            let mut rows = [isa.splat(0.0); LANES];
            for (i, row) in rows.iter_mut().enumerate() {
                if range.contains(&(j + i)) {
                    *row = load_part(isa, keys[j + i], d);
                }
            }
            for (row, turned) in isa.transpose(rows).iter().zip(&mut turned[d..]) {
                isa.store(*row, &mut turned.as_chunks_mut().0[j / LANES]);
            }
        }
    }
}

/// Sixteen elements from `at` on, zeros after the end of `row`.
#[inline(always)]
fn load_part<I: Isa>(isa: I, row: &[f32], at: usize) -> I::V {
    match row[at..].first_chunk() {
        Some(full) => isa.load(full),
        None => widen_tail(isa, &row[at..]),
    }
}

impl State {
    /// Scaled scores of a few queries with every position of the tile: chains over head_dim, one position a lane.
    #[inline(always)]
    fn scores<I: Isa>(&mut self, isa: I, group: Range<usize>, head_dim: usize, scale: f32) {
        let queries = &self.queries[group.start * head_dim..group.end * head_dim];
        let scores = &mut self.scores[group.clone()];
        let keys = &self.turned;
        match (I::WIDE, group.len()) {
            (true, 1) => score::<I, 1, 4>(isa, queries, keys, scores, scale),
            (true, 2) => score::<I, 2, 4>(isa, queries, keys, scores, scale),
            (true, 3) => score::<I, 3, 4>(isa, queries, keys, scores, scale),
            (true, 4) => score::<I, 4, 4>(isa, queries, keys, scores, scale),
            (true, 5) => score::<I, 5, 4>(isa, queries, keys, scores, scale),
            (true, _) => score::<I, 6, 4>(isa, queries, keys, scores, scale),
            (false, 1) => score::<I, 1, 2>(isa, queries, keys, scores, scale),
            (false, _) => score::<I, 2, 2>(isa, queries, keys, scores, scale),
        }
    }

    /// Turns the scores of one query into weights e^(score - max), where it sees the position, and rescales what it has.
    #[inline(always)]
    fn weigh<I: Isa>(&mut self, isa: I, query: usize, seen: Range<usize>) {
        if seen.is_empty() {
            return;
        }
        let scores = &mut self.scores[query];
        scores[..seen.start].fill(f32::NEG_INFINITY);
        scores[seen.end..].fill(f32::NEG_INFINITY);
        let old = self.max[query];
        let scores = scores.as_chunks_mut::<LANES>().0;
        let mut top = isa.splat(old);
        for scores in &*scores {
            top = isa.max(top, isa.load(scores));
        }
        let mut lanes = [0.0; LANES];
        isa.store(top, &mut lanes);
        let max = lanes.into_iter().fold(old, |a, b| if a > b { a } else { b });
        self.max[query] = max;
        let sums = self.sums.as_chunks_mut::<LANES>().0;
        let width = sums.len() / self.max.len();
        let sums = &mut sums[query * width..][..width];
        let mut weight = isa.load(&self.weights[query]);
        // Where max stays the same the factor is exactly 1.
        if max != old {
            let shrink = isa.exp(isa.splat(old - max));
            for sum in sums {
                isa.store(isa.mul(isa.load(sum), shrink), sum);
            }
            weight = isa.mul(weight, shrink);
        }
        for scores in scores {
            let e = isa.exp(isa.sub(isa.load(scores), isa.splat(max)));
            isa.store(e, scores);
            weight = isa.add(weight, e);
        }
        isa.store(weight, &mut self.weights[query]);
    }

    /// Adds weight * value of the positions in `range` to the sums of a few queries.
    #[inline(always)]
    fn add_values<I: Isa>(&mut self, isa: I, group: Range<usize>, values: &[&[f32]; TILE], range: Range<usize>) {
        let width = self.sums.len() / self.max.len();
        let sums = &mut self.sums[group.start * width..group.end * width];
        let weights = &self.scores[group.clone()];
        match (I::WIDE, group.len()) {
            (true, 1) => add_values::<I, 1, 4>(isa, weights, values, range, sums),
            (true, 2) => add_values::<I, 2, 4>(isa, weights, values, range, sums),
            (true, 3) => add_values::<I, 3, 4>(isa, weights, values, range, sums),
            (true, 4) => add_values::<I, 4, 4>(isa, weights, values, range, sums),
            (true, 5) => add_values::<I, 5, 4>(isa, weights, values, range, sums),
            (true, _) => add_values::<I, 6, 4>(isa, weights, values, range, sums),
            (false, 1) => add_values::<I, 1, 2>(isa, weights, values, range, sums),
            (false, _) => add_values::<I, 2, 2>(isa, weights, values, range, sums),
        }
    }

    /// The result of one query: the weighted values over the sum of the weights.
    #[inline(always)]
    fn finish<I: Isa>(&self, isa: I, query: usize, out: &mut [f32]) {
        let inverse = 1.0 / isa.sum(isa.load(&self.weights[query]));
        let width = self.sums.len() / self.max.len();
        let sums = &self.sums[query * width..];
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum * inverse);
    }
}

/// `scores[r][j]` = scale * sum over d of `queries[d][r]` * `keys[d][j]`, C vectors of j at a time.
#[inline(always)]
fn score<I: Isa, const R: usize, const C: usize>(
    isa: I,
    queries: &[f32],
    keys: &[[f32; TILE]],
    scores: &mut [[f32; TILE]],
    scale: f32,
) {
    for c in (0..TILE / LANES).step_by(C) {
        let mut sums = [[isa.splat(0.0); C]; R];
        for (q, k) in queries.as_chunks::<R>().0.iter().zip(keys) {
            let mut key = [isa.splat(0.0); C];
            for (key, k) in key.iter_mut().zip(&k.as_chunks().0[c..]) {
                *key = isa.load(k);
            }
            for (sums, q) in sums.iter_mut().zip(q) {
                add_products(isa, isa.splat(*q), &key, sums);
            }
        }
        for (sums, scores) in sums.iter().zip(&mut *scores) {
            for (sum, out) in sums.iter().zip(&mut scores.as_chunks_mut().0[c..]) {
                isa.store(isa.mul(*sum, isa.splat(scale)), out);
            }
        }
    }
}

/// sum + a * b for every vector of `b`.
#[inline(always)]
fn add_products<I: Isa, const C: usize>(isa: I, a: I::V, b: &[I::V; C], sums: &mut [I::V; C]) {
    for (sum, b) in sums.iter_mut().zip(b) {
        *sum = isa.fma(a, *b, *sum);
    }
}

/// `sums[r][d]` += `weights[r][j]` * `values[j][d]` in order of j, C vectors of d at a time.
#[inline(always)]
fn add_values<I: Isa, const R: usize, const C: usize>(
    isa: I,
    weights: &[[f32; TILE]],
    values: &[&[f32]; TILE],
    range: Range<usize>,
    sums: &mut [f32],
) {
    let width = sums.len() / R;
    let mut d = 0;
    while d < width {
        if d + C * LANES <= width {
            add_columns::<I, R, C>(isa, weights, values, range.clone(), sums, d);
            d += C * LANES;
        } else {
            add_columns::<I, R, 1>(isa, weights, values, range.clone(), sums, d);
            d += LANES;
        }
    }
}

#[inline(always)]
fn add_columns<I: Isa, const R: usize, const C: usize>(
    isa: I,
    weights: &[[f32; TILE]],
    values: &[&[f32]; TILE],
    range: Range<usize>,
    sums: &mut [f32],
    d: usize,
) {
    let width = sums.len() / R;
    let weights: &[[f32; TILE]; R] = match weights.first_chunk() {
        Some(weights) => weights,
        None => return,
    };
    let mut totals = [[isa.splat(0.0); C]; R];
    for (r, totals) in totals.iter_mut().enumerate() {
        for (total, sum) in totals.iter_mut().zip(sums[r * width + d..].as_chunks().0) {
            *total = isa.load(sum);
        }
    }
    for j in range {
        let row = &values[j][d..];
        let mut value = [isa.splat(0.0); C];
        if let Some(full) = row.get(..C * LANES) {
            for (value, full) in value.iter_mut().zip(full.as_chunks().0) {
                *value = isa.load(full);
            }
        } else {
            // The end of a head_dim that is no multiple of the lanes.
            for (c, value) in value.iter_mut().enumerate() {
                *value = load_part(isa, row, c * LANES);
            }
        }
        for (totals, weights) in totals.iter_mut().zip(weights) {
            add_products(isa, isa.splat(weights[j]), &value, totals);
        }
    }
    for (r, totals) in totals.iter().enumerate() {
        let row = &mut sums[r * width + d..][..C * LANES];
        for (total, out) in totals.iter().zip(row.as_chunks_mut().0) {
            isa.store(*total, out);
        }
    }
}
