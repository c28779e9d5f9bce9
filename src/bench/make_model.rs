//! Writes a checkpoint of a chosen shape with random weights: something to measure where no real one can be had.
//! It loads like any other Hugging Face folder; what it says is noise.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use serde_json::{Map, Value, json};

use crate::checkpoint::safetensors;
use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::model::random::random_tensors;

/// The shape of the checkpoint. The defaults are a Mistral of 125 million parameters.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Folder to write; must not exist
    #[arg(value_name = "DIR")]
    pub out: PathBuf,
    /// Width of the residual stream
    #[arg(long, default_value_t = 768)]
    pub hidden: usize,
    /// Decoder layers
    #[arg(long, default_value_t = 12)]
    pub layers: usize,
    /// Query heads
    #[arg(long, default_value_t = 12)]
    pub heads: usize,
    /// Key and value heads
    #[arg(long, default_value_t = 4)]
    pub kv_heads: usize,
    /// Width of the feed-forward layer, or of each expert
    #[arg(long, default_value_t = 2048)]
    pub intermediate: usize,
    /// Experts in a layer, of which two compute each token: a Mixtral
    #[arg(long, value_parser = clap::value_parser!(u16).range(2..=256))]
    pub experts: Option<u16>,
    /// Tokens of the vocabulary, at least 259
    #[arg(long, default_value_t = 32000, value_parser = clap::value_parser!(u32).range(259..=1_000_000))]
    pub vocab: u32,
    /// Positions the model accepts
    #[arg(long, default_value_t = 4096)]
    pub positions: usize,
    /// How weights are stored
    #[arg(long, value_enum, default_value_t = WeightType::Bf16)]
    pub dtype: WeightType,
    /// What the model is for
    #[arg(long, value_enum, default_value_t = Kind::Policy)]
    pub kind: Kind,
    /// Seed of the weights
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Storage type of the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum WeightType {
    /// 32-bit floats.
    F32,
    /// 16-bit floats with the range of 32-bit ones.
    Bf16,
    /// IEEE 16-bit floats.
    F16,
}

/// What the model is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// A language model.
    Policy,
    /// A reward model in the layout of Eurus-RM.
    Reward,
}

/// Writes the folder and returns the number of parameters.
///
/// # Errors
/// If the folder exists, cannot be written, or the shape is not one that `serve` takes.
pub fn run(options: &Options) -> Result<usize> {
    let text = to_text(&config(options))?;
    let config = ModelConfig::parse(&text, None)?;
    fs::create_dir(&options.out).map_err(|error| Error::file(&options.out, error))?;
    let dtype = match options.dtype {
        WeightType::F32 => DType::F32,
        WeightType::Bf16 => DType::BF16,
        WeightType::F16 => DType::F16,
    };
    let mut tensors = random_tensors(&config, options.seed)?;
    for tensor in tensors.values_mut() {
        *tensor = tensor.to_dtype(dtype)?;
    }
    safetensors::write(&options.out.join("model.safetensors"), &tensors)?;
    write(&options.out, "config.json", &text)?;
    write(&options.out, "tokenizer.json", &to_text(&tokenizer(options.vocab))?)?;
    write(&options.out, "tokenizer_config.json", &to_text(&tokenizer_config())?)?;
    Ok(tensors.values().map(Tensor::elem_count).sum())
}

fn write(folder: &Path, name: &str, text: &str) -> Result<()> {
    let path = folder.join(name);
    fs::write(&path, text).map_err(|error| Error::file(&path, error))
}

fn to_text(value: &Value) -> Result<String> {
    serde_json::to_string_pretty(value).map_err(Error::internal)
}

fn config(options: &Options) -> Value {
    let (class, kind) = match options.experts {
        None => ("MistralForCausalLM", "mistral"),
        Some(_) => ("MixtralForCausalLM", "mixtral"),
    };
    let (architecture, append_eos) = match options.kind {
        Kind::Policy => (class, None),
        Kind::Reward => ("EurusRewardModel", Some(false)),
    };
    let dtype = match options.dtype {
        WeightType::F32 => "float32",
        WeightType::Bf16 => "bfloat16",
        WeightType::F16 => "float16",
    };
    let mut config = json!({
        "architectures": [architecture], "model_type": kind, "torch_dtype": dtype, "hidden_act": "silu",
        "hidden_size": options.hidden, "intermediate_size": options.intermediate,
        "num_hidden_layers": options.layers, "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads, "vocab_size": options.vocab,
        "max_position_embeddings": options.positions, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "sliding_window": null, "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2,
    });
    if let Some(append_eos) = append_eos {
        config["append_eos"] = json!(append_eos);
    }
    if let Some(experts) = options.experts {
        config["num_local_experts"] = json!(experts);
        config["num_experts_per_tok"] = json!(2);
    }
    config
}

/// A byte-level tokenizer of the asked size: three special tokens, one token a byte, and names for the rest.
fn tokenizer(vocab: u32) -> Value {
    let mut tokens = Map::new();
    for (id, special) in ["<unk>", "<s>", "</s>"].into_iter().enumerate() {
        tokens.insert(special.to_string(), json!(id));
    }
    for byte in byte_alphabet() {
        tokens.insert(byte.to_string(), json!(tokens.len()));
    }
    while tokens.len() < vocab as usize {
        tokens.insert(format!("word{}", tokens.len()), json!(tokens.len()));
    }
    let special = |id: u32, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": false, "byte_fallback": false, "vocab": tokens, "merges": []},
    })
}

/// The 256 characters that byte-level BPE writes for bytes: printable ones stand for themselves, the others follow from U+0100 (GPT-2).
fn byte_alphabet() -> Vec<char> {
    let printable = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut others = 0x100..;
    (0..256u32).filter_map(|byte| char::from_u32(if printable(byte) { byte } else { others.next()? })).collect()
}

fn tokenizer_config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": true,
        "chat_template": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
    })
}
