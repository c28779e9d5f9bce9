//! The arithmetic of attention rows: online softmax over tiles that start at absolute multiples of a constant.
//! A row's sums run over positions in order, so neither its neighbours nor the cut of its sequence can change a bit.

use crate::ops::lanes::{Body, Element, Isa, Kernel, LANES, add_products, store_part, widen_part};
use crate::ops::storage::Shared;
use std::ops::Range;

/// Positions of a tile. Part of the definition of the result: the softmax is rescaled at tile ends.
pub(super) const TILE: usize = 64;
/// Queries that go through the registers together.
const FEW: usize = 6;

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
    pub(super) fn seen(&self, position: usize) -> Range<usize> {
        let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        first..position + 1
    }
}

/// Keys and values of consecutive positions inside of one tile, `[head_dim]` each.
pub(super) struct Span<'a, E> {
    pub(super) keys: [&'a [E]; TILE],
    pub(super) values: [&'a [E]; TILE],
    end: usize,
}

impl<E> Default for Span<'_, E> {
    fn default() -> Self {
        Self { keys: [&[]; TILE], values: [&[]; TILE], end: 0 }
    }
}

impl<'a, E> Span<'a, E> {
    /// The next position.
    #[inline(always)]
    pub(super) fn push(&mut self, key: &'a [E], value: &'a [E]) {
        self.keys[self.end] = key;
        self.values[self.end] = value;
        self.end += 1;
    }
}

/// Pushes the keys and values of the positions of a range, in order.
pub(super) type Fetch<'a, 'kv, E> = &'a (dyn Fn(Range<usize>, &mut Span<'kv, E>) + 'a);

/// Consecutive tokens `rows` of one sequence, the first at `position`, with all query heads that read `kv_head`.
pub(super) struct Rows<'a, 'kv, E> {
    pub(super) body: Body,
    pub(super) shape: &'a Heads,
    /// `[T, heads, head_dim]`
    pub(super) q: &'a [f32],
    /// `[T, heads, head_dim]`
    pub(super) out: &'a Shared<'a, f32>,
    pub(super) rows: Range<usize>,
    pub(super) position: usize,
    pub(super) kv_head: usize,
    pub(super) fetch: Fetch<'a, 'kv, E>,
}

