//! The metadata of a GGUF file as the config.json it was converted from, so that the checks of that are those of this.

use std::collections::BTreeMap;

use serde_json::{Map, Value as Json, json};

use super::header::Value;
use crate::error::{Error, Result};

/// Key of this program: a reward is read after an end-of-sequence token.
pub(super) const APPEND_EOS: &str = "eurus.append_eos";
/// Key of this program: all tokens that end an answer, where there are several.
pub(super) const EOS_IDS: &str = "eurus.eos_token_ids";

/// Where `llama.rope.freq_base` is missing, whatever the layers are.
const ROPE_THETA: f64 = 10_000.0;

/// What the metadata does not tell: about the head and the numbers, from the tensors.
pub(super) struct Head {
    /// There is a tensor of rewards.
    pub(super) is_reward: bool,
    /// There is no tensor of logits.
    pub(super) is_tied: bool,
    /// What config.json calls the type of all matrices, where they are floating-point and have one.
    pub(super) dtype: Option<&'static str>,
}

/// The metadata of one file, by key.
#[derive(Clone, Copy)]
pub(super) struct Metadata<'a>(pub(super) &'a BTreeMap<String, Value>);

impl<'a> Metadata<'a> {
    pub(super) fn get(self, key: &str) -> Option<&'a Value> {
        self.0.get(key)
    }

    pub(super) fn text(self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(key, "a text", other)),
        }
    }

    pub(super) fn flag(self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Flag(flag)) => Ok(Some(*flag)),
            Some(other) => Err(wrong(key, "a flag", other)),
        }
    }

    pub(super) fn number(self, key: &str) -> Result<Option<u64>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(number)) => Ok(Some(*number)),
            Some(Value::Signed(number)) if *number >= 0 => Ok(Some(number.unsigned_abs())),
            Some(other) => Err(wrong(key, "a number of 0 or more", other)),
        }
    }

    pub(super) fn list(self, key: &str) -> Result<Option<&'a [Value]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::List(list)) => Ok(Some(list)),
            Some(other) => Err(wrong(key, "a list", other)),
        }
    }

    fn real(self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            // As it would be printed: 1e-5 is not the f64 of the nearest f32.
            Some(Value::Real(real)) => Ok((*real as f32).to_string().parse().ok()),
            Some(other) => Err(wrong(key, "a real number", other)),
        }
    }
}

fn wrong(key: &str, kind: &str, found: &Value) -> Error {
    let mut found = format!("{found:?}");
    if let Some((end, _)) = found.char_indices().nth(60) {
        found.truncate(end);
        found.push_str("...");
    }
    Error::Checkpoint(format!("{key} must be {kind}, not {found}"))
}

