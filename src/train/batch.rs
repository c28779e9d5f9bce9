//! Which examples make a step, in which order, and how their texts are packed without seeing each other.
//! The order is a function of seed and epoch alone: the same on every machine and with any number of threads.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::example::{Example, Text};
use crate::error::{Error, Result};
use crate::ops::sample::uniform;

/// The `[batch]` section of a recipe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BatchRecipe {
    /// Examples of one optimiser step; a pair is one.
    pub examples: usize,
    /// Most tokens of one packed micro-batch. A longer example has one to itself.
    pub tokens: usize,
}

impl Default for BatchRecipe {
    fn default() -> Self {
        // The paper gives no batch size; a micro-batch holds four texts of the default length.
        Self { examples: 32, tokens: 16_384 }
    }
}

impl BatchRecipe {
    /// Refuses values that no training can mean.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the key.
    pub fn check(&self) -> Result<()> {
        for (key, value) in [("batch.examples", self.examples), ("batch.tokens", self.tokens)] {
            if value == 0 {
                return Err(Error::invalid(key, format!("{key} must be at least 1")));
            }
        }
        Ok(())
    }
}

/// A permutation that depends on its length, a seed and an epoch only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    indices: Vec<usize>,
}

impl Order {
    /// The order of `len` things in `epoch`.
    pub fn new(len: usize, seed: u64, epoch: u64) -> Self {
        // The stream of an epoch has nothing to do with those of its neighbours or of neighbouring seeds.
        let seed = mix(seed ^ mix(epoch));
        let mut indices: Vec<usize> = (0..len).collect();
        for last in (1..len).rev() {
            let other = (uniform(seed, last as u64) * (last + 1) as f64) as usize;
            indices.swap(last, other.min(last));
        }
        Self { indices }
    }

    /// The permutation: what stands where.
    pub fn indices(&self) -> &[usize] {
        &self.indices
    }
}

impl IntoIterator for Order {
    type Item = usize;
    type IntoIter = std::vec::IntoIter<usize>;

    fn into_iter(self) -> Self::IntoIter {
        self.indices.into_iter()
    }
}

/// One round of SplitMix64 (Steele, Lea and Flood 2014).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// The examples of each optimiser step of `epoch`: every example once, the last step with what is left.
pub fn steps(examples: &[Example], recipe: &BatchRecipe, seed: u64, epoch: u64) -> Vec<Vec<usize>> {
    let order = Order::new(examples.len(), seed, epoch);
    order.indices.chunks(recipe.examples.max(1)).map(<[usize]>::to_vec).collect()
}

/// Things of `lengths` `[things]` in micro-batches of at most `tokens`, whole and each once: the longest first, each into the
/// fullest micro-batch that has room for it. A thing longer than `tokens` is alone.
pub fn micro_batches(lengths: &[usize], tokens: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|index| (std::cmp::Reverse(lengths[*index]), *index));
    let mut batches: Vec<Vec<usize>> = Vec::new();
    // Room that is left, and in which micro-batch.
    let mut rooms: BTreeSet<(usize, usize)> = BTreeSet::new();
    for index in order {
        let len = lengths[index];
        match rooms.range((len, 0)..).next().copied() {
            Some((room, batch)) => {
                rooms.remove(&(room, batch));
                rooms.insert((room - len, batch));
                batches[batch].push(index);
            }
            None => {
                rooms.extend(tokens.checked_sub(len).map(|room| (room, batches.len())));
                batches.push(vec![index]);
            }
        }
    }
    // Inside a micro-batch things stand in the order of the step.
    batches.iter_mut().for_each(|batch| batch.sort_unstable());
    batches
}

/// A token to predict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// The row of the hidden states that predicts it: the token before it.
    pub row: u32,
    /// The token.
    pub token: u32,
    /// Which text it belongs to.
    pub text: u32,
}

/// Texts end to end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Packed {
    /// `[T]`: the tokens of all texts.
    pub tokens: Vec<u32>,
    /// `[T]`: the place of each token in its text, from 0.
    pub positions: Vec<u32>,
    /// `[texts + 1]`: where each text begins, and at last T.
    pub starts: Vec<usize>,
    /// The tokens that count, in order.
    pub targets: Vec<Target>,
}

