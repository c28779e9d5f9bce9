//! Runs step plans: one forward pass over all chunks, then the head over the rows that are read.
//! Decides nothing about what runs; knows nothing of requests beyond the plan.

use std::sync::OnceLock;

use candle_core::Tensor;

use super::batch::{Bounds, ForwardBatch, Read};
use super::kv_cache::{KvCache, Paged};
use super::sampler;
use crate::engine::request::{TokenId, TokenLogProb};
use crate::engine::step::{Chunk, Executor, Last, Outcome, Rows, StepOutput, StepPlan, Want};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::heads::{Head, RewardHead};
use crate::ops::attention::inputs::Inputs;
use crate::ops::embed::select;
use crate::ops::logprobs::logprobs;
use crate::ops::replay::{Replays, Room};
use crate::ops::sample::{self, Drawn, Draws};
use crate::ops::{host, parallel};

/// Rows the head is applied to at once: for a vocabulary of 32,000 their logits are 32 MB, however long the prompt
/// whose log-probabilities are asked for.
const HEAD_ROWS_MAX: usize = 256;

/// A model, its cache and the arithmetic of one engine.
#[derive(Debug)]
pub struct Runner {
    model: Model,
    cache: KvCache,
    /// None where every step is computed anew.
    replays: Option<Replays>,
}

impl Runner {
    /// Runs `model` over `cache`; both live on one device. Where that is a GPU, steps of decoding are recorded and replayed.
    pub fn new(model: Model, cache: KvCache) -> Self {
        let Model { config, decoder, .. } = &model;
        let replays = Replays::new([config.heads, config.kv_heads], decoder.place().device());
        // Which experts compute a row is decided on the host.
        let replays = replays.filter(|_| config.experts.is_none());
        Self { model, cache, replays }
    }

    /// Computes every step anew.
    #[must_use]
    pub fn without_replays(self) -> Self {
        Self { replays: None, ..self }
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The cache.
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// Steps that were replayed so far.
    pub fn replayed(&self) -> u64 {
        self.replays.as_ref().map_or(0, Replays::replayed)
    }

    /// Hidden states `[R, hidden]` of the rows that are read.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn forward(&self, inputs: &Inputs<'_>) -> Result<Tensor> {
        forward(&self.model, &self.cache, inputs)
    }

