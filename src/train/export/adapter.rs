//! Adapters alone, as a folder that PEFT loads beside the model that they were trained for.

use std::collections::HashMap;
use std::path::Path;

use candle_core::Tensor;
use serde_json::{Map, Number, Value, json};

use super::super::folder;
use super::super::recipe::LoraRecipe;
use super::{pretty, write_file};
use crate::checkpoint::safetensors;
use crate::error::Result;
use crate::model::config::HeadKind;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// What is written.
pub struct Adapter<'a> {
    /// Folder or hub id of the model that the adapters stand beside.
    pub base: &'a str,
    /// What that model is for.
    pub head: HeadKind,
    /// Rank, scale and layers.
    pub lora: &'a LoraRecipe,
    /// The factors by PEFT's names: `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, `[rank, in]`, and
    /// `lora_B`, `[out, rank]`.
    pub tensors: &'a HashMap<String, Tensor>,
}

/// Writes `adapter` to `folder`, which takes the place of what is there once everything is on the disk.
///
/// # Errors
/// If a file cannot be written: then nothing has changed.
pub fn export_adapter(folder: &Path, adapter: &Adapter<'_>) -> Result<()> {
    let mut write = |temporary: &Path| {
        write_file(temporary, CONFIG, pretty(&config(adapter))?.as_bytes())?;
        safetensors::write(&temporary.join(TENSORS), adapter.tensors)
    };
    folder::publish(folder, &mut write, &mut |_| Ok(()))
}

/// What PEFT 0.21 needs; everything that is not said has its default there.
fn config(adapter: &Adapter<'_>) -> Map<String, Value> {
    let lora = adapter.lora;
    // PEFT's type is a whole number, and any alpha that somebody writes is one.
    let whole = lora.alpha.fract() == 0.0 && lora.alpha.abs() < 1e15;
    let alpha = if whole { Some(Number::from(lora.alpha as i64)) } else { Number::from_f64(lora.alpha) };
    let task = (adapter.head == HeadKind::Language).then_some("CAUSAL_LM");
    // The head of a reward model is trained whole.
    let whole: &[&str] = if adapter.head == HeadKind::Reward { &["regression_head"] } else { &[] };
    let pairs = [
        ("modules_to_save", json!(whole)),
        ("peft_type", json!("LORA")),
        ("base_model_name_or_path", json!(adapter.base)),
        ("task_type", json!(task)),
        ("r", json!(lora.rank)),
        ("lora_alpha", json!(alpha)),
        ("lora_dropout", json!(0.0)),
        ("target_modules", json!(lora.targets)),
        ("use_rslora", json!(lora.rslora)),
        ("bias", json!("none")),
        ("inference_mode", json!(true)),
    ];
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}
