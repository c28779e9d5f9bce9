//! The stack of Llama-shaped layers: tokens and positions in, normalised hidden states out.
//! Knows neither caches nor gradients: how rows see each other is the caller's [`Attention`].

use candle_core::{DType, Device, Tensor};

use super::config::ModelConfig;
use super::weights::Weights;
use crate::error::Result;
use crate::ops::embed::embed;
use crate::ops::linear::Linear;
use crate::ops::rms_norm::{add_rms_norm, rms_norm};
use crate::ops::rope::{RopeTable, rope};
use crate::ops::swiglu::swiglu;

/// How the rows of a batch see each other and what came before them.
pub trait Attention {
    /// Attention of layer `layer` for queries `q` `[T, heads, head_dim]` over keys and values
    /// `[T, kv_heads, head_dim]` of the same rows and whatever earlier rows the implementation holds.
    /// The result is `[T, heads * head_dim]`.
    ///
    /// # Errors
    /// If a tensor operation fails.
    fn attend(&self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor>;
}

/// Embedding, layers and final norm.
#[derive(Debug)]
pub struct Decoder {
    embedding: Tensor,
    /// `norms[i]` precedes the attention of layer i; the last one follows all layers.
    norms: Vec<Tensor>,
    layers: Vec<Layer>,
    table: RopeTable,
    eps: f64,
}

#[derive(Debug)]
struct Layer {
    /// `[(heads + 2 * kv_heads) * head_dim, hidden]`: queries, keys, values.
    qkv: Linear,
    /// `[hidden, heads * head_dim]`.
    output: Linear,
    mlp_norm: Tensor,
    /// `[2 * intermediate, hidden]`: gate, up.
    gate_up: Linear,
    /// `[hidden, intermediate]`.
    down: Linear,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Decoder {
    /// Takes the tensors of the decoder that `config` describes.
    ///
    /// # Errors
    /// If a tensor operation fails; missing tensors are told by [`Weights::finish`].
    pub fn new(config: &ModelConfig, weights: &mut Weights, device: &Device) -> Result<Self> {
        let hidden = config.hidden;
        let embedding = take(weights, "model.embed_tokens.weight", &[config.vocab, hidden], device)?;
        let mut norms = Vec::with_capacity(config.layers + 1);
        let mut layers = Vec::with_capacity(config.layers);
        for index in 0..config.layers {
            norms.push(take(weights, &format!("model.layers.{index}.input_layernorm.weight"), &[hidden], device)?);
            layers.push(Layer::new(config, weights, index, device)?);
        }
        norms.push(take(weights, "model.norm.weight", &[hidden], device)?);
        let table = RopeTable::new(config.head_dim, config.rope_theta, config.positions_max, device)?;
        Ok(Self { embedding, norms, layers, table, eps: config.rms_eps })
    }

    /// Rotates by `table` instead of the frequencies that follow from `rope_theta`.
    #[must_use]
    pub fn with_rope(self, table: RopeTable) -> Self {
        Self { table, ..self }
    }

    /// The embedding `[vocab, hidden]`, which a tied head shares.
    pub fn embedding(&self) -> &Tensor {
        &self.embedding
    }

    /// Hidden states `[T, hidden]` after the final norm, for `tokens` `[T]` u32 at `positions` `[T]` u32.
    ///
    /// # Errors
    /// If a token is outside the vocabulary, a position outside the table, or a tensor operation fails.
    pub fn forward(&self, tokens: &Tensor, positions: &Tensor, attention: &dyn Attention) -> Result<Tensor> {
        let mut residual = embed(tokens, &self.embedding)?;
        let mut normed = rms_norm(&residual, &self.norms[0], self.eps)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let (q, k, v) = layer.project(&normed)?;
            let (q, k) = (rope(&q, positions, &self.table)?, rope(&k, positions, &self.table)?);
            let attended = layer.output.forward(&attention.attend(index, &q, &k, &v)?)?;
            (residual, normed) = add_rms_norm(&attended, &residual, &layer.mlp_norm, self.eps)?;
            let mlp = layer.down.forward(&swiglu(&layer.gate_up.forward(&normed)?)?)?;
            (residual, normed) = add_rms_norm(&mlp, &residual, &self.norms[index + 1], self.eps)?;
        }
        Ok(normed)
    }
}

impl Layer {
    fn new(config: &ModelConfig, weights: &mut Weights, index: usize, device: &Device) -> Result<Self> {
        let ModelConfig { hidden, heads, kv_heads, head_dim, intermediate, .. } = *config;
        let prefix = format!("model.layers.{index}");
        let mut part = |name: &str, rows: usize, columns: usize| {
            take(weights, &format!("{prefix}.{name}.weight"), &[rows, columns], device)
        };
        let qkv = stack(&[
            part("self_attn.q_proj", heads * head_dim, hidden)?,
            part("self_attn.k_proj", kv_heads * head_dim, hidden)?,
            part("self_attn.v_proj", kv_heads * head_dim, hidden)?,
        ])?;
        let output = Linear::dense(part("self_attn.o_proj", hidden, heads * head_dim)?)?;
        let gate_up =
            stack(&[part("mlp.gate_proj", intermediate, hidden)?, part("mlp.up_proj", intermediate, hidden)?])?;
        let down = Linear::dense(part("mlp.down_proj", hidden, intermediate)?)?;
        let mlp_norm = take(weights, &format!("{prefix}.post_attention_layernorm.weight"), &[hidden], device)?;
        Ok(Self { qkv, output, mlp_norm, gate_up, down, heads, kv_heads, head_dim })
    }

    /// Queries `[T, heads, head_dim]`, keys and values `[T, kv_heads, head_dim]`, before the rotation.
    fn project(&self, x: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let fused = self.qkv.forward(x)?;
        let rows = fused.dim(0)?;
        let part = |first: usize, count: usize| -> Result<Tensor> {
            let columns = fused.narrow(1, first * self.head_dim, count * self.head_dim)?.contiguous()?;
            Ok(columns.reshape((rows, count, self.head_dim))?)
        };
        let q = part(0, self.heads)?;
        let k = part(self.heads, self.kv_heads)?;
        let v = part(self.heads + self.kv_heads, self.kv_heads)?;
        Ok((q, k, v))
    }
}

/// One linear layer out of several that read the same input: one pass over the input instead of many.
fn stack(parts: &[Tensor]) -> Result<Linear> {
    let same = parts.iter().all(|part| part.dtype() == parts[0].dtype());
    let weight = if same {
        Tensor::cat(parts, 0)?
    } else {
        let wide = parts.iter().map(|part| part.to_dtype(DType::F32)).collect::<candle_core::Result<Vec<_>>>()?;
        Tensor::cat(&wide, 0)?
    };
    Linear::dense(weight)
}

/// Like [`Weights::take`], on `device` and contiguous, which stand-ins for missing tensors are not.
pub(super) fn take(weights: &mut Weights, name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
    Ok(weights.take(name, shape)?.to_device(device)?.contiguous()?)
}
