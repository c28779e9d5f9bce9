//! Tokenising and detokenising as use cases of their own.

use std::sync::Arc;

use super::{Prompt, ServedModel, Service, TokenId, prompt, updates::TokenText};
use crate::{
    error::Result,
    text::tokenizer::{Bos, Special, SpecialText},
};

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
    /// Whether BOS is put in front of text.
    pub adds_bos: bool,
    /// Ids it can give.
    pub vocab_size: usize,
    /// Name of the chat template.
    pub template: String,
    /// Tokens of the context.
    pub len_max: usize,
}

impl Service {
    /// The tokens of a prompt, by the tokenizer of `model` (of either kind).
    ///
    /// # Errors
    /// Invalid naming the field; NotFound for an unknown model.
    pub async fn tokenize(&self, model: Option<&str>, prompt: Prompt, special: SpecialTokens) -> Result<Tokens> {
        let model = Arc::clone(self.model(model)?);
        let limits = self.limits().clone();
        self.off_thread(move || {
            let ids = match (&prompt, special) {
                (Prompt::Text(text), SpecialTokens::Omit) => {
                    prompt::bytes(prompt.field(), text.len(), &limits)?;
                    let ids = model.tokenizer.encode(text, Special::Parse, Bos::Omit);
                    ids.map_err(|error| prompt::blame(error, prompt.field()))?
                }
                (Prompt::Text(text), SpecialTokens::Add) if text.is_empty() => {
                    prompt::encode(&model, text, prompt.field())?
                }
                _ => prompt::prepare(&model, &prompt, &limits)?.ids,
            };
            let text = |&id: &TokenId| TokenText::new(&model.tokenizer, id).text;
            let texts = ids.iter().map(text).collect();
            Ok(Tokens { model, ids, texts })
        })
        .await
    }

    /// The text of tokens, special ones included.
    ///
    /// # Errors
    /// Invalid in `tokens`; NotFound for an unknown model.
    pub fn detokenize(&self, model: Option<&str>, ids: &[TokenId]) -> Result<String> {
        let model = self.model(model)?;
        prompt::bytes("tokens", ids.len(), self.limits())?;
        model.tokenizer.decode(ids, SpecialText::Show).map_err(|error| prompt::blame(error, "tokens"))
    }

    /// What a client needs to know about the tokenizer of `model`.
    ///
    /// # Errors
    /// NotFound for an unknown model.
    pub fn tokenizer_info(&self, model: Option<&str>) -> Result<TokenizerInfo> {
        let model = self.model(model)?;
        let tokenizer = &model.tokenizer;
        Ok(TokenizerInfo {
            bos_token: tokenizer.bos_text().map(str::to_string),
            eos_token: tokenizer.eos_text().map(str::to_string),
            adds_bos: tokenizer.adds_bos(),
            vocab_size: model.vocab_size,
            template: model.template.name().to_string(),
            len_max: model.len_max,
        })
    }
}
