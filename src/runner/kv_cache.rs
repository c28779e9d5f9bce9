//! The memory that keys and values live in, and the attention that reads it through block tables.
//! Which block belongs to whom is the engine's business.

use candle_core::{DType, Device, Tensor};

use super::batch::ForwardBatch;
use crate::error::Result;
use crate::model::config::ModelConfig;
use crate::model::decoder::Attention;
use crate::ops::attention::paged_attention;
use crate::ops::kv_write::kv_write;

/// Keys and values of every layer, in blocks of consecutive slots.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    block_count: usize,
    block_size: usize,
    scale: f32,
}

/// `[blocks, kv_heads, block_size, head_dim]` f32 each.
#[derive(Debug)]
struct LayerCache {
    keys: Tensor,
    values: Tensor,
}

impl KvCache {
    /// An empty cache of `block_count` blocks of `block_size` slots for the model that `config` describes.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn new(config: &ModelConfig, block_count: usize, block_size: usize, device: &Device) -> Result<Self> {
        let shape = (block_count, config.kv_heads, block_size, config.head_dim);
        let zeros = || Tensor::zeros(shape, DType::F32, device);
        let layers = (0..config.layers)
            .map(|_| Ok(LayerCache { keys: zeros()?, values: zeros()? }))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { layers, block_count, block_size, scale: config.attention_scale() })
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
    pub batch: &'a ForwardBatch,
}

impl Attention for Paged<'_> {
    fn attend(&self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let LayerCache { keys, values } = &self.cache.layers[layer];
        kv_write(keys, k, &self.batch.slots)?;
        kv_write(values, v, &self.batch.slots)?;
        paged_attention(q, keys, values, &self.batch.paged, self.cache.scale)
    }
}
