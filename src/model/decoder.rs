//! The stack of Llama-shaped layers: tokens and positions in, normalised hidden states out.
//! Knows no caches: how rows see each other is the caller's [`Attention`]. Each layer's gradient stands beside it.

use candle_core::{Device, Tensor};

use super::config::ModelConfig;
use super::mlp::Mlp;
use super::weights::Weights;
use crate::error::Result;
use crate::ops::embed::{embed, select};
use crate::ops::linear::Linear;
use crate::ops::parameter::{Parameter, Precision};
use crate::ops::place::Place;
use crate::ops::rms_norm::{add_rms_norm, rms_norm, rms_norm_backward};
use crate::ops::rope::{RopeTable, Turn, split_rope, split_rope_backward};

/// How the rows of a batch see each other and what came before them.
pub trait Attention {
    /// Attention of layer `layer` for rows of queries, keys and values, `qkv` `[T, (heads + 2 * kv_heads) * head_dim]`, which are to
    /// be turned by `turn`, over the same rows and whatever earlier rows the implementation holds. `qkv` may be used up.
    /// The result is `[T, heads * head_dim]`.
    ///
    /// # Errors
    /// If a tensor operation fails.
    fn attend(&self, layer: usize, qkv: &Tensor, turn: &Turn<'_>) -> Result<Tensor>;
}

/// An attention whose gradients are known. It leaves its rows as they are.
pub trait AttentionGradient: Attention {
    /// The gradients of turned queries, keys and values side by side, `[T, (heads + 2 * kv_heads) * head_dim]`, from that of the
    /// result of [`Attention::attend`], `[T, heads * head_dim]`.
    ///
    /// # Errors
    /// If a tensor operation fails.
    fn attend_backward(&self, qkv: [&Tensor; 3], d_attended: &Tensor) -> Result<Tensor>;
}

/// Embedding, layers and final norm.
#[derive(Debug)]
pub struct Decoder {
    pub(super) embedding: Parameter,
    pub(super) layers: Vec<Layer>,
    /// Follows all layers.
    pub(super) norm: Parameter,
    table: RopeTable,
    eps: f64,
    place: Place,
}

#[derive(Debug)]
pub(super) struct Layer {
    pub(super) attention_norm: Parameter,
    /// `[(heads + 2 * kv_heads) * head_dim, hidden]`: queries, keys, values.
    pub(super) qkv: Linear,
    /// `[hidden, heads * head_dim]`.
    pub(super) output: Linear,
    pub(super) mlp_norm: Parameter,
    pub(super) mlp: Mlp,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
}

/// What a layer computed on its way, `[T, ..]` each: what its gradients are computed from.
#[derive(Debug)]
pub(super) struct Trace {
    pub(super) attended: Attended,
    pub(super) fed: Fed,
}

/// What a layer computed up to its attention.
#[derive(Debug)]
pub(super) struct Attended {
    /// Sum of everything before the layer.
    pub(super) x: Tensor,
    normed: Tensor,
    qkv: Tensor,
    heads: Tensor,
}

/// What a layer computed from there on.
#[derive(Debug)]
pub(super) struct Fed {
    /// The sum before the layer and what attention added.
    pub(super) y: Tensor,
    normed: Tensor,
    /// None where there are no gradients: of experts, and of weights quantised or laid out for serving.
    gate_up: Option<Tensor>,
}

/// The rows of a step: `[T]` u32 positions, and how they see each other.
pub(super) struct Rows<'a, A: ?Sized> {
    pub(super) positions: &'a Tensor,
    pub(super) attention: &'a A,
}

