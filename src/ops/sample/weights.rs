//! What the tokens of a row weigh, and which of them are left by filters: a few passes over the row, none of which sorts it.

use crate::ops::lanes::{Body, Isa, Kernel, LANES};
use crate::ops::select::{best_ranks, between, id, rank};
use std::borrow::Cow;

/// Vectors of tokens whose weights are added up in f32, lane by lane; the sums of blocks are added up in f64.
const BLOCK_VECTORS: usize = 16;
const BLOCK: usize = BLOCK_VECTORS * LANES;

/// Logits at which the end of a nucleus is looked for in one pass, and passes: together they cut the search to a 125th of its width.
const BOUNDS: usize = 4;
const PASSES: usize = 3;

/// Tokens that are sorted to find the last one of a nucleus.
const SORTED_MAX: usize = 64;

/// The tokens of one row, each with its weight in units of the most probable one.
pub(super) struct Weights<'a> {
    /// Whole vectors: minus infinity stands in what the row leaves of its last one.
    logits: Cow<'a, [f32]>,
    max: f32,
    temperature: f32,
    /// 0 where the token is out.
    weights: Vec<f32>,
    /// The sum of every block of weights.
    sums: Vec<f64>,
}

impl<'a> Weights<'a> {
    /// e^((logit - max) / temperature) of each of `logits`, of which `max` is the largest.
    pub(super) fn new(logits: &'a [f32], max: f32, temperature: f32) -> Self {
        let mut logits = Cow::Borrowed(logits);
        if logits.len() % LANES > 0 {
            let len = logits.len().next_multiple_of(LANES);
            logits.to_mut().resize(len, f32::NEG_INFINITY);
        }
        let (mut weights, mut sums) = (vec![0.0; logits.len()], vec![0.0; logits.len().div_ceil(BLOCK)]);
        Body::best().run(Weigh { logits: &logits, max, temperature, weights: &mut weights, sums: &mut sums });
        Self { logits, max, temperature, weights, sums }
    }

    /// The [`rank`] of the last token of the nucleus: the fewest most probable tokens whose share of the weight of the `top_k` most
    /// probable ones, or of all for 0, reaches `share`. None where that is every token.
    pub(super) fn last(&self, top_k: usize, share: f64) -> Option<u64> {
        if (1..self.logits.len()).contains(&top_k) {
            let kept = best_ranks(&self.logits, top_k);
            let total: f64 = kept.iter().map(|rank| self.of(*rank)).sum();
            return self.crossing(&kept, 0.0, share * total);
        }
        if share < 1.0 { self.last_of_all(share) } else { None }
    }

    fn last_of_all(&self, share: f64) -> Option<u64> {
        let total: f64 = self.sums.iter().sum();
        let wanted = share * total;
        // Together, tokens below this cannot fill what is outside the nucleus, so none of them belongs to it.
        let negligible = (1.0 - share) * total / self.logits.len() as f64;
        let lowest = f64::from(self.max) + f64::from(self.temperature) * (negligible.ln() - 0.01);
        // The logit of the last token is above `low`, with all above which it is enough, and at most `high`, above which it is not.
        let mut low = (lowest as f32).next_down();
        let (mut high, mut mass) = (self.max, 0.0);
        for _ in 0..PASSES {
            let step = (f64::from(high) - f64::from(low)) / (BOUNDS + 1) as f64;
            let bounds: [f32; BOUNDS] = std::array::from_fn(|i| (f64::from(high) - step * (i + 1) as f64) as f32);
            let masses = Body::best().run(Masses { logits: &self.logits, weights: &self.weights, bounds });
            let enough = masses.iter().position(|mass| *mass >= wanted).unwrap_or(BOUNDS);
            if let Some(before) = enough.checked_sub(1) {
                (high, mass) = (bounds[before], masses[before]);
            }
            low = bounds.get(enough).copied().unwrap_or(low);
        }
        let open = between(&self.logits, low.next_up(), high);
        self.last_of(open.into_iter().map(|token| rank(self.logits[token as usize], token)).collect(), mass, wanted)
    }

    /// As [`Self::crossing`], in any order.
    fn last_of(&self, mut ranks: Vec<u64>, mut mass: f64, wanted: f64) -> Option<u64> {
        let mut open = &mut ranks[..];
        while open.len() > SORTED_MAX {
            let half = open.len() / 2;
            open.select_nth_unstable(half);
            let (better, rest) = open.split_at_mut(half);
            let reached = mass + better.iter().map(|rank| self.of(*rank)).sum::<f64>();
            if reached >= wanted {
                open = better;
            } else {
                (open, mass) = (rest, reached);
            }
        }
        open.sort_unstable();
        self.crossing(open, mass, wanted)
    }

    /// The first of `ranks` with which the weights, `mass` before them, reach `wanted`. Where rounding lets none do so, the last one.
    fn crossing(&self, ranks: &[u64], mut mass: f64, wanted: f64) -> Option<u64> {
        let reaches = |rank: &&u64| {
            mass += self.of(**rank);
            mass >= wanted
        };
        ranks.iter().find(reaches).or(ranks.last()).copied()
    }

