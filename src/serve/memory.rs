//! How much memory a model takes: weights as they are stored, and a key/value cache sized by the settings.

use std::fmt;

use crate::{
    config::EngineConfig,
    error::{Error, Result},
    model::config::ModelConfig,
};

/// Without a setting, a cache takes at most this part of the memory that is free.
const CACHE_SHARE: u64 = 4;
const GIB: f64 = (1u64 << 30) as f64;

/// What one model will hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct MemoryPlan {
    /// Bytes of the tensors.
    pub(super) weight_bytes: u64,
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
    /// Plans for `model` with `available` bytes free; None where the system does not tell.
    ///
    /// # Errors
    /// [`Error::Invalid`] where weights and cache do not fit, or the cache is smaller than one block.
    pub(super) fn new(
        model: &ModelConfig,
        weight_bytes: u64,
        settings: &EngineConfig,
        available: Option<u64>,
    ) -> Result<Self> {
        if let Some(available) = available
            && weight_bytes > available
        {
            let message = format!("the weights take {}, {} are free", gib(weight_bytes), gib(available));
            return Err(Error::invalid("model", message));
        }
        let len_max = settings.len_max.unwrap_or(model.positions_max).min(model.positions_max);
        let token_bytes = model.kv_bytes_per_token();
        let block_bytes = token_bytes.saturating_mul(settings.block_size as u64);
        let left = available.map(|available| available - weight_bytes);
        let budget = match settings.kv_cache_gib {
            Some(asked) => Some((asked * GIB) as u64),
            None => left.map(|left| left / CACHE_SHARE),
        };
        // Every sequence that runs at once at its full length; more would never be used.
        let enough = settings.running_max.saturating_mul(len_max.div_ceil(settings.block_size));
        let affordable = budget.map_or(enough, |bytes| usize::try_from(bytes / block_bytes).unwrap_or(usize::MAX));
        let block_count = enough.min(affordable).min(u32::MAX as usize);
        let plan = Self { weight_bytes, len_max, block_count, block_size: settings.block_size, token_bytes };
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

    /// Bytes of the cache.
    pub(super) fn cache_bytes(&self) -> u64 {
        self.token_bytes * self.cache_len() as u64
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "weights {}, cache {} for {} tokens, sequences of up to {} tokens",
            gib(self.weight_bytes),
            gib(self.cache_bytes()),
            self.cache_len(),
            self.len_max
        )
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

    /// 2 layers, 1 key head of width 8: 2 * 4 * 2 * 8 = 128 bytes of cache for a token.
    fn model() -> ModelConfig {
        let json = r#"{"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
            "intermediate_size": 32, "vocab_size": 10, "max_position_embeddings": 100, "sliding_window": null,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2}"#;
        ModelConfig::parse(json, None).unwrap()
    }

    fn settings(running_max: usize) -> EngineConfig {
        EngineConfig { running_max, ..EngineConfig::default() }
    }

    #[test]
    fn without_limits_every_running_sequence_has_its_full_length() {
        let plan = MemoryPlan::new(&model(), 1000, &settings(3), None).unwrap();
        // ceil(100 / 16) = 7 blocks each.
        assert_eq!((plan.block_count, plan.cache_len(), plan.cache_bytes()), (21, 336, 336 * 128));
        assert_eq!(plan.len_max, 100);
    }

    #[test]
    fn the_cache_takes_a_quarter_of_what_the_weights_leave() {
        // 41,960 free after the weights, a quarter is 10,490: 5 blocks of 2048 bytes.
        let plan = MemoryPlan::new(&model(), 1000, &settings(3), Some(42_960)).unwrap();
        assert_eq!(plan.block_count, 5);
    }

    #[test]
    fn a_given_size_is_used_but_no_more_than_can_be_filled() {
        let small = EngineConfig { kv_cache_gib: Some(8192.0 / GIB), ..settings(3) };
        assert_eq!(MemoryPlan::new(&model(), 0, &small, None).unwrap().block_count, 4);
        let large = EngineConfig { kv_cache_gib: Some(1.0), ..settings(3) };
        assert_eq!(MemoryPlan::new(&model(), 0, &large, None).unwrap().block_count, 21);
    }

    #[test]
    fn the_length_is_capped_by_the_setting_and_by_the_model() {
        let short = EngineConfig { len_max: Some(20), ..settings(1) };
        assert_eq!(MemoryPlan::new(&model(), 0, &short, None).unwrap().len_max, 20);
        let long = EngineConfig { len_max: Some(500), ..settings(1) };
        assert_eq!(MemoryPlan::new(&model(), 0, &long, None).unwrap().len_max, 100);
    }

    #[track_caller]
    fn refused(weight_bytes: u64, settings: &EngineConfig, available: u64, part: &str) {
        let message = MemoryPlan::new(&model(), weight_bytes, settings, Some(available)).unwrap_err().to_string();
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
