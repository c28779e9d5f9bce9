//! A checkpoint as a GGUF file: what config.json and the tokenizer say as metadata, and tensors as llama.cpp lays them out.

use std::collections::HashMap;
use std::path::Path;

use candle_core::DType;

use super::header::Value;
use super::names::{self, InFile, RowOrder};
use super::write::{self, Planned};
use super::{config, vocabulary};
use crate::checkpoint::draft::Output;
use crate::checkpoint::rounding::{Rounding, converted};
use crate::checkpoint::tensor::{self, Storage, TensorInfo};
use crate::checkpoint::{Checkpoint, Progress};
use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::model::config::tensors::is_router;
use crate::model::weights::is_harmless_extra;

/// Of the blocks that are written: llama.cpp's GGML_QNT_VERSION.
const BLOCKS_VERSION: u64 = 2;

/// Writes `checkpoint` to the new file `path`, rounded, tensor by tensor.
///
/// # Errors
/// [`Error::Unsupported`] for what such a file has no place for, and those of reading, rounding and writing.
pub(in crate::checkpoint) fn write(
    checkpoint: &Checkpoint,
    rounding: Rounding,
    path: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<()> {
    let plan = Plan::new(checkpoint, rounding)?;
    let mut output = Output::create(path)?;
    let starts = write::header(&mut output, &metadata(checkpoint, rounding)?, &plan.tensors)?;
    checkpoint.visit(progress, &mut |info, bytes| {
        let Some((index, place)) = plan.places.get(&info.name) else {
            return Err(Error::Internal(format!("{} was not planned", info.name)));
        };
        let storage = &plan.tensors[*index].storage;
        let before = place.expert.unwrap_or(0) as u64 * tensor::bytes(storage, &info.shape);
        output.go_to(starts[*index] + before)?;
        let bytes = in_order(place.order, bytes, info, &checkpoint.config);
        converted(info, &bytes, storage, &mut |bytes| output.write(bytes))
    })?;
    // The last tensor is filled up as the others are.
    output.finish_at(starts.last().copied().unwrap_or(0))
}

/// What a file has.
struct Plan {
    /// Its tensors, in their order.
    tensors: Vec<Planned>,
    /// For each tensor of the checkpoint, by name, the one it goes to.
    places: HashMap<String, (usize, InFile)>,
}

impl Plan {
    fn new(checkpoint: &Checkpoint, rounding: Rounding) -> Result<Self> {
        let config = &checkpoint.config;
        let mut plan = Self { tensors: Vec::new(), places: HashMap::new() };
        let mut merged: HashMap<String, usize> = HashMap::new();
        for info in checkpoint.headers().iter().filter(|info| !is_harmless_extra(&info.name)) {
            let place = names::in_file(&info.name)
                .ok_or_else(|| Error::Unsupported(format!("{} has no place in a GGUF file", info.name)))?;
            let storage = storage(info, rounding, config);
            let next = plan.tensors.len();
            let index = if place.expert.is_some() { *merged.entry(place.name.clone()).or_insert(next) } else { next };
            if index == next {
                let experts = config.experts.filter(|_| place.expert.is_some()).map(|experts| experts.count);
                let shape = experts.into_iter().chain(info.shape.iter().copied()).collect();
                plan.tensors.push(Planned { name: place.name.clone(), storage, shape });
            } else if plan.tensors[index].storage != storage {
                let what = format!("{} is {storage} and other experts are not: a GGUF file has all in one", info.name);
                return Err(Error::Unsupported(what));
            }
            plan.places.insert(info.name.clone(), (index, place));
        }
        Ok(plan)
    }
}

/// As llama.cpp's converter: vectors in float32, and so the head of a reward model, which is one row, and routers.
fn storage(info: &TensorInfo, rounding: Rounding, config: &ModelConfig) -> Storage {
    match info.shape.as_slice() {
        [_] | [1, _] => Storage::Float(DType::F32),
        _ if is_router(&info.name) => Storage::Float(DType::F32),
        _ => rounding.storage(info, config),
    }
}

/// The rows of `bytes` as they lie in a file.
fn in_order(order: RowOrder, bytes: Vec<u8>, info: &TensorInfo, config: &ModelConfig) -> Vec<u8> {
    match order {
        RowOrder::Same => bytes,
        RowOrder::Queries => names::permuted(bytes, info.shape[0], config.heads),
        RowOrder::Keys => names::permuted(bytes, info.shape[0], config.kv_heads),
    }
}

fn metadata(checkpoint: &Checkpoint, rounding: Rounding) -> Result<Vec<(String, Value)>> {
    let config = &checkpoint.config;
    let count = |count: usize| Value::Unsigned(count as u64);
    let text = |text: &str| Value::Text(text.to_owned());
    let mut all = vec![
        ("general.architecture", text("llama")),
        ("general.type", text("model")),
        ("general.name", text(&checkpoint.name)),
        ("general.file_type", Value::Unsigned(file_type(rounding))),
        ("general.quantization_version", Value::Unsigned(BLOCKS_VERSION)),
        ("llama.vocab_size", count(config.vocab)),
        ("llama.context_length", count(config.positions_max)),
        ("llama.embedding_length", count(config.hidden)),
        ("llama.block_count", count(config.layers)),
        ("llama.feed_forward_length", count(config.intermediate)),
        ("llama.attention.head_count", count(config.heads)),
        ("llama.attention.head_count_kv", count(config.kv_heads)),
        ("llama.attention.key_length", count(config.head_dim)),
        ("llama.attention.value_length", count(config.head_dim)),
        ("llama.attention.layer_norm_rms_epsilon", Value::Real(config.rms_eps)),
        ("llama.rope.dimension_count", count(config.head_dim)),
        ("llama.rope.freq_base", Value::Real(config.rope_theta)),
    ];
    if let Some(experts) = config.experts {
        all.push(("llama.expert_count", count(experts.count)));
        all.push(("llama.expert_used_count", count(experts.per_token)));
    }
    all.extend(config.window.map(|window| ("llama.attention.sliding_window", count(window))));
    all.extend(config.append_eos.then_some((config::APPEND_EOS, Value::Flag(true))));
    let mut all: Vec<(String, Value)> = all.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    all.extend(vocabulary::metadata(checkpoint)?);
    Ok(all)
}

/// llama.cpp's numbers of file types (`llama_ftype`).
fn file_type(rounding: Rounding) -> u64 {
    match rounding {
        Rounding::F16 => 1,
        Rounding::Q4_0 => 2,
        Rounding::Q8_0 => 7,
        Rounding::Q4KM => 15,
        Rounding::Q5KM => 17,
        Rounding::Q6K => 18,
        Rounding::Bf16 => 32,
    }
}
