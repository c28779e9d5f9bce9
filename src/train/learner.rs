//! The model that learns, on packed texts: what it reads off each text, and the gradients that follow from slopes of that.
//! Nothing here knows a loss; log-probabilities and rewards are those of serving, bit for bit on the CPU.

use candle_core::{Device, Tensor};

use super::batch::Packed;
use crate::error::Result;
use crate::model::Model;
use crate::model::decoder::{Attention, AttentionGradient};
use crate::model::heads::Head;
use crate::model::tape::Keep;
use crate::ops::attention::{packed_attention, packed_attention_backward};
use crate::ops::logprobs::TargetScore;
use crate::ops::rope::{Turn, split_rope};

/// What a model says of one text.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Reading {
    /// The sum of the log-probabilities of its targets, or its reward.
    pub value: f64,
    /// How many targets it has; 0 under a reward model.
    pub targets: usize,
    /// Sum of the entropies of the distributions of its targets, in nats.
    pub entropy: f64,
    /// Targets that were the most probable token.
    pub correct: usize,
}

/// A model and where it computes.
#[derive(Debug)]
pub struct Learner {
    /// The model.
    pub model: Model,
    /// What is kept for the backward pass.
    pub keep: Keep,
    /// Where it lies.
    pub device: Device,
}

/// The derivative of the loss by each text's value, `[texts]`.
pub enum Slopes<'a> {
    /// Of every text the same, whatever the model says of it: its logits are then computed once.
    Same(f64),
    /// They follow from what the model says.
    Of(&'a mut dyn FnMut(&[Reading]) -> Vec<f64>),
}

/// Texts end to end, blind to each other.
struct Segments<'a> {
    starts: &'a [usize],
    window: Option<usize>,
    scale: f32,
}

impl Attention for Segments<'_> {
    fn attend(&self, _layer: usize, qkv: &Tensor, turn: &Turn<'_>) -> Result<Tensor> {
        let [q, k, v] = split_rope(qkv, turn)?;
        packed_attention(&q, &k, &v, self.starts, self.window, self.scale)
    }
}

impl AttentionGradient for Segments<'_> {
    fn attend_backward(&self, qkv: [&Tensor; 3], d_attended: &Tensor) -> Result<Tensor> {
        packed_attention_backward(qkv, d_attended, self.starts, self.window, self.scale)
    }
}

impl Learner {
    /// What the model says of each text of `packed`, `[texts]`.
    ///
    /// # Errors
    /// If a token is outside the vocabulary or a text longer than the model's context, or a tensor operation fails.
    pub fn read(&self, packed: &Packed) -> Result<Vec<Reading>> {
        let [tokens, positions] = self.inputs(packed)?;
        let rows = Rows::of(packed, &self.model.head);
        let read = rows.indices(&self.device)?;
        let hidden = self.model.decoder.forward(&tokens, &positions, &self.segments(packed), Some(&read))?;
        rows.readings(&self.model.head, &hidden)
    }

    /// What the model says of each text of `packed`; adds to the gradient of every trained weight what follows from `slopes`.
    ///
    /// # Errors
    /// As [`Learner::read`].
    pub fn learn(&self, packed: &Packed, slopes: Slopes<'_>) -> Result<Vec<Reading>> {
        let [tokens, positions] = self.inputs(packed)?;
        let (segments, head) = (self.segments(packed), &self.model.head);
        let tape = self.model.decoder.forward_kept(&tokens, &positions, &segments, self.keep)?;
        let rows = Rows::of(packed, head);
        let read = rows.indices(&self.device)?;
        let (readings, d_rows) = rows.learn(head, &tape.hidden().index_select(&read, 0)?, slopes)?;
        let d_hidden = tape.hidden().zeros_like()?.index_add(&read, &d_rows, 0)?;
        tape.backward(&d_hidden)?;
        Ok(readings)
    }

