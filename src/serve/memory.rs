//! How much memory models take on their device: weights, what a step works in, and a key/value cache sized by the settings.

use std::fmt;

use candle_core::{DType, Device};

use crate::{
    checkpoint::{Checkpoint, Rounding, Storage},
    config::{CacheDtype, ComputeDtype, Config, EngineConfig},
    device,
    error::{Error, Result},
    model::config::ModelConfig,
    ops::{attention, parameter::Precision, place::Place},
    service::Kind,
};

/// Without a setting, a cache takes at most this part of the host's memory that is free: others need some too.
const HOST_SHARE: f64 = 0.25;
/// The caches of all models together, of a GPU's memory that weights and work leave.
const GPU_SHARE: f64 = 0.9;
/// On a GPU, beside what grows with the model: the kernels, the libraries' own buffers, sums over parts of contexts, and the memory of
/// recorded steps, which have few rows.
const GPU_WORK_BYTES: u64 = 768 << 20;
/// Rows whose logits exist at once.
const LOGITS_ROWS: u64 = 256;
const GIB: f64 = (1u64 << 30) as f64;

/// The type of numbers in a cache in the host's memory for a model that multiplies in `precision`.
pub(crate) fn host_cache_dtype(asked: CacheDtype, precision: Precision) -> DType {
    match asked {
        CacheDtype::Auto => attention::cache_dtype(precision),
        CacheDtype::F32 => DType::F32,
        CacheDtype::Bf16 => DType::BF16,
        CacheDtype::F16 => DType::F16,
    }
}

/// How the numbers of a model are kept and multiplied.
#[derive(Debug, Clone, Copy)]
pub(super) struct Numbers {
    /// What its matrices are rounded to while they are loaded.
    pub(super) rounding: Option<Rounding>,
    pub(super) compute_dtype: ComputeDtype,
}

impl Numbers {
    /// Those of the policy or the reward model of `config`.
    pub(super) fn of(kind: Kind, config: &Config) -> Self {
        let (asked, compute_dtype) = match kind {
            Kind::Policy => (config.quantize, config.compute_dtype),
            Kind::Reward => (config.reward_quantize, config.reward_compute_dtype),
        };
        Self { rounding: asked.map(Rounding::from), compute_dtype }
    }
}

/// What a model needs before there is a cache.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Needs {
    weight_bytes: u64,
    /// Of a step beside weights and cache. Not counted on a CPU.
    work_bytes: u64,
    /// Of the numbers in the cache.
    cache_dtype: DType,
}

impl Needs {
    /// Those of `checkpoint` on `device`, its numbers kept and multiplied as `numbers` says.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a type of the cache that the device does not have.
    pub(super) fn new(
        checkpoint: &Checkpoint,
        Numbers { rounding, compute_dtype }: Numbers,
        device: &Device,
        settings: &EngineConfig,
    ) -> Result<Self> {
        let headers = checkpoint.headers();
        if device.is_cpu() {
            let precision = match compute_dtype {
                ComputeDtype::Bf16 if checkpoint.is_bf16(rounding) => Precision::Bf16,
                _ => Precision::F32,
            };
            let cache_dtype = host_cache_dtype(settings.kv_cache_dtype, precision);
            return Ok(Self { weight_bytes: checkpoint.memory_bytes(rounding), work_bytes: 0, cache_dtype });
        }
        if settings.kv_cache_dtype != CacheDtype::Auto {
            let message = "on a GPU the cache has the type that the model computes in: leave it at auto";
            return Err(Error::invalid("engine.kv_cache_dtype", message));
        }
        let embedding = headers.iter().find(|tensor| tensor.name == "model.embed_tokens.weight");
        let stored = embedding.and_then(|tensor| match tensor.storage {
            // Rounded, it takes two bytes there in any case.
            Storage::Float(dtype) if rounding.is_none() => Some(dtype),
            _ => None,
        });
        let (model, dtype) = (&checkpoint.config, Place::dtype_on(device, stored));
        let number_bytes = dtype.size_in_bytes() as u64;
        // Rows that live at once in a layer: residuals and norms, the projection of queries, keys and values, and the two of the mlp;
        // of experts those of one, which may have all rows, and what it gives.
        let attention = (2 * model.heads + 2 * model.kv_heads) * model.head_dim;
        let row = 7 * model.hidden + attention + 3 * model.intermediate;
        let work = settings.step_tokens as u64 * row as u64 + LOGITS_ROWS * model.vocab as u64;
        Ok(Self {
            weight_bytes: model.parameter_count() * number_bytes,
            work_bytes: GPU_WORK_BYTES + work * number_bytes,
            cache_dtype: dtype,
        })
    }

