//! A trained model as a Hugging Face folder that `eurus serve` and transformers load.
//! Owns which files there are and what they say; the tensors are the trainer's, the tokenizer is copied as it was.

mod adapter;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use candle_core::{DType, Tensor};
use serde_json::{Map, Value, json};

use super::card::Card;
use super::folder;
use super::recipe::SaveDtype;
use crate::checkpoint::{CONFIG, Checkpoint, GENERATION_CONFIG, INDEX, SINGLE, TOKENIZER_FILES, safetensors};
use crate::error::{Error, Result};
use crate::model::config::{HeadKind, ModelConfig};
use crate::model::weights::WeightProblems;

pub use adapter::{Adapter, export_adapter};

const TEMPLATE: &str = "chat_template.jinja";
const TOKENIZER: &str = "tokenizer.json";
const README: &str = "README.md";
const REWARD_CLASS: &str = "EurusRewardModel";

/// What is written.
pub struct Export<'a> {
    /// Config and tokenizer come from here.
    pub source: &'a Checkpoint,
    /// A reward model or a policy; a reward model may come out of a policy.
    pub head: HeadKind,
    /// Whether rewards are read after an end-of-sequence token; None leaves it as the source has it.
    pub append_eos: Option<bool>,
    /// The tensors by their Hugging Face names, in any floating type.
    pub tensors: &'a HashMap<String, Tensor>,
    /// How they are stored; None stores them as the source says.
    pub dtype: Option<SaveDtype>,
    /// Most bytes of one file of tensors; a larger tensor has a file of its own.
    pub max_shard_bytes: u64,
    /// Takes the place of the source's chat template.
    pub chat_template: Option<&'a str>,
    /// The README.
    pub card: &'a Card<'a>,
}

impl SaveDtype {
    /// As candle has it.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }

    /// The type that `checkpoint` is stored in.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        match checkpoint.config.dtype {
            Some(DType::BF16) => Self::Bf16,
            Some(DType::F16) => Self::F16,
            _ => Self::F32,
        }
    }

    /// As config.json spells it.
    fn torch(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }
}

/// Writes `parts` to `folder`, which takes the place of what is there once everything is on the disk.
///
/// # Errors
/// [`Error::Checkpoint`] naming the tensors that do not fit the config, or the file that cannot be written: then nothing has
/// changed.
pub fn export(folder: &Path, parts: &Export<'_>) -> Result<()> {
    let dtype = parts.dtype.unwrap_or_else(|| SaveDtype::of(parts.source));
    let config = config(parts, dtype)?;
    let text = pretty(&config)?;
    let shards = shards(parts, &ModelConfig::parse(&text, None)?, dtype)?;
    let mut write = |temporary: &Path| {
        write_file(temporary, CONFIG, text.as_bytes())?;
        if let Some(generation) = generation_config(parts, &config)? {
            write_file(temporary, GENERATION_CONFIG, &generation)?;
        }
        for name in TOKENIZER_FILES {
            if let Some(bytes) = parts.source.file(name)? {
                write_file(temporary, name, &bytes)?;
            }
        }
        if parts.source.file(TOKENIZER)?.is_none() {
            // As it was read: other libraries convert tokenizer.model by rules of their own.
            write_file(temporary, TOKENIZER, parts.source.tokenizer_json.as_bytes())?;
        }
        if let Some(template) = parts.chat_template {
            write_file(temporary, TEMPLATE, template.as_bytes())?;
        }
        write_file(temporary, README, parts.card.render().as_bytes())?;
        write_tensors(temporary, parts.tensors, &shards, dtype)
    };
    folder::publish(folder, &mut write, &mut |_| Ok(()))
}

/// Gives back a model that an earlier [`export`] to `folder` was about to replace when the process was killed, and removes
/// what it left half written.
///
/// # Errors
/// If the files cannot be read or changed.
pub fn recover(folder: &Path) -> Result<()> {
    folder.parent().map_or(Ok(()), folder::sweep)
}

