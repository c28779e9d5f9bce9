//! What config.json and generation_config.json say about a model, checked before any memory is asked for.
//! Knows shapes and names of the tensors; does not read them.

use candle_core::DType;

use crate::error::Result;

mod keys;
pub(crate) mod tensors;

use keys::Keys;

/// Largest sizes accepted, far above any published model of this kind: a larger number in a config.json is a damaged
/// or hostile file, and must not reach an allocation.
mod most {
    pub(super) const HIDDEN: usize = 1 << 16;
    pub(super) const LAYERS: usize = 1 << 10;
    pub(super) const HEADS: usize = 1 << 10;
    pub(super) const HEAD_DIM: usize = 1 << 9;
    pub(super) const INTERMEDIATE: usize = 1 << 19;
    pub(super) const VOCAB: usize = 1 << 21;
    pub(super) const POSITIONS: usize = 1 << 24;
    pub(super) const EOS_COUNT: usize = 64;
    /// 2^40 parameters are 2 TiB at two bytes each.
    pub(super) const PARAMETERS: u64 = 1 << 40;
}

/// Most experts that a layer may have.
pub const EXPERTS_MAX: usize = 1 << 8;

/// The families of decoders that one implementation covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `model_type` mistral: may have a sliding window.
    Mistral,
    /// `model_type` llama: no sliding window, whatever the file says, as in transformers.
    Llama,
    /// `model_type` mixtral: Mistral with several feed-forward layers in the place of one.
    Mixtral,
}

/// The feed-forward layers among which a router chooses for every token (arXiv 2401.04088, section 2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Experts {
    /// How many there are in a layer.
    pub count: usize,
    /// How many compute each token; at most `count`.
    pub per_token: usize,
}

/// What is read off the last hidden state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadKind {
    /// One logit for each word of the vocabulary.
    Language,
    /// One real number: a reward.
    Reward,
}

/// A checked description of a model. All counts are at least 1.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// What the model answers with.
    pub head: HeadKind,
    /// Name of the head's own tensor; `None` when it is the embedding (`tied`).
    pub head_tensor: Option<&'static str>,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head, even; `heads * head_dim` need not be `hidden`.
    pub head_dim: usize,
    /// Width of the feed-forward layer, or of each expert.
    pub intermediate: usize,
    /// None where a layer has one feed-forward layer for all tokens.
    pub experts: Option<Experts>,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Added to the mean square in every RMS norm.
    pub rms_eps: f64,
    /// A position sees itself and the `window - 1` before it; `None` sees all before it.
    pub window: Option<usize>,
    /// Longest sequence the model was made for.
    pub positions_max: usize,
    /// The language head is the embedding.
    pub tied: bool,
    /// First token of a sequence.
    pub bos: Option<u32>,
    /// Tokens that end an answer: those of generation_config.json first. May be empty: then the tokenizer knows.
    pub eos: Vec<u32>,
    /// Whether scoring appends an end-of-sequence token unless the request says otherwise.
    pub append_eos: bool,
    /// Element type the file announces (`dtype` or `torch_dtype`); the tensors themselves decide.
    pub dtype: Option<DType>,
}

