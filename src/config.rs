//! What a user may set, with units and defaults: one struct for each section, filled by `Config::load`.
//! Owns names, defaults and ranges of keys; what they do is decided where they are used.

pub(crate) mod layers;
pub(crate) mod render;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, de};

use crate::device::Choice;
use crate::error::{Error, Result};

pub use layers::Overrides;

/// The file read when no `--config` is given and it exists.
pub const DEFAULT_FILE: &str = "eurus.toml";

/// All settings of a serving process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Policy: a built-in name, a folder, a .gguf file, or a hub id
    /// `org/name[@revision][:gguf]`; `none` serves no policy.
    pub model: String,
    /// Reward model, named like `model`; `none` serves no reward model.
    pub reward_model: String,
    /// Name of the policy in requests; by default the name it was opened by.
    pub model_name: Option<String>,
    /// Name of the reward model in requests; by default the name it was opened by.
    pub reward_model_name: Option<String>,
    /// Rounds the matrices of the policy while it is loaded; by default they stay as they are stored.
    pub quantize: Option<Quantization>,
    /// The same for the reward model.
    pub reward_quantize: Option<Quantization>,
    /// How the policy multiplies bf16 weights: `f32` is exact, `bf16` rounds activations as most servers do, for twice the speed.
    pub compute_dtype: ComputeDtype,
    /// The same for the reward model, whose rewards are then no longer exact.
    pub reward_compute_dtype: ComputeDtype,
    /// A safetensors file with one row: the head of the reward model, in place of the one its checkpoint has.
    pub reward_head: Option<PathBuf>,
    /// Device that models are loaded to: `auto` takes a GPU where there is one that this program can use.
    pub device: Choice,
    /// Where checkpoints come from.
    pub hub: HubConfig,
    /// Listening, keys and deadlines.
    pub server: ServerConfig,
    /// Batching and memory, for each of the two engines.
    pub engine: EngineConfig,
    /// What one request may ask for.
    pub limits: LimitsConfig,
    /// What is written to stderr.
    pub log: LogConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            model: "eurus-mini/policy".into(),
            reward_model: "eurus-mini/reward".into(),
            model_name: None,
            reward_model_name: None,
            quantize: None,
            reward_quantize: None,
            compute_dtype: ComputeDtype::F32,
            reward_compute_dtype: ComputeDtype::F32,
            reward_head: None,
            device: Choice::default(),
            hub: HubConfig::default(),
            server: ServerConfig::default(),
            engine: EngineConfig::default(),
            limits: LimitsConfig::default(),
            log: LogConfig::default(),
        }
    }
}

/// What matrices are rounded to: formats and mixtures of llama.cpp's files. What is not worth it or does not go stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// 16 bits, for checkpoints in 32.
    Bf16,
    /// IEEE 16 bits.
    F16,
    /// 8.5 bits a number.
    #[value(name = "q8_0")]
    Q8_0,
    /// 4.5 bits a number.
    #[value(name = "q4_0")]
    Q4_0,
    /// 4.5 to 6.6 bits a number.
    #[serde(rename = "q4_k_m")]
    #[value(name = "q4_k_m")]
    Q4KM,
    /// 5.5 to 6.6 bits a number.
    #[serde(rename = "q5_k_m")]
    #[value(name = "q5_k_m")]
    Q5KM,
    /// 6.6 bits a number.
    #[serde(rename = "q6_k")]
    #[value(name = "q6_k")]
    Q6K,
}

/// How products of linear layers are computed, and those of attention where [`CacheDtype::Auto`] says so. Norms, rotations and all sums
/// are float32 in either case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ComputeDtype {
    /// In float32.
    #[default]
    F32,
    /// Both operands rounded to bf16: two to four times as fast for prompts and batches where the processor multiplies bf16.
    Bf16,
}

/// Type of the numbers in the key/value cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum CacheDtype {
    /// The one that the model computes in. On a CPU that is float32, where results are exact then, but bf16 where `compute_dtype` bf16
    /// multiplies on Intel's AMX: attention uses it, too, then, which makes long prompts faster.
    #[default]
    Auto,
    /// float32.
    F32,
    /// bf16: half the memory, and half of what long contexts read at every step.
    Bf16,
    /// f16: as bf16, with finer steps and a narrower range.
    F16,
}

