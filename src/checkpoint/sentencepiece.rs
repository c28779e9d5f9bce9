//! SentencePiece models (tokenizer.model) rewritten as tokenizer.json, so that the `tokenizers` crate gives the ids
//! that SentencePiece itself gives. Only BPE models; what cannot be expressed and would change an id is refused, but
//! for the rarities that `to_tokenizer_json` lists.

use serde_json::{Value, json};

use crate::error::{Error, Result};

mod charsmap;
mod merges;
mod proto;

use charsmap::CharacterMap;
pub(super) use proto::{Algorithm, Kind, Model, Piece, kind};

/// SentencePiece's visible space, U+2581.
const SPACE: &str = "\u{2581}";
/// Where extra spaces are removed, decoding drops all that a text begins with.
const LEADING_SPACES_MAX: usize = 1 << 16;

/// Rewrites a SentencePiece BPE model.
///
/// Known to differ from SentencePiece: a text that is exactly one user-defined symbol gets no dummy prefix. Character
/// maps (not identity ones, which Mistral's and Llama's models have) are applied grapheme by grapheme, so replaced
/// characters with combining marks and keys of several letters come out otherwise, and a text of nothing but dropped
/// characters gets no dummy prefix. Decoding shows the unknown token by its name.
///
/// # Errors
/// [`Error::Checkpoint`] for a damaged model, [`Error::Unsupported`] for a sound one of another kind.
pub fn to_tokenizer_json(model: &[u8]) -> Result<String> {
    model_to_tokenizer_json(&Model::parse(model)?)
}

/// As [`to_tokenizer_json`], of a model that was read from elsewhere.
pub(super) fn model_to_tokenizer_json(model: &Model<'_>) -> Result<String> {
    refuse_others(model)?;
    let unknown = model.unknown()?;
    let vocab: serde_json::Map<String, Value> =
        model.pieces.iter().enumerate().map(|(id, piece)| (piece.text.to_owned(), json!(id))).collect();
    if vocab.len() != model.pieces.len() {
        return Err(Error::Checkpoint("tokenizer.model: two pieces have the same text".to_owned()));
    }
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(model),
        "normalizer": normalizer(model)?,
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": decoder(model),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            // SentencePiece joins neighbouring unknown characters into one token.
            "fuse_unk": true,
            "byte_fallback": model.byte_fallback,
            "ignore_merges": false,
            "vocab": vocab,
            "merges": merges::merges(&model.pieces)?,
        },
    });
    Ok(tokenizer.to_string())
}

fn refuse_others(model: &Model<'_>) -> Result<()> {
    let refused = |what: &str| Err(Error::Unsupported(format!("tokenizer.model: {what}; supply a tokenizer.json")));
    match model.algorithm {
        Algorithm::Bpe => {}
        Algorithm::Unigram => return refused("a SentencePiece unigram model (only BPE ones are converted)"),
        Algorithm::Other => {
            return refused("a SentencePiece model of words or characters (only BPE ones are converted)");
        }
    }
    if !model.escape_whitespaces {
        return refused("escape_whitespaces false is not supported");
    }
    if model.whitespace_as_suffix {
        return refused("treat_whitespace_as_suffix is not supported");
    }
    if model.has_denormalizer {
        return refused("a denormaliser is not supported");
    }
    Ok(())
}

/// Symbols that are found in the text before it is split: the user-defined ones always, control symbols only where the
/// caller wants special tokens parsed.
fn added_tokens(model: &Model<'_>) -> Vec<Value> {
    let added = |(id, piece): (usize, &proto::Piece<'_>)| {
        let special = match piece.kind {
            Kind::Unknown | Kind::Control => true,
            Kind::UserDefined => false,
            Kind::Normal | Kind::Byte | Kind::Unused => return None,
        };
        Some(json!({
            "id": id, "content": piece.text, "single_word": false, "lstrip": false, "rstrip": false,
            // User-defined symbols are looked for after normalising the whole text, which is given one dummy prefix.
            "normalized": !special, "special": special,
        }))
    };
    model.pieces.iter().enumerate().filter_map(added).collect()
}

fn normalizer(model: &Model<'_>) -> Result<Value> {
    let mut steps = Vec::new();
    if !model.charsmap.is_empty() {
        let map = CharacterMap::parse(model.charsmap)?;
        // The two are one grapheme, and of a grapheme that short only the beginning is replaced.
        let line_end = "\r\n";
        steps.push(json!({ "type": "Replace", "pattern": { "String": line_end }, "content": map.apply(line_end) }));
        steps.push(json!({ "type": "Precompiled", "precompiled_charsmap": charsmap::base64(model.charsmap) }));
    }
    if model.remove_extra_whitespaces {
        // At the end SentencePiece drops visible spaces too, at the beginning it does not.
        let spaces = format!(r"\A +|[ {SPACE}]+\z| +(?= )");
        steps.push(json!({ "type": "Replace", "pattern": { "Regex": spaces }, "content": "" }));
    }
    if model.add_dummy_prefix {
        steps.push(dummy_prefix(model));
    }
    steps.push(json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE }));
    Ok(json!({ "type": "Sequence", "normalizers": steps }))
}

/// The visible space before every text. Added tokens are normalised like texts, and must not get one: hence, where
/// there are user-defined symbols, the look-ahead.
fn dummy_prefix(model: &Model<'_>) -> Value {
    let symbols = model.pieces.iter().filter(|piece| piece.kind == Kind::UserDefined);
    let symbols: Vec<String> = symbols.map(|piece| escaped(piece.text)).collect();
    if symbols.is_empty() {
        return json!({ "type": "Prepend", "prepend": SPACE });
    }
    let start = format!(r"\A(?!(?:{})\z)", symbols.join("|"));
    json!({ "type": "Replace", "pattern": { "Regex": start }, "content": SPACE })
}

/// `text` as a regular expression that matches it alone; symbols are looked up with visible spaces turned back.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(2 * text.len());
    for c in text.chars() {
        if c.is_ascii() && !c.is_ascii_alphanumeric() {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

fn decoder(model: &Model<'_>) -> Value {
    let mut steps = vec![json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " })];
    if model.byte_fallback {
        steps.push(json!({ "type": "ByteFallback" }));
    }
    steps.push(json!({ "type": "Fuse" }));
    let stripped = match (model.remove_extra_whitespaces, model.add_dummy_prefix) {
        (true, _) => LEADING_SPACES_MAX,
        (false, true) => 1,
        (false, false) => 0,
    };
    if stripped > 0 {
        steps.push(json!({ "type": "Strip", "content": " ", "start": stripped, "stop": 0 }));
    }
    json!({ "type": "Sequence", "decoders": steps })
}