/// The source's config.json with what training changed.
fn config(parts: &Export<'_>, dtype: SaveDtype) -> Result<Map<String, Value>> {
    let bytes =
        parts.source.file(CONFIG)?.ok_or_else(|| Error::Checkpoint(format!("{}: no {CONFIG}", parts.source.name)))?;
    let mut config: Map<String, Value> =
        serde_json::from_slice(&bytes).map_err(|error| Error::Checkpoint(format!("{CONFIG}: {error}")))?;
    // transformers 5 writes `dtype`, transformers 4 `torch_dtype`.
    let keys = ["dtype", "torch_dtype"];
    let known: Vec<&str> = keys.into_iter().filter(|key| config.contains_key(*key)).collect();
    for key in if known.is_empty() { vec!["torch_dtype"] } else { known } {
        config.insert(key.to_owned(), dtype.torch().into());
    }
    if let Some(embedding) = parts.tensors.get("model.embed_tokens.weight") {
        config.insert("vocab_size".to_owned(), embedding.dims().first().copied().into());
    }
    let was_reward = parts.source.config.head == HeadKind::Reward;
    if parts.head == HeadKind::Reward && !was_reward {
        config.insert("architectures".to_owned(), json!([REWARD_CLASS]));
    }
    // It names code that is not copied.
    config.remove("auto_map");
    if let Some(append_eos) = parts.append_eos.filter(|_| parts.head == HeadKind::Reward) {
        config.insert("append_eos".to_owned(), append_eos.into());
    }
    if parts.head == HeadKind::Language && was_reward {
        return Err(Error::Unsupported(format!(
            "{} is a reward model: no policy can be written from it",
            parts.source.name
        )));
    }
    Ok(config)
}

/// The source's; a policy without one gets the tokens at which it ends. A reward model generates nothing.
fn generation_config(parts: &Export<'_>, config: &Map<String, Value>) -> Result<Option<Vec<u8>>> {
    if parts.head == HeadKind::Reward {
        return Ok(None);
    }
    if let Some(bytes) = parts.source.file(GENERATION_CONFIG)? {
        return Ok(Some(bytes));
    }
    let mut generation = Map::from_iter([("_from_model_config".to_owned(), json!(true))]);
    for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        generation.extend(config.get(key).filter(|id| !id.is_null()).map(|id| (key.to_owned(), id.clone())));
    }
    pretty(&generation).map(|text| Some(text.into_bytes()))
}

/// Names of the tensors of each file, in the order of the model; none is missing, misshapen or left over.
fn shards(parts: &Export<'_>, config: &ModelConfig, dtype: SaveDtype) -> Result<Vec<Vec<String>>> {
    let mut problems = WeightProblems::default();
    let mut left: HashMap<&str, &Tensor> = parts.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let (mut shards, mut bytes): (Vec<Vec<String>>, u64) = (vec![Vec::new()], 0);
    for (name, shape) in config.weight_shapes() {
        let tensor = match left.remove(name.as_str()) {
            None => {
                problems.missing(&name);
                continue;
            }
            Some(tensor) => tensor,
        };
        if tensor.dims() != shape {
            problems.misshapen(&name, tensor.dims(), &shape);
        }
        let size = (tensor.elem_count() * dtype.dtype().size_in_bytes()) as u64;
        if bytes > 0 && bytes + size > parts.max_shard_bytes {
            shards.push(Vec::new());
            bytes = 0;
        }
        bytes += size;
        if let Some(shard) = shards.last_mut() {
            shard.push(name);
        }
    }
    left.into_keys().for_each(|name| problems.unused(name));
    problems.into_result().map(|()| shards)
}

fn write_tensors(
    folder: &Path,
    tensors: &HashMap<String, Tensor>,
    shards: &[Vec<String>],
    dtype: SaveDtype,
) -> Result<()> {
    let (mut weight_map, mut total) = (BTreeMap::new(), 0);
    for (index, names) in shards.iter().enumerate() {
        let file = match shards.len() {
            1 => SINGLE.to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        // One file at a time is in memory in its final type.
        let mut shard = HashMap::new();
        for name in names {
            if let Some(tensor) = tensors.get(name) {
                let tensor = tensor.to_dtype(dtype.dtype())?.contiguous()?;
                total += tensor.elem_count() * dtype.dtype().size_in_bytes();
                shard.insert(name.clone(), tensor);
                weight_map.insert(name, file.clone());
            }
        }
        safetensors::write(&folder.join(&file), &shard)?;
    }
    if shards.len() > 1 {
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        write_file(folder, INDEX, pretty(&index)?.as_bytes())?;
    }
    Ok(())
}

fn pretty(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string_pretty(value).map(|text| text + "\n").map_err(Error::internal)
}

fn write_file(folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = folder.join(name);
    fs::write(&path, bytes).map_err(|error| Error::file(&path, error))
}

#[cfg(test)]
mod tests;