/// Section `hub`. The cache folder, the token and the address follow Hugging Face's own variables:
/// `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_ENDPOINT`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HubConfig {
    /// Branch, tag or commit of the policy; by default `main`.
    pub revision: Option<String>,
    /// Branch, tag or commit of the reward model; by default `main`.
    pub reward_revision: Option<String>,
    /// Use only files that are in the local cache; `HF_HUB_OFFLINE=1` does the same.
    pub offline: bool,
}

/// Section `server`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// Address to listen on. Anything but loopback should come with API keys.
    pub host: String,
    /// TCP port; 0 takes a free one and prints it.
    pub port: u16,
    /// Accepted API keys; none leaves the server open to everyone who reaches it.
    pub api_keys: ApiKeys,
    /// A file with one more API key on each line.
    pub api_key_file: Option<PathBuf>,
    /// Largest request body, in bytes; units such as `8MiB` may be written.
    #[serde(deserialize_with = "byte_count")]
    pub body_bytes_max: u64,
    /// Largest request head, in bytes; units may be written.
    #[serde(deserialize_with = "byte_count")]
    pub header_bytes_max: u64,
    /// Header fields of a request.
    pub headers_max: usize,
    /// Seconds a client may take to send its request headers.
    pub header_seconds_max: u64,
    /// Seconds a client may take to send its request body.
    pub body_seconds_max: u64,
    /// Seconds a request may take in all; what has been generated by then is lost.
    pub request_seconds_max: u64,
    /// Seconds a connection may stay open between requests.
    pub keep_alive_seconds_max: u64,
    /// Seconds that running requests get to finish after SIGTERM or SIGINT.
    pub drain_seconds_max: u64,
    /// Seconds a client may leave a streamed answer unread before it is dropped.
    pub stall_seconds_max: u64,
    /// Open connections; further ones wait in the system's backlog.
    pub connections_max: usize,
    /// Whether `/metrics` is served without an API key.
    pub metrics_open: bool,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".into(),
            port: 8000,
            api_keys: ApiKeys::default(),
            api_key_file: None,
            body_bytes_max: 8 << 20,
            header_bytes_max: 32 << 10,
            headers_max: 64,
            header_seconds_max: 5,
            body_seconds_max: 30,
            request_seconds_max: 3600,
            keep_alive_seconds_max: 75,
            drain_seconds_max: 30,
            stall_seconds_max: 60,
            connections_max: 1024,
            metrics_open: false,
        }
    }
}

/// Section `engine`. The policy and the reward model each have an engine with these settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EngineConfig {
    /// Tokens computed in one step at most: larger is faster for long prompts and slower for everyone else's next token.
    pub step_tokens: usize,
    /// Sequences that run at once.
    pub running_max: usize,
    /// Sequences that wait for their turn; beyond it requests are answered 429.
    pub waiting_max: usize,
    /// Longest sequence in tokens, prompt and answer together; by default what the model was made for.
    pub len_max: Option<usize>,
    /// Tokens in a cache block.
    pub block_size: usize,
    /// Memory of one model's key/value cache, in GiB; by default enough for `running_max` sequences of full length,
    /// but no more than a quarter of the memory that is free, or of a GPU's nine tenths, shared by the models.
    pub kv_cache_gib: Option<f64>,
    /// Type of its numbers on a CPU; on a GPU they have the type that the model computes in.
    pub kv_cache_dtype: CacheDtype,
    /// Threads for arithmetic; by default the number of cores this process may use.
    pub threads: Option<usize>,
    /// Keep each of them but the first on a core of its own: for a machine that does nothing else.
    pub pin_threads: bool,
    /// On a GPU, record steps of decoding as graphs and replay them, which saves launching their kernels one by one.
    pub step_graphs: bool,
    /// Seconds without a finished step after which a busy engine counts as stalled and `/health` answers 503.
    pub step_seconds_max: u64,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            step_tokens: 512,
            running_max: 64,
            waiting_max: 512,
            len_max: None,
            block_size: 16,
            kv_cache_gib: None,
            kv_cache_dtype: CacheDtype::Auto,
            threads: None,
            pin_threads: false,
            step_graphs: true,
            step_seconds_max: 60,
        }
    }
}

