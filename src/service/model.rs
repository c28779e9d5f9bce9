//! One served model: its name, its tokenizer and template, and the engine that runs it.

use std::sync::Arc;

use super::TokenId;
use crate::{
    engine::EngineHandle,
    text::{ChatTemplate, Tokenizer},
};

/// What a model's head gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The next token.
    Policy,
    /// A reward.
    Reward,
}

/// A model that this process serves.
#[derive(Debug)]
pub struct ServedModel {
    /// The name requests use.
    pub name: String,
    /// Other names for it.
    pub aliases: Vec<String>,
    /// What its head gives.
    pub kind: Kind,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Its chat template.
    pub template: Arc<ChatTemplate>,
    /// The engine that runs it, and no other model.
    pub engine: EngineHandle,
    /// Tokens of prompt and output together, at most.
    pub len_max: usize,
    /// Rows of its embedding: token ids are below this.
    pub vocab_size: usize,
    /// Whether a scored text ends with the end-of-sequence token unless the request says otherwise.
    pub append_eos: bool,
    /// Tokens that end a generation.
    pub eos_ids: Vec<TokenId>,
    /// When it was loaded, in unix seconds.
    pub created: u64,
}

impl ServedModel {
    /// Whether requests may call it `name`.
    pub fn is_called(&self, name: &str) -> bool {
        self.name == name || self.aliases.iter().any(|alias| alias == name)
    }
}
