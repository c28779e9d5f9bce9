//! How fast a model runs without a server: prompt tokens a second, and generated tokens a second by batch size.
//! Drives the runner with plans of its own, so what is timed is exactly what a server's step executes.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use crate::config::CacheDtype;
use crate::device::{self, Choice};
use crate::engine::request::SamplingParams;
use crate::engine::step::{BlockId, Chunk, Draw, Executor, Rows, SequenceId, StepPlan, Want};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::config::HeadKind;
use crate::ops::parallel;
use crate::runner::{Runner, kv_cache::KvCache};
use crate::serve::host_cache_dtype;

const BLOCK_SIZE: usize = 16;

/// What to time.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Checkpoint: a built-in name, a folder, a .gguf file, or a hub id
    #[arg(long, default_value = "eurus-mini/policy")]
    pub model: String,
    /// Device that the model is loaded to
    #[arg(long, value_enum, default_value = "auto")]
    pub device: Choice,
    /// Threads for arithmetic; by default all cores
    #[arg(long)]
    pub threads: Option<usize>,
    /// Keep each of them but the first on a core of its own
    #[arg(long)]
    pub pin_threads: bool,
    /// Tokens of the prompt that is timed
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub prefill: u32,
    /// Batch sizes of the generation that is timed (none for a reward model)
    #[arg(long, value_delimiter = ',', default_value = "1,4,8,16")]
    pub batches: Vec<u32>,
    /// Tokens in the cache of each sequence before generation
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub context: u32,
    /// Steps of generation
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: u32,
    /// Compute products of bf16 weights in bf16 instead of float32
    #[arg(long)]
    pub bf16: bool,
    /// Type of the numbers in the key/value cache on a CPU
    #[arg(long, value_enum, default_value = "auto")]
    pub kv_cache_dtype: CacheDtype,
    /// On a GPU, launch the kernels of each step one by one instead of replaying recorded steps
    #[arg(long)]
    pub no_step_graphs: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What was timed: the median of three runs each.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Parameters of the model.
    pub parameters: u64,
    /// What it was timed on.
    pub device: String,
    /// Threads used.
    pub threads: usize,
    /// Tokens of the prompt.
    pub prefill: u32,
    /// Prompt tokens a second.
    pub prefill_tokens_per_second: f64,
    /// Generation by batch size.
    pub decode: Vec<DecodeRow>,
}

/// Generation at one batch size.
#[derive(Debug, Clone, Serialize)]
pub struct DecodeRow {
    /// Sequences that run together.
    pub batch: u32,
    /// Generated tokens a second, all sequences together.
    pub tokens_per_second: f64,
}

/// Sets the threads that `options` ask for, before a model is loaded with them.
pub fn set_threads(options: &Options) {
    if let Some(threads) = options.threads {
        parallel::set_threads(threads);
    }
    if options.pin_threads {
        parallel::pin_workers();
    }
}

/// Times `model`, with the threads of [`set_threads`].
///
/// # Errors
/// If the shape asked for does not fit the model, or a step fails.
pub fn run(options: &Options, mut model: Model) -> Result<Report> {
    if options.bf16 && model.pack()? == 0 {
        let message = "no weight of this model can be multiplied in bf16 on this processor";
        return Err(Error::invalid("--bf16", message));
    }
    let config = model.config.clone();
    let longest = options.prefill.max(options.context + options.steps) as usize;
    if longest > config.positions_max {
        let message = format!("{longest} tokens are more than the model's {} positions", config.positions_max);
        return Err(Error::invalid("--context", message));
    }
    let batches = if config.head == HeadKind::Language { options.batches.as_slice() } else { &[] };
    let sequences = batches.iter().copied().max().unwrap_or(1) as usize;
    let place = model.decoder.place();
    let (device, on_cpu) = (device::describe(place.device()), place.device().is_cpu());
    if !on_cpu && options.kv_cache_dtype != CacheDtype::Auto {
        return Err(Error::invalid("--kv-cache-dtype", "on a GPU the cache has the model's type: leave it at auto"));
    }
    let dtype =
        if on_cpu { host_cache_dtype(options.kv_cache_dtype, model.decoder.precision()) } else { place.dtype() };
    let cache = KvCache::of(&model, dtype, sequences * longest.div_ceil(BLOCK_SIZE), BLOCK_SIZE)?;
    let runner = Runner::new(model, cache);
    let runner = if options.no_step_graphs { runner.without_replays() } else { runner };
    let mut bench = Bench { runner, blocks: longest.div_ceil(BLOCK_SIZE), vocab: config.vocab, filled: 0 };
    let prefill = median(|| bench.prefill(options.prefill as usize))?;
    let decode = batches.iter().map(|&batch| {
        let tokens_per_second = median(|| bench.decode(batch as usize, options))?;
        Ok(DecodeRow { batch, tokens_per_second })
    });
    Ok(Report {
        parameters: config.parameter_count(),
        device,
        threads: parallel::threads(),
        prefill: options.prefill,
        prefill_tokens_per_second: prefill,
        decode: decode.collect::<Result<_>>()?,
    })
}

