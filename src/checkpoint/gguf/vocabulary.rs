//! A tokenizer as the metadata of a GGUF file: whole, as tokenizer.json, which this program prefers, and in the lists from which
//! llama.cpp builds its own, where that would split texts alike.

use std::collections::HashMap;

use serde_json::Value as Json;

use super::config::EOS_IDS;
use super::header::{Header, Value};
use crate::checkpoint::sentencepiece::Model;
use crate::checkpoint::{Checkpoint, Files, TOKENIZER_MODEL};
use crate::error::{Error, Result};

/// The types of tokens, by SentencePiece's numbers.
mod kind {
    pub(super) const NORMAL: i64 = 1;
    pub(super) const UNKNOWN: i64 = 2;
    pub(super) const CONTROL: i64 = 3;
    pub(super) const USER_DEFINED: i64 = 4;
    pub(super) const UNUSED: i64 = 5;
    pub(super) const BYTE: i64 = 6;
}

/// What llama.cpp's converter gives added tokens and rows of the embedding without a token.
const SCORE_OF_OTHERS: f32 = -10_000.0;

/// How a tokenizer works, as far as llama.cpp knows such a kind.
enum Algorithm {
    /// Pieces are joined by their scores.
    SentencePiece { scores: Vec<f32>, space_prefix: bool },
    /// Bytes are joined by rules, within what a pattern of this name cuts.
    Bytes { pre: &'static str, merges: Vec<String> },
    /// In a way of its own: llama.cpp takes token ids.
    Other,
}

/// The keys of the tokenizer of `checkpoint`.
///
/// # Errors
/// If its files are damaged.
pub(super) fn metadata(checkpoint: &Checkpoint) -> Result<Vec<(String, Value)>> {
    if let Files::Gguf { path, .. } = &checkpoint.files {
        let own = Header::open(path)?.metadata.into_iter();
        return Ok(own.filter(|(key, _)| key.starts_with("tokenizer.") || key == EOS_IDS).collect());
    }
    let json: Json = serde_json::from_str(&checkpoint.tokenizer_json)
        .map_err(|error| Error::Checkpoint(format!("tokenizer.json: {error}")))?;
    let (texts, kinds) = tokens(&json, checkpoint.config.vocab);
    let mut all = Vec::new();
    let mut put = |key: &str, value: Value| all.push((format!("tokenizer.ggml.{key}"), value));
    match algorithm(checkpoint, &json, &texts)? {
        Algorithm::SentencePiece { scores, space_prefix } => {
            put("model", Value::Text("llama".to_owned()));
            put("scores", Value::List(scores.into_iter().map(|score| Value::Real(f64::from(score))).collect()));
            put("add_space_prefix", Value::Flag(space_prefix));
        }
        Algorithm::Bytes { pre, merges } => {
            put("model", Value::Text("gpt2".to_owned()));
            put("pre", Value::Text(pre.to_owned()));
            put("merges", Value::List(merges.into_iter().map(Value::Text).collect()));
        }
        Algorithm::Other => {
            tracing::warn!(
                "{}: llama.cpp has no tokenizer like this one, it will take token ids only",
                checkpoint.name
            );
            put("model", Value::Text("none".to_owned()));
        }
    }
    put("tokens", Value::List(texts.into_iter().map(Value::Text).collect()));
    put("token_type", Value::List(kinds.into_iter().map(Value::Signed).collect()));
    specials(checkpoint, &mut put)?;
    all.extend(other_ends(checkpoint)?);
    if let Some(template) = &checkpoint.tokenizer_config.chat_template {
        all.push(("tokenizer.chat_template".to_owned(), Value::Text(template.clone())));
    }
    all.push(("tokenizer.huggingface.json".to_owned(), Value::Text(checkpoint.tokenizer_json.clone())));
    Ok(all)
}

/// Text and kind of every row of the embedding.
fn tokens(json: &Json, rows: usize) -> (Vec<String>, Vec<i64>) {
    let mut texts: Vec<String> = (0..rows).map(|id| format!("[PAD{id}]")).collect();
    let mut kinds = vec![kind::UNUSED; rows];
    let mut put = |id: Option<u64>, text: &str, kind: i64| {
        if let Some(id) = id.and_then(|id| usize::try_from(id).ok()).filter(|id| *id < rows) {
            (texts[id], kinds[id]) = (text.to_owned(), kind);
        }
    };
    let falls_back = json["model"]["byte_fallback"] == true;
    for (text, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
        let is_byte = falls_back && text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
        put(id.as_u64(), text, if is_byte { kind::BYTE } else { kind::NORMAL });
    }
    let unknown = &json["model"]["unk_token"];
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        let kind = match token["special"] == true {
            true if token["content"] == *unknown => kind::UNKNOWN,
            true => kind::CONTROL,
            false => kind::USER_DEFINED,
        };
        put(token["id"].as_u64(), token["content"].as_str().unwrap_or_default(), kind);
    }
    (texts, kinds)
}

