//! From settings to one served model: opens the checkpoint, plans memory, loads, and starts the engine.

use std::{
    sync::Arc,
    thread::JoinHandle,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use candle_core::Device;

use super::{
    memory::{MemoryPlan, Numbers},
    progress::ProgressLine,
};
use crate::{
    checkpoint::{self, Checkpoint, HubOptions, Rounding, Source},
    config::{ComputeDtype, Config, Quantization},
    device,
    engine::{Engine, Limits},
    error::{Error, Result},
    metrics::Metrics,
    model::{Model, config::HeadKind},
    ops::memory,
    runner::{Runner, kv_cache::KvCache},
    service::{Kind, ServedModel},
    text::Tokenizer,
};

/// A model that is about to be loaded.
pub(super) struct Opened {
    pub(super) kind: Kind,
    pub(super) checkpoint: Checkpoint,
    pub(super) numbers: Numbers,
}

/// The checkpoint of the policy or the reward model of `config`, which is of that kind.
///
/// # Errors
/// A checkpoint that cannot be had, is damaged or of the wrong kind.
pub(super) fn opened(kind: Kind, config: &Config, metrics: &Metrics) -> Result<Opened> {
    let checkpoint = timed(metrics, "open", || open(kind, config))?;
    check_kind(kind, &checkpoint)?;
    Ok(Opened { kind, checkpoint, numbers: Numbers::of(kind, config) })
}

/// A model of `config`, running on `device` as planned.
///
/// # Errors
/// A checkpoint that is damaged or does not fit into memory.
pub(super) fn load(
    Opened { kind, checkpoint, numbers }: Opened,
    plan: &MemoryPlan,
    device: &Device,
    config: &Config,
    metrics: &Metrics,
) -> Result<(ServedModel, JoinHandle<()>)> {
    let name = match kind {
        Kind::Policy => &config.model_name,
        Kind::Reward => &config.reward_model_name,
    };
    let name = name.clone().unwrap_or_else(|| checkpoint.name.clone());
    let tokenizer = Arc::new(checkpoint.tokenizer()?);
    let template = Arc::new(checkpoint.chat_template()?);

    tracing::info!(model = name, template = template.name(), "{plan}");
    if plan.cache_len() < plan.len_max {
        tracing::warn!(model = name, "the cache holds {} tokens: longer sequences are refused", plan.cache_len());
    }
    let runner = timed(metrics, "load", || {
        let mut model = load_model(&checkpoint, numbers.rounding, device)?;
        if device.is_cpu() {
            set_arithmetic(&mut model, numbers.compute_dtype, &name)?;
        }
        let cache = memory::apart(|| KvCache::of(&model, plan.cache_dtype(), plan.block_count, plan.block_size))?;
        let runner = Runner::new(model, cache);
        Ok(if config.engine.step_graphs { runner } else { runner.without_replays() })
    })?;

    let limits = Limits {
        step_tokens: config.engine.step_tokens,
        running_max: config.engine.running_max,
        waiting_max: config.engine.waiting_max,
        len_max: plan.len_max,
    };
    let executor = Box::new(runner);
    let (engine, thread) = Engine::start(&name, limits, plan.block_count, plan.block_size, executor, metrics)?;
    let model = ServedModel {
        name,
        aliases: Vec::new(),
        kind,
        eos_ids: eos_ids(&checkpoint, &tokenizer),
        tokenizer,
        template,
        engine,
        len_max: plan.len_max,
        vocab_size: checkpoint.config.vocab,
        append_eos: checkpoint.config.append_eos,
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
    };
    Ok((model, thread))
}

/// The checkpoint of the policy or the reward model of `config`.
///
/// # Errors
/// As [`checkpoint::open`].
pub(super) fn open(kind: Kind, config: &Config) -> Result<Checkpoint> {
    let (source, revision) = match kind {
        Kind::Policy => (&config.model, &config.hub.revision),
        Kind::Reward => (&config.reward_model, &config.hub.reward_revision),
    };
    let mut options = HubOptions::from_env();
    options.revision.clone_from(revision);
    options.offline |= config.hub.offline;
    let checkpoint = open_source(source, &options)?;
    match &config.reward_head {
        Some(path) if kind == Kind::Reward => checkpoint.with_reward_head(path),
        _ => Ok(checkpoint),
    }
}

impl From<Quantization> for Rounding {
    fn from(asked: Quantization) -> Self {
        match asked {
            Quantization::Bf16 => Self::Bf16,
            Quantization::F16 => Self::F16,
            Quantization::Q8_0 => Self::Q8_0,
            Quantization::Q4_0 => Self::Q4_0,
            Quantization::Q4KM => Self::Q4KM,
            Quantization::Q5KM => Self::Q5KM,
            Quantization::Q6K => Self::Q6K,
        }
    }
}

pub(crate) fn open_source(source: &str, options: &HubOptions) -> Result<Checkpoint> {
    let mut line = ProgressLine::start();
    let checkpoint = checkpoint::open(&Source::parse(source)?, options, &mut |progress| line.show(progress));
    line.end();
    checkpoint
}

pub(super) fn check_kind(kind: Kind, checkpoint: &Checkpoint) -> Result<()> {
    match (kind, checkpoint.config.head) {
        (Kind::Policy, HeadKind::Language) | (Kind::Reward, HeadKind::Reward) => Ok(()),
        (Kind::Policy, HeadKind::Reward) => {
            let message = format!("{} is a reward model: give it as reward_model", checkpoint.name);
            Err(Error::invalid("model", message))
        }
        (Kind::Reward, HeadKind::Language) => {
            Err(Error::invalid("reward_model", format!("{} has no reward head", checkpoint.name)))
        }
    }
}

/// The configuration's, or else the tokenizer's.
fn eos_ids(checkpoint: &Checkpoint, tokenizer: &Tokenizer) -> Vec<u32> {
    if checkpoint.config.eos.is_empty() { tokenizer.eos().into_iter().collect() } else { checkpoint.config.eos.clone() }
}

/// Lets `model` compute in `asked`, as far as its weights and the processor can.
fn set_arithmetic(model: &mut Model, asked: ComputeDtype, name: &str) -> Result<()> {
    match asked {
        ComputeDtype::F32 => {}
        ComputeDtype::Bf16 if model.pack()? == 0 => {
            tracing::warn!(
                model = name,
                "no weight is bf16, or this processor does not multiply it: computed as with compute_dtype f32"
            );
        }
        ComputeDtype::Bf16 => {
            tracing::info!(model = name, "bf16 weights are multiplied by activations rounded to bf16")
        }
    }
    Ok(())
}

fn load_model(checkpoint: &Checkpoint, rounding: Option<Rounding>, device: &Device) -> Result<Model> {
    let mut line = ProgressLine::start();
    // To the host: what has to be converted is converted there.
    let weights = checkpoint.load_rounded(rounding, &Device::Cpu, &mut |progress| line.show(progress));
    line.end();
    Model::load(checkpoint.config.clone(), weights?, device)
}

/// The model that `source` names on the chosen device, without tokenizer and engine.
///
/// # Errors
/// A checkpoint that cannot be had or is damaged, or no such device.
pub fn model(source: &str, device: device::Choice) -> Result<Model> {
    load_model(&open_source(source, &HubOptions::from_env())?, None, &device::open(device)?)
}

/// Runs a stage of the start and records how long it took.
fn timed<T>(metrics: &Metrics, stage: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let result = work();
    metrics.startup_seconds.with_label_values(&[stage]).observe(start.elapsed().as_secs_f64());
    result
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn a_format_has_one_name_everywhere() {
        for format in Quantization::value_variants() {
            let flag = format.to_possible_value().unwrap().get_name().to_owned();
            assert_eq!(serde_json::to_value(format).unwrap(), flag);
            assert_eq!(Rounding::from(*format).name(), flag);
        }
    }
}
