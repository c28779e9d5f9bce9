//! The largest of many numbers, in one order everywhere: larger ones first, equals by the lower id.

use super::lanes::{Body, Isa, Kernel, LANES};

/// Rows of sixteen numbers whose largest are found together.
const DEPTH: usize = 16;

/// The place of entry `id` with the number `x`, which is not NaN, among all: ascending in the order of this module. Its low half is `id`.
pub(super) fn rank(x: f32, id: u32) -> u64 {
    // -0 equals 0.
    let bits = (x + 0.0).to_bits();
    let ascending = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    u64::from(!ascending) << 32 | u64::from(id)
}

/// The id of a [`rank`].
pub(super) fn id(rank: u64) -> u32 {
    rank as u32
}

/// The ids of the `count` largest of `x`, best first. None may be NaN.
pub(super) fn best(x: &[f32], count: usize) -> Vec<u32> {
    best_ranks(x, count).into_iter().map(id).collect()
}

/// [`best`] as [`rank`]s.
pub(super) fn best_ranks(x: &[f32], count: usize) -> Vec<u64> {
    let mut ranks = ranks(x, count);
    if (1..ranks.len()).contains(&count) {
        ranks.select_nth_unstable(count - 1);
    }
    ranks.truncate(count);
    ranks.sort_unstable();
    ranks
}

/// [`rank`]s among which are those of the `count` largest of `x`.
fn ranks(x: &[f32], count: usize) -> Vec<u64> {
    let rank_of = |id: u32| rank(x[id as usize], id);
    let mut tops = Vec::with_capacity(x.len() / DEPTH + DEPTH * LANES);
    Body::best().run(Tops(x, &mut tops));
    if count == 0 || count > tops.len() / 2 {
        return (0..x.len() as u32).map(rank_of).collect();
    }
    // As many numbers as `count` are no smaller than this.
    let (_, least, _) = tops.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a));
    between(x, *least, f32::INFINITY).into_iter().map(rank_of).collect()
}

/// The ids of the numbers of `x` from `low` to `high`, both included, and of NaNs, ascending.
pub(super) fn between(x: &[f32], low: f32, high: f32) -> Vec<u32> {
    Body::best().run(Between { x, low, high })
}

/// The largest of every group of [`DEPTH`] numbers, which need not be neighbours; numbers that fill no group are given one by one.
struct Tops<'a>(&'a [f32], &'a mut Vec<f32>);

impl Kernel for Tops<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (full, tail) = self.0.as_chunks::<LANES>();
        let (groups, rest) = full.as_chunks::<DEPTH>();
        for group in groups {
            let mut tops = isa.splat(f32::NEG_INFINITY);
            for x in group {
                tops = isa.max(isa.load(x), tops);
            }
            let mut lanes = [0.0; LANES];
            isa.store(tops, &mut lanes);
            self.1.extend_from_slice(&lanes);
        }
        self.1.extend_from_slice(rest.as_flattened());
        self.1.extend_from_slice(tail);
    }
}

struct Between<'a> {
    x: &'a [f32],
    low: f32,
    high: f32,
}

impl Kernel for Between<'_> {
    type Output = Vec<u32>;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> Vec<u32> {
        let mut found = Vec::new();
        let (low, high) = (isa.splat(self.low), isa.splat(self.high));
        let (full, tail) = self.x.as_chunks::<LANES>();
        for (first, x) in (0..).step_by(LANES).zip(full) {
            let x = isa.load(x);
            let mut inside = !(isa.less(x, low) | isa.less(high, x));
            while inside != 0 {
                found.push(first + inside.trailing_zeros());
                inside &= inside - 1;
            }
        }
        let tail = ((full.len() * LANES) as u32..).zip(tail);
        found.extend(tail.filter(|(_, x)| !(**x < self.low || self.high < **x)).map(|(id, _)| id));
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::sample::uniform;

    fn numbers(len: u64) -> Vec<f32> {
        // Coarse steps make ties; a few are impossible.
        let number = |i| if i % 11 == 3 { f32::NEG_INFINITY } else { (uniform(3, i) * 200.0).floor() as f32 - 100.0 };
        (0..len).map(number).collect()
    }

    #[test]
    fn ranks_ascend_from_the_largest_number_and_then_by_id() {
        let order = [
            (f32::INFINITY, 9),
            (3.5, 2),
            (3.5, 4),
            (1e-40, 0),
            (0.0, 1),
            (-0.0, 5),
            (0.0, 6),
            (-1e-40, 0),
            (-3.5, 0),
            (f32::NEG_INFINITY, 0),
        ];
        let ranks: Vec<u64> = order.iter().map(|&(x, id)| rank(x, id)).collect();
        assert!(ranks.is_sorted() && ranks.iter().zip(order).all(|(rank, (_, expected))| id(*rank) == expected));
    }

    #[test]
    fn the_best_are_those_of_a_full_sort() {
        for len in [0, 1, 15, 16, 255, 256, 257, 1000, 5000] {
            let x = numbers(len);
            let mut sorted: Vec<u32> = (0..len as u32).collect();
            sorted.sort_by(|&a, &b| x[b as usize].total_cmp(&x[a as usize]).then(a.cmp(&b)));
            for count in [0, 1, 2, 50, 200, 6000] {
                assert_eq!(best(&x, count), sorted[..count.min(sorted.len())], "{count} of {len}");
            }
        }
    }

    #[test]
    fn numbers_between_bounds_are_found_in_order() {
        let bounds = [f32::NEG_INFINITY, -50.0, 0.0, 98.0, 99.5, f32::INFINITY];
        let outside = |x: f32, low, high| x < low || x > high;
        for len in [0, 1, 15, 16, 17, 1000] {
            let mut x = numbers(len);
            x.iter_mut().step_by(23).for_each(|x| *x = f32::NAN);
            for (low, high) in bounds.iter().flat_map(|low| bounds.map(|high| (*low, high))) {
                let expected: Vec<u32> = (0..len as u32).filter(|id| !outside(x[*id as usize], low, high)).collect();
                assert_eq!(between(&x, low, high), expected, "{low}..{high} of {len}");
            }
        }
    }
}
