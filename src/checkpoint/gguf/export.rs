//! A checkpoint as a GGUF file: what config.json and the tokenizer say as metadata, and tensors as llama.cpp lays them out.

use std::path::Path;

use candle_core::DType;

use super::header::Value;
use super::names::{self, RowOrder};
use super::write::{self, Planned};
use super::{config, vocabulary};
use crate::checkpoint::draft::Output;
use crate::checkpoint::rounding::{Rounding, converted};
use crate::checkpoint::tensor::{Storage, TensorInfo};
use crate::checkpoint::{Checkpoint, Progress};
use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
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
    let mut planned = Vec::new();
    let mut orders = Vec::new();
    for info in checkpoint.headers().iter().filter(|info| !is_harmless_extra(&info.name)) {
        let (name, order) = names::in_file(&info.name)
            .ok_or_else(|| Error::Unsupported(format!("{} has no place in a GGUF file", info.name)))?;
        planned.push(Planned { name, storage: storage(info, rounding, &checkpoint.config), shape: info.shape.clone() });
        orders.push(order);
    }
    let mut output = Output::create(path)?;
    write::header(&mut output, &metadata(checkpoint, rounding)?, &planned)?;
    let mut left = planned.iter().zip(orders);
    checkpoint.visit(progress, &mut |info, bytes| {
        let (planned, order) = left.next().ok_or_else(|| Error::Internal(format!("{} was not planned", info.name)))?;
        let bytes = in_order(order, bytes, info, &checkpoint.config);
        converted(info, &bytes, &planned.storage, &mut |bytes| output.write(bytes))?;
        write::align(&mut output)
    })?;
    output.finish()
}

/// As llama.cpp's converter: vectors in float32, and so the head of a reward model, which is one row.
fn storage(info: &TensorInfo, rounding: Rounding, config: &ModelConfig) -> Storage {
    match info.shape.as_slice() {
        [_] | [1, _] => Storage::Float(DType::F32),
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