impl<'kv, E: Element> Rows<'_, 'kv, E> {
    /// Computes the rows and writes them.
    pub(super) fn compute(&self, state: &mut State) {
        self.begin(state);
        let mut span = Span::default();
        for (first, range) in self.tiles() {
            self.fetch_tile(first, range.clone(), &mut span);
            let head_dim = self.shape.head_dim;
            self.body.run(Turn { keys: &span.keys, range, head_dim, turned: &mut state.turned });
            for start in (0..state.queries.len()).step_by(FEW) {
                let group = start..state.queries.len().min(start + FEW);
                if self.body.is_wide() {
                    self.attend::<4>(state, group, &span.values, first);
                } else {
                    self.attend::<1>(state, group, &span.values, first);
                }
            }
        }
        self.finish(state);
    }

    /// The first position of every tile, and which of its positions any of the rows sees.
    pub(super) fn tiles(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let positions = self.shape.seen(self.position).start..self.position + self.rows.len();
        (positions.start / TILE..positions.end.div_ceil(TILE)).map(move |tile| {
            let first = tile * TILE;
            (first, positions.start.max(first) - first..positions.end.min(first + TILE) - first)
        })
    }

    /// Those positions of the tile that starts at `first`.
    pub(super) fn fetch_tile(&self, first: usize, range: Range<usize>, span: &mut Span<'kv, E>) {
        span.end = range.start;
        (self.fetch)(first + range.start..first + range.end, span);
    }

    /// What a query sees of the tile that starts at `first`.
    pub(super) fn seen_of(&self, query: &Query, first: usize) -> Range<usize> {
        let all = self.shape.seen(query.position);
        all.start.max(first) - first..all.end.clamp(first, first + TILE) - first
    }

    /// Writes the results.
    pub(super) fn finish(&self, state: &State) {
        for (query, sums) in state.queries.iter().zip(state.sums.chunks_exact(state.width)) {
            // SAFETY: a row and key head belong to one piece of work each, so no other thread has these elements.
            #[allow(unsafe_code)]
            let out = unsafe { self.out.cleared(query.start, self.shape.head_dim) };
            self.body.run(Divide { sums, weights: &query.weights, out });
        }
    }

    /// Makes `state` that of these rows at their start. Scores and keys of other pieces stay: what is read of them is written before.
    pub(super) fn begin(&self, state: &mut State) {
        let share = self.shape.heads / self.shape.kv_heads;
        let queries = self.rows.clone().enumerate().flat_map(|(index, row)| {
            (0..share).map(move |head| Query {
                start: (row * self.shape.heads + self.kv_head * share + head) * self.shape.head_dim,
                position: self.position + index,
                max: f32::NEG_INFINITY,
                weights: [0.0; LANES],
            })
        });
        state.queries.clear();
        state.queries.extend(queries);
        let count = state.queries.len();
        state.sums.clear();
        state.sums.resize(count * state.width, 0.0);
        state.scores.resize(count, [0.0; TILE]);
    }

    /// A few queries over the tile that starts at position `first`; C vectors at a time.
    fn attend<const C: usize>(&self, state: &mut State, group: Range<usize>, values: &[&[E]; TILE], first: usize) {
        let mut seen = [const { 0..0 }; FEW];
        for (seen, query) in seen.iter_mut().zip(&state.queries[group.clone()]) {
            *seen = self.seen_of(query, first);
        }
        let seen = &seen[..group.len()];
        if seen.iter().all(Range::is_empty) {
            return;
        }
        match group.len() {
            1 => self.score::<1, C>(state, group.start),
            2 => self.score::<2, C>(state, group.start),
            3 => self.score::<3, C>(state, group.start),
            4 => self.score::<4, C>(state, group.start),
            5 => self.score::<5, C>(state, group.start),
            _ => self.score::<FEW, C>(state, group.start),
        }
        self.body.run(Weigh {
            scores: &mut state.scores[group.clone()],
            seen,
            queries: &mut state.queries[group.clone()],
            sums: &mut state.sums[group.start * state.width..],
            width: state.width,
        });
        // What all of them see together, the rest one by one: no query multiplies a value it does not see, not even by zero.
        let common = seen.iter().fold(0..TILE, |common, seen| common.start.max(seen.start)..common.end.min(seen.end));
        if common.is_empty() {
            for (query, seen) in group.zip(seen) {
                self.add_values::<1, C>(state, query, values, seen.clone());
            }
            return;
        }
        for (query, seen) in group.clone().zip(seen).filter(|(_, seen)| seen.start < common.start) {
            self.add_values::<1, C>(state, query, values, seen.start..common.start);
        }
        match group.len() {
            1 => self.add_values::<1, C>(state, group.start, values, common.clone()),
            2 => self.add_values::<2, C>(state, group.start, values, common.clone()),
            3 => self.add_values::<3, C>(state, group.start, values, common.clone()),
            4 => self.add_values::<4, C>(state, group.start, values, common.clone()),
            5 => self.add_values::<5, C>(state, group.start, values, common.clone()),
            _ => self.add_values::<FEW, C>(state, group.start, values, common.clone()),
        }
        for (query, seen) in group.zip(seen).filter(|(_, seen)| seen.end > common.end) {
            self.add_values::<1, C>(state, query, values, common.end..seen.end);
        }
    }

    fn score<const R: usize, const C: usize>(&self, state: &mut State, first: usize) {
        let queries = std::array::from_fn(|r| &self.q[state.queries[first + r].start..][..self.shape.head_dim]);
        if let Some(scores) = state.scores[first..].first_chunk_mut() {
            self.body.run(Score::<R, C> { queries, keys: &state.turned, scores, scale: self.shape.scale });
        }
    }

    pub(super) fn add_values<const R: usize, const C: usize>(
        &self,
        state: &mut State,
        first: usize,
        values: &[&[E]; TILE],
        range: Range<usize>,
    ) {
        let sums = &mut state.sums[first * state.width..][..R * state.width];
        if let Some(weights) = state.scores[first..].first_chunk() {
            self.body.run(AddValues::<E, R, C> { weights, values, range, sums });
        }
    }
}

/// What the queries of a piece keep from tile to tile; a thread has one for all its pieces.
pub(super) struct State {
    /// head_dim rounded up to lanes.
    pub(super) width: usize,
    pub(super) queries: Vec<Query>,
    /// `[queries, width]`: sums of e^(score - max) * value.
    pub(super) sums: Vec<f32>,
    /// `[queries, TILE]`: scores of the current tile, then e^(score - max).
    pub(super) scores: Vec<[f32; TILE]>,
    /// `[width, TILE]`: keys of the current tile, turned.
    turned: Vec<[f32; TILE]>,
}

