//! The memory that keys and values live in, and the attention that reads it through block tables.
//! Which block belongs to whom is the engine's business.

use candle_core::{DType, Tensor};

use crate::error::Result;
use crate::model::Model;
use crate::model::decoder::Attention;
use crate::ops::attention::inputs::Inputs;
use crate::ops::attention::step::step_attention;
use crate::ops::parameter::Precision;
use crate::ops::rope::Turn;

/// Keys and values of every layer, in blocks of consecutive slots.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    block_count: usize,
    block_size: usize,
    scale: f32,
    /// How attention multiplies.
    precision: Precision,
}

/// `[blocks, kv_heads, block_size, head_dim]` each.
#[derive(Debug)]
struct LayerCache {
    keys: Tensor,
    values: Tensor,
}

impl KvCache {
    /// An empty cache of `block_count` blocks of `block_size` slots for `model`, on its device, in the type that it computes in.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn new(model: &Model, block_count: usize, block_size: usize) -> Result<Self> {
        Self::of(model, model.decoder.place().dtype(), block_count, block_size)
    }

    /// A cache of numbers of type `dtype`; on a CPU f32, bf16 or f16.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn of(model: &Model, dtype: DType, block_count: usize, block_size: usize) -> Result<Self> {
        let (config, place) = (&model.config, model.decoder.place());
        let shape = (block_count, config.kv_heads, block_size, config.head_dim);
        let zeros = || Tensor::zeros(shape, dtype, place.device());
        let layers = (0..config.layers)
            .map(|_| Ok(LayerCache { keys: zeros()?, values: zeros()? }))
            .collect::<Result<Vec<_>>>()?;
        let (scale, precision) = (config.attention_scale(), model.decoder.precision());
        Ok(Self { layers, block_count, block_size, scale, precision })
    }

    /// Blocks in all.
    pub fn block_count(&self) -> usize {
        self.block_count
    }

    /// Slots of one block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Memory of all layers, in bytes.
    pub fn bytes(&self) -> usize {
        let tensor = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        self.layers.iter().map(|layer| tensor(&layer.keys) + tensor(&layer.values)).sum()
    }
}

/// Attention of one batch through the cache: every row's keys and values are written before any row attends.
#[derive(Debug, Clone, Copy)]
pub struct Paged<'a> {
    /// Where keys and values go.
    pub cache: &'a KvCache,
    /// Which slots are written and which are seen.
    pub inputs: &'a Inputs<'a>,
}

impl Attention for Paged<'_> {
    fn attend(&self, layer: usize, qkv: &Tensor, turn: &Turn<'_>) -> Result<Tensor> {
        let LayerCache { keys, values } = &self.cache.layers[layer];
        step_attention(qkv, turn, [keys, values], self.inputs, self.cache.scale, self.cache.precision)
    }
}
