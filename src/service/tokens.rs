//! Tokenising and detokenising as use cases of their own.

use std::sync::Arc;

use super::{Prompt, ServedModel, Service, TokenId};
use crate::error::{Error, Result};

/// Whether BOS stands before tokenised text. Rendered conversations have theirs in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SpecialTokens {
    /// As a prompt would have it.
    #[default]
    Add,
    /// The text alone.
    Omit,
}

/// Tokens of a text.
#[derive(Debug, Clone)]
pub struct Tokens {
    /// Whose tokenizer.
    pub model: Arc<ServedModel>,
    /// The tokens.
    pub ids: Vec<TokenId>,
    /// The text of each.
    pub texts: Vec<String>,
}

/// What a client needs to know about a tokenizer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizerInfo {
    /// Text of the beginning-of-sequence token.
    pub bos_token: Option<String>,
    /// Text of the end-of-sequence token.
    pub eos_token: Option<String>,
    /// Ids it can give.
    pub vocab_size: usize,
    /// Name of the chat template.
    pub template: String,
    /// Source of the chat template.
    pub template_source: String,
    /// Tokens of the context.
    pub len_max: usize,
}

impl Service {
    /// The tokens of a prompt, by the tokenizer of `model` (of either kind).
    ///
    /// # Errors
    /// Invalid naming the field; NotFound for an unknown model.
    pub async fn tokenize(&self, _model: Option<&str>, _prompt: Prompt, _special: SpecialTokens) -> Result<Tokens> {
        Err(Error::internal("not built yet"))
    }

    /// The text of tokens, special ones included.
    ///
    /// # Errors
    /// Invalid in `tokens`; NotFound for an unknown model.
    pub fn detokenize(&self, _model: Option<&str>, _ids: &[TokenId]) -> Result<String> {
        Err(Error::internal("not built yet"))
    }

    /// What a client needs to know about the tokenizer of `model`.
    ///
    /// # Errors
    /// NotFound for an unknown model.
    pub fn tokenizer_info(&self, _model: Option<&str>) -> Result<TokenizerInfo> {
        Err(Error::internal("not built yet"))
    }
}