impl Packed {
    /// Packs `texts` in their order.
    pub fn new(texts: &[&Text]) -> Self {
        let count = texts.iter().map(|text| text.tokens.len()).sum();
        let mut packed = Self {
            tokens: Vec::with_capacity(count),
            positions: Vec::with_capacity(count),
            starts: Vec::with_capacity(texts.len() + 1),
            targets: Vec::new(),
        };
        packed.starts.push(0);
        for (number, text) in texts.iter().enumerate() {
            assert!(text.tokens.len() == text.targets.len(), "a text has one target flag a token");
            assert!(text.targets.first() != Some(&true), "nothing predicts the first token of a text");
            let start = packed.tokens.len();
            packed.tokens.extend_from_slice(&text.tokens);
            packed.positions.extend(0..text.tokens.len() as u32);
            let counted = (1..text.tokens.len()).filter(|place| text.targets[*place]);
            packed.targets.extend(counted.map(|place| Target {
                row: (start + place - 1) as u32,
                token: text.tokens[place],
                text: number as u32,
            }));
            packed.starts.push(packed.tokens.len());
        }
        packed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(tokens: &[u32], prompt: usize) -> Text {
        Text { tokens: tokens.to_vec(), targets: (0..tokens.len()).map(|place| place >= prompt).collect() }
    }

    #[test]
    fn the_order_is_the_same_everywhere() {
        assert_eq!(Order::new(12, 0, 0).indices(), GOLDEN[0]);
        assert_eq!(Order::new(12, 0, 1).indices(), GOLDEN[1]);
        assert_eq!(Order::new(12, 1, 0).indices(), GOLDEN[2]);
        assert_eq!(Order::new(0, 1, 0).indices(), [0; 0]);
    }

    /// By a second implementation, of Philox, SplitMix64 and the shuffle, in Python.
    const GOLDEN: [[usize; 12]; 3] = [
        [8, 5, 2, 4, 0, 11, 6, 10, 9, 7, 1, 3],
        [2, 9, 10, 0, 7, 11, 1, 3, 8, 5, 4, 6],
        [7, 3, 0, 1, 11, 4, 6, 8, 9, 5, 10, 2],
    ];

    #[test]
    fn every_example_is_in_one_step_and_the_last_step_is_partial() {
        let examples: Vec<Example> = (0..10).map(|token| Example::Text(text(&[1, token], 1))).collect();
        let recipe = BatchRecipe { examples: 4, tokens: 8 };
        let steps = steps(&examples, &recipe, 3, 0);
        assert_eq!(steps.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4, 2]);
        let mut all = steps.concat();
        all.sort_unstable();
        assert_eq!(all, (0..10).collect::<Vec<_>>());
        assert!(BatchRecipe { examples: 0, tokens: 1 }.check().is_err() && BatchRecipe::default().check().is_ok());
    }

    #[test]
    fn places_are_drawn_evenly() {
        let mut counts = [[0u32; 4]; 4];
        for epoch in 0..4000 {
            Order::new(4, 9, epoch).into_iter().enumerate().for_each(|(place, index)| counts[place][index] += 1);
        }
        // 1000 expected; 5 standard deviations are 137.
        assert!(counts.iter().flatten().all(|count| count.abs_diff(1000) < 137), "{counts:?}");
    }

    #[test]
    fn the_fullest_batch_with_room_takes_the_next_longest() {
        assert_eq!(micro_batches(&[3, 7, 2, 5, 3], 10), [vec![0, 1], vec![2, 3, 4]]);
        assert_eq!(micro_batches(&[4, 30, 6], 10), [vec![1], vec![0, 2]]);
        // 8 | 6 3 would waste; the 2 goes where it fits exactly.
        assert_eq!(micro_batches(&[6, 8, 2, 3], 10), [vec![1, 2], vec![0, 3]]);
        assert_eq!(micro_batches(&[], 10), Vec::<Vec<usize>>::new());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn packing_is_whole_and_within_the_budget(lengths in prop::collection::vec(0..40usize, 0..80), tokens in 1..60usize) {
            let batches = micro_batches(&lengths, tokens);
            let mut all = batches.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
            let total: usize = lengths.iter().sum();
            for batch in &batches {
                let sum: usize = batch.iter().map(|index| lengths[*index]).sum();
                prop_assert!(!batch.is_empty() && (sum <= tokens || batch.len() == 1));
            }
            // No two that are both at most half full.
            let half = batches.iter().filter(|batch| batch.iter().map(|index| 2 * lengths[*index]).sum::<usize>() <= tokens);
            prop_assert!(half.count() <= 1, "{} tokens in {:?}", total, batches);
        }
    }

    #[test]
    fn positions_and_targets_restart_with_every_text() {
        let (first, second) = (text(&[1, 5, 6], 2), text(&[1, 7, 8, 9], 1));
        let packed = Packed::new(&[&first, &second]);
        assert_eq!(packed.tokens, [1, 5, 6, 1, 7, 8, 9]);
        assert_eq!(packed.positions, [0, 1, 2, 0, 1, 2, 3]);
        assert_eq!(packed.starts, [0, 3, 7]);
        let targets =
            [(1, 6, 0), (3, 7, 1), (4, 8, 1), (5, 9, 1)].map(|(row, token, text)| Target { row, token, text });
        assert_eq!(packed.targets, targets);
        assert_eq!(Packed::new(&[]).starts, [0]);
    }
}