/// The middle of three, after one run to warm up.
fn median(mut run: impl FnMut() -> Result<f64>) -> Result<f64> {
    run()?;
    let mut rates = [run()?, run()?, run()?];
    rates.sort_by(f64::total_cmp);
    Ok(rates[1])
}

struct Bench {
    runner: Runner,
    /// Blocks of each sequence.
    blocks: usize,
    vocab: usize,
    /// Sequences that have a context.
    filled: usize,
}

impl Bench {
    /// One prompt in one step; tokens a second.
    fn prefill(&mut self, tokens: usize) -> Result<f64> {
        let started = Instant::now();
        self.step(&[0], 0, tokens)?;
        Ok(tokens as f64 / started.elapsed().as_secs_f64())
    }

    /// `batch` sequences, one token each a step; tokens a second.
    fn decode(&mut self, batch: usize, options: &Options) -> Result<f64> {
        let (context, steps) = (options.context as usize, options.steps as usize);
        let sequences: Vec<usize> = (0..batch).collect();
        for sequence in self.filled..batch {
            self.step(&[sequence], 0, context)?;
        }
        self.filled = self.filled.max(batch);
        let started = Instant::now();
        for step in 0..steps {
            self.step(&sequences, context + step, 1)?;
        }
        Ok((batch * steps) as f64 / started.elapsed().as_secs_f64())
    }

    /// Computes `count` tokens from position `start` of each sequence.
    fn step(&mut self, sequences: &[usize], start: usize, count: usize) -> Result<()> {
        let chunks = sequences.iter().map(|&sequence| self.chunk(sequence, start, count)).collect();
        self.runner.execute(&StepPlan { chunks }, &mut || ()).map(drop)
    }

    fn chunk(&self, sequence: usize, start: usize, count: usize) -> Chunk {
        let first = sequence * self.blocks;
        let end = first + (start + count).div_ceil(BLOCK_SIZE);
        let token = |position: usize| ((position * 7919 + sequence * 104_729) % self.vocab) as u32;
        let want = match self.runner.model().config.head {
            HeadKind::Reward => Want::Score,
            HeadKind::Language => Want::Token(Draw {
                params: Arc::new(SamplingParams::default()),
                position: start + count,
                generated_count: 0,
                history: Vec::new(),
                prompt_len: start + count,
            }),
        };
        Chunk {
            id: SequenceId(sequence as u64),
            start,
            tokens: (start..start + count).map(token).collect(),
            blocks: (first..end).map(|block| BlockId(block as u32)).collect(),
            rows: Rows::Nothing,
            want,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millions = self.parameters as f64 / 1e6;
        writeln!(f, "{millions:.1} million parameters, {}, {} threads", self.device, self.threads)?;
        write!(f, "prefill {:>5} tokens  {:>10.1} tok/s", self.prefill, self.prefill_tokens_per_second)?;
        for row in &self.decode {
            write!(f, "\ndecode  batch {:>6}  {:>10.1} tok/s", row.batch, row.tokens_per_second)?;
        }
        Ok(())
    }
}