    fn of(&self, rank: u64) -> f64 {
        f64::from(self.weights[id(rank) as usize])
    }

    /// Drops what comes after the rank `last` and what weighs less than `least`.
    pub(super) fn keep(&mut self, last: Option<u64>, least: f32) {
        let mut lowest = f32::NEG_INFINITY;
        let mut block = 0;
        if let Some(last) = last.map(|rank| id(rank) as usize) {
            (lowest, block) = (self.logits[last], last / BLOCK);
            let end = self.logits.len().min((block + 1) * BLOCK);
            let equals = (last + 1..end).filter(|token| self.logits[*token] == lowest);
            equals.for_each(|token| self.weights[token] = 0.0);
        }
        let (logits, weights, sums) = (&self.logits[..], &mut self.weights[..], &mut self.sums[..]);
        Body::best().run(Keep { logits, weights, sums, lowest, block, least });
    }

    /// The token at which the running sum of the weights exceeds the share `uniform` of them, block by block.
    pub(super) fn locate(&self, uniform: f64) -> Option<u32> {
        let total: f64 = self.sums.iter().sum();
        let (target, mut mass, mut last) = (uniform * total, 0.0, None);
        let blocks = self.weights.chunks(BLOCK).zip(&self.sums).enumerate();
        for (block, (weights, sum)) in blocks.filter(|(_, (_, sum))| **sum > 0.0) {
            last = Some((block * BLOCK, weights, mass));
            if mass + sum > target {
                break;
            }
            mass += sum;
        }
        // A share that was rounded up to the sum means the last token of its block.
        let (first, weights, before) = last?;
        let mut mass = before;
        let mut found = None;
        for (token, weight) in (first as u32..).zip(weights).filter(|(_, weight)| **weight > 0.0) {
            mass += f64::from(*weight);
            found = Some(token);
            if mass > target {
                break;
            }
        }
        found
    }
}

struct Weigh<'a> {
    logits: &'a [f32],
    max: f32,
    temperature: f32,
    weights: &'a mut [f32],
    sums: &'a mut [f64],
}

impl Kernel for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (max, temperature) = (isa.splat(self.max), isa.splat(self.temperature));
        let (logits, weights) = (vectors(self.logits), vectors_mut(self.weights));
        let blocks = logits.chunks(BLOCK_VECTORS).zip(weights.chunks_mut(BLOCK_VECTORS));
        for ((logits, weights), sum) in blocks.zip(self.sums) {
            let mut lanes = isa.splat(0.0);
            for (logits, weights) in logits.iter().zip(weights) {
                let weight = isa.exp(isa.div(isa.sub(isa.load(logits), max), temperature));
                isa.store(weight, weights);
                lanes = isa.add(lanes, weight);
            }
            *sum = f64::from(isa.sum(lanes));
        }
    }
}

/// The weight of all logits above each of `bounds`.
struct Masses<'a> {
    logits: &'a [f32],
    weights: &'a [f32],
    bounds: [f32; BOUNDS],
}

impl Kernel for Masses<'_> {
    type Output = [f64; BOUNDS];

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> [f64; BOUNDS] {
        let (bounds, zero) = (self.bounds.map(|bound| isa.splat(bound)), isa.splat(0.0));
        let mut masses = [0.0; BOUNDS];
        let (logits, weights) = (vectors(self.logits), vectors(self.weights));
        for (logits, weights) in logits.chunks(BLOCK_VECTORS).zip(weights.chunks(BLOCK_VECTORS)) {
            let mut sums = [zero; BOUNDS];
            for (logits, weights) in logits.iter().zip(weights) {
                let (logits, weights) = (isa.load(logits), isa.load(weights));
                for (sum, bound) in sums.iter_mut().zip(bounds) {
                    *sum = isa.add_where_less(*sum, bound, logits, weights);
                }
            }
            masses.iter_mut().zip(isa.sum4(sums)).for_each(|(mass, sum)| *mass += f64::from(sum));
        }
        masses
    }
}

/// Zeroes the weights of logits below `lowest`, those that equal it in blocks after `block`, and weights below `least`.
struct Keep<'a> {
    logits: &'a [f32],
    weights: &'a mut [f32],
    sums: &'a mut [f64],
    lowest: f32,
    block: usize,
    least: f32,
}