impl ModelConfig {
    /// Reads and checks config.json and, where there is one, generation_config.json.
    ///
    /// # Errors
    /// [`crate::error::Error::Unsupported`] for a sound description of a model that this program does not run,
    /// otherwise [`crate::error::Error::Checkpoint`]; either names every offending key.
    pub fn parse(config_json: &str, generation_config_json: Option<&str>) -> Result<Self> {
        let mut keys = Keys::parse("config.json", config_json)?;
        let mut generation = Keys::parse("generation_config.json", generation_config_json.unwrap_or("{}"))?;
        let architecture = architecture(&mut keys);
        if architecture.is_none() {
            keys.finish()?;
        }
        let tied = keys.flag("tie_word_embeddings", false);
        let (head, head_tensor) = head(&mut keys, tied);
        refuse_other_shapes(&mut keys);

        let heads = keys.size("num_attention_heads", most::HEADS);
        let hidden = keys.size("hidden_size", most::HIDDEN);
        // The default of MistralConfig and MixtralConfig is 8; LlamaConfig's is one key head for each query head.
        let kv_default = if architecture == Some(Architecture::Llama) { heads } else { 8 };
        let eps_default = if architecture == Some(Architecture::Mixtral) { 1e-5 } else { 1e-6 };
        let vocab = keys.size("vocab_size", most::VOCAB);
        let mut config = Self {
            architecture: architecture.unwrap_or(Architecture::Llama),
            head,
            head_tensor,
            hidden,
            layers: keys.size("num_hidden_layers", most::LAYERS),
            heads,
            kv_heads: keys.size_or("num_key_value_heads", most::HEADS, kv_default),
            head_dim: head_dim(&mut keys, hidden, heads),
            intermediate: keys.size("intermediate_size", most::INTERMEDIATE),
            experts: experts(&mut keys, architecture),
            vocab,
            rope_theta: rope_theta(&mut keys, architecture),
            rms_eps: keys.real("rms_norm_eps", 1e-20..=0.1).unwrap_or(eps_default),
            window: window(&mut keys, architecture),
            positions_max: keys.size("max_position_embeddings", most::POSITIONS),
            tied,
            bos: None,
            eos: generation.token_ids("eos_token_id", vocab, most::EOS_COUNT),
            append_eos: keys.flag("append_eos", false),
            dtype: keys.dtype(),
        };
        let bos = [&mut keys, &mut generation].map(|keys| keys.token_ids("bos_token_id", vocab, 1));
        config.bos = bos.concat().first().copied();
        for id in keys.token_ids("eos_token_id", vocab, most::EOS_COUNT) {
            if !config.eos.contains(&id) {
                config.eos.push(id);
            }
        }
        config.check_together(&mut keys);
        keys.join(generation);
        keys.finish()?;
        Ok(config)
    }

    /// What attention scores are multiplied by: 1 / sqrt(head_dim) (arXiv 1706.03762, section 3.2.1).
    pub fn attention_scale(&self) -> f32 {
        (1.0 / (self.head_dim as f64).sqrt()) as f32
    }

    /// Bytes of key-value cache that one token occupies over all layers, of numbers of `number_bytes`.
    pub fn kv_bytes_per_token(&self, number_bytes: u64) -> u64 {
        2 * number_bytes * self.layers as u64 * self.kv_heads as u64 * self.head_dim as u64
    }

    /// What only several keys together can break. A size of 0 stands for one already found wrong.
    fn check_together(&self, keys: &mut Keys) {
        if self.heads > 0 && self.kv_heads > 0 && !self.heads.is_multiple_of(self.kv_heads) {
            let what = format!("must divide num_attention_heads: {} into {} does not go", self.kv_heads, self.heads);
            keys.wrong("num_key_value_heads", what);
        }
        match self.checked_parameter_count() {
            Some(count) if count <= most::PARAMETERS => {}
            count => {
                let gib = count.map_or("too many".to_owned(), |count| (count >> 29).to_string());
                keys.wrong("hidden_size", format!("and the other sizes would need {gib} GiB at two bytes a weight"));
            }
        }
    }
}

fn architecture(keys: &mut Keys) -> Option<Architecture> {
    let class = keys.architecture_class();
    let from_class = || match class.as_deref() {
        Some(class) if class.starts_with("Mistral") => Some("mistral".to_owned()),
        Some(class) if class.starts_with("Mixtral") => Some("mixtral".to_owned()),
        Some(class) if class.starts_with("Llama") => Some("llama".to_owned()),
        _ => None,
    };
    let name = keys.text("model_type").or_else(from_class);
    match name.as_deref() {
        Some("mistral") => Some(Architecture::Mistral),
        Some("llama") => Some(Architecture::Llama),
        Some("mixtral") => Some(Architecture::Mixtral),
        Some(other) => {
            keys.unsupported(format!("model_type {other} is not supported (supported: mistral, mixtral, llama)"));
            None
        }
        None => {
            keys.wrong("model_type", "is missing");
            None
        }
    }
}

