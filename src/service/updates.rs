//! What a generation yields: plain data, token texts resolved.

use super::{TokenId, Usage};
use crate::{engine::request::TokenLogProb, text::Tokenizer};

/// Stands for a probability of zero, so that every log-probability is a JSON number.
const LOGPROB_MIN: f32 = -9999.0;

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

impl TokenText {
    /// Looks a token up.
    pub(super) fn new(tokenizer: &Tokenizer, id: TokenId) -> Self {
        // A model may have more rows than its tokenizer has tokens; those stand for nothing.
        let bytes = tokenizer.token_bytes(id).unwrap_or_default();
        Self { id, text: String::from_utf8_lossy(&bytes).into_owned(), bytes }
    }
}

impl TokenInfo {
    /// What the engine said of a token, with its text.
    pub(super) fn new(tokenizer: &Tokenizer, row: &TokenLogProb) -> Self {
        let top = |&(id, logprob): &(TokenId, f32)| (TokenText::new(tokenizer, id), logprob.max(LOGPROB_MIN));
        Self {
            token: TokenText::new(tokenizer, row.token),
            logprob: Some(row.logprob.max(LOGPROB_MIN)),
            top: row.top.iter().map(top).collect(),
        }
    }

    /// A token that nothing predicted.
    pub(super) fn unknown(tokenizer: &Tokenizer, id: TokenId) -> Self {
        Self { token: TokenText::new(tokenizer, id), logprob: None, top: Vec::new() }
    }
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

/// Puts the updates of a generation together again.
pub(super) struct Collector {
    seed: u64,
    prompt: Vec<TokenInfo>,
    partial: Vec<Delta>,
}

impl Collector {
    /// For `count` candidates, the first drawn with `seed`.
    pub(super) fn new(count: usize, seed: u64) -> Self {
        let empty = |index| Delta { index, text: String::new(), ids: Vec::new(), logprobs: Vec::new() };
        Self { seed, prompt: Vec::new(), partial: (0..count).map(empty).collect() }
    }

    /// Takes one update; gives the candidate that it finished.
    pub(super) fn take(&mut self, update: Update) -> Option<Candidate> {
        match update {
            Update::Prompt(tokens) => self.prompt = tokens,
            Update::Delta(delta) => {
                let partial = &mut self.partial[delta.index];
                partial.text.push_str(&delta.text);
                partial.ids.extend(delta.ids);
                partial.logprobs.extend(delta.logprobs);
            }
            Update::Finished(finished) => return Some(self.finish(finished)),
        }
        None
    }

    /// The tokens of the prompt, where they were asked for.
    pub(super) fn into_prompt(self) -> Vec<TokenInfo> {
        self.prompt
    }

    fn finish(&mut self, finished: Finished) -> Candidate {
        let Finished { index, reason, stop_reason, usage } = finished;
        let partial = &mut self.partial[index];
        let logprobs = std::mem::take(&mut partial.logprobs);
        Candidate {
            index,
            seed: self.seed.wrapping_add(index as u64),
            text: std::mem::take(&mut partial.text),
            ids: std::mem::take(&mut partial.ids),
            mean_logprob: mean(&logprobs),
            logprobs,
            finish: reason,
            stop_reason,
            usage,
        }
    }
}

/// Mean log-probability; none of no tokens.
fn mean(logprobs: &[TokenInfo]) -> Option<f64> {
    let sum: f64 = logprobs.iter().filter_map(|info| info.logprob).map(f64::from).sum();
    (!logprobs.is_empty()).then(|| sum / logprobs.len() as f64)
}
