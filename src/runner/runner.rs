//! Runs step plans: one forward pass over all chunks, then the head over the rows that are read.
//! Decides nothing about what runs; knows nothing of requests beyond the plan.

use std::sync::OnceLock;

use candle_core::{Device, Tensor};

use super::batch::{Bounds, ForwardBatch, Read};
use super::kv_cache::{KvCache, Paged};
use super::sampler;
use crate::engine::request::TokenLogProb;
use crate::engine::step::{Chunk, Executor, Last, Outcome, Rows, StepOutput, StepPlan, Want};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::heads::{Head, LanguageHead, RewardHead};
use crate::ops::parallel;

/// Rows the head is applied to at once: for a vocabulary of 32,000 their logits are 32 MB, however long the prompt
/// whose log-probabilities are asked for.
const HEAD_ROWS_MAX: usize = 256;

/// A model, its cache and the arithmetic of one engine.
#[derive(Debug)]
pub struct Runner {
    model: Model,
    cache: KvCache,
    device: Device,
}

impl Runner {
    /// Runs `model` over `cache`; both live on one device.
    pub fn new(model: Model, cache: KvCache) -> Self {
        let device = model.decoder.embedding().device().clone();
        Self { model, cache, device }
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The cache.
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// Hidden states `[T, hidden]` of all rows.
    fn forward(&self, batch: &ForwardBatch) -> Result<Tensor> {
        let tokens = Tensor::new(batch.tokens.as_slice(), &self.device)?;
        let positions = Tensor::new(batch.positions.as_slice(), &self.device)?;
        self.model.decoder.forward(&tokens, &positions, &Paged { cache: &self.cache, batch })
    }
}

impl Executor for Runner {
    fn execute(&mut self, plan: &StepPlan) -> Result<StepOutput> {
        if plan.chunks.is_empty() {
            return Ok(StepOutput::default());
        }
        let batch = ForwardBatch::new(plan, &Bounds::new(&self.model.config, &self.cache))?;
        let hidden = self.forward(&batch)?;
        let mut output = StepOutput { outcomes: plan.chunks.iter().map(|_| nothing()).collect() };
        for reads in batch.reads.chunks(HEAD_ROWS_MAX) {
            let rows: Vec<u32> = reads.iter().map(|read| read.row as u32).collect();
            let rows = hidden.index_select(&Tensor::new(rows, &self.device)?, 0)?;
            let found = match &self.model.head {
                Head::Language(head) => read_logits(head, &rows, reads, plan)?,
                Head::Reward(head) => read_rewards(head, &rows, reads, plan)?,
            };
            for (read, found) in reads.iter().zip(found) {
                record(&mut output.outcomes[read.chunk], found);
            }
        }
        Ok(output)
    }
}

/// What one row gave.
#[derive(Debug)]
enum Found {
    /// For [`Rows::LogProbs`] and the last row.
    Tokens(Option<TokenLogProb>, Last),
    /// For [`Rows::Scores`] and the last row.
    Rewards(Option<f32>, Last),
}

fn nothing() -> Outcome {
    Outcome { logprobs: Vec::new(), scores: Vec::new(), last: Last::Nothing }
}

/// Adds what a row gave to the outcome of its chunk; the first failure stays.
fn record(outcome: &mut Outcome, found: Result<Found>) {
    if matches!(outcome.last, Last::Failed(_)) {
        return;
    }
    let last = match found {
        Ok(Found::Tokens(logprob, last)) => {
            outcome.logprobs.extend(logprob);
            last
        }
        Ok(Found::Rewards(score, last)) => {
            outcome.scores.extend(score);
            last
        }
        Err(error) => {
            *outcome = nothing();
            Last::Failed(error)
        }
    };
    outcome.last = last;
}

/// Applies the head to `rows` `[R, hidden]` and reads each row for its chunk.
fn read_logits(head: &LanguageHead, rows: &Tensor, reads: &[Read], plan: &StepPlan) -> Result<Vec<Result<Found>>> {
    let logits = head.apply(rows)?;
    let (count, vocab) = logits.dims2()?;
    let logits = logits.flatten_all()?.to_vec1::<f32>()?;
    // A row takes as long as a small matrix product once the vocabulary is large.
    let found: Vec<OnceLock<Result<Found>>> = (0..count).map(|_| OnceLock::new()).collect();
    parallel::for_each(count, |index| {
        let row = &logits[index * vocab..(index + 1) * vocab];
        let read = &reads[index];
        let _ = found[index].set(read_tokens(row, read, &plan.chunks[read.chunk]));
    });
    let missing = || Err(Error::internal("a row of logits was not read"));
    Ok(found.into_iter().map(|cell| cell.into_inner().unwrap_or_else(missing)).collect())
}

fn read_tokens(row: &[f32], read: &Read, chunk: &Chunk) -> Result<Found> {
    let logprob = match (&chunk.rows, read.each) {
        (Rows::LogProbs { targets, top }, Some(index)) => Some(sampler::logprob(row, targets[index], *top)?),
        (Rows::Scores, _) => return Err(no_reward_head()),
        _ => None,
    };
    let last = match &chunk.want {
        Want::Token(draw) if read.last => {
            let (token, logprob) = sampler::draw(row, draw)?;
            Last::Token(token, logprob)
        }
        Want::Score => return Err(no_reward_head()),
        _ => Last::Nothing,
    };
    Ok(Found::Tokens(logprob, last))
}

fn read_rewards(head: &RewardHead, rows: &Tensor, reads: &[Read], plan: &StepPlan) -> Result<Vec<Result<Found>>> {
    let rewards = head.apply(rows)?.to_vec1::<f32>()?;
    let read_one = |(reward, read): (&f32, &Read)| {
        let chunk = &plan.chunks[read.chunk];
        if matches!(chunk.rows, Rows::LogProbs { .. }) || matches!(chunk.want, Want::Token(_)) {
            return Err(Error::invalid("model", "this model gives rewards and has no tokens to draw"));
        }
        if !reward.is_finite() {
            return Err(Error::Internal(format!("the model gave {reward} as a reward")));
        }
        let last = if read.last { Last::Score(*reward) } else { Last::Nothing };
        Ok(Found::Rewards(read.each.map(|_| *reward), last))
    };
    Ok(rewards.iter().zip(reads).map(read_one).collect())
}

fn no_reward_head() -> Error {
    Error::invalid("model", "this model generates text and gives no rewards")
}