    fn bytes(&self) -> u64 {
        self.weight_bytes + self.work_bytes
    }
}

/// The memory of a device while models are planned on it, one after the other.
#[derive(Debug)]
pub(super) struct Memory {
    /// None where the system does not tell.
    available: Option<u64>,
    /// Whether what later models need is left to them.
    reserves: bool,
    later: Vec<Needs>,
}

impl Memory {
    /// That of `device` for models that need `needs`, to be planned in this order.
    pub(super) fn new(device: &Device, needs: impl IntoIterator<Item = Needs>) -> Self {
        let mut later: Vec<Needs> = needs.into_iter().collect();
        later.reverse();
        Self { available: device::memory_available(device), reserves: !device.is_cpu(), later }
    }

    /// The plan of the next model.
    ///
    /// # Errors
    /// As [`MemoryPlan::new`].
    pub(super) fn plan(&mut self, model: &ModelConfig, settings: &EngineConfig) -> Result<MemoryPlan> {
        let Some(needs) = self.later.pop() else { return Err(Error::internal("no model is left to be planned")) };
        let (reserved, cache_share) = match self.reserves {
            true => (self.later.iter().map(Needs::bytes).sum::<u64>(), GPU_SHARE / (self.later.len() + 1) as f64),
            false => (0, HOST_SHARE),
        };
        let available = self.available.map(|available| available.saturating_sub(reserved));
        let plan = MemoryPlan::new(model, &needs, settings, &Room { available, cache_share });
        let taken = plan.as_ref().map_or(needs.bytes(), |plan| needs.bytes() + plan.cache_bytes());
        self.available = self.available.map(|available| available.saturating_sub(taken));
        plan
    }
}

/// What a model finds.
struct Room {
    available: Option<u64>,
    /// Of what weights and work leave.
    cache_share: f64,
}

/// What one model will hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct MemoryPlan {
    needs: Needs,
    /// Longest sequence in tokens.
    pub(super) len_max: usize,
    /// Blocks of the cache.
    pub(super) block_count: usize,
    /// Tokens in a block.
    pub(super) block_size: usize,
    /// Bytes of cache for one token, all layers.
    token_bytes: u64,
}

