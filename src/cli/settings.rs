//! Flags that all commands with models share, each tied to its setting by the name of its environment variable,
//! and what such a command starts from them.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};

use crate::{
    config::{CacheDtype, ComputeDtype, Config, NONE, Overrides, Quantization},
    device::Choice,
    error::Result,
    service::{Service, generate::GenerateRequest},
};

/// Requests that may wait for the engine of a command without a server.
const WAITING_MAX: usize = 1 << 20;

/// Which models, and how they run.
#[derive(Debug, Args)]
pub(super) struct SettingArgs {
    /// Policy: a built-in name, a folder, a .gguf file, or a hub id org/name[@revision][:gguf]; "none" for no policy
    #[arg(long, env = "EURUS_MODEL", value_name = "MODEL")]
    pub(super) model: Option<String>,
    /// Reward model, named like the policy; "none" for no reward model
    #[arg(long, env = "EURUS_REWARD_MODEL", value_name = "MODEL")]
    reward_model: Option<String>,
    /// Name of the policy in requests
    #[arg(long, env = "EURUS_MODEL_NAME", value_name = "NAME")]
    model_name: Option<String>,
    /// Name of the reward model in requests
    #[arg(long, env = "EURUS_REWARD_MODEL_NAME", value_name = "NAME")]
    reward_model_name: Option<String>,
    /// Round the policy's matrices while it is loaded
    #[arg(long, env = "EURUS_QUANTIZE", value_name = "FORMAT", value_enum)]
    quantize: Option<Quantization>,
    /// Round the reward model's matrices while it is loaded
    #[arg(long, env = "EURUS_REWARD_QUANTIZE", value_name = "FORMAT", value_enum)]
    reward_quantize: Option<Quantization>,
    /// How the policy multiplies bf16 weights: f32 is exact, bf16 two to four times as fast for prompts where the processor has it
    #[arg(long, env = "EURUS_COMPUTE_DTYPE", value_name = "TYPE", value_enum)]
    compute_dtype: Option<ComputeDtype>,
    /// The same for the reward model
    #[arg(long, env = "EURUS_REWARD_COMPUTE_DTYPE", value_name = "TYPE", value_enum)]
    reward_compute_dtype: Option<ComputeDtype>,
    /// Safetensors file with one row: the head of the reward model, in place of its own
    #[arg(long, env = "EURUS_REWARD_HEAD", value_name = "FILE")]
    reward_head: Option<String>,
    /// Device that models are loaded to; auto takes a GPU where there is one
    #[arg(long, env = "EURUS_DEVICE", value_name = "DEVICE", value_enum)]
    device: Option<Choice>,
    /// Settings file
    #[arg(long, env = "EURUS_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Branch, tag or commit of the policy on the hub
    #[arg(long, env = "EURUS_HUB__REVISION", value_name = "REV")]
    revision: Option<String>,
    /// Branch, tag or commit of the reward model on the hub
    #[arg(long, env = "EURUS_HUB__REWARD_REVISION", value_name = "REV")]
    reward_revision: Option<String>,
    /// Use only checkpoints that are on this machine (as HF_HUB_OFFLINE=1)
    #[arg(long, env = "EURUS_HUB__OFFLINE", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    offline: Option<bool>,
    /// Threads for arithmetic
    #[arg(long, env = "EURUS_ENGINE__THREADS", value_name = "COUNT")]
    threads: Option<usize>,
    /// Keep each of them but the first on a core of its own: for a machine that does nothing else
    #[arg(
        long, env = "EURUS_ENGINE__PIN_THREADS", num_args = 0..=1, default_missing_value = "true", require_equals = true
    )]
    pin_threads: Option<bool>,
    /// Longest sequence in tokens, prompt and answer together
    #[arg(long, env = "EURUS_ENGINE__LEN_MAX", value_name = "TOKENS")]
    len_max: Option<usize>,
    /// Memory of each model's key/value cache, in GiB
    #[arg(long, env = "EURUS_ENGINE__KV_CACHE_GIB", value_name = "GIB")]
    kv_cache_gib: Option<f64>,
    /// Type of the numbers in the key/value cache on a CPU: f32 is exact, bf16 and f16 take half the memory; auto is f32,
    /// or bf16 where compute-dtype bf16 uses Intel's AMX
    #[arg(long, env = "EURUS_ENGINE__KV_CACHE_DTYPE", value_name = "TYPE", value_enum)]
    kv_cache_dtype: Option<CacheDtype>,
    /// Tokens computed in one step at most
    #[arg(long, env = "EURUS_ENGINE__STEP_TOKENS", value_name = "TOKENS")]
    step_tokens: Option<usize>,
    /// Sequences that run at once
    #[arg(long, env = "EURUS_ENGINE__RUNNING_MAX", value_name = "COUNT")]
    running_max: Option<usize>,
    /// Sequences that wait for their turn before requests are refused with 429
    #[arg(long, env = "EURUS_ENGINE__WAITING_MAX", value_name = "COUNT")]
    waiting_max: Option<usize>,
    /// text or json
    #[arg(long, env = "EURUS_LOG__FORMAT", value_name = "FORMAT", value_parser = ["text", "json"])]
    log_format: Option<String>,
    /// error, warn, info, debug, trace, or filter directives
    #[arg(long, env = "EURUS_LOG__LEVEL", value_name = "LEVEL")]
    log_level: Option<String>,
    /// Any other setting of the file, such as limits.n_max=16; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// Which models a command starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Models {
    /// The policy alone.
    Policy,
    /// The reward model alone.
    Reward,
    /// Both.
    Both,
}

