//! Scoring: texts, conversations or ids in, raw rewards out, in the order of the inputs.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::{Message, ServedModel, Service, TokenId, Usage};
use crate::error::{Error, Result};

/// One thing to score.
#[derive(Debug, Clone, PartialEq)]
pub enum ScoreInput {
    /// A conversation that ends with the assistant's turn, rendered by the reward model's template.
    Messages(Vec<Message>),
    /// A conversation that asks, and the assistant's answer.
    PromptAndCompletion {
        /// The conversation before the answer; one user message for a plain prompt.
        prompt: Vec<Message>,
        /// The answer.
        completion: String,
    },
    /// Rendered text without BOS; special tokens in it are parsed.
    Text(String),
    /// Token ids, taken as they are.
    Ids(Vec<TokenId>),
}

/// Which rewards are returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Returns {
    /// The one at the last token.
    #[default]
    Last,
    /// The one at every token.
    All,
}

/// What happens to an input longer than the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Truncate {
    /// It is refused.
    #[default]
    Error,
    /// The oldest tokens after BOS are dropped.
    Left,
    /// The end is dropped.
    Right,
}

/// What to score.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ScoreRequest {
    /// A reward model; none means the first one served.
    pub model: Option<String>,
    /// What to score.
    pub inputs: Vec<ScoreInput>,
    /// Further variables of the template.
    pub kwargs: Map<String, Value>,
    /// Whether each sequence ends with end of sequence; none means what the checkpoint says. Never doubled.
    pub append_eos: Option<bool>,
    /// Which rewards are returned.
    pub returns: Returns,
    /// What happens to inputs that are too long.
    pub truncate: Truncate,
}

/// One reward.
#[derive(Debug, Clone, PartialEq)]
pub struct Reward {
    /// Which input.
    pub index: usize,
    /// Raw value of the head at the last token.
    pub reward: f32,
    /// Raw value at every token, where asked for.
    pub all: Option<Vec<f32>>,
    /// Tokens read.
    pub tokens: usize,
    /// The token at which the reward was read.
    pub last_token_id: TokenId,
    /// Whether tokens were dropped.
    pub truncated: bool,
}

/// The rewards of one request.
#[derive(Debug, Clone)]
pub struct Rewards {
    /// The reward model.
    pub model: Arc<ServedModel>,
    /// The chat template that rendered the inputs; none where all were rendered text or ids.
    pub template: Option<String>,
    /// In the order of the inputs.
    pub data: Vec<Reward>,
    /// Tokens of all inputs.
    pub usage: Usage,
}

impl Service {
    /// Scores all inputs of a request.
    ///
    /// # Errors
    /// Invalid naming the field; NotFound for an unknown model; Overloaded or Unavailable as the engine says.
    pub async fn score(&self, _request: ScoreRequest) -> Result<Rewards> {
        Err(Error::internal("not built yet"))
    }
}
