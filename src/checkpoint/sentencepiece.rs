//! SentencePiece models (tokenizer.model) rewritten as tokenizer.json.

use crate::error::{Error, Result};

/// Rewrites a SentencePiece model.
///
/// # Errors
/// [`Error::Checkpoint`] for damaged models.
pub fn to_tokenizer_json(_model: &[u8]) -> Result<String> {
    Err(Error::Unsupported("tokenizer.model".to_owned()))
}
