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
