//! What a generation yields: plain data, token texts resolved.

use super::{TokenId, Usage};

/// A token and what it stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenText {
    /// The token.
    pub id: TokenId,
    /// Its text; bytes that are no character by themselves show as U+FFFD.
    pub text: String,
    /// Its bytes, exactly.
    pub bytes: Vec<u8>,
}

/// A token's log-probability under the model's own distribution. Values are finite: minus infinity shows as -9999.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenInfo {
    /// The token.
    pub token: TokenText,
    /// Natural logarithm of its probability; `None` only for the first token of a prompt.
    pub logprob: Option<f32>,
    /// The most probable tokens, best first; as many as were asked for.
    pub top: Vec<(TokenText, f32)>,
}

/// Why a candidate ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// End of sequence, a stop token or a stop string.
    Stop,
    /// `max_tokens` or the context is used up.
    Length,
}

impl FinishReason {
    /// `"stop"` or `"length"`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// Which of the request's own stop conditions ended a candidate; end of sequence is none of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// One of `stop`.
    Text(String),
    /// One of `stop_token_ids`.
    Token(TokenId),
}

/// The next piece of one candidate: one token as a rule; its text may be empty while characters or stop strings are undecided.
#[derive(Debug, Clone, PartialEq)]
pub struct Delta {
    /// Which candidate.
    pub index: usize,
    /// Text to append.
    pub text: String,
    /// Tokens drawn, the ending one included (its text is not part of `text`).
    pub ids: Vec<TokenId>,
    /// One for each of `ids` where log-probabilities were asked for, else empty.
    pub logprobs: Vec<TokenInfo>,
}

/// The end of one candidate.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    /// Which candidate.
    pub index: usize,
    /// Why.
    pub reason: FinishReason,
    /// The request's own stop condition, where one did it.
    pub stop_reason: Option<StopReason>,
    /// Tokens of this candidate. After a stop string `cached_tokens` is 0: the engine was not asked any more.
    pub usage: Usage,
}

/// What a generation yields, in the order in which it happens.
#[derive(Debug, Clone, PartialEq)]
pub enum Update {
    /// Every token of the prompt; once, before everything else, only where `prompt_logprobs` was asked for.
    Prompt(Vec<TokenInfo>),
    /// The next piece of one candidate.
    Delta(Delta),
    /// The end of one candidate.
    Finished(Finished),
}

/// One finished candidate.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Which one, from 0.
    pub index: usize,
    /// The seed that draws it again.
    pub seed: u64,
    /// Its text.
    pub text: String,
    /// Tokens drawn, the ending one included.
    pub ids: Vec<TokenId>,
    /// One for each of `ids` where log-probabilities were asked for, else empty.
    pub logprobs: Vec<TokenInfo>,
    /// Mean log-probability of `ids`, where log-probabilities were asked for.
    pub mean_logprob: Option<f64>,
    /// Why it ended.
    pub finish: FinishReason,
    /// The request's own stop condition, where one did it.
    pub stop_reason: Option<StopReason>,
    /// Its tokens.
    pub usage: Usage,
}

/// All candidates of a generation, by index.
#[derive(Debug, Clone, PartialEq)]
pub struct Completed {
    /// Every token of the prompt where `prompt_logprobs` was asked for, else empty.
    pub prompt: Vec<TokenInfo>,
    /// The candidates, by index.
    pub candidates: Vec<Candidate>,
}

/// Tokens of several candidates of one prompt: the prompt counts once.
pub fn total_usage(candidates: &[Candidate]) -> Usage {
    let usages = || candidates.iter().map(|candidate| candidate.usage);
    Usage {
        prompt_tokens: usages().map(|usage| usage.prompt_tokens).max().unwrap_or(0),
        cached_tokens: candidates.first().map_or(0, |first| first.usage.cached_tokens),
        completion_tokens: usages().map(|usage| usage.completion_tokens).sum(),
    }
}