impl SettingArgs {
    /// The settings that are given, without those of the server.
    ///
    /// # Errors
    /// If a `--set` is not of the form key=value.
    pub(super) fn overrides(&self) -> Result<Overrides> {
        let mut overrides = Overrides::default();
        for assignment in &self.set {
            overrides.set_text(assignment)?;
        }
        overrides.set("model", self.model.clone());
        overrides.set("reward_model", self.reward_model.clone());
        overrides.set("model_name", self.model_name.clone());
        overrides.set("reward_model_name", self.reward_model_name.clone());
        overrides.set("quantize", self.quantize.and_then(named));
        overrides.set("reward_quantize", self.reward_quantize.and_then(named));
        overrides.set("compute_dtype", self.compute_dtype.and_then(named));
        overrides.set("reward_compute_dtype", self.reward_compute_dtype.and_then(named));
        overrides.set("reward_head", self.reward_head.clone());
        overrides.set("device", self.device);
        overrides.set("hub.revision", self.revision.clone());
        overrides.set("hub.reward_revision", self.reward_revision.clone());
        overrides.set("hub.offline", self.offline);
        overrides.set("engine.threads", self.threads);
        overrides.set("engine.pin_threads", self.pin_threads);
        overrides.set("engine.len_max", self.len_max);
        overrides.set("engine.kv_cache_gib", self.kv_cache_gib);
        overrides.set("engine.kv_cache_dtype", self.kv_cache_dtype.and_then(named));
        overrides.set("engine.step_tokens", self.step_tokens);
        overrides.set("engine.running_max", self.running_max);
        overrides.set("engine.waiting_max", self.waiting_max);
        overrides.set("log.format", self.log_format.clone());
        overrides.set("log.level", self.log_level.clone());
        Ok(overrides)
    }

    /// The settings after file, environment and `overrides`.
    ///
    /// # Errors
    /// Names the setting that is wrong.
    pub(super) fn load(&self, overrides: &Overrides) -> Result<Config> {
        Config::load(self.config.as_deref(), overrides)
    }

    /// Loads the settings and starts `models` in this process, for commands that need no server.
    ///
    /// # Errors
    /// Wrong settings, or a checkpoint that cannot be opened.
    pub(super) fn start(&self, models: Models) -> Result<Arc<Service>> {
        let mut overrides = self.overrides()?;
        match models {
            Models::Policy => overrides.set("reward_model", Some(NONE)),
            Models::Reward => overrides.set("model", Some(NONE)),
            Models::Both => {}
        }
        // Nobody else waits in the queue of a command's own engine.
        overrides.set("engine.waiting_max", Some(self.waiting_max.unwrap_or(WAITING_MAX)));
        let config = self.load(&overrides)?;
        super::start_logging(&config.log)?;
        crate::serve::service(&config)
    }
}

/// What a setting's value is called in files.
fn named(value: impl ValueEnum) -> Option<String> {
    value.to_possible_value().map(|value| value.get_name().to_owned())
}

/// How answers are drawn.
#[derive(Debug, Args)]
pub(super) struct SamplingArgs {
    /// 0 takes the most probable token
    #[arg(long, default_value_t = 1.0)]
    temperature: f32,
    /// Smallest set of most probable tokens with this mass
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Tokens of an answer at most; by default what the context leaves
    #[arg(long)]
    max_tokens: Option<usize>,
    /// Makes answers repeatable
    #[arg(long)]
    seed: Option<u64>,
    /// End an answer at this text; may be repeated
    #[arg(long)]
    stop: Vec<String>,
}

impl SamplingArgs {
    /// Writes the values into `request`.
    pub(super) fn apply(&self, request: &mut GenerateRequest) {
        request.temperature = self.temperature;
        request.top_p = self.top_p;
        request.max_tokens = self.max_tokens;
        request.seed = self.seed;
        request.stop.clone_from(&self.stop);
    }
}