/// One head of one row.
pub(super) struct Query {
    /// Where it starts in `q`, and its result in `out`.
    pub(super) start: usize,
    /// Of its row in the sequence.
    position: usize,
    /// The largest score so far.
    max: f32,
    /// Sixteen partial sums of e^(score - max).
    weights: [f32; LANES],
}

impl State {
    /// For heads of `head_dim` numbers.
    pub(super) fn new(head_dim: usize) -> Self {
        let width = head_dim.next_multiple_of(LANES);
        let turned = vec![[0.0; TILE]; width];
        Self { width, queries: Vec::new(), sums: Vec::new(), scores: Vec::new(), turned }
    }
}

/// `turned[d][j]` = `keys[j][d]` for the positions j in `range`; rounded outwards to whole vectors, filled with zeros.
struct Turn<'a, E> {
    keys: &'a [&'a [E]; TILE],
    range: Range<usize>,
    head_dim: usize,
    turned: &'a mut [[f32; TILE]],
}

impl<E: Element> Kernel for Turn<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for j in (self.range.start / LANES * LANES..self.range.end).step_by(LANES) {
            for d in (0..self.head_dim).step_by(LANES) {
                let mut rows = [isa.splat(0.0); LANES];
                for (i, row) in rows.iter_mut().enumerate() {
                    if self.range.contains(&(j + i)) {
                        *row = widen_part(isa, &self.keys[j + i][d..]);
                    }
                }
                for (row, turned) in isa.transpose(rows).iter().zip(&mut self.turned[d..]) {
                    isa.store(*row, &mut turned.as_chunks_mut().0[j / LANES]);
                }
            }
        }
    }
}

/// `scores[r][j]` = scale * sum over d of `queries[r][d]` * `keys[d][j]`, each sum one chain in order of d.
struct Score<'a, const R: usize, const C: usize> {
    queries: [&'a [f32]; R],
    keys: &'a [[f32; TILE]],
    scores: &'a mut [[f32; TILE]; R],
    scale: f32,
}

impl<const R: usize, const C: usize> Kernel for Score<'_, R, C> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let len = self.queries[0].len();
        let queries = self.queries.map(|query| &query[..len]);
        for c in (0..TILE / LANES).step_by(C) {
            let mut sums = [[isa.splat(0.0); C]; R];
            for (d, key) in self.keys[..len].iter().enumerate() {
                let mut keys = [isa.splat(0.0); C];
                for (to, key) in keys.iter_mut().zip(&key.as_chunks().0[c..]) {
                    *to = isa.load(key);
                }
                for (query, sums) in queries.iter().zip(&mut sums) {
                    add_products(isa, isa.broadcast(query[d]), &keys, sums);
                }
            }
            for (sums, scores) in sums.iter().zip(&mut *self.scores) {
                for (sum, out) in sums.iter().zip(&mut scores.as_chunks_mut().0[c..]) {
                    isa.store(isa.mul(*sum, isa.splat(self.scale)), out);
                }
            }
        }
    }
}

/// Turns the scores of a few queries into weights e^(score - max), 0 where a position is not seen, and rescales what there is.
pub(super) struct Weigh<'a> {
    pub(super) scores: &'a mut [[f32; TILE]],
    pub(super) seen: &'a [Range<usize>],
    pub(super) queries: &'a mut [Query],
    /// `[queries, width]`
    pub(super) sums: &'a mut [f32],
    pub(super) width: usize,
}

impl Kernel for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for (i, (seen, query)) in self.seen.iter().zip(self.queries).enumerate() {
            if seen.is_empty() {
                continue;
            }
            let scores = &mut self.scores[i];
            // Mostly all is seen, and even a call to fill nothing takes its time.
            if seen.len() < TILE {
                scores[..seen.start].fill(f32::NEG_INFINITY);
                scores[seen.end..].fill(f32::NEG_INFINITY);
            }
            let scores = scores.as_chunks_mut().0;
            let old = query.max;
            let max = largest(isa, scores, old);
            query.max = max;
            let mut weight = isa.load(&query.weights);
            // Where max stays the same the factor is exactly 1.
            if max != old {
                let shrink = isa.exp(isa.splat(old - max));
                weight = isa.mul(weight, shrink);
                for sum in self.sums[i * self.width..][..self.width].as_chunks_mut().0 {
                    isa.store(isa.mul(isa.load(sum), shrink), sum);
                }
            }
            for scores in scores {
                let e = isa.exp(isa.sub(isa.load(scores), isa.splat(max)));
                isa.store(e, scores);
                weight = isa.add(weight, e);
            }
            isa.store(weight, &mut query.weights);
        }
    }
}