    fn inputs(&self, packed: &Packed) -> Result<[Tensor; 2]> {
        let tokens = Tensor::new(&packed.tokens[..], &self.device)?;
        Ok([tokens, Tensor::new(&packed.positions[..], &self.device)?])
    }

    fn segments<'a>(&self, packed: &'a Packed) -> Segments<'a> {
        let config = &self.model.config;
        Segments { starts: &packed.starts, window: config.window, scale: config.attention_scale() }
    }
}

/// The hidden states that are read.
struct Rows {
    /// `[R]`: where they are.
    rows: Vec<u32>,
    /// `[R]`: the tokens they predict; none under a reward model.
    tokens: Vec<u32>,
    /// `[R]`: the texts they belong to.
    texts: Vec<u32>,
    /// How many texts there are.
    count: usize,
}

impl Rows {
    /// Those that predict a target, or the last one of each text under a reward model.
    fn of(packed: &Packed, head: &Head) -> Self {
        match head {
            Head::Language(_) => Self {
                rows: packed.targets.iter().map(|target| target.row).collect(),
                tokens: packed.targets.iter().map(|target| target.token).collect(),
                texts: packed.targets.iter().map(|target| target.text).collect(),
                count: packed.starts.len() - 1,
            },
            Head::Reward(_) => Self {
                rows: packed.starts[1..].iter().map(|end| *end as u32 - 1).collect(),
                tokens: Vec::new(),
                texts: (0..packed.starts.len() as u32 - 1).collect(),
                count: packed.starts.len() - 1,
            },
        }
    }

    fn indices(&self, device: &Device) -> Result<Tensor> {
        Ok(Tensor::new(&self.rows[..], device)?)
    }

    /// What `head` says of each text, from its rows of hidden states `[R, hidden]`.
    fn readings(&self, head: &Head, hidden: &Tensor) -> Result<Vec<Reading>> {
        match head {
            Head::Language(head) => Ok(self.gather(&head.target_scores(hidden, &self.tokens)?)),
            Head::Reward(head) => {
                let rewards: Vec<f32> = head.apply(hidden)?.to_vec1()?;
                let reading = |reward: f32| Reading { value: f64::from(reward), ..Reading::default() };
                Ok(rewards.into_iter().map(reading).collect())
            }
        }
    }

    /// As [`Rows::readings`], and the gradient of the rows of hidden states; that of the head's weight is added to its own.
    fn learn(&self, head: &Head, hidden: &Tensor, slopes: Slopes<'_>) -> Result<(Vec<Reading>, Tensor)> {
        if let (Head::Language(head), Slopes::Same(slope)) = (head, &slopes) {
            let slopes = vec![*slope as f32; self.texts.len()];
            let (scores, d_rows) = head.learn_targets(hidden, &self.tokens, &slopes)?;
            return Ok((self.gather(&scores), d_rows));
        }
        let readings = self.readings(head, hidden)?;
        let slopes = match slopes {
            Slopes::Same(slope) => vec![slope; self.count],
            Slopes::Of(slopes) => slopes(&readings),
        };
        let slopes: Vec<f32> = self.texts.iter().map(|&text| slopes[text as usize] as f32).collect();
        let d_rows = match head {
            Head::Language(head) => head.learn_targets(hidden, &self.tokens, &slopes)?.1,
            Head::Reward(head) => head.backward(hidden, &slopes)?,
        };
        Ok((readings, d_rows))
    }

    /// The scores of all targets, text by text.
    fn gather(&self, scores: &[TargetScore]) -> Vec<Reading> {
        let mut readings = vec![Reading::default(); self.count];
        for (TargetScore { logprob, entropy, correct }, text) in scores.iter().zip(&self.texts) {
            let reading = &mut readings[*text as usize];
            reading.value += f64::from(*logprob);
            reading.targets += 1;
            reading.entropy += f64::from(*entropy);
            reading.correct += usize::from(*correct);
        }
        readings
    }
}