impl Kernel for Keep<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (zero, least) = (isa.splat(0.0), isa.splat(self.least));
        let (below, at) = (isa.splat(self.lowest.next_down()), isa.splat(self.lowest));
        let (logits, weights) = (vectors(self.logits), vectors_mut(self.weights));
        let blocks = logits.chunks(BLOCK_VECTORS).zip(weights.chunks_mut(BLOCK_VECTORS));
        for (index, ((logits, weights), sum)) in blocks.zip(self.sums).enumerate() {
            let bound = if index <= self.block { below } else { at };
            let mut lanes = zero;
            for (logits, weights) in logits.iter().zip(weights) {
                let kept = isa.select_less(bound, isa.load(logits), isa.load(weights), zero);
                let kept = isa.select_less(kept, least, zero, kept);
                isa.store(kept, weights);
                lanes = isa.add(lanes, kept);
            }
            *sum = f64::from(isa.sum(lanes));
        }
    }
}

#[inline(always)]
fn vectors(x: &[f32]) -> &[[f32; LANES]] {
    x.as_chunks().0
}

#[inline(always)]
fn vectors_mut(x: &mut [f32]) -> &mut [[f32; LANES]] {
    x.as_chunks_mut().0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::ops::sample::uniform;

    fn largest(logits: &[f32]) -> f32 {
        logits.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }

    #[track_caller]
    fn check_nucleus(logits: &[f32], temperature: f32, top_k: usize, share: f32) {
        let mut weights = Weights::new(logits, largest(logits), temperature);
        let mut ranks: Vec<u64> = (0..).zip(logits).map(|(token, logit)| rank(*logit, token)).collect();
        ranks.sort_unstable();
        ranks.truncate(if top_k == 0 { ranks.len() } else { top_k });
        let wanted = f64::from(share) * ranks.iter().map(|rank| weights.of(*rank)).sum::<f64>();
        let mut mass = 0.0;
        let before = ranks.iter().position(|rank| {
            mass += weights.of(*rank);
            mass >= wanted
        });
        ranks.truncate(before.map_or(ranks.len(), |before| before + 1));
        let mut expected: Vec<u32> = ranks.into_iter().map(id).filter(|id| weights.of(u64::from(*id)) > 0.0).collect();
        expected.sort_unstable();
        let last = weights.last(top_k, f64::from(share));
        weights.keep(last, 0.0);
        let found = |id: &u32| weights.of(u64::from(*id)) > 0.0;
        assert_eq!((0..logits.len() as u32).filter(found).collect::<Vec<_>>(), expected);
        let total: f64 = weights.weights.iter().copied().map(f64::from).sum();
        assert!((weights.sums.iter().sum::<f64>() - total).abs() <= 1e-6 * total);
    }

    #[test]
    fn nuclei_agree_with_a_full_sort() {
        let mut counter = 0;
        for round in 0..200u64 {
            let len = [300, 40, 1031, 5000][round as usize % 4];
            // Coarse steps make ties, coarser ones many.
            let steps = [160.0, 40.0, 4.0][round as usize % 3];
            let logits: Vec<f32> = (0..len)
                .map(|i| {
                    counter += 1;
                    let logit = (uniform(round, counter) * steps).floor() as f32 * (10.0 / steps as f32);
                    if i % 17 == 3 { f32::NEG_INFINITY } else { logit }
                })
                .collect();
            let share = uniform(round, u64::MAX) as f32;
            for top_k in [0, 1, 30, len] {
                check_nucleus(&logits, 1.0, top_k, share);
            }
        }
    }

    #[test]
    fn nuclei_of_the_extremes() {
        let mut logits: Vec<f32> = (0..3000).map(|i| uniform(9, i) as f32).collect();
        for share in [0.0, 1e-30, 0.5, 0.9999] {
            // Flatter and sharper than any float can tell apart.
            for temperature in [f32::MAX, 1e30, 1e-3, f32::MIN_POSITIVE] {
                check_nucleus(&logits, temperature, 0, share);
            }
            check_nucleus(&[f32::MAX, f32::MIN, 0.0], 1e38, 0, share);
        }
        // All are equal.
        logits.fill(-7.5);
        for share in [0.5, 1.0 - f32::EPSILON / 2.0] {
            check_nucleus(&logits, 1.0, 0, share);
            check_nucleus(&logits, 1e-8, 0, share);
            check_nucleus(&logits, 1.0, 700, share);
        }
    }

    #[test]
    fn a_large_vocabulary_is_searched_block_by_block_as_token_by_token() {
        for len in [1, 255, 256, 257, 1031, 5000] {
            let logits: Vec<f32> =
                (0..len).map(|i| uniform(5, i) as f32 * 20.0 - if i % 7 == 0 { 200.0 } else { 0.0 }).collect();
            let weights = Weights::new(&logits, largest(&logits), 0.8);
            let total: f64 = weights.weights.iter().copied().map(f64::from).sum();
            let mut running = 0.0;
            for (token, weight) in weights.weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
                // In the middle of a token, so that rounding decides nothing.
                let at = (running + 0.5 * f64::from(*weight)) / total;
                running += f64::from(*weight);
                if *weight > 1e-4 {
                    assert_eq!(weights.locate(at), Some(token as u32), "{len}");
                }
            }
            assert_eq!(weights.locate(1.0).map(|token| weights.weights[token as usize] > 0.0), Some(true));
        }
    }
}