/// The config.json of the model that `metadata` describes.
///
/// # Errors
/// [`Error::Unsupported`] for another architecture than llama, [`Error::Checkpoint`] for a key of another kind.
pub(super) fn config_json(metadata: Metadata<'_>, head: &Head) -> Result<String> {
    match metadata.text("general.architecture")? {
        Some("llama") => {}
        other => {
            let other = other.unwrap_or("that is not named");
            let what = format!(
                "a GGUF file of architecture {other} (supported: llama, which Mistral's and Mixtral's files have too)"
            );
            return Err(Error::Unsupported(what));
        }
    }
    refuse_others(metadata)?;
    let mut config = Map::new();
    let mut put = |key: &str, value: Option<Json>| {
        if let Some(value) = value {
            config.insert(key.to_owned(), value);
        }
    };
    let sizes = [
        ("hidden_size", "llama.embedding_length"),
        ("num_hidden_layers", "llama.block_count"),
        ("num_attention_heads", "llama.attention.head_count"),
        ("num_key_value_heads", "llama.attention.head_count_kv"),
        ("intermediate_size", "llama.feed_forward_length"),
        ("max_position_embeddings", "llama.context_length"),
        ("head_dim", "llama.attention.key_length"),
        ("bos_token_id", "tokenizer.ggml.bos_token_id"),
    ];
    for (key, name) in sizes {
        put(key, metadata.number(name)?.map(Json::from));
    }
    let tokens = metadata.list("tokenizer.ggml.tokens")?.map(|tokens| tokens.len() as u64);
    put("vocab_size", metadata.number("llama.vocab_size")?.or(tokens).map(Json::from));
    let eps = metadata.real("llama.attention.layer_norm_rms_epsilon")?;
    if eps.is_none_or(|eps| !eps.is_finite()) {
        let what = "llama.attention.layer_norm_rms_epsilon is missing or no number; convert the model again";
        return Err(Error::Checkpoint(what.to_owned()));
    }
    put("rms_norm_eps", eps.map(Json::from));
    put("rope_theta", Some(Json::from(metadata.real("llama.rope.freq_base")?.unwrap_or(ROPE_THETA))));
    put("eos_token_id", ends(metadata)?);
    put("append_eos", metadata.flag(APPEND_EOS)?.map(Json::from));
    put("torch_dtype", head.dtype.map(Json::from));
    // Only Mistral's configuration knows windows, and wants the number of key heads said. A window of 0 is none.
    let window = metadata.number("llama.attention.sliding_window")?.filter(|window| *window > 0);
    let is_windowed = window.is_some();
    put("sliding_window", window.map(Json::from));
    let experts = expert_count(metadata)?;
    if let Some(count) = experts {
        let Some(used) = metadata.number("llama.expert_used_count")?.filter(|used| (1..=count).contains(used)) else {
            let what = format!("llama.expert_used_count must be a number from 1 to {count}, the number of experts");
            return Err(Error::Checkpoint(what));
        };
        put("num_local_experts", Some(Json::from(count)));
        put("num_experts_per_tok", Some(Json::from(used)));
    }
    let (class, kind) = match (experts, is_windowed) {
        (Some(_), _) => ("MixtralForCausalLM", "mixtral"),
        (None, true) => ("MistralForCausalLM", "mistral"),
        (None, false) => ("LlamaForCausalLM", "llama"),
    };
    put("architectures", Some(json!([if head.is_reward { "EurusRewardModel" } else { class }])));
    put("model_type", Some(json!(kind)));
    put("tie_word_embeddings", Some(json!(head.is_tied && !head.is_reward)));
    if metadata.number("llama.attention.head_count_kv")?.is_none() {
        put("num_key_value_heads", metadata.number("llama.attention.head_count")?.map(Json::from));
    }
    Ok(Json::Object(config).to_string())
}

/// How many experts a layer has, where it has any.
pub(super) fn expert_count(metadata: Metadata<'_>) -> Result<Option<u64>> {
    Ok(metadata.number("llama.expert_count")?.filter(|count| *count > 0))
}

/// Tokens that end an answer: of a text, and of a turn where it has one of its own.
fn ends(metadata: Metadata<'_>) -> Result<Option<Json>> {
    if let Some(ids) = metadata.list(EOS_IDS)? {
        let id = |value: &Value| match value {
            Value::Unsigned(id) => Ok(Json::from(*id)),
            other => Err(wrong(EOS_IDS, "a list of token ids", other)),
        };
        return ids.iter().map(id).collect::<Result<Vec<_>>>().map(|ids| Some(Json::Array(ids)));
    }
    let mut ids = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        ids.extend(metadata.number(key)?.map(Json::from));
    }
    Ok((!ids.is_empty()).then_some(Json::Array(ids)))
}

fn refuse_others(metadata: Metadata<'_>) -> Result<()> {
    let refused = |what: String| Err(Error::Unsupported(what));
    if let Some(kind) = metadata.text("llama.rope.scaling.type")?.filter(|kind| *kind != "none") {
        return refused(format!("llama.rope.scaling.type {kind} is not supported"));
    }
    for key in ["llama.rope.scaling.factor", "llama.rope.scale_linear"] {
        if metadata.text("llama.rope.scaling.type")?.is_none()
            && metadata.real(key)?.is_some_and(|factor| factor != 1.0)
        {
            return refused(format!("{key} is not supported"));
        }
    }
    let heads = metadata.number("llama.attention.head_count")?.unwrap_or(0);
    let share = metadata.number("llama.embedding_length")?.and_then(|hidden| hidden.checked_div(heads));
    let head_dim = metadata.number("llama.attention.key_length")?.or(share);
    for key in ["llama.rope.dimension_count", "llama.attention.value_length"] {
        if let (Some(found), Some(expected)) = (metadata.number(key)?, head_dim)
            && found != expected
        {
            return refused(format!("{key} {found} where heads have {expected} numbers is not supported"));
        }
    }
    Ok(())
}
