//! How fast a model trains without data or files: SFT steps on texts of one length, forward, backward and AdamW.
//! Runs the trainer's own step, so what is timed is what `eurus train` does between two records.

use std::fmt;
use std::time::Instant;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::config::HeadKind;
use crate::model::tape::Keep;
use crate::ops::parallel;
use crate::ops::parameter::Precision;
use crate::train::example::{Example, Text};
use crate::train::learner::Learner;
use crate::train::optimizer::{AdamWOptions, Optimizer};
use crate::train::step::{Batch, Objective, Pass};

/// What to time.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Checkpoint of a policy: a built-in name, a folder, or a hub id
    #[arg(long, default_value = "eurus-mini/policy")]
    pub model: String,
    /// Threads for arithmetic; by default all cores
    #[arg(long)]
    pub threads: Option<usize>,
    /// Texts in a step
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    pub texts: u32,
    /// Tokens in a text
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(2..))]
    pub length: u32,
    /// Steps that are timed, after two to warm up
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: u32,
    /// Compute activations again in the backward pass
    #[arg(long)]
    pub recompute: bool,
    /// Round the operands of matrix products to bf16
    #[arg(long)]
    pub bf16: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What was timed: medians over the steps.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Parameters of the model.
    pub parameters: u64,
    /// Threads used.
    pub threads: usize,
    /// Tokens of a step.
    pub tokens: u32,
    /// Seconds of the forward and backward pass.
    pub gradient_seconds: f64,
    /// Seconds of clipping and AdamW.
    pub optimizer_seconds: f64,
    /// Tokens trained a second.
    pub tokens_per_second: f64,
    /// Most memory the process has held, in bytes; 0 where the system does not tell.
    pub memory_bytes_max: u64,
}

/// Times steps of `model`, whose weights are changed.
///
/// # Errors
/// If the shape asked for does not fit the model, or a step fails.
pub fn run(options: &Options, mut model: Model) -> Result<Report> {
    if let Some(threads) = options.threads {
        parallel::set_threads(threads);
    }
    if model.config.experts.is_some() {
        return Err(Error::invalid("--model", format!("{} is a mixture of experts: not trained", options.model)));
    }
    if model.config.head != HeadKind::Language {
        return Err(Error::invalid("--model", format!("{} is not a policy", options.model)));
    }
    if options.length as usize > model.config.positions_max {
        let most = model.config.positions_max;
        return Err(Error::invalid("--length", format!("{} is more than the model's {most}", options.length)));
    }
    model.train()?;
    model.compute_in(if options.bf16 { Precision::Bf16 } else { Precision::F32 });
    let keep = if options.recompute { Keep::Inputs } else { Keep::Everything };
    let device = model.decoder.embedding().value().device().clone();
    let learner = Learner { model, keep, device };
    let adamw = AdamWOptions { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.0, clip_norm: Some(1.0) };
    let mut optimizer = Optimizer::new(&learner.model, adamw)?;
    let examples: Vec<Example> = (0..options.texts).map(|text| example(&learner.model, text, options.length)).collect();
    let batch = Batch { examples: examples.iter().collect(), ..Batch::default() };
    let tokens = options.texts * options.length;
    let (mut gradients, mut moves) = (Vec::new(), Vec::new());
    for _ in 0..options.steps + 2 {
        let started = Instant::now();
        Objective::Sft.step(&learner, &batch, tokens as usize, Pass::Learn)?;
        gradients.push(started.elapsed().as_secs_f64());
        let started = Instant::now();
        let norm = optimizer.gradient_norm()?;
        optimizer.step(1e-5, norm)?;
        moves.push(started.elapsed().as_secs_f64());
    }
    let (gradient_seconds, optimizer_seconds) = (median(&gradients[2..]), median(&moves[2..]));
    Ok(Report {
        parameters: learner.model.config.parameter_count(),
        threads: parallel::threads(),
        tokens,
        gradient_seconds,
        optimizer_seconds,
        tokens_per_second: f64::from(tokens) / (gradient_seconds + optimizer_seconds),
        memory_bytes_max: memory_bytes_max(),
    })
}

/// A text of noise whose every token counts.
fn example(model: &Model, text: u32, length: u32) -> Example {
    let token = |place: u32| (place * 7919 + text * 104_729) % model.config.vocab as u32;
    Example::Text(Text {
        tokens: (0..length).map(token).collect(),
        targets: (0..length).map(|place| place > 0).collect(),
    })
}

fn median(seconds: &[f64]) -> f64 {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// The high-water mark of this process's resident memory, as Linux tells it.
fn memory_bytes_max() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kibibytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:.1} million parameters, {} threads", self.parameters as f64 / 1e6, self.threads)?;
        writeln!(f, "step of {} tokens  {:>10.1} tok/s", self.tokens, self.tokens_per_second)?;
        writeln!(f, "gradients  {:.3} s, optimiser {:.3} s", self.gradient_seconds, self.optimizer_seconds)?;
        write!(f, "memory     {} MiB at most", self.memory_bytes_max >> 20)
    }
}