impl Decoder {
    /// Takes the tensors of the decoder that `config` describes.
    ///
    /// # Errors
    /// If a tensor operation fails; missing tensors are told by [`Weights::finish`].
    pub fn new(config: &ModelConfig, weights: &mut Weights, device: &Device) -> Result<Self> {
        let hidden = config.hidden;
        let embedding = weights.take_matrix("model.embed_tokens.weight", &[config.vocab, hidden])?;
        let place = Place::new(device, &embedding);
        let embedding = place.put(embedding)?;
        let layers =
            (0..config.layers).map(|index| Layer::new(config, weights, index, &place)).collect::<Result<_>>()?;
        let norm = place.put(weights.take("model.norm.weight", &[hidden])?.into())?;
        let table = RopeTable::new(config.head_dim, config.rope_theta, config.positions_max, device)?;
        Ok(Self { embedding, layers, norm, table, eps: config.rms_eps, place })
    }

    /// Rotates by `table` instead of the frequencies that follow from `rope_theta`.
    #[must_use]
    pub fn with_rope(self, table: RopeTable) -> Self {
        Self { table, ..self }
    }

    /// The embedding `[vocab, hidden]`, which a tied head shares.
    pub fn embedding(&self) -> &Parameter {
        &self.embedding
    }

    /// Where its weights lie, and the type it computes in there.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// How its layers multiply.
    pub fn precision(&self) -> Precision {
        self.layers.first().map(|layer| layer.qkv.weight().precision()).unwrap_or_default()
    }

    /// Hidden states `[R, hidden]` after the final norm of the rows `read` `[R]` u32, or of all, for `tokens` `[T]` u32 at `positions`
    /// `[T]` u32. Of the last layer's rows the others go no further than its attention, which keeps what later steps need of them.
    ///
    /// # Errors
    /// If a token is outside the vocabulary, a position outside the table, or a tensor operation fails.
    pub fn forward(
        &self,
        tokens: &Tensor,
        positions: &Tensor,
        attention: &dyn Attention,
        read: Option<&Tensor>,
    ) -> Result<Tensor> {
        let rows = Rows { positions, attention };
        let (mut residual, mut added) = (embed(tokens, &self.embedding)?, None);
        for index in 0..self.layers.len() {
            let Attended { mut x, mut heads, .. } = self.attend(index, residual, added, &rows)?;
            if let Some(read) = read.filter(|_| index + 1 == self.layers.len()) {
                if read.elem_count() == 0 {
                    return Ok(x.narrow(0, 0, 0)?);
                }
                (x, heads) = (select(&x, read)?, select(&heads, read)?);
            }
            let (fed, mlp) = self.feed(index, x, &heads)?;
            (residual, added) = (fed.y, Some(mlp));
        }
        Ok(self.finish(residual, added)?.1)
    }

    /// Layer `index` on `residual` `[T, hidden]` and what the layer before `added` to it: its trace, whose `fed.y` is the new residual,
    /// and what its mlp adds to that, `[T, hidden]`.
    pub(super) fn layer<A: Attention + ?Sized>(
        &self,
        index: usize,
        residual: Tensor,
        added: Option<Tensor>,
        rows: &Rows<'_, A>,
    ) -> Result<(Trace, Tensor)> {
        let attended = self.attend(index, residual, added, rows)?;
        let (fed, mlp) = self.feed(index, attended.x.clone(), &attended.heads)?;
        Ok((Trace { attended, fed }, mlp))
    }

    /// The first half of [`Decoder::layer`].
    fn attend<A: Attention + ?Sized>(
        &self,
        index: usize,
        residual: Tensor,
        added: Option<Tensor>,
        rows: &Rows<'_, A>,
    ) -> Result<Attended> {
        let layer = &self.layers[index];
        let (x, normed) = add_norm(residual, added, &layer.attention_norm, self.eps)?;
        let qkv = layer.qkv.forward(&normed)?;
        let heads = rows.attention.attend(index, &qkv, &self.turn(layer, rows.positions))?;
        Ok(Attended { x, normed, qkv, heads })
    }

    /// The second half of [`Decoder::layer`], from the sum before the layer and what its heads gave, for all rows or some of them.
    fn feed(&self, index: usize, x: Tensor, heads: &Tensor) -> Result<(Fed, Tensor)> {
        let layer = &self.layers[index];
        let (y, normed) = add_norm(layer.output.forward(heads)?, Some(x), &layer.mlp_norm, self.eps)?;
        let (mlp, gate_up) = layer.mlp.forward(&normed)?;
        Ok((Fed { y, normed, gate_up }, mlp))
    }

