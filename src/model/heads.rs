//! What is read off a hidden state: a logit for each token, or one reward.

use candle_core::Tensor;

use super::config::{HeadKind, ModelConfig};
use super::decoder::{Decoder, take};
use super::weights::Weights;
use crate::error::Result;
use crate::ops::linear::Linear;

/// The last linear map of a model.
#[derive(Debug)]
pub enum Head {
    /// Logits.
    Language(LanguageHead),
    /// Rewards.
    Reward(RewardHead),
}

/// Gives logits `[R, vocab]`.
#[derive(Debug)]
pub struct LanguageHead {
    linear: Linear,
}

/// Gives raw rewards `[R]`: the product of hidden state and weight, no bias, no squashing. Reward models of this kind
/// are unbounded and tens wide.
#[derive(Debug)]
pub struct RewardHead {
    linear: Linear,
}

impl Head {
    /// Takes the head's tensor, or shares the embedding of `decoder` where config.json says so.
    ///
    /// # Errors
    /// If a tensor operation fails; a missing tensor is told by [`Weights::finish`].
    pub fn new(config: &ModelConfig, weights: &mut Weights, decoder: &Decoder) -> Result<Self> {
        let rows = match config.head {
            HeadKind::Language => config.vocab,
            HeadKind::Reward => 1,
        };
        let embedding = decoder.embedding();
        let weight = match config.head_tensor {
            Some(name) => take(weights, name, &[rows, config.hidden], embedding.device())?,
            None => embedding.clone(),
        };
        let linear = Linear::dense(weight)?;
        Ok(match config.head {
            HeadKind::Language => Self::Language(LanguageHead { linear }),
            HeadKind::Reward => Self::Reward(RewardHead { linear }),
        })
    }

    /// Logits `[R, vocab]` or rewards `[R]` of hidden states `[R, hidden]`.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn apply(&self, rows: &Tensor) -> Result<Tensor> {
        match self {
            Self::Language(head) => head.apply(rows),
            Self::Reward(head) => head.apply(rows),
        }
    }
}

impl LanguageHead {
    /// Logits `[R, vocab]` of hidden states `[R, hidden]`.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn apply(&self, rows: &Tensor) -> Result<Tensor> {
        self.linear.forward(rows)
    }
}

impl RewardHead {
    /// Rewards `[R]` of hidden states `[R, hidden]`.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn apply(&self, rows: &Tensor) -> Result<Tensor> {
        Ok(self.linear.forward(rows)?.flatten_all()?)
    }
}
