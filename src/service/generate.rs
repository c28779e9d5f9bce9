//! Generating: a checked request becomes n engine requests, whose answers are read as one stream of updates.

use std::sync::Arc;

use super::{
    Prompt, ServedModel, Service, TokenId,
    updates::{Completed, Update},
};
use crate::error::{Error, Result};

/// Whether a stop string is part of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StopText {
    /// The output ends before it.
    #[default]
    Cut,
    /// The output ends with it (`include_stop_str_in_output`); the text of a stop token is kept too.
    Keep,
}

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

/// A running generation. Dropping it cancels every candidate within one step.
#[derive(Debug)]
pub struct Generation {
    model: Arc<ServedModel>,
    seed: u64,
    prompt_ids: Vec<TokenId>,
    prompt_text: String,
    template: Option<String>,
}

impl Generation {
    /// The policy that runs.
    pub fn model(&self) -> &Arc<ServedModel> {
        &self.model
    }

    /// The seed of candidate 0.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt_ids.len()
    }

    /// The prompt as the model sees it.
    pub fn prompt_ids(&self) -> &[TokenId] {
        &self.prompt_ids
    }

    /// The prompt as text: as given, as rendered, or decoded from ids.
    pub fn prompt_text(&self) -> &str {
        &self.prompt_text
    }

    /// The chat template that rendered the prompt; none for text and ids.
    pub fn template(&self) -> Option<&str> {
        self.template.as_deref()
    }

    /// The next update of any candidate, as it happens; `None` after the last one or after an error.
    pub async fn next(&mut self) -> Option<Result<Update>> {
        None
    }

    /// Everything, once all candidates have ended.
    ///
    /// # Errors
    /// The first failure of a candidate; the others are cancelled.
    pub async fn collect(self) -> Result<Completed> {
        Err(Error::internal("not built yet"))
    }
}

impl Service {
    /// Checks, tokenises (on the blocking pool) and submits a request.
    ///
    /// # Errors
    /// Invalid naming the field; NotFound for an unknown model; Overloaded if the engine cannot take all candidates;
    /// Unavailable if it is gone.
    pub async fn generate(&self, _request: GenerateRequest) -> Result<Generation> {
        Err(Error::internal("not built yet"))
    }
}
