//! The tokenizer within a GGUF file: SentencePiece's pieces and scores, or a whole tokenizer.json.

use super::config::Metadata;
use super::header::Value;
use crate::checkpoint::facts::TokenizerFacts;
use crate::checkpoint::sentencepiece::{self, Algorithm, Kind, Model, Piece};
use crate::error::{Error, Result};

const TOKENS: &str = "tokenizer.ggml.tokens";
const SCORES: &str = "tokenizer.ggml.scores";
const TYPES: &str = "tokenizer.ggml.token_type";

/// The tokenizer in the form of tokenizer.json.
///
/// # Errors
/// [`Error::Unsupported`] for another kind than SentencePiece's, [`Error::Checkpoint`] for lists that do not fit each other.
pub(super) fn json(metadata: Metadata<'_>) -> Result<String> {
    if let Some(json) = metadata.text("tokenizer.huggingface.json")? {
        return Ok(json.to_owned());
    }
    match metadata.text("tokenizer.ggml.model")? {
        Some("llama") => {}
        other => {
            let other = other.unwrap_or("that is not named");
            let what = format!(
                "tokenizer.ggml.model {other}: only llama (SentencePiece) and tokenizer.huggingface.json are read"
            );
            return Err(Error::Unsupported(what));
        }
    }
    let pieces = pieces(metadata)?;
    let has_bytes = pieces.iter().any(|piece| piece.kind == Kind::Byte);
    let model = Model {
        pieces,
        algorithm: Algorithm::Bpe,
        byte_fallback: has_bytes,
        whitespace_as_suffix: metadata.flag("tokenizer.ggml.treat_whitespace_as_suffix")?.unwrap_or(false),
        charsmap: &[],
        add_dummy_prefix: metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true),
        remove_extra_whitespaces: metadata.flag("tokenizer.ggml.remove_extra_whitespaces")?.unwrap_or(false),
        escape_whitespaces: true,
        has_denormalizer: false,
    };
    sentencepiece::model_to_tokenizer_json(&model)
}

fn pieces(metadata: Metadata<'_>) -> Result<Vec<Piece<'_>>> {
    let list = |key: &str| {
        metadata.list(key)?.ok_or_else(|| Error::Checkpoint(format!("{key} is missing; convert the model again")))
    };
    let (tokens, scores, types) = (list(TOKENS)?, list(SCORES)?, list(TYPES)?);
    if scores.len() != tokens.len() || types.len() != tokens.len() {
        let (tokens, scores, types) = (tokens.len(), scores.len(), types.len());
        let what = format!("{tokens} {TOKENS}, {scores} {SCORES} and {types} {TYPES} do not fit each other");
        return Err(Error::Checkpoint(what));
    }
    let pieces = tokens.iter().zip(scores).zip(types).map(|((token, score), kind)| {
        let (Value::Text(text), Value::Real(score)) = (token, score) else {
            return Err(Error::Checkpoint(format!("{TOKENS} must be texts and {SCORES} real numbers")));
        };
        let number = match kind {
            Value::Signed(number) => u64::try_from(*number).ok(),
            Value::Unsigned(number) => Some(*number),
            _ => None,
        };
        let Some(number) = number else {
            return Err(Error::Checkpoint(format!("{TYPES} must be numbers above 0, not {kind:?}")));
        };
        Ok(Piece { text, score: *score as f32, kind: sentencepiece::kind(number)? })
    });
    pieces.collect()
}

/// What the metadata says about the tokenizer.
///
/// # Errors
/// [`Error::Checkpoint`] for a key of another kind, or the id of no token.
pub(super) fn facts(metadata: Metadata<'_>) -> Result<TokenizerFacts> {
    let token = |key: &str| -> Result<Option<String>> {
        let Some(id) = metadata.number(key)? else { return Ok(None) };
        let tokens = metadata.list(TOKENS)?.unwrap_or_default();
        match usize::try_from(id).ok().and_then(|id| tokens.get(id)) {
            Some(Value::Text(text)) => Ok(Some(text.clone())),
            _ => Err(Error::Checkpoint(format!("{key} is {id}, and there are {} tokens", tokens.len()))),
        }
    };
    let is_sentencepiece = metadata.text("tokenizer.ggml.model")? == Some("llama");
    Ok(TokenizerFacts {
        bos_token: token("tokenizer.ggml.bos_token_id")?,
        eos_token: token("tokenizer.ggml.eos_token_id")?,
        unk_token: token("tokenizer.ggml.unknown_token_id")?,
        pad_token: token("tokenizer.ggml.padding_token_id")?,
        add_bos_token: metadata.flag("tokenizer.ggml.add_bos_token")?.or(is_sentencepiece.then_some(true)),
        add_eos_token: metadata.flag("tokenizer.ggml.add_eos_token")?,
        chat_template: metadata.text("tokenizer.chat_template")?.map(str::to_owned),
    })
}