/// The head, and the name of its tensor.
fn head(keys: &mut Keys, tied: bool) -> (HeadKind, Option<&'static str>) {
    let language = (HeadKind::Language, if tied { None } else { Some("lm_head.weight") });
    let class = keys.architecture_class();
    match class.as_deref() {
        None | Some("MistralForCausalLM" | "MixtralForCausalLM" | "LlamaForCausalLM") => language,
        // id2label is left out of account: these configs carry the two labels that transformers gives every model.
        Some("EurusRewardModel" | "LlamaRewardModel") => (HeadKind::Reward, Some("regression_head.weight")),
        Some(
            "MistralForSequenceClassification" | "MixtralForSequenceClassification" | "LlamaForSequenceClassification",
        ) => {
            let labels = keys.label_count();
            if labels != 1 {
                keys.unsupported(format!("num_labels {labels}: a classifier with other than one label is no reward"));
            }
            (HeadKind::Reward, Some("score.weight"))
        }
        Some(other) => {
            keys.unsupported(format!(
                "architecture {other} is not supported (supported: *ForCausalLM, *ForSequenceClassification and \
                 EurusRewardModel of mistral, mixtral and llama)"
            ));
            language
        }
    }
}

fn refuse_other_shapes(keys: &mut Keys) {
    for key in ["attention_bias", "mlp_bias"] {
        if keys.flag(key, false) {
            keys.unsupported(format!("{key} true: layers with biases are not supported"));
        }
    }
    match keys.text("hidden_act").as_deref() {
        None | Some("silu" | "swish") => {}
        Some(other) => keys.unsupported(format!("hidden_act {other} is not supported (supported: silu)")),
    }
    if keys.has("quantization_config") {
        keys.unsupported("quantization_config: checkpoints with quantised tensors are not supported".to_owned());
    }
}

/// Given, or an equal share of the residual stream.
fn head_dim(keys: &mut Keys, hidden: usize, heads: usize) -> usize {
    if !keys.has("head_dim") && heads > 0 && !hidden.is_multiple_of(heads) {
        keys.wrong(
            "num_attention_heads",
            format!("{heads} does not divide hidden_size {hidden}, and there is no head_dim"),
        );
        return 0;
    }
    let share = hidden.checked_div(heads).unwrap_or(0);
    let head_dim = keys.size_or("head_dim", most::HEAD_DIM, share);
    if !head_dim.is_multiple_of(2) || head_dim > most::HEAD_DIM {
        keys.wrong("head_dim", format!("must be even and at most {}, not {head_dim}", most::HEAD_DIM));
    }
    head_dim
}

/// From the top level (old files), from `rope_parameters` (transformers 5), or both when they agree.
fn rope_theta(keys: &mut Keys, architecture: Option<Architecture>) -> f64 {
    let range = 1e-3..=1e15;
    let top = keys.real("rope_theta", range.clone());
    let mut inner = None;
    for key in ["rope_parameters", "rope_scaling"] {
        let Some(mut nested) = keys.nested(key) else { continue };
        let kind = nested.text("rope_type").or_else(|| nested.text("type"));
        if let Some(kind) = kind.filter(|kind| kind != "default") {
            keys.unsupported(format!("{key} of type {kind} is not supported (supported: default)"));
        }
        if nested.real("partial_rotary_factor", 0.0..=1.0).is_some_and(|factor| factor < 1.0) {
            keys.unsupported(format!("{key}.partial_rotary_factor below 1 is not supported"));
        }
        inner = inner.or(nested.real("rope_theta", range.clone()));
        keys.join(nested);
    }
    if let (Some(top), Some(inner)) = (top, inner)
        && top != inner
    {
        keys.wrong("rope_theta", format!("is {top}, and {inner} in rope_parameters"));
    }
    let default = if architecture == Some(Architecture::Mixtral) { 1e6 } else { 1e4 };
    inner.or(top).unwrap_or(default)
}

fn window(keys: &mut Keys, architecture: Option<Architecture>) -> Option<usize> {
    let used = keys.flag("use_sliding_window", true);
    let window = keys.has("sliding_window").then(|| keys.size("sliding_window", usize::MAX));
    window.filter(|_| used && architecture != Some(Architecture::Llama))
}