    fn turn<'a>(&'a self, layer: &Layer, positions: &'a Tensor) -> Turn<'a> {
        Turn { positions, table: &self.table, heads: [layer.heads, layer.kv_heads] }
    }

    /// The sum of `residual` and `added`, and its final norm, `[T, hidden]` both.
    pub(super) fn finish(&self, residual: Tensor, added: Option<Tensor>) -> Result<(Tensor, Tensor)> {
        add_norm(residual, added, &self.norm, self.eps)
    }

    /// The gradient of the sum before the final norm from that of its result, `dy`, for the sum `x`, `[T, hidden]` all.
    pub(super) fn finish_backward(&self, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let dx = x.zeros_like()?;
        rms_norm_backward(&dx, x, &self.norm, self.eps, dy)?;
        Ok(dx)
    }

    /// The gradient of the sum before layer `index` from that of the sum after it, `d` `[T, hidden]`, which is used up.
    pub(super) fn layer_backward<A: AttentionGradient + ?Sized>(
        &self,
        index: usize,
        trace: &Trace,
        d: Tensor,
        rows: &Rows<'_, A>,
    ) -> Result<Tensor> {
        let (layer, Trace { attended, fed }) = (&self.layers[index], trace);
        let d_normed = layer.mlp.backward(&fed.normed, fed.gate_up.as_ref(), &d)?;
        rms_norm_backward(&d, &fed.y, &layer.mlp_norm, self.eps, &d_normed)?;
        let d_heads = layer.output.backward(&attended.heads, &d)?;
        let turn = self.turn(layer, rows.positions);
        let [q, k, v] = split_rope(&attended.qkv, &turn)?;
        let d_qkv = rows.attention.attend_backward([&q, &k, &v], &d_heads)?;
        split_rope_backward(&d_qkv, &turn)?;
        let d_normed = layer.qkv.backward(&attended.normed, &d_qkv)?;
        rms_norm_backward(&d, &attended.x, &layer.attention_norm, self.eps, &d_normed)?;
        Ok(d)
    }
}

/// The sum of `residual` and `added`, and its norm.
fn add_norm(residual: Tensor, added: Option<Tensor>, weight: &Parameter, eps: f64) -> Result<(Tensor, Tensor)> {
    match added {
        Some(added) => add_rms_norm(&added, &residual, weight.value(), eps),
        None => {
            let normed = rms_norm(&residual, weight.value(), eps)?;
            Ok((residual, normed))
        }
    }
}

impl Layer {
    fn new(config: &ModelConfig, weights: &mut Weights, index: usize, place: &Place) -> Result<Self> {
        let ModelConfig { hidden, heads, kv_heads, head_dim, .. } = *config;
        let prefix = format!("model.layers.{index}");
        let mut norm = |name: &str| place.put(weights.take(&format!("{prefix}.{name}.weight"), &[hidden])?.into());
        let (attention_norm, mlp_norm) = (norm("input_layernorm")?, norm("post_attention_layernorm")?);
        let mut part = |name: &str, shape: &[usize]| weights.take_matrix(&format!("{prefix}.{name}.weight"), shape);
        let put = |weight: Parameter| Linear::dense(place.put(weight)?);
        Ok(Self {
            attention_norm,
            qkv: put(Parameter::stack(&[
                part("self_attn.q_proj", &[heads * head_dim, hidden])?,
                part("self_attn.k_proj", &[kv_heads * head_dim, hidden])?,
                part("self_attn.v_proj", &[kv_heads * head_dim, hidden])?,
            ])?)?,
            output: put(part("self_attn.o_proj", &[hidden, heads * head_dim])?)?,
            mlp_norm,
            mlp: Mlp::new(config, weights, &prefix, place)?,
            heads,
            kv_heads,
            head_dim,
        })
    }
}