impl MemoryPlan {
    /// Plans for `model` in `room`.
    ///
    /// # Errors
    /// [`Error::Invalid`] where weights and cache do not fit, or the cache is smaller than one block.
    fn new(model: &ModelConfig, needs: &Needs, settings: &EngineConfig, room: &Room) -> Result<Self> {
        if let Some(available) = room.available
            && needs.bytes() > available
        {
            let message = format!("the weights take {}, {} are free", gib(needs.bytes()), gib(available));
            return Err(Error::invalid("model", message));
        }
        let len_max = settings.len_max.unwrap_or(model.positions_max).min(model.positions_max);
        let token_bytes = model.kv_bytes_per_token(needs.cache_dtype.size_in_bytes() as u64);
        let block_bytes = token_bytes.saturating_mul(settings.block_size as u64);
        let left = room.available.map(|available| available - needs.bytes());
        let budget = match settings.kv_cache_gib {
            Some(asked) => Some((asked * GIB) as u64),
            None => left.map(|left| (left as f64 * room.cache_share) as u64),
        };
        // Every sequence that runs at once at its full length; more would never be used.
        let enough = settings.running_max.saturating_mul(len_max.div_ceil(settings.block_size));
        let affordable = budget.map_or(enough, |bytes| usize::try_from(bytes / block_bytes).unwrap_or(usize::MAX));
        let block_count = enough.min(affordable).min(u32::MAX as usize);
        let plan = Self { needs: *needs, len_max, block_count, block_size: settings.block_size, token_bytes };
        if block_count == 0 {
            let message =
                format!("no block of the cache fits: one of {} tokens takes {}", settings.block_size, gib(block_bytes));
            return Err(Error::invalid("engine.kv_cache_gib", message));
        }
        match left {
            Some(left) if plan.cache_bytes() > left => {
                let message = format!("the cache would take {}, {} are free", gib(plan.cache_bytes()), gib(left));
                Err(Error::invalid("engine.kv_cache_gib", message))
            }
            _ => Ok(plan),
        }
    }

    /// Tokens the cache holds.
    pub(super) fn cache_len(&self) -> usize {
        self.block_count * self.block_size
    }

    /// Type of the numbers in the cache.
    pub(super) fn cache_dtype(&self) -> DType {
        self.needs.cache_dtype
    }

    /// Bytes of the cache.
    pub(super) fn cache_bytes(&self) -> u64 {
        self.token_bytes * self.cache_len() as u64
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "weights {}, ", gib(self.needs.weight_bytes))?;
        if self.needs.work_bytes > 0 {
            write!(f, "work {}, ", gib(self.needs.work_bytes))?;
        }
        let (cache, dtype, tokens) = (gib(self.cache_bytes()), self.cache_dtype().as_str(), self.cache_len());
        write!(f, "cache {cache} of {dtype} for {tokens} tokens, sequences of up to {} tokens", self.len_max)
    }
}

