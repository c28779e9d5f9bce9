//! What is asked of an engine and what it answers: plain data, no tensors and no text.
//! A reward is a generation of zero tokens read by another head.

use std::sync::Arc;

use tokio::sync::mpsc::Sender;

use crate::error::Error;

/// A token of the model's vocabulary.
pub type TokenId = u32;

/// One prompt and what to do with it. Dropping the receiver of `reply` cancels it within one step.
#[derive(Debug)]
pub struct Request {
    /// Token ids, at least one.
    pub prompt: Vec<TokenId>,
    /// Generate after it, or score it.
    pub task: Task,
    /// Where events go. Bounded: a reader that does not read pauses its own sequence only.
    pub reply: Sender<Event>,
}

/// What to do with the prompt.
#[derive(Debug, Clone)]
pub enum Task {
    /// Append tokens until a stop condition holds.
    Generate(Arc<SamplingParams>),
    /// Read the reward head.
    Score(ScoreRows),
}

/// Which positions of a scored sequence are reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScoreRows {
    /// The last token only.
    Last,
    /// Every token; [`Event::Scores`] precedes [`Event::Score`].
    All,
}

/// How the next token is chosen and when to stop. Neutral values switch a rule off.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 takes the most probable token.
    pub temperature: f32,
    /// Smallest set of most probable tokens whose mass reaches this; 1 is off.
    pub top_p: f32,
    /// Only this many most probable tokens; 0 is off.
    pub top_k: usize,
    /// Only tokens at least this fraction as probable as the most probable one; 0 is off.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output (CTRL, arXiv 1909.05858); 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from logits of tokens present in the output; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted once for every occurrence in the output; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Key of the counter-based generator; the counter is the position of the drawn token.
    pub seed: u64,
    /// Tokens to generate at most. 0 with `prompt_logprobs` only reads the prompt.
    pub max_tokens: usize,
    /// Tokens before which no stop token may be drawn.
    pub min_tokens: usize,
    /// Tokens that end the sequence (end-of-sequence included unless the caller ignores it).
    pub stop_token_ids: Vec<TokenId>,
    /// Report each drawn token's log-probability and this many alternatives.
    pub logprobs: Option<usize>,
    /// Report each prompt token's log-probability and this many alternatives. Switches prefix reuse off for this sequence.
    pub prompt_logprobs: Option<usize>,
}

impl Default for SamplingParams {
    /// Greedy, sixteen tokens, nothing reported.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            max_tokens: 16,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

impl SamplingParams {
    /// Whether drawing needs the tokens seen so far.
    pub fn needs_history(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// Log-probability of one token under the model's own distribution (before temperature, penalties and filters).
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogProb {
    /// The token.
    pub token: TokenId,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The most probable tokens, best first; as many as were asked for.
    pub top: Vec<(TokenId, f32)>,
}

/// What an engine answers, in order; `Done` or `Failed` comes last, exactly once.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Log-probabilities of prompt tokens 1.., sent once before the first token.
    Prompt(Vec<TokenLogProb>),
    /// One generated token; `logprob` where asked for.
    Token {
        /// The token.
        id: TokenId,
        /// Its log-probability, if requested.
        logprob: Option<TokenLogProb>,
    },
    /// Raw reward at every token.
    Scores(Vec<f32>),
    /// Raw reward at the last token.
    Score(f32),
    /// Finished.
    Done(Finish, Usage),
    /// This sequence failed; others are not affected.
    Failed(Error),
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// A stop token was drawn (it is the last token sent).
    Stop(TokenId),
    /// `max_tokens` were drawn, or the context is full.
    Length,
    /// The reward was read.
    Scored,
}

/// Token counts of one sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Prompt tokens whose cache entries were reused when the sequence was first admitted.
    pub cached_tokens: usize,
    /// Tokens drawn.
    pub completion_tokens: usize,
}