fn experts(keys: &mut Keys, architecture: Option<Architecture>) -> Option<Experts> {
    if architecture != Some(Architecture::Mixtral) {
        return None;
    }
    let count = keys.size_or("num_local_experts", EXPERTS_MAX, 8);
    let per_token = keys.size_or("num_experts_per_tok", EXPERTS_MAX, 2);
    if per_token > count && count > 0 {
        keys.wrong("num_experts_per_tok", format!("is {per_token}, of {count} experts"));
    }
    Some(Experts { count, per_token })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use serde_json::{Value, json};

    use super::*;
    use crate::error::Error;

    /// Eurus-7b's sizes.
    fn eurus_7b() -> Value {
        json!({
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
            "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "intermediate_size": 14336, "vocab_size": 32000, "max_position_embeddings": 32768, "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5, "sliding_window": 4096, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
            "bos_token_id": 1, "eos_token_id": 2
        })
    }

    /// `eurus_7b` with other keys; null removes one.
    fn with(changes: &Value) -> String {
        let mut config = eurus_7b();
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        config.to_string()
    }

    fn parsed(changes: &Value) -> ModelConfig {
        ModelConfig::parse(&with(changes), None).unwrap()
    }

    #[test]
    fn the_published_sizes_come_out() {
        let config = parsed(&json!({}));
        assert_eq!(config.parameter_count(), 7_241_732_096);
        assert_eq!((config.head_dim, config.window, config.positions_max), (128, Some(4096), 32768));
        assert_eq!((config.bos, config.eos.as_slice(), config.dtype), (Some(1), &[2][..], Some(DType::BF16)));
        assert_eq!((config.head, config.head_tensor), (HeadKind::Language, Some("lm_head.weight")));
        assert_eq!(config.kv_bytes_per_token(4), 2 * 131_072);

        let reward = parsed(&json!({
            "architectures": ["EurusRewardModel"], "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "append_eos": true
        }));
        assert_eq!((reward.head, reward.head_tensor), (HeadKind::Reward, Some("regression_head.weight")));
        assert_eq!((reward.parameter_count(), reward.append_eos), (7_110_664_192, true));

        let eurus_70b = parsed(&json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80,
            "num_attention_heads": 64, "intermediate_size": 28672, "vocab_size": 32016, "attention_bias": false,
            "rope_scaling": null, "rope_theta": 1000000
        }));
        assert_eq!(eurus_70b.parameter_count(), 68_976_910_336);
        assert_eq!((eurus_70b.window, eurus_70b.rope_theta), (None, 1e6));

        let eurux = parsed(&json!({
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 6144, "num_hidden_layers": 56,
            "num_attention_heads": 48, "intermediate_size": 16384, "num_local_experts": 8, "num_experts_per_tok": 2,
            "sliding_window": null, "rope_theta": 1000000, "max_position_embeddings": 65536
        }));
        assert_eq!(eurux.parameter_count(), 140_620_634_112);
        assert_eq!((eurux.window, eurux.experts), (None, Some(Experts { count: 8, per_token: 2 })));
    }

    #[test]
    fn the_shapes_add_up_to_the_parameter_count() {
        let mixtral = json!({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 3});
        for changes in
            [json!({}), json!({"tie_word_embeddings": true}), json!({"head_dim": 64, "vocab_size": 7}), mixtral]
        {
            let config = parsed(&changes);
            let sum: usize = config.weight_shapes().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
            assert_eq!(sum as u64, config.parameter_count(), "{changes}");
        }
        let tied = parsed(&json!({"tie_word_embeddings": true}));
        assert_eq!((tied.tied, tied.head_tensor), (true, None));
        assert_eq!(tied.weight_shapes().len(), 1 + 32 * 9 + 1);
    }

    #[test]
    fn the_same_thing_may_be_said_in_several_ways() {
        let theta = |changes| parsed(&changes).rope_theta;
        let default = json!({"rope_type": "default", "rope_theta": 5e5});
        assert_eq!(theta(json!({"rope_theta": null, "rope_parameters": default})), 5e5);
        assert_eq!(theta(json!({"rope_theta": null})), 1e4);
        assert_eq!(theta(json!({"rope_scaling": {"type": "default"}})), 1e4);
        assert_eq!(parsed(&json!({"use_sliding_window": false})).window, None);
        assert_eq!(parsed(&json!({"sliding_window": null})).window, None);
        assert_eq!(parsed(&json!({"head_dim": null})).head_dim, 128);
        assert_eq!(parsed(&json!({"architectures": null})).head, HeadKind::Language);
        assert_eq!(parsed(&json!({"model_type": null})).architecture, Architecture::Mistral);
        assert_eq!(parsed(&json!({"num_key_value_heads": null})).kv_heads, 8);
        assert_eq!(parsed(&json!({"torch_dtype": null, "dtype": "float16"})).dtype, Some(DType::F16));
        let bare = json!({
            "model_type": "mixtral", "architectures": null, "rope_theta": null, "rms_norm_eps": null,
            "num_key_value_heads": null
        });
        let bare = parsed(&bare);
        assert_eq!((bare.rope_theta, bare.rms_eps, bare.kv_heads), (1e6, 1e-5, 8));
        assert_eq!(bare.experts, Some(Experts { count: 8, per_token: 2 }));
        let llama = json!({"model_type": "llama", "num_key_value_heads": null});
        assert_eq!(parsed(&llama).kv_heads, 32);
        let classifier = json!({"architectures": ["MistralForSequenceClassification"], "id2label": {"0": "LABEL_0"}});
        assert_eq!(parsed(&classifier).head_tensor, Some("score.weight"));
    }

    #[test]
    fn end_tokens_are_the_union_with_the_generation_config_first() {
        let eos = |changes: Value, generation| ModelConfig::parse(&with(&changes), generation).unwrap().eos;
        assert_eq!(eos(json!({}), Some(r#"{"eos_token_id": [7, 2, 9]}"#)), [7, 2, 9]);
        assert_eq!(eos(json!({"eos_token_id": [2, 3]}), Some(r#"{"eos_token_id": 7}"#)), [7, 2, 3]);
        assert_eq!(eos(json!({"eos_token_id": null}), Some("{}")), [0; 0]);
        let bos = ModelConfig::parse(&with(&json!({"bos_token_id": null})), Some(r#"{"bos_token_id": 5}"#)).unwrap();
        assert_eq!(bos.bos, Some(5));
    }

    #[track_caller]
    fn check_refused(changes: &Value, expected: &str) {
        match ModelConfig::parse(&with(changes), None) {
            Err(Error::Checkpoint(message)) => assert_eq!(message, format!("config.json: {expected}")),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn absurd_values_are_refused_by_name() {
        let size =
            |key: &str, most: usize, shown: &str| format!("{key} must be a whole number from 1 to {most}, not {shown}");
        check_refused(&json!({"hidden_size": 1u64 << 31}), &size("hidden_size", 65536, "2147483648"));
        check_refused(&json!({"num_hidden_layers": 1_000_000}), &size("num_hidden_layers", 1024, "1000000"));
        check_refused(&json!({"num_attention_heads": 0}), &size("num_attention_heads", 1024, "0"));
        check_refused(&json!({"num_attention_heads": -1}), &size("num_attention_heads", 1024, "-1"));
        check_refused(&json!({"vocab_size": 1u64 << 40}), &size("vocab_size", 2_097_152, "1099511627776"));
        check_refused(&json!({"vocab_size": "big"}), &size("vocab_size", 2_097_152, "\"big\""));
        check_refused(&json!({"vocab_size": 3.5}), &size("vocab_size", 2_097_152, "3.5"));
        let positions = size("max_position_embeddings", 16_777_216, "4611686018427387904");
        check_refused(&json!({"max_position_embeddings": 1u64 << 62}), &positions);
        check_refused(&json!({"head_dim": 0}), &size("head_dim", 512, "0"));
        check_refused(&json!({"head_dim": 65}), "head_dim must be even and at most 512, not 65");
        check_refused(&json!({"hidden_size": null}), "hidden_size is missing");
        let chosen =
            json!({"model_type": "mixtral", "architectures": null, "num_local_experts": 3, "num_experts_per_tok": 4});
        check_refused(&chosen, "num_experts_per_tok is 4, of 3 experts");
        check_refused(&json!({"sliding_window": 0}), "sliding_window must be a whole number above 0, not 0");
        let kv =
            |kv, heads| format!("num_key_value_heads must divide num_attention_heads: {kv} into {heads} does not go");
        check_refused(&json!({"num_key_value_heads": 64}), &kv(64, 32));
        check_refused(&json!({"num_key_value_heads": 5}), &kv(5, 32));
        let share = "num_attention_heads 24 does not divide hidden_size 4096, and there is no head_dim";
        check_refused(&json!({"num_attention_heads": 24}), share);
        check_refused(&json!({"rope_theta": 0}), "rope_theta must be a number from 1e-3 to 1e15, not 0");
        check_refused(&json!({"rope_theta": "inf"}), "rope_theta must be a number from 1e-3 to 1e15, not \"inf\"");
        let theta = json!({"rope_parameters": {"rope_theta": 5e5}});
        check_refused(&theta, "rope_theta is 10000, and 500000 in rope_parameters");
        let eps = "rms_norm_eps must be a number from 1e-20 to 1e-1, not";
        check_refused(&json!({"rms_norm_eps": 0}), &format!("{eps} 0"));
        check_refused(&json!({"rms_norm_eps": -1e-5}), &format!("{eps} -0.00001"));
        check_refused(
            &json!({"eos_token_id": 32000}),
            "eos_token_id must hold token ids below vocab_size, not [32000]",
        );
        check_refused(&json!({"append_eos": 1}), "append_eos must be true or false, not 1");
        let huge = json!({
            "hidden_size": 65536, "num_hidden_layers": 1024, "intermediate_size": 524_288, "num_attention_heads": 512
        });
        check_refused(&huge, "hidden_size and the other sizes would need 213256 GiB at two bytes a weight");
    }

    #[test]
    fn every_problem_is_told_in_one_error() {
        let changes = json!({"hidden_size": 0, "num_key_value_heads": 64, "rope_theta": -1, "attention_bias": true});
        let message = ModelConfig::parse(&with(&changes), Some(r#"{"eos_token_id": "x"}"#)).unwrap_err().to_string();
        for part in [
            "hidden_size must be",
            "num_key_value_heads must divide",
            "rope_theta must be",
            "attention_bias true",
            "generation_config.json eos_token_id must",
        ] {
            assert!(message.contains(part), "{part}: {message}");
        }
        assert_eq!(message.matches("; ").count(), 4, "{message}");
    }

    #[test]
    fn sound_but_other_models_are_unsupported() {
        let refused = |changes: Value| match ModelConfig::parse(&with(&changes), None) {
            Err(Error::Unsupported(message)) => message,
            other => panic!("{changes}: {other:?}"),
        };
        for (changes, part) in [
            (json!({"model_type": "gpt2"}), "model_type gpt2"),
            (json!({"attention_bias": true}), "attention_bias"),
            (json!({"mlp_bias": true}), "mlp_bias"),
            (json!({"hidden_act": "gelu"}), "hidden_act gelu"),
            (json!({"quantization_config": {"bits": 4}}), "quantization_config"),
            (json!({"rope_scaling": {"type": "linear", "factor": 2.0}}), "rope_scaling of type linear"),
            (json!({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}), "rope_parameters of type yarn"),
            (json!({"architectures": ["MistralModel"]}), "architecture MistralModel"),
            (json!({"architectures": ["LlamaForSequenceClassification"]}), "num_labels 2"),
            (json!({"torch_dtype": "float64"}), "torch_dtype float64"),
        ] {
            assert!(refused(changes).contains(part), "{part}");
        }
    }

    #[test]
    fn texts_that_are_no_json_object_are_refused() {
        let nested = "[".repeat(100_000);
        let infinite = with(&json!({})).replace("10000.0", "Infinity");
        let not_a_number = with(&json!({})).replace("1e-05", "NaN").replace("0.00001", "NaN");
        let beyond = with(&json!({})).replace("10000.0", "1e999");
        for text in ["", "[]", "3", "{", nested.as_str(), &infinite, &not_a_number, &beyond] {
            let error = ModelConfig::parse(text, None).unwrap_err();
            assert!(
                matches!(&error, Error::Checkpoint(message) if message.starts_with("config.json is not")),
                "{error}"
            );
        }
        assert!(ModelConfig::parse(&with(&json!({})), Some("nonsense")).is_err());
    }
}