/// The largest of `old` and all scores.
#[inline(always)]
fn largest<I: Isa>(isa: I, scores: &[[f32; LANES]], old: f32) -> f32 {
    let mut top = isa.splat(old);
    for scores in scores {
        top = isa.max(top, isa.load(scores));
    }
    let mut lanes = [0.0; LANES];
    isa.store(top, &mut lanes);
    // Halves onto halves: a chain of sixteen would take longer than all else here.
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = if lanes[i] > lanes[i + half] { lanes[i] } else { lanes[i + half] };
        }
        half /= 2;
    }
    lanes[0]
}

/// `sums[r][d]` += `weights[r][j]` * `values[j][d]` for the positions j in `range`, in order.
struct AddValues<'a, E, const R: usize, const C: usize> {
    weights: &'a [[f32; TILE]; R],
    values: &'a [&'a [E]; TILE],
    range: Range<usize>,
    /// `[R, width]`
    sums: &'a mut [f32],
}

impl<E: Element, const R: usize, const C: usize> Kernel for AddValues<'_, E, R, C> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        // Nothing is seen of the tile where the range is empty, which may end before it starts.
        let Some([row, ..]) = self.values.get(self.range.clone()) else { return };
        let (head_dim, width) = (row.len(), self.sums.len() / R);
        let mut d = 0;
        while d < width {
            if d + C * LANES <= head_dim {
                self.columns::<I, C>(isa, d, width);
                d += C * LANES;
            } else if d + LANES <= head_dim {
                self.columns::<I, 1>(isa, d, width);
                d += LANES;
            } else {
                self.last(isa, d, width);
                d += LANES;
            }
        }
    }
}

impl<E: Element, const R: usize, const C: usize> AddValues<'_, E, R, C> {
    /// N vectors from `d` on. Nothing else may be in the loop: the sums would live in memory.
    #[inline(always)]
    fn columns<I: Isa, const N: usize>(&mut self, isa: I, d: usize, width: usize) {
        let mut totals = self.totals::<I, N>(isa, d, width);
        for j in self.range.clone() {
            let row = &self.values[j][d..d + N * LANES];
            let mut value = [isa.splat(0.0); N];
            for (value, part) in value.iter_mut().zip(row.as_chunks().0) {
                *value = E::widen(isa, part);
            }
            for (totals, weights) in totals.iter_mut().zip(self.weights) {
                add_products(isa, isa.broadcast(weights[j]), &value, totals);
            }
        }
        self.keep(isa, d, width, &totals);
    }

    /// The end from `d` on of a head_dim that is no multiple of the lanes.
    #[inline(always)]
    fn last<I: Isa>(&mut self, isa: I, d: usize, width: usize) {
        let mut totals = self.totals::<I, 1>(isa, d, width);
        for j in self.range.clone() {
            let value = [widen_part(isa, &self.values[j][d..])];
            for (totals, weights) in totals.iter_mut().zip(self.weights) {
                add_products(isa, isa.broadcast(weights[j]), &value, totals);
            }
        }
        self.keep(isa, d, width, &totals);
    }

    #[inline(always)]
    fn totals<I: Isa, const N: usize>(&self, isa: I, d: usize, width: usize) -> [[I::V; N]; R] {
        let mut totals = [[isa.splat(0.0); N]; R];
        for (totals, sums) in totals.iter_mut().zip(self.sums.chunks_exact(width)) {
            for (total, sum) in totals.iter_mut().zip(sums[d..].as_chunks().0) {
                *total = isa.load(sum);
            }
        }
        totals
    }

    #[inline(always)]
    fn keep<I: Isa, const N: usize>(&mut self, isa: I, d: usize, width: usize, totals: &[[I::V; N]; R]) {
        for (totals, sums) in totals.iter().zip(self.sums.chunks_exact_mut(width)) {
            for (total, sum) in totals.iter().zip(sums[d..].as_chunks_mut().0) {
                isa.store(*total, sum);
            }
        }
    }
}

/// `out[d]` = `sums[d]` times the reciprocal of the sum of all weights.
struct Divide<'a> {
    sums: &'a [f32],
    weights: &'a [f32; LANES],
    out: &'a mut [f32],
}

impl Kernel for Divide<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let inverse = isa.splat(1.0 / isa.sum(isa.load(self.weights)));
        for (sums, out) in self.sums.as_chunks().0.iter().zip(self.out.chunks_mut(LANES)) {
            store_part(isa, isa.mul(isa.load(sums), inverse), out);
        }
    }
}
