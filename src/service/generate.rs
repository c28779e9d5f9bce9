//! Generating: a checked request becomes n engine requests, whose answers are read as one stream of updates.

use std::sync::Arc;

use tokio::sync::mpsc::{Receiver, channel};

pub use super::generation::Generation;
use super::{
    Prompt, ServedModel, Service, TokenId,
    prompt::{self, Prepared},
    validate,
};
pub use crate::text::stream::StopText;
use crate::{
    engine::request::{Event, Request, SamplingParams, Task},
    error::Result,
};

/// Events of one sequence that may wait for their reader; a sequence whose reader lags further pauses.
const EVENTS_MAX: usize = 64;

/// Whether the model's end-of-sequence tokens end a candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Eos {
    /// They do.
    #[default]
    Stops,
    /// They are tokens like others (`ignore_eos`).
    Ignored,
}

/// What to generate. All ranges are checked by [`Service::generate`], which names the field that is wrong.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateRequest {
    /// A policy; none means the first one served.
    pub model: Option<String>,
    /// What to go on from.
    pub prompt: Prompt,
    /// Candidates; candidate i draws with seed + i.
    pub n: usize,
    /// Tokens of each candidate at most; none means the rest of the context. 0 only reads the prompt.
    pub max_tokens: Option<usize>,
    /// Tokens before which no stop token is drawn.
    pub min_tokens: usize,
    /// 0 to 2; 0 takes the most probable token.
    pub temperature: f32,
    /// Above 0, at most 1.
    pub top_p: f32,
    /// 0 is off.
    pub top_k: usize,
    /// 0 to 1; 0 is off.
    pub min_p: f32,
    /// Above 0, at most 10; 1 is off.
    pub repetition_penalty: f32,
    /// -2 to 2; 0 is off.
    pub presence_penalty: f32,
    /// -2 to 2; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens, -100 to 100.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Seed of candidate 0; without one a random seed below 2^53 is drawn, and the generation tells it.
    pub seed: Option<u64>,
    /// Strings that end a candidate.
    pub stop: Vec<String>,
    /// Tokens that end a candidate, besides end of sequence.
    pub stop_token_ids: Vec<TokenId>,
    /// Whether what stopped a candidate is part of its text.
    pub stop_text: StopText,
    /// Whether end of sequence ends a candidate.
    pub eos: Eos,
    /// Report the log-probability of every drawn token and this many alternatives.
    pub logprobs: Option<usize>,
    /// Report the log-probability of every prompt token and this many alternatives.
    pub prompt_logprobs: Option<usize>,
}

impl GenerateRequest {
    /// One candidate at temperature 1 with every rule off, as long as the context allows.
    pub fn new(prompt: Prompt) -> Self {
        Self {
            model: None,
            prompt,
            n: 1,
            max_tokens: None,
            min_tokens: 0,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            stop_text: StopText::Cut,
            eos: Eos::Stops,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

impl Service {
    /// Checks, tokenises (on the blocking pool) and submits a request.
    ///
    /// # Errors
    /// Invalid naming the field; NotFound for an unknown model; Overloaded if the engine cannot take all candidates;
    /// Unavailable if it is gone.
    pub async fn generate(&self, request: GenerateRequest) -> Result<Generation> {
        validate::count("n", request.n, self.limits().n_max)?;
        self.start(request).await
    }

    /// The same without a limit on `n`, which the caller has checked.
    pub(super) async fn start(&self, request: GenerateRequest) -> Result<Generation> {
        let model = Arc::clone(self.policy(request.model.as_deref())?);
        validate::check(&request, self.limits(), model.vocab_size)?;
        let (request, prepared) = {
            let (model, limits) = (Arc::clone(&model), self.limits().clone());
            self.off_thread(move || {
                let prepared = prompt::prepare(&model, &request.prompt, &limits)?;
                Ok((request, prepared))
            })
            .await?
        };
        let max_tokens = validate::max_tokens(&request, prepared.ids.len(), model.len_max)?;
        let seed = request.seed.unwrap_or_else(random_seed);
        let mut sources = Vec::with_capacity(request.n);
        for index in 0..request.n {
            let params = params(&request, &model, Draw { index, seed, max_tokens });
            sources.push(submit(&model, &prepared, params)?);
        }
        Ok(Generation::new(model, &request, seed, prepared, sources))
    }
}

/// What differs between the candidates of a request, or is not in it as such.
struct Draw {
    index: usize,
    seed: u64,
    max_tokens: usize,
}

fn params(request: &GenerateRequest, model: &ServedModel, draw: Draw) -> SamplingParams {
    let mut stop_token_ids = request.stop_token_ids.clone();
    if request.eos == Eos::Stops {
        stop_token_ids.extend(model.eos_ids.iter().filter(|id| !request.stop_token_ids.contains(id)));
    }
    SamplingParams {
        temperature: request.temperature,
        top_p: request.top_p,
        top_k: request.top_k,
        min_p: request.min_p,
        repetition_penalty: request.repetition_penalty,
        presence_penalty: request.presence_penalty,
        frequency_penalty: request.frequency_penalty,
        logit_bias: request.logit_bias.clone(),
        seed: draw.seed.wrapping_add(draw.index as u64),
        max_tokens: draw.max_tokens,
        min_tokens: request.min_tokens,
        stop_token_ids,
        logprobs: request.logprobs,
        // The prompt is the same for all candidates, so one reads it for all.
        prompt_logprobs: request.prompt_logprobs.filter(|_| draw.index == 0),
    }
}

/// Hands one candidate to the engine, unless there is nothing to compute.
fn submit(model: &ServedModel, prompt: &Prepared, params: SamplingParams) -> Result<Option<Receiver<Event>>> {
    if params.max_tokens == 0 && params.prompt_logprobs.is_none() {
        return Ok(None);
    }
    let (reply, events) = channel(EVENTS_MAX);
    model.engine.submit(Request { prompt: prompt.ids.clone(), task: Task::Generate(Arc::new(params)), reply })?;
    Ok(Some(events))
}

fn random_seed() -> u64 {
    let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
    // Six bits of a version 4 identifier are fixed; mixing both halves leaves none fixed in the result.
    (high ^ low.rotate_left(32)) % validate::SEED_END
}