fn algorithm(checkpoint: &Checkpoint, json: &Json, texts: &[String]) -> Result<Algorithm> {
    if json["model"]["type"] != "BPE" {
        return Ok(Algorithm::Other);
    }
    let merges = merges(json);
    if json["model"]["byte_fallback"] != true {
        return Ok(match pattern(json, merges.is_empty()) {
            Some(pre) => {
                let merges = merges.into_iter().map(|(left, right)| format!("{left} {right}")).collect();
                Algorithm::Bytes { pre, merges }
            }
            None => Algorithm::Other,
        });
    }
    if let Some(bytes) = checkpoint.file(TOKENIZER_MODEL)? {
        let model = Model::parse(&bytes)?;
        let agrees = model.pieces.iter().zip(texts).all(|(piece, text)| piece.text == text);
        if agrees && model.pieces.len() <= texts.len() {
            let mut scores: Vec<f32> = model.pieces.iter().map(|piece| piece.score).collect();
            scores.resize(texts.len(), SCORE_OF_OTHERS);
            return Ok(Algorithm::SentencePiece { scores, space_prefix: model.add_dummy_prefix });
        }
    }
    // A piece that an earlier rule makes has the greater score.
    let mut ranks: HashMap<String, usize> = HashMap::new();
    for (rank, (left, right)) in merges.iter().enumerate() {
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    let score = |text: &String| ranks.get(text).map_or(SCORE_OF_OTHERS, |rank| -(*rank as f32));
    Ok(Algorithm::SentencePiece { scores: texts.iter().map(score).collect(), space_prefix: has_space_prefix(json) })
}

/// The rules of a tokenizer.json, which spells them as `"a b"` or `["a", "b"]`.
fn merges(json: &Json) -> Vec<(&str, &str)> {
    let rules = json["model"]["merges"].as_array().into_iter().flatten();
    rules
        .filter_map(|rule| {
            rule.as_str().map_or_else(|| Some((rule[0].as_str()?, rule[1].as_str()?)), |rule| rule.split_once(' '))
        })
        .collect()
}

/// llama.cpp's name for how text is cut before bytes are joined; without rules to join by, it does not matter.
fn pattern(json: &Json, joins_nothing: bool) -> Option<&'static str> {
    let cutter = &json["pre_tokenizer"];
    if cutter["type"] != "ByteLevel" || cutter["add_prefix_space"] == true {
        return None;
    }
    match cutter["use_regex"] != false {
        true => Some("gpt-2"),
        false => joins_nothing.then_some("default"),
    }
}

/// Whether a visible space is put before a text.
fn has_space_prefix(json: &Json) -> bool {
    let is_prefix = |step: &Json| match step["type"].as_str() {
        Some("Prepend") => true,
        Some("Metaspace") => {
            step["prepend_scheme"].as_str().map_or(step["add_prefix_space"] == true, |when| when != "never")
        }
        _ => false,
    };
    let steps = |step: &Json, list: &str| is_prefix(step) || step[list].as_array().into_iter().flatten().any(is_prefix);
    steps(&json["normalizer"], "normalizers") || steps(&json["pre_tokenizer"], "pretokenizers")
}

/// Which tokens open and end texts.
fn specials(checkpoint: &Checkpoint, put: &mut impl FnMut(&str, Value)) -> Result<()> {
    let tokenizer = checkpoint.tokenizer()?;
    let facts = &checkpoint.tokenizer_config;
    let id = |text: &Option<String>| text.as_deref().and_then(|text| tokenizer.token_id(text));
    let ids = [
        ("bos_token_id", tokenizer.bos()),
        ("eos_token_id", tokenizer.eos().or(checkpoint.config.eos.first().copied())),
        ("unknown_token_id", id(&facts.unk_token)),
        ("padding_token_id", id(&facts.pad_token)),
    ];
    for (key, id) in ids {
        if let Some(id) = id {
            put(key, Value::Unsigned(u64::from(id)));
        }
    }
    put("add_bos_token", Value::Flag(tokenizer.adds_bos()));
    put("add_eos_token", Value::Flag(facts.add_eos_token.unwrap_or(false)));
    Ok(())
}

/// Tokens that end an answer besides the one that ends a text: for llama.cpp the first, for this program all.
fn other_ends(checkpoint: &Checkpoint) -> Result<Vec<(String, Value)>> {
    let (eos, ends) = (checkpoint.tokenizer()?.eos(), &checkpoint.config.eos);
    let Some(other) = ends.iter().find(|end| Some(**end) != eos).filter(|_| eos.is_some()) else {
        return Ok(Vec::new());
    };
    let ids = ends.iter().map(|id| Value::Unsigned(u64::from(*id))).collect();
    Ok(vec![
        ("tokenizer.ggml.eot_token_id".to_owned(), Value::Unsigned(u64::from(*other))),
        (EOS_IDS.to_owned(), Value::List(ids)),
    ])
}