fn gib(bytes: u64) -> String {
    let gib = bytes as f64 / GIB;
    if gib >= 0.1 { format!("{gib:.2} GiB") } else { format!("{:.1} MiB", gib * 1024.0) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::{checkpoint::HubOptions, serve::load::open_source};

    /// 2 layers, 1 key head of width 8: 2 * 4 * 2 * 8 = 128 bytes of cache for a token.
    fn model() -> ModelConfig {
        let json = r#"{"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
            "intermediate_size": 32, "vocab_size": 10, "max_position_embeddings": 100, "sliding_window": null,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2}"#;
        ModelConfig::parse(json, None).unwrap()
    }

    fn plan(weight_bytes: u64, settings: &EngineConfig, available: Option<u64>) -> Result<MemoryPlan> {
        let needs = Needs { weight_bytes, work_bytes: 0, cache_dtype: DType::F32 };
        MemoryPlan::new(&model(), &needs, settings, &Room { available, cache_share: HOST_SHARE })
    }

    fn settings(running_max: usize) -> EngineConfig {
        EngineConfig { running_max, ..EngineConfig::default() }
    }

    #[test]
    fn without_limits_every_running_sequence_has_its_full_length() {
        let plan = plan(1000, &settings(3), None).unwrap();
        // ceil(100 / 16) = 7 blocks each.
        assert_eq!((plan.block_count, plan.cache_len(), plan.cache_bytes()), (21, 336, 336 * 128));
        assert_eq!(plan.len_max, 100);
    }

    #[test]
    fn the_cache_takes_a_quarter_of_what_the_weights_leave() {
        // 41,960 free after the weights, a quarter is 10,490: 5 blocks of 2048 bytes.
        let plan = plan(1000, &settings(3), Some(42_960)).unwrap();
        assert_eq!(plan.block_count, 5);
    }

    #[test]
    fn a_given_size_is_used_but_no_more_than_can_be_filled() {
        let small = EngineConfig { kv_cache_gib: Some(8192.0 / GIB), ..settings(3) };
        assert_eq!(plan(0, &small, None).unwrap().block_count, 4);
        let large = EngineConfig { kv_cache_gib: Some(1.0), ..settings(3) };
        assert_eq!(plan(0, &large, None).unwrap().block_count, 21);
    }

    #[test]
    fn the_length_is_capped_by_the_setting_and_by_the_model() {
        let short = EngineConfig { len_max: Some(20), ..settings(1) };
        assert_eq!(plan(0, &short, None).unwrap().len_max, 20);
        let long = EngineConfig { len_max: Some(500), ..settings(1) };
        assert_eq!(plan(0, &long, None).unwrap().len_max, 100);
    }

    #[test]
    fn a_cache_is_bf16_where_attention_will_multiply_bf16() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/serve/mistral-bf16");
        let checkpoint = open_source(folder, &HubOptions::default()).unwrap();
        let dtype = |compute_dtype, rounding, kv_cache_dtype| {
            let settings = EngineConfig { kv_cache_dtype, ..EngineConfig::default() };
            let numbers = Numbers { rounding, compute_dtype };
            Needs::new(&checkpoint, numbers, &Device::Cpu, &settings).unwrap().cache_dtype
        };
        let unit = attention::cache_dtype(Precision::Bf16);
        assert_eq!(dtype(ComputeDtype::F32, None, CacheDtype::Auto), DType::F32);
        assert_eq!(dtype(ComputeDtype::Bf16, None, CacheDtype::Auto), unit);
        assert_eq!(dtype(ComputeDtype::Bf16, Some(Rounding::Bf16), CacheDtype::Auto), unit);
        assert_eq!(dtype(ComputeDtype::Bf16, Some(Rounding::F16), CacheDtype::Auto), DType::F32);
        assert_eq!(dtype(ComputeDtype::Bf16, None, CacheDtype::F32), DType::F32);
        assert_eq!(dtype(ComputeDtype::F32, None, CacheDtype::Bf16), DType::BF16);
    }

    #[test]
    fn models_share_a_gpu() {
        // 1,000 bytes each for weights and 100 for work; 64 bytes of cache for a token, 1,024 for a block.
        let needs = Needs { weight_bytes: 1000, work_bytes: 100, cache_dtype: DType::BF16 };
        let mut memory = Memory { available: Some(102_200), reserves: true, later: vec![needs, needs] };
        // 100,000 left for both caches: 45,000 for the first, then nine tenths of the rest.
        let first = memory.plan(&model(), &settings(100)).unwrap();
        assert_eq!((first.block_count, memory.available), (43, Some(102_200 - 1_100 - 43 * 1_024)));
        assert_eq!(memory.plan(&model(), &settings(100)).unwrap().block_count, 49);
        assert!(memory.plan(&model(), &settings(100)).is_err());
        let text = first.to_string();
        assert!(text.starts_with("weights 0.0 MiB, work 0.0 MiB, cache 0.0 MiB of bf16 for 688 tokens"), "{text}");
        let mut full = Memory { available: Some(2_100), reserves: true, later: vec![needs, needs] };
        assert!(full.plan(&model(), &settings(100)).is_err());
    }

    #[track_caller]
    fn refused(weight_bytes: u64, settings: &EngineConfig, available: u64, part: &str) {
        let message = plan(weight_bytes, settings, Some(available)).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }

    #[test]
    fn what_does_not_fit_is_refused_before_it_is_loaded() {
        refused(2 << 30, &settings(1), 1 << 30, "the weights take 2.00 GiB, 1.00 GiB are free");
        let greedy = EngineConfig { kv_cache_gib: Some(1.0), ..settings(4096) };
        refused(0, &greedy, 1 << 20, "the cache would take");
        refused(0, &settings(1), 100, "no block of the cache fits");
    }
}
