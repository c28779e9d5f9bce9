//! What a run begins with: the checkpoint, its weights or new ones, what is trained of them, and how texts are encoded for it.

use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::data::{Encoder, TextEnd};
use super::recipe::{Init, LoraRecipe, Recipe, Stage};
use crate::checkpoint::{self, Checkpoint, HubOptions, Progress, Source};
use crate::config::ComputeDtype;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::config::{HeadKind, ModelConfig};
use crate::model::parameters::LowRank;
use crate::model::random::{Normal, random_tensors};
use crate::model::weights::Weights;
use crate::ops::parameter::{Parameter, Precision};
use crate::ops::sample::uniform;
use crate::text::ChatTemplate;

const REWARD_HEAD: &str = "regression_head.weight";
/// Streams of numbers that must not repeat those of the weights.
const HEAD_STREAM: u64 = 0x4ead;
const ADAPTER_STREAM: u64 = 0xada7;

/// Opens the checkpoint `from`; `progress` is told what is loaded, and bytes done and in all.
///
/// # Errors
/// As [`checkpoint::open`].
pub fn open(from: &str, progress: &mut dyn FnMut(&str, u64, u64)) -> Result<Checkpoint> {
    checkpoint::open(&Source::parse(from)?, &HubOptions::from_env(), &mut |step| tell(step, progress))
}

fn tell(step: Progress<'_>, progress: &mut dyn FnMut(&str, u64, u64)) {
    match step {
        Progress::Download { file, done, total } => progress(file, done, total),
        Progress::Load { done, total } => progress("loading weights", done, total),
    }
}

/// Whether the layers of `checkpoint` have gradients.
///
/// # Errors
/// [`Error::Invalid`] for mixtures of experts, which have none.
pub fn check_trainable(checkpoint: &Checkpoint) -> Result<()> {
    if checkpoint.config.experts.is_none() {
        return Ok(());
    }
    let message = format!("{} is a mixture of experts, and those are served and not trained", checkpoint.name);
    Err(Error::invalid("model.from", message))
}

/// How `recipe` encodes texts for a model that begins as `checkpoint`.
///
/// # Errors
/// If tokenizer or template are damaged, or the stage wants an end-of-sequence token and there is none.
pub fn encoder(recipe: &Recipe, checkpoint: &Checkpoint) -> Result<Encoder> {
    let template = match &recipe.model.chat_template {
        Some(path) => ChatTemplate::from_source(path.display().to_string(), &read(path)?)?,
        None => checkpoint.chat_template()?,
    };
    let end = match recipe.stage {
        Stage::Reward if recipe.model.append_eos.unwrap_or(checkpoint.config.append_eos) => TextEnd::AnswerAndEos,
        Stage::Reward => TextEnd::Answer,
        _ => TextEnd::Turn,
    };
    Encoder::new(Arc::new(checkpoint.tokenizer()?), template, end)
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path)
        .map_err(|error| Error::invalid("model.chat_template", format!("{}: {error}", path.display())))
}

/// The frozen model of `checkpoint`.
///
/// # Errors
/// If its files are damaged.
pub fn frozen(checkpoint: &Checkpoint, device: &Device, progress: &mut dyn FnMut(&str, u64, u64)) -> Result<Model> {
    let weights = checkpoint.load_weights(device, &mut |step| tell(step, progress))?;
    Model::load(checkpoint.config.clone(), weights, device)
}

/// The model that `recipe` trains, with the gradients of what is trained of it.
///
/// # Errors
/// If the checkpoint is damaged or of a kind that the stage does not train.
pub fn trained(
    recipe: &Recipe,
    checkpoint: &Checkpoint,
    device: &Device,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<Model> {
    let seed = recipe.run.seed;
    let mut weights = match recipe.model.init {
        Init::Checkpoint => checkpoint.load_weights(device, &mut |step| tell(step, progress))?,
        Init::Random => Weights::new(random_tensors(&checkpoint.config, seed)?),
    };
    let mut config = checkpoint.config.clone();
    if weights.is_quantized() {
        let message =
            format!("{} is quantised, and quantised weights are not trained: name its original", checkpoint.name);
        return Err(Error::invalid("model.from", message));
    }
    match (recipe.stage, config.head) {
        (Stage::Reward, HeadKind::Language) => reward_head(&mut config, &mut weights, seed, device)?,
        (Stage::Reward, HeadKind::Reward) | (_, HeadKind::Language) => {}
        (stage, HeadKind::Reward) => {
            let message = format!("{} is a reward model; {} trains a policy", checkpoint.name, stage.name());
            return Err(Error::invalid("model.from", message));
        }
    }
    let mut model = Model::load(config, weights, device)?;
    match &recipe.lora {
        None => model.train()?,
        Some(lora) => {
            adapt(&mut model, lora, seed, device)?;
            if recipe.stage == Stage::Reward {
                model.train_head()?;
            }
        }
    }
    model.compute_in(match recipe.run.compute_dtype {
        ComputeDtype::F32 => Precision::F32,
        ComputeDtype::Bf16 => Precision::Bf16,
    });
    Ok(model)
}

/// Puts a new reward head in the place of the language head: normal with standard deviation 1 / (hidden + 1), as OpenRLHF begins.
fn reward_head(config: &mut ModelConfig, weights: &mut Weights, seed: u64, device: &Device) -> Result<()> {
    if let Some(name) = config.head_tensor {
        weights.discard(name);
    }
    config.head = HeadKind::Reward;
    config.head_tensor = Some(REWARD_HEAD);
    config.tied = false;
    let values = Normal::new(seed ^ HEAD_STREAM).take(config.hidden, 1.0 / (config.hidden + 1) as f64);
    weights.put(REWARD_HEAD, Tensor::from_vec(values, (1, config.hidden), device)?);
    Ok(())
}

/// Adapters as PEFT begins: A uniform within 1 / sqrt(in), B zero, so that the model is the same at first.
fn adapt(model: &mut Model, lora: &LoraRecipe, seed: u64, device: &Device) -> Result<()> {
    let mut drawn = 0;
    let scale = if lora.rslora { lora.alpha / (lora.rank as f64).sqrt() } else { lora.alpha / lora.rank as f64 };
    model.adapt(|name, (rows, width)| {
        if !lora.targets.iter().any(|target| name.ends_with(&format!(".{target}.weight"))) {
            return Ok(None);
        }
        let bound = 1.0 / (width as f64).sqrt();
        let mut next = || {
            drawn += 1;
            ((2.0 * uniform(seed ^ ADAPTER_STREAM, drawn) - 1.0) * bound) as f32
        };
        let a: Vec<f32> = (0..lora.rank * width).map(|_| next()).collect();
        let a = Tensor::from_vec(a, (lora.rank, width), device)?;
        let b = Tensor::zeros((rows, lora.rank), a.dtype(), device)?;
        Ok(Some(LowRank { a: Parameter::trained(&a)?, b: Parameter::trained(&b)?, scale: scale as f32 }))
    })
}