/// Section `limits`. A request beyond a limit is answered 400, naming the field.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    /// Choices of one request.
    pub n_max: usize,
    /// Candidates of one best-of-n request.
    pub best_of_max: usize,
    /// Prompts in one completions request.
    pub prompts_max: usize,
    /// Size of one prompt before it is tokenised, in bytes; units may be written.
    #[serde(deserialize_with = "byte_count")]
    pub prompt_bytes_max: u64,
    /// Messages in one conversation.
    pub messages_max: usize,
    /// Stop strings of one request.
    pub stop_max: usize,
    /// Length of one stop string, in bytes.
    pub stop_bytes_max: usize,
    /// Alternatives reported for one token.
    pub top_logprobs_max: usize,
    /// Entries of `logit_bias`.
    pub logit_bias_max: usize,
    /// Texts in one scoring request.
    pub score_batch_max: usize,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            n_max: 64,
            best_of_max: 64,
            prompts_max: 256,
            prompt_bytes_max: 1 << 20,
            messages_max: 1024,
            stop_max: 16,
            stop_bytes_max: 256,
            top_logprobs_max: 20,
            logit_bias_max: 1024,
            score_batch_max: 256,
        }
    }
}

/// Section `log`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// `text` for people, `json` for machines.
    pub format: LogFormat,
    /// Least severe level shown (`error`, `warn`, `info`, `debug`, `trace`), or filter directives such as
    /// `info,eurus=debug`; `EURUS_LOG` and `RUST_LOG` take precedence.
    pub level: String,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { format: LogFormat::Text, level: "info".into() }
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One readable line for each event.
    Text,
    /// One JSON object for each event.
    Json,
}

/// API keys: never printed, not even by `Debug` or when the settings are shown.
#[derive(Clone, Default, PartialEq)]
pub struct ApiKeys(Vec<String>);

impl ApiKeys {
    /// Takes `keys` as they are.
    pub fn new(keys: Vec<String>) -> Self {
        Self(keys)
    }

    /// The keys in clear, for whoever compares them.
    pub fn reveal(&self) -> &[String] {
        &self.0
    }
}

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} hidden", self.0.len())
    }
}

impl Serialize for ApiKeys {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(|_| "(hidden)"))
    }
}

impl<'de> Deserialize<'de> for ApiKeys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        /// The environment has one string, a file has a list.
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            List(Vec<String>),
            Text(String),
        }
        // The failed value is a secret, so serde's own message must not be shown.
        let written = Written::deserialize(deserializer).map_err(|_| de::Error::custom("not a list of strings"))?;
        let keys = match written {
            Written::List(keys) => keys,
            Written::Text(text) => text.split(',').map(|key| key.trim().to_string()).collect(),
        };
        Ok(Self(keys))
    }
}

impl Config {
    /// Defaults, then `file` (or `./eurus.toml` where it exists), then `EURUS_*` variables, then `overrides`.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming every unknown key, wrong type and value out of range.
    pub fn load(file: Option<&Path>, overrides: &Overrides) -> Result<Self> {
        Self::from_sources(file, std::env::vars(), overrides)
    }