    /// The outcomes of a step that is replayed; None if it has to be computed as any other.
    fn replay(
        &mut self,
        plan: &StepPlan,
        batch: &mut ForwardBatch,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<Option<StepOutput>> {
        let Self { model, cache, replays: Some(replays) } = self else { return Ok(None) };
        let Head::Language(head) = &model.head else { return Ok(None) };
        if !batch.is_one_row_each() || batch.tokens.len() > HEAD_ROWS_MAX {
            return Ok(None);
        }
        let mut draws = plain_draws(&batch.reads, plan, model.config.vocab);
        if draws.iter().any(Option::is_none) {
            return Ok(None);
        }
        let room = Room::of(draws.len(), batch.paged.contexts.iter().copied().max().unwrap_or(0));
        batch.fill_up(room.rows);
        draws.resize(room.rows, None);
        let rows: Vec<u32> = (0..room.rows as u32).collect();
        let words = replays.run(batch.integers(&rows, &draws), room, |inputs| {
            sample::draw(&head.apply(&forward(model, cache, inputs)?)?, &inputs.draws)
        })?;
        meanwhile();
        let drawn = sample::read(&words, &draws)?.into_iter().take(plan.chunks.len());
        // What is wrong with a row that is no distribution is told by computing the step again, which changes nothing.
        let outcomes: Option<_> = drawn.map(|drawn| Some(Outcome { last: drawn_token(drawn?), ..nothing() })).collect();
        Ok(outcomes.map(|outcomes| StepOutput { outcomes }))
    }

    fn compute(&self, plan: &StepPlan, batch: &ForwardBatch) -> Result<StepOutput> {
        let Model { config, decoder, .. } = &self.model;
        let rows: Vec<u32> = batch.reads.iter().map(|read| read.row as u32).collect();
        let draws = plain_draws(&batch.reads, plan, config.vocab);
        let heads = [config.heads, config.kv_heads];
        let inputs = Inputs::new(batch.integers(&rows, &draws), heads, decoder.place().device())?;
        let hidden = self.forward(&inputs)?;
        let mut output = StepOutput { outcomes: plan.chunks.iter().map(|_| nothing()).collect() };
        for (index, reads) in batch.reads.chunks(HEAD_ROWS_MAX).enumerate() {
            let first = index * HEAD_ROWS_MAX;
            let rows = hidden.narrow(0, first, reads.len())?;
            let found = match &self.model.head {
                Head::Language(head) => {
                    let draws = inputs.draws.narrow(first, reads.len())?;
                    read_logits(&head.apply(&rows)?, &draws, reads, plan)?
                }
                Head::Reward(head) => read_rewards(head, &rows, reads, plan)?,
            };
            for (read, found) in reads.iter().zip(found) {
                record(&mut output.outcomes[read.chunk], found);
            }
        }
        Ok(output)
    }
}

impl Executor for Runner {
    fn execute(&mut self, plan: &StepPlan, meanwhile: &mut dyn FnMut()) -> Result<StepOutput> {
        if plan.chunks.is_empty() {
            return Ok(StepOutput::default());
        }
        let bounds = Bounds::new(&self.model.config, &self.cache);
        let mut batch = ForwardBatch::new(plan, &bounds)?;
        match self.replay(plan, &mut batch, meanwhile)? {
            Some(output) => Ok(output),
            None => {
                meanwhile();
                self.compute(plan, &batch)
            }
        }
    }
}

fn forward(model: &Model, cache: &KvCache, inputs: &Inputs<'_>) -> Result<Tensor> {
    let paged = Paged { cache, inputs };
    let some = inputs.integers.reads.len() < inputs.integers.tokens.len();
    model.decoder.forward(&inputs.tokens, &inputs.positions, &paged, some.then_some(&inputs.reads))
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

/// How each row is drawn from where its logits are, if a token of it is all that is read.
fn plain_draws(reads: &[Read], plan: &StepPlan, vocab: usize) -> Vec<Option<sample::Draw>> {
    let plain = |read: &Read| match (&plan.chunks[read.chunk].want, read.each) {
        (Want::Token(draw), None) if read.last => sampler::plain(draw, vocab),
        _ => None,
    };
    reads.iter().map(plain).collect()
}

/// Reads each row of `logits` `[R, vocab]` for its chunk. Tokens and log-probabilities of known tokens are found where the logits are;
/// logits of other rows come to the host.
fn read_logits(logits: &Tensor, draws: &Draws<'_>, reads: &[Read], plan: &StepPlan) -> Result<Vec<Result<Found>>> {
    let vocab = logits.dim(1)?;
    let found = read_in_place(logits, draws, reads, plan)?;
    let left: Vec<usize> = (0..reads.len()).filter(|&index| found[index].is_none()).collect();
    let numbers = match left.len() {
        0 => Vec::new(),
        count if count == reads.len() => host::floats(logits)?,
        count => {
            let left = left.iter().map(|&index| index as u32).collect();
            host::floats(&select(logits, &Tensor::from_vec(left, count, logits.device())?)?)?
        }
    };
    let found: Vec<OnceLock<Result<Found>>> =
        found.into_iter().map(|found| found.map(Ok).map_or_else(OnceLock::new, OnceLock::from)).collect();
    // A row takes as long as a small matrix product once the vocabulary is large.
    parallel::for_each(left.len(), |index| {
        let (row, read) = (&numbers[index * vocab..(index + 1) * vocab], &reads[left[index]]);
        let _ = found[left[index]].set(read_tokens(row, read, &plan.chunks[read.chunk]));
    });
    let missing = || Err(Error::internal("a row of logits was not read"));
    Ok(found.into_iter().map(|cell| cell.into_inner().unwrap_or_else(missing)).collect())
}

/// What can be read off `logits` `[R, vocab]` without them; None for rows that need more, or that there is an error for.
fn read_in_place(logits: &Tensor, draws: &Draws<'_>, reads: &[Read], plan: &StepPlan) -> Result<Vec<Option<Found>>> {
    let drawn = match draws.rows().iter().all(Option::is_none) {
        true => vec![None; reads.len()],
        false => sample::read(&sample::draw(logits, draws)?, draws.rows())?,
    };
    let target = |read: &Read| match (&plan.chunks[read.chunk].rows, read.each) {
        (Rows::LogProbs { targets, top: 0 }, Some(index)) if !read.last => Some(targets[index]),
        _ => None,
    };
    let targets: Vec<_> = reads.iter().map(target).collect();
    let logprobs = logprobs(logits, &targets)?;
    let found = (0..reads.len()).map(|index| match (drawn[index], targets[index].zip(logprobs[index])) {
        (Some(drawn), _) => Some(Found::Tokens(None, drawn_token(drawn))),
        (None, Some((token, logprob))) => Some(Found::Tokens(Some(entry(token, logprob)), Last::Nothing)),
        (None, None) => None,
    });
    Ok(found.collect())
}

fn drawn_token(Drawn { token, logprob }: Drawn) -> Last {
    Last::Token(token, logprob.map(|logprob| entry(token, logprob)))
}

fn entry(token: TokenId, logprob: f32) -> TokenLogProb {
    TokenLogProb { token, logprob, top: Vec::new() }
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::collections::HashMap;
    use std::sync::Arc;

    use candle_core::Device;

    use super::*;
    use crate::engine::request::SamplingParams;
    use crate::engine::step::{BlockId, Draw, SequenceId};
    use crate::model::config::ModelConfig;
    use crate::model::weights::Weights;
    use crate::ops::sample::uniform;

    const VOCAB: u32 = 20;
    /// A sequence that holds this token has no numbers.
    const POISON: u32 = 19;

    fn tiny(architecture: &str) -> Runner {
        let json = format!(
            r#"{{"architectures": ["{architecture}"], "model_type": "mistral", "hidden_act": "silu", "hidden_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24,
            "vocab_size": {VOCAB}, "max_position_embeddings": 700, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "sliding_window": null, "tie_word_embeddings": false}}"#
        );
        let config = ModelConfig::parse(&json, None).unwrap();
        let mut counter = 0;
        let mut values = |count: usize| -> Vec<f32> {
            let first = counter;
            counter += count as u64;
            (first..counter).map(|i| uniform(1, i) as f32 - 0.5).collect()
        };
        let tensors: HashMap<String, Tensor> = config
            .weight_shapes()
            .into_iter()
            .map(|(name, shape)| {
                let mut values = values(shape.iter().product());
                if name == "model.embed_tokens.weight" {
                    values[POISON as usize * 16..].fill(f32::NAN);
                }
                (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
            })
            .collect();
        let model = Model::load(config, Weights::new(tensors), &Device::Cpu).unwrap();
        let cache = KvCache::new(&model, 100, 8).unwrap();
        assert_eq!(cache.bytes() as u64, 800 * model.config.kv_bytes_per_token(4));
        Runner::new(model, cache)
    }

    fn policy() -> Runner {
        tiny("MistralForCausalLM")
    }

    fn reward() -> Runner {
        tiny("EurusRewardModel")
    }

    /// A whole sequence in the blocks from `block` on.
    fn chunk(block: u32, tokens: &[u32], rows: Rows, want: Want) -> Chunk {
        let blocks = (block..block + tokens.len().div_ceil(8) as u32).map(BlockId).collect();
        Chunk { id: SequenceId(u64::from(block)), start: 0, tokens: tokens.to_vec(), blocks, rows, want }
    }

    fn token(params: SamplingParams) -> Want {
        let params = Arc::new(params);
        Want::Token(Draw { params, position: 0, generated_count: 0, history: Vec::new(), prompt_len: 0 })
    }

    fn greedy() -> Want {
        token(SamplingParams { logprobs: Some(2), ..SamplingParams::default() })
    }

    fn execute(runner: &mut Runner, chunks: &[Chunk]) -> Vec<Outcome> {
        runner.execute(&StepPlan { chunks: chunks.to_vec() }, &mut || ()).unwrap().outcomes
    }

    #[track_caller]
    fn check_failed(outcome: &Outcome, part: &str) {
        let Last::Failed(error) = &outcome.last else { panic!("{outcome:?}") };
        assert!(error.to_string().contains(part), "{error}");
        assert!(outcome.logprobs.is_empty() && outcome.scores.is_empty());
    }

    #[test]
    fn an_empty_plan_has_no_outcomes() {
        assert_eq!(execute(&mut policy(), &[]), []);
    }

    #[test]
    fn what_is_not_a_number_fails_its_own_sequence_only() {
        let logprobs = |targets: &[u32]| Rows::LogProbs { targets: targets.to_vec(), top: 1 };
        let sound = [chunk(0, &[1, 2, 3], logprobs(&[2, 3]), greedy()), chunk(1, &[4, 5], Rows::Nothing, greedy())];
        let broken = chunk(2, &[1, POISON, 3], logprobs(&[POISON, 3]), greedy());
        let together = execute(&mut policy(), &[sound[0].clone(), broken, sound[1].clone()]);
        check_failed(&together[1], "NaN");
        assert_eq!([together[0].clone(), together[2].clone()].to_vec(), execute(&mut policy(), &sound));

        let sound = chunk(0, &[1, 2, 3], Rows::Scores, Want::Score);
        let broken = chunk(1, &[1, POISON, 3], Rows::Scores, Want::Score);
        let together = execute(&mut reward(), &[broken, sound.clone()]);
        check_failed(&together[0], "NaN");
        assert_eq!(together[1..], execute(&mut reward(), &[sound]));
    }

    #[test]
    fn a_parameter_that_cannot_be_fails_its_own_sequence_only() {
        let params = SamplingParams { logit_bias: vec![(VOCAB, 1.0)], ..SamplingParams::default() };
        let chunks = [chunk(0, &[1], Rows::Nothing, token(params)), chunk(1, &[1], Rows::Nothing, greedy())];
        let outcomes = execute(&mut policy(), &chunks);
        check_failed(&outcomes[0], "outside the vocabulary");
        assert!(matches!(outcomes[1].last, Last::Token(..)));
    }

    #[test]
    fn each_head_refuses_what_only_the_other_gives() {
        let scores = chunk(0, &[1, 2], Rows::Scores, Want::Nothing);
        let score = chunk(1, &[1, 2], Rows::Nothing, Want::Score);
        let logprobs = chunk(2, &[1, 2], Rows::LogProbs { targets: vec![2], top: 0 }, Want::Nothing);
        let token = chunk(3, &[1, 2], Rows::Nothing, greedy());
        let outcomes = execute(&mut policy(), &[scores.clone(), score.clone(), logprobs.clone(), token.clone()]);
        check_failed(&outcomes[0], "gives no rewards");
        check_failed(&outcomes[1], "gives no rewards");
        assert!(outcomes[2].logprobs.len() == 1 && matches!(outcomes[3].last, Last::Token(_, Some(_))));
        let outcomes = execute(&mut reward(), &[scores, score, logprobs, token]);
        assert!(outcomes[0].scores.len() == 2 && outcomes[0].last == Last::Nothing);
        assert_eq!(outcomes[1].last, Last::Score(outcomes[0].scores[1]));
        check_failed(&outcomes[2], "no tokens to draw");
        check_failed(&outcomes[3], "no tokens to draw");
    }

    #[test]
    fn long_chunks_are_read_in_pieces() {
        let tokens: Vec<u32> = (0..HEAD_ROWS_MAX as u32 + 70).map(|i| i * i % 19).collect();
        let targets = tokens[1..].to_vec();
        let whole = chunk(0, &tokens, Rows::LogProbs { targets: targets.clone(), top: 2 }, greedy());
        let mut runner = policy();
        let outcome = execute(&mut runner, std::slice::from_ref(&whole)).remove(0);
        assert_eq!(outcome.logprobs.iter().map(|entry| entry.token).collect::<Vec<_>>(), targets);
        let mut found = Vec::new();
        for start in (0..tokens.len()).step_by(37) {
            let end = (start + 37).min(tokens.len());
            let rows = Rows::LogProbs { targets: targets[start..end.min(targets.len())].to_vec(), top: 2 };
            let piece = Chunk { start, tokens: tokens[start..end].to_vec(), rows, ..whole.clone() };
            let outcome = execute(&mut runner, &[piece]).remove(0);
            found.extend(outcome.logprobs);
        }
        assert_eq!(found, outcome.logprobs);
    }
}
