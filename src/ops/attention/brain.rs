//! Attention rows over keys and values of bf16, multiplied in the processor's matrix unit: queries and weights are rounded, scores, softmax
//! and sums stay in float32. As in `rows`, nothing depends on how a sequence is cut or on what is computed beside it.

use super::rows::{Rows, Span, State, TILE, Weigh};
use crate::ops::lanes::{Isa, Kernel, LANES, store_part, widen_part};
use crate::ops::linear::small::{COLUMNS, Panel, Small, Stored, Strips};
use half::bf16;
use std::ops::Range;

/// What a thread multiplies.
#[derive(Default)]
pub(super) struct Operands {
    /// `[queries, head_dim]`: scaled.
    scaled: Vec<f32>,
    queries: Strips,
    weights: Strips,
    keys: Panel,
    /// `[head_dim / COLUMNS]`
    values: Vec<Panel>,
    /// `[queries, COLUMNS]`
    products: Vec<f32>,
    /// Of the current tile, what each query sees.
    seen: Vec<Range<usize>>,
}

impl Rows<'_, '_, bf16> {
    /// Computes the rows and writes them.
    pub(super) fn compute_in_bf16(&self, small: Small, state: &mut State, operands: &mut Operands) {
        self.begin(state);
        let (count, head_dim) = (state.queries.len(), self.shape.head_dim);
        let whole = Small::whole(count);
        state.scores.resize(whole, [0.0; TILE]);
        operands.products.resize(whole * COLUMNS, 0.0);
        operands.values.resize_with(head_dim.div_ceil(COLUMNS), Panel::default);
        operands.scaled.resize(count * head_dim, 0.0);
        for (query, to) in state.queries.iter().zip(operands.scaled.chunks_exact_mut(head_dim)) {
            self.body.run(Scale { from: &self.q[query.start..][..head_dim], scale: self.shape.scale, to });
        }
        small.left(&operands.scaled, head_dim, &mut operands.queries);
        let multiplier = small.multiplier(count);
        let mut span = Span::default();
        for (first, range) in self.tiles() {
            self.fetch_tile(first, range.clone(), &mut span);
            let stored = |rows| Stored { rows, range: (range.start, range.end) };
            small.turned(stored(&span.keys), head_dim, &mut operands.keys);
            multiplier.multiply(&operands.queries, &operands.keys, state.scores.as_flattened_mut());
            operands.seen.clear();
            operands.seen.extend(state.queries.iter().map(|query| self.seen_of(query, first)));
            self.body.run(Weigh {
                scores: &mut state.scores[..count],
                seen: &operands.seen,
                queries: &mut state.queries,
                sums: &mut state.sums,
                width: state.width,
            });
            for (scores, _) in state.scores.iter_mut().zip(&operands.seen).filter(|(_, seen)| seen.is_empty()) {
                scores.fill(0.0);
            }
            let mut finite = true;
            for (index, panel) in operands.values.iter_mut().enumerate() {
                finite &= small.right(stored(&span.values), index * COLUMNS, panel);
            }
            if !finite {
                // Zero times infinity: who does not see such a value must not multiply it.
                for (query, seen) in operands.seen.iter().enumerate() {
                    self.add_values::<1, 1>(state, query, &span.values, seen.clone());
                }
                continue;
            }
            small.left(state.scores[..count].as_flattened(), TILE, &mut operands.weights);
            for (index, panel) in operands.values.iter().enumerate() {
                multiplier.multiply(&operands.weights, panel, &mut operands.products);
                let (sums, width) = (&mut state.sums[..], state.width);
                self.body.run(Add { products: &operands.products, sums, width, first: index * COLUMNS });
            }
        }
        self.finish(state);
    }
}

/// `to` = scale * `from`.
struct Scale<'a> {
    from: &'a [f32],
    scale: f32,
    to: &'a mut [f32],
}

impl Kernel for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for (from, to) in self.from.chunks(LANES).zip(self.to.chunks_mut(LANES)) {
            store_part(isa, isa.mul(widen_part(isa, from), isa.splat(self.scale)), to);
        }
    }
}

/// `sums[r][first + i]` += `products[r][i]`.
struct Add<'a> {
    /// `[queries, COLUMNS]`
    products: &'a [f32],
    /// `[queries, width]`
    sums: &'a mut [f32],
    width: usize,
    first: usize,
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for (products, sums) in self.products.chunks_exact(COLUMNS).zip(self.sums.chunks_exact_mut(self.width)) {
            for (product, sum) in products.as_chunks().0.iter().zip(sums[self.first..].as_chunks_mut().0) {
                isa.store(isa.add(isa.load(sum), isa.load(product)), sum);
            }
        }
    }
}