    /// [`Config::load`] with the environment given.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn from_sources(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
        overrides: &Overrides,
    ) -> Result<Self> {
        let default = Path::new(DEFAULT_FILE);
        let file = file.or_else(|| default.exists().then_some(default));
        let config = layers::merge(file, environment, overrides)?;
        config.validate()?;
        Ok(config)
    }

    /// The accepted API keys: those of the configuration and those of `api_key_file`, in that order.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the file cannot be read or a key is empty.
    pub fn api_keys(&self) -> Result<ApiKeys> {
        let mut keys = self.server.api_keys.reveal().to_vec();
        if let Some(path) = &self.server.api_key_file {
            let text = std::fs::read_to_string(path)
                .map_err(|error| Error::invalid("server.api_key_file", format!("{}: {error}", path.display())))?;
            keys.extend(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(String::from));
            if keys.is_empty() {
                let message = format!("{} has no key, which would leave the server open", path.display());
                return Err(Error::invalid("server.api_key_file", message));
            }
        }
        if keys.iter().any(|key| key.is_empty()) {
            return Err(Error::invalid("server.api_keys", "an API key must not be empty"));
        }
        Ok(ApiKeys(keys))
    }

    /// The settings as a TOML file, without the API keys.
    pub fn to_toml(&self) -> String {
        render::to_toml(self)
    }

    /// Every count with its key, least and greatest value.
    fn counts(&self) -> [(&'static str, u64, u64, u64); 27] {
        let (server, engine, limits) = (&self.server, &self.engine, &self.limits);
        [
            ("server.body_bytes_max", server.body_bytes_max, 1024, 1 << 32),
            ("server.header_bytes_max", server.header_bytes_max, 8192, 1 << 20),
            ("server.headers_max", server.headers_max as u64, 16, 1024),
            ("server.header_seconds_max", server.header_seconds_max, 1, 3600),
            ("server.body_seconds_max", server.body_seconds_max, 1, 3600),
            ("server.request_seconds_max", server.request_seconds_max, 1, 86_400),
            ("server.keep_alive_seconds_max", server.keep_alive_seconds_max, 1, 3600),
            ("server.drain_seconds_max", server.drain_seconds_max, 0, 86_400),
            ("server.stall_seconds_max", server.stall_seconds_max, 1, 86_400),
            ("server.connections_max", server.connections_max as u64, 1, 1 << 20),
            ("engine.step_tokens", engine.step_tokens as u64, 1, 1 << 20),
            ("engine.running_max", engine.running_max as u64, 1, 4096),
            ("engine.waiting_max", engine.waiting_max as u64, 1, 1 << 20),
            ("engine.len_max", engine.len_max.map_or(1, |len| len as u64), 1, 1 << 24),
            ("engine.block_size", engine.block_size as u64, 1, 256),
            ("engine.threads", engine.threads.map_or(1, |count| count as u64), 1, 1024),
            ("engine.step_seconds_max", engine.step_seconds_max, 1, 3600),
            ("limits.n_max", limits.n_max as u64, 1, 4096),
            ("limits.best_of_max", limits.best_of_max as u64, 1, 4096),
            ("limits.prompts_max", limits.prompts_max as u64, 1, 1 << 16),
            ("limits.prompt_bytes_max", limits.prompt_bytes_max, 16, 1 << 32),
            ("limits.messages_max", limits.messages_max as u64, 1, 1 << 16),
            ("limits.stop_max", limits.stop_max as u64, 0, 1024),
            ("limits.stop_bytes_max", limits.stop_bytes_max as u64, 1, 1 << 16),
            ("limits.top_logprobs_max", limits.top_logprobs_max as u64, 0, 1024),
            ("limits.logit_bias_max", limits.logit_bias_max as u64, 0, 1 << 20),
            ("limits.score_batch_max", limits.score_batch_max as u64, 1, 1 << 16),
        ]
    }

    /// Ranges, all problems in one error.
    fn validate(&self) -> Result<()> {
        let counts = self.counts();
        let mut problems: Vec<String> = counts
            .iter()
            .filter(|(_, value, least, most)| value < least || value > most)
            .map(|(key, value, least, most)| format!("{key} = {value} is outside {least}..={most}"))
            .collect();
        if let Some(gib) = self.engine.kv_cache_gib
            && !(gib.is_finite() && gib > 0.0 && gib <= 65_536.0)
        {
            problems.push(format!("engine.kv_cache_gib = {gib} is outside 0 (exclusive)..=65536"));
        }
        for (key, name) in [("model", Some(&self.model)), ("reward_model", Some(&self.reward_model))]
            .into_iter()
            .chain([("model_name", self.model_name.as_ref()), ("reward_model_name", self.reward_model_name.as_ref())])
        {
            if name.is_some_and(|name| name.trim().is_empty()) {
                problems.push(format!("{key} is empty"));
            }
        }
        if self.model == NONE && self.reward_model == NONE {
            problems.push("model and reward_model are both \"none\": nothing to serve".into());
        }
        if self.server.host.trim().is_empty() {
            problems.push("server.host is empty".into());
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Invalid { message: problems.join("; "), field: None }) }
    }
}

/// The model name that stands for "serve none".
pub const NONE: &str = "none";

/// A count of bytes: a number, or a string with a unit: `B`, `kB`, `MB`, `GB` (powers of 1000), `KiB`, `MiB`, `GiB`.
pub(crate) fn byte_count<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Number(u64),
        Text(String),
    }
    match Written::deserialize(deserializer) {
        Ok(Written::Number(count)) => Ok(count),
        Ok(Written::Text(text)) => {
            parse_bytes(&text).ok_or_else(|| de::Error::custom(format!("`{text}` is not a size such as 8MiB")))
        }
        Err(_) => Err(de::Error::custom("not a size such as 8388608 or \"8MiB\"")),
    }
}

fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = match unit.trim() {
        "" | "B" => 1,
        "kB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests;
