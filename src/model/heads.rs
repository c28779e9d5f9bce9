//! What is read off a hidden state: a logit for each token, or one reward.

use candle_core::Tensor;

use super::config::{HeadKind, ModelConfig};
use super::decoder::Decoder;
use super::weights::Weights;
use crate::error::Result;
use crate::ops::host;
use crate::ops::linear::Linear;
use crate::ops::logprobs::{TargetScore, target_scores, target_scores_backward};

/// Logits that exist at a time when only their targets' log-probabilities are wanted, about: for every piece of rows the weight and, in
/// training, its gradient pass by once more.
const LOGITS: usize = 4 << 20;
/// Fewest rows of such a piece.
const ROWS_MIN: usize = 256;

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
    pub(super) linear: Linear,
}

/// Gives raw rewards `[R]`: the product of hidden state and weight, no bias, no squashing. Reward models of this kind
/// are unbounded and tens wide, so they are computed in float32 on the host whatever the decoder computes in, and wherever.
#[derive(Debug)]
pub struct RewardHead {
    pub(super) linear: Linear,
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
        let weight = match (config.head_tensor, config.head) {
            (Some(name), HeadKind::Language) => {
                decoder.place().put(weights.take_matrix(name, &[rows, config.hidden])?)?
            }
            // Stays with the host.
            (Some(name), HeadKind::Reward) => weights.take_matrix(name, &[rows, config.hidden])?,
            (None, _) => decoder.embedding().clone(),
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

    /// How the `targets` `[R]` score after the hidden states `rows` `[R, hidden]`. Never holds more than a few rows of logits.
    ///
    /// # Errors
    /// If a target is outside the vocabulary, a logit is not a number, or a tensor operation fails.
    pub fn target_scores(&self, rows: &Tensor, targets: &[u32]) -> Result<Vec<TargetScore>> {
        let mut scores = Vec::with_capacity(targets.len());
        let each = self.rows_together();
        for (index, targets) in targets.chunks(each).enumerate() {
            let rows = rows.narrow(0, index * each, targets.len())?;
            scores.extend(target_scores(&self.apply(&rows)?, targets)?);
        }
        Ok(scores)
    }

    /// As [`LanguageHead::target_scores`], and the gradient of `rows` `[R, hidden]` from those of the log-probabilities, `slopes`
    /// `[R]`; that of the head's weight is added to its own. Logits are computed once for both.
    ///
    /// # Errors
    /// As [`LanguageHead::target_scores`].
    pub fn learn_targets(&self, rows: &Tensor, targets: &[u32], slopes: &[f32]) -> Result<(Vec<TargetScore>, Tensor)> {
        let (mut scores, mut parts) = (Vec::with_capacity(targets.len()), Vec::new());
        let each = self.rows_together();
        for (index, (targets, slopes)) in targets.chunks(each).zip(slopes.chunks(each)).enumerate() {
            let rows = rows.narrow(0, index * each, targets.len())?;
            let logits = self.apply(&rows)?;
            scores.extend(target_scores(&logits, targets)?);
            let d_logits = target_scores_backward(&logits, targets, slopes)?;
            parts.push(self.linear.backward(&rows, &d_logits)?);
        }
        let d_rows = if parts.is_empty() { rows.zeros_like()? } else { Tensor::cat(&parts, 0)? };
        Ok((scores, d_rows))
    }

    fn rows_together(&self) -> usize {
        let vocab = self.linear.dims().map_or(1, |(vocab, _)| vocab.max(1));
        (LOGITS / vocab).max(ROWS_MIN)
    }
}

impl RewardHead {
    /// Rewards `[R]` of hidden states `[R, hidden]`.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn apply(&self, rows: &Tensor) -> Result<Tensor> {
        Ok(self.linear.forward(&host::tensor(rows)?)?.flatten_all()?)
    }

    /// The gradient of `rows` `[R, hidden]` from those of the rewards, `slopes` `[R]`; that of the weight is added to its own.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn backward(&self, rows: &Tensor, slopes: &[f32]) -> Result<Tensor> {
        self.linear.backward(rows, &Tensor::from_slice(slopes, (slopes.len(), 1), rows.device())?)
    }
}
