//! Formats that weights can be rounded to: which tensor gets which type, and the numbers of one type as another.
//! Which files they come from and go to is decided elsewhere.

use std::fmt;

use candle_core::DType;
use half::{bf16, f16};

use super::tensor::{Storage, TensorInfo};
use crate::error::{Error, Result};
use crate::model::config::tensors::is_router;
use crate::model::config::{HeadKind, ModelConfig};
use crate::model::weights::{ABS_MAX, Format, quantize};

/// Numbers that are widened at a time: a multiple of every block, and little beside a tensor.
const CHUNK: usize = 1 << 20;
/// Layers of the 70B shape, whose values are shared by so many heads that llama.cpp gives them another bit.
const LAYERS_OF_70B: usize = 80;

/// What the matrices of a model are rounded to. Names and mixtures are those of llama.cpp's files; vectors, the head of a reward
/// model and routers of experts are never rounded. A folder of safetensors has one type for all tensors, those included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// 16 bits with the range of float32.
    Bf16,
    /// IEEE 16 bits.
    F16,
    /// 8.5 bits a number.
    Q8_0,
    /// 4.5 bits a number, the language head 6.6.
    Q4_0,
    /// 4.5 bits a number; the language head, half of the values and half of the down projections 6.6.
    Q4KM,
    /// 5.5 bits a number; the same ones 6.6.
    Q5KM,
    /// 6.6 bits a number.
    Q6K,
}

impl Rounding {
    /// What users call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4KM => "q4_k_m",
            Self::Q5KM => "q5_k_m",
            Self::Q6K => "q6_k",
        }
    }

    /// What most matrices become.
    pub(super) fn main(self) -> Storage {
        match self {
            Self::Bf16 => Storage::Float(DType::BF16),
            Self::F16 => Storage::Float(DType::F16),
            Self::Q8_0 => Storage::Quantized(Format::Q8_0),
            Self::Q4_0 => Storage::Quantized(Format::Q4_0),
            Self::Q4KM => Storage::Quantized(Format::Q4K),
            Self::Q5KM => Storage::Quantized(Format::Q5K),
            Self::Q6K => Storage::Quantized(Format::Q6K),
        }
    }

    /// How the tensor `info` of the model `config` is kept.
    ///
    /// The mixtures follow llama.cpp's `llama_tensor_get_type`. Rows that are no whole blocks of 256 become Q8_0, rows that are no
    /// multiple of 32 stay as they are.
    pub(super) fn storage(self, info: &TensorInfo, config: &ModelConfig) -> Storage {
        let is_reward_head = config.head == HeadKind::Reward && config.head_tensor == Some(info.name.as_str());
        let k = match *info.shape.as_slice() {
            [_, k] if !is_reward_head && !is_router(&info.name) => k,
            _ => return info.storage.clone(),
        };
        let Storage::Quantized(format) = self.main() else { return self.main() };
        let format = self.of_part(info, config, format);
        [format, Format::Q8_0]
            .into_iter()
            .find(|format| k.is_multiple_of(format.block_len()))
            .map_or_else(|| info.storage.clone(), Storage::Quantized)
    }

    fn of_part(self, info: &TensorInfo, config: &ModelConfig, format: Format) -> Format {
        let name = info.name.as_str();
        let gives_logits = match config.head_tensor {
            Some(head) => name == head,
            None => name == "model.embed_tokens.weight",
        };
        if gives_logits && format != Format::Q8_0 {
            return Format::Q6K;
        }
        let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
        let layer = layer.and_then(|(index, part)| Some((index.parse::<usize>().ok()?, part)));
        let Some((index, part)) = layer else { return format };
        let mixes_formats = matches!(self, Self::Q4KM | Self::Q5KM);
        let has_8_experts = config.experts.is_some_and(|experts| experts.count == 8);
        match part {
            // Small beside eight experts.
            "self_attn.k_proj.weight" | "self_attn.v_proj.weight" if has_8_experts => Format::Q8_0,
            "self_attn.o_proj.weight" if has_8_experts && self == Self::Q4KM => Format::Q5K,
            _ if mixes_formats && may_get_more_bits(part) && gets_more_bits(index, config.layers) => Format::Q6K,
            "self_attn.v_proj.weight" if self == Self::Q4KM && config.layers == LAYERS_OF_70B => Format::Q5K,
            _ => format,
        }
    }
}

impl fmt::Display for Rounding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether the mixtures give this part of a layer more bits: values, and what leads back to the residual stream from experts or the one
/// feed-forward layer.
fn may_get_more_bits(part: &str) -> bool {
    let down =
        part == "mlp.down_proj.weight" || part.starts_with("block_sparse_moe.experts.") && part.ends_with(".w2.weight");
    down || part == "self_attn.v_proj.weight"
}

