//! Writes the keys or values of new tokens into their slots of the block cache.

use super::storage::{range, slice};
use crate::error::Result;
use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor};

/// Copies row t of `src` `[T, kv_heads, head_dim]` f32 to slot `slots[t]` of `cache` `[blocks, kv_heads, block_size, head_dim]` f32,
/// in place; slot = block * block_size + offset. Fails on shapes that do not fit and slots outside of the cache.
pub fn kv_write(cache: &Tensor, src: &Tensor, slots: &[u32]) -> Result<()> {
    Ok(cache.inplace_op2(src, &KvWrite { slots })?)
}

struct KvWrite<'a> {
    slots: &'a [u32],
}

impl InplaceOp2 for KvWrite<'_> {
    fn name(&self) -> &'static str {
        "kv_write"
    }

    fn cpu_fwd(
        &self,
        cache: &mut CpuStorage,
        cache_layout: &Layout,
        src: &CpuStorage,
        src_layout: &Layout,
    ) -> candle_core::Result<()> {
        let (blocks, kv_heads, block_size, head_dim) = cache_layout.shape().dims4()?;
        if src_layout.dims() != [self.slots.len(), kv_heads, head_dim] {
            candle_core::bail!(
                "kv_write: {} slots and a cache of {:?} do not take {:?}",
                self.slots.len(),
                cache_layout.dims(),
                src_layout.dims()
            );
        }
        if let Some(slot) = self.slots.iter().find(|&&slot| slot as usize >= blocks * block_size) {
            candle_core::bail!("kv_write: slot {slot} is outside of a cache of {} slots", blocks * block_size);
        }
        let src: &[f32] = slice("kv_write", src, src_layout)?;
        let (start, end) = range("kv_write", cache_layout)?;
        let CpuStorage::F32(cache) = cache else {
            candle_core::bail!("kv_write: the cache must be f32");
        };
        let cache = &mut cache[start..end];
        for (row, &slot) in src.chunks_exact((kv_heads * head_dim).max(1)).zip(self.slots) {
            let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
            for (head, values) in row.chunks_exact(head_dim).enumerate() {
                let at = ((block * kv_heads + head) * block_size + offset) * head_dim;
                cache[at..at + head_dim].copy_from_slice(values);
            }
        }
        Ok(())
    }
}