/// The first and the last eighth of the layers, and every third between.
fn gets_more_bits(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

/// Gives `out` the tensor `info`, whose floating-point numbers are `data`, as `to` has it, portion by portion.
///
/// # Errors
/// [`Error::Checkpoint`] for numbers that `to` cannot hold, [`Error::Unsupported`] if `data` is quantised, and those of `out`.
pub(super) fn converted(
    info: &TensorInfo,
    data: &[u8],
    to: &Storage,
    out: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    if info.storage == *to {
        return out(data);
    }
    let Storage::Float(from) = info.storage else {
        let what = format!("{} is {}: name the original in bf16, f16 or f32", info.name, info.storage);
        return Err(Error::Unsupported(what));
    };
    for portion in data.chunks(CHUNK * from.size_in_bytes()) {
        let numbers = widened(portion, from);
        let most = if *to == Storage::Float(DType::F32) { f32::INFINITY } else { most(to) };
        if let Some(number) = numbers.iter().find(|number| number.is_nan() || number.abs() > most) {
            return Err(Error::Checkpoint(format!("{}: holds {number}, which {to} cannot keep", info.name)));
        }
        out(&match to {
            Storage::Float(dtype) => narrowed(&numbers, *dtype),
            Storage::Quantized(format) => quantize(*format, &numbers),
            Storage::Other(name) => return Err(Error::Internal(format!("{} as {name}", info.name))),
        })?;
    }
    Ok(())
}

/// Largest number that comes out finite.
fn most(to: &Storage) -> f32 {
    match to {
        Storage::Float(DType::BF16) => bf16::MAX.to_f32(),
        _ => ABS_MAX,
    }
}

fn widened(data: &[u8], from: DType) -> Vec<f32> {
    let (pairs, fours) = (data.as_chunks::<2>().0, data.as_chunks::<4>().0);
    match from {
        DType::BF16 => pairs.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
        DType::F16 => pairs.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect(),
        _ => fours.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
    }
}

fn narrowed(numbers: &[f32], to: DType) -> Vec<u8> {
    match to {
        DType::BF16 => numbers.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        DType::F16 => numbers.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        _ => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn config(layers: usize, intermediate: usize, tied: bool) -> ModelConfig {
        of_type("mistral", layers, intermediate, tied)
    }

    fn of_type(kind: &str, layers: usize, intermediate: usize, tied: bool) -> ModelConfig {
        let json = serde_json::json!({
            "model_type": kind, "hidden_size": 256, "num_hidden_layers": layers, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": intermediate, "vocab_size": 320, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": tied
        });
        ModelConfig::parse(&json.to_string(), None).unwrap()
    }

    fn kept(rounding: Rounding, config: &ModelConfig, name: &str) -> String {
        let (name, shape) = config.weight_shapes().into_iter().find(|(found, _)| found == name).unwrap();
        let info = TensorInfo { name, storage: Storage::Float(DType::F32), shape, bytes: 0 };
        rounding.storage(&info, config).to_string()
    }

    #[test]
    fn the_mixtures_are_those_of_llama_cpp() {
        let config = config(16, 512, false);
        let all = |rounding, part: &str| -> Vec<usize> {
            let name = |layer: &usize| format!("model.layers.{layer}.{part}.weight");
            (0..16).filter(|layer| kept(rounding, &config, &name(layer)) == "Q6_K").collect()
        };
        // What llama-quantize gives a model of sixteen layers.
        let more = [0, 1, 4, 7, 10, 13, 14, 15];
        for (rounding, most) in [(Rounding::Q4KM, "Q4_K"), (Rounding::Q5KM, "Q5_K")] {
            assert_eq!(all(rounding, "self_attn.v_proj"), more);
            assert_eq!(all(rounding, "self_attn.k_proj"), [0; 0]);
            assert_eq!(kept(rounding, &config, "model.layers.2.self_attn.v_proj.weight"), most);
            assert_eq!(kept(rounding, &config, "model.embed_tokens.weight"), most);
            assert_eq!(kept(rounding, &config, "lm_head.weight"), "Q6_K");
        }
        assert_eq!(kept(Rounding::Q4_0, &config, "lm_head.weight"), "Q6_K");
        assert_eq!(kept(Rounding::Q8_0, &config, "lm_head.weight"), "Q8_0");
        let tied = self::config(16, 512, true);
        assert_eq!(kept(Rounding::Q4KM, &tied, "model.embed_tokens.weight"), "Q6_K");
        let deep = self::config(80, 512, false);
        assert_eq!(kept(Rounding::Q4KM, &deep, "model.layers.11.self_attn.v_proj.weight"), "Q5_K");
        assert_eq!(kept(Rounding::Q4KM, &deep, "model.layers.11.mlp.down_proj.weight"), "Q4_K");
    }

    #[test]
    fn mixtures_of_eight_experts_give_attention_more_bits() {
        let config = of_type("mixtral", 16, 512, false);
        let kept = |rounding, part: &str| kept(rounding, &config, &format!("model.layers.{part}.weight"));
        // What llama-quantize gives a model of sixteen layers with eight experts.
        for (rounding, most, output) in [(Rounding::Q4KM, "Q4_K", "Q5_K"), (Rounding::Q5KM, "Q5_K", "Q5_K")] {
            for part in ["2.self_attn.k_proj", "2.self_attn.v_proj", "0.self_attn.v_proj"] {
                assert_eq!(kept(rounding, part), "Q8_0");
            }
            assert_eq!(kept(rounding, "2.self_attn.o_proj"), output);
            assert_eq!(kept(rounding, "2.self_attn.q_proj"), most);
            for part in ["w1", "w2", "w3"] {
                assert_eq!(kept(rounding, &format!("2.block_sparse_moe.experts.7.{part}")), most);
            }
            assert_eq!(kept(rounding, "1.block_sparse_moe.experts.7.w2"), "Q6_K");
            assert_eq!(kept(rounding, "1.block_sparse_moe.experts.7.w1"), most);
            assert_eq!(kept(rounding, "1.block_sparse_moe.gate"), "f32");
        }
        assert_eq!(kept(Rounding::Bf16, "1.block_sparse_moe.gate"), "f32");
        assert_eq!(kept(Rounding::Q4_0, "1.self_attn.k_proj"), "Q8_0");
        assert_eq!(kept(Rounding::Q4_0, "1.self_attn.o_proj"), "Q4_0");
    }

    #[test]
    fn vectors_and_odd_rows_fall_back() {
        let config = config(2, 480, false);
        assert_eq!(kept(Rounding::Q4KM, &config, "model.norm.weight"), "f32");
        assert_eq!(kept(Rounding::F16, &config, "model.layers.1.mlp.gate_proj.weight"), "f16");
        // 480 is a multiple of 32 and not of 256.
        assert_eq!(kept(Rounding::Q5KM, &config, "model.layers.1.mlp.down_proj.weight"), "Q8_0");
        assert_eq!(kept(Rounding::Q4_0, &config, "model.layers.1.mlp.down_proj.weight"), "Q4_0");
        let odd = ModelConfig { hidden: 40, ..config };
        assert_eq!(kept(Rounding::Q4_0, &odd, "model.layers.1.mlp.gate_proj.weight"), "f32");
        let mut reward = odd;
        (reward.head, reward.head_tensor) = (HeadKind::Reward, Some("score.weight"));
        assert_eq!(kept(Rounding::Bf16, &reward, "score.weight"), "f32");
    }

    #[test]
    fn numbers_keep_their_values_or_are_refused_by_name() {
        let info = |storage, count| TensorInfo { name: "w".to_owned(), storage, shape: vec![1, count], bytes: 0 };
        let convert = |from: DType, numbers: &[f32], to: Storage| {
            let mut out = Vec::new();
            let data = narrowed(numbers, from);
            converted(&info(Storage::Float(from), numbers.len()), &data, &to, &mut |bytes| {
                out.extend_from_slice(bytes);
                Ok(())
            })?;
            Ok(out)
        };
        let numbers = [1.5, -0.25, 1024.0, 0.0];
        for from in [DType::F32, DType::BF16, DType::F16] {
            for to in [DType::F32, DType::BF16, DType::F16] {
                assert_eq!(convert(from, &numbers, Storage::Float(to)).unwrap(), narrowed(&numbers, to));
            }
        }
        for (bad, to, part) in [
            (f32::NAN, Storage::Float(DType::BF16), "w: holds NaN, which bf16 cannot keep"),
            (1e5, Storage::Float(DType::F16), "w: holds 100000, which f16 cannot keep"),
            (f32::INFINITY, Storage::Quantized(Format::Q8_0), "w: holds inf, which Q8_0 cannot keep"),
        ] {
            let error: Error = convert(DType::F32, &[bad; 32], to).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        }
        let quantized = info(Storage::Quantized(Format::Q8_0), 32);
        let error = converted(&quantized, &[0; 34], &Storage::Float(DType::F32), &mut |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("w is Q8_0: name the original"), "{error}");
    }
}
