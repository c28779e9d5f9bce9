//! Writes the keys or values of new tokens into their slots of the block cache.

use super::parallel;
use super::storage::{Shared, range, slice};
use crate::error::Result;
use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor};
use half::slice::HalfFloatSliceExt;

/// Copies row t of `src` `[T, kv_heads, head_dim]` f32 to slot `slots[t]` of `cache` `[blocks, kv_heads, block_size, head_dim]`, in
/// place; slot = block * block_size + offset. A cache of f32 keeps every bit, one of bf16 or f16 the nearest number. Fails on shapes
/// that do not fit and slots outside of the cache.
pub fn kv_write(cache: &Tensor, src: &Tensor, slots: &[u32]) -> Result<()> {
    Ok(cache.inplace_op2(src, &KvWrite { slots })?)
}

/// From this many rows on other threads take part: waking them takes as long as the copy of a few.
const ROWS_MIN: usize = 64;

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
        let rows = Rows { src, slots: self.slots, kv_heads, block_size, head_dim };
        match cache {
            CpuStorage::F32(cache) => rows.write(&mut cache[start..end], <[f32]>::copy_from_slice),
            CpuStorage::BF16(cache) => rows.write(&mut cache[start..end], HalfFloatSliceExt::convert_from_f32_slice),
            CpuStorage::F16(cache) => rows.write(&mut cache[start..end], HalfFloatSliceExt::convert_from_f32_slice),
            _ => candle_core::bail!("kv_write: the cache must be f32, bf16 or f16"),
        }
        Ok(())
    }
}

/// Rows to be written, checked.
struct Rows<'a> {
    /// `[T, kv_heads, head_dim]`
    src: &'a [f32],
    slots: &'a [u32],
    kv_heads: usize,
    block_size: usize,
    head_dim: usize,
}

impl Rows<'_> {
    /// Writes every head of every row by `put`; threads take different heads.
    fn write<T: Send>(&self, cache: &mut [T], put: impl Fn(&mut [T], &[f32]) + Sync) {
        let Self { src, slots, kv_heads, block_size, head_dim } = *self;
        let cache = &Shared::new(cache);
        let write = |head: usize| {
            for (row, &slot) in slots.iter().enumerate() {
                let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
                let at = ((block * kv_heads + head) * block_size + offset) * head_dim;
                // SAFETY: no other head has this place, and those of one head are written one after the other.
                #[allow(unsafe_code)]
                let to = unsafe { cache.part(at, head_dim) };
                put(to, &src[(row * kv_heads + head) * head_dim..][..head_dim]);
            }
        };
        if slots.len() < ROWS_MIN {
            return (0..kv_heads).for_each(write);
        }
        parallel::for_each(kv_heads, write);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use crate::ops::samples::{check_bits, floats, tensor};

    #[test]
    fn rows_land_in_their_slots_and_nowhere_else() {
        let (blocks, kv_heads, block_size, head_dim) = (50, 2, 4, 3);
        // Few rows, and as many as several threads write.
        let scattered: Vec<u32> = (0..150).map(|i| i * 7 % 200).collect();
        for slots in [&[19, 0, 6][..], &scattered] {
            let cache = tensor(1, (blocks, kv_heads, block_size, head_dim));
            let src = tensor(2, (slots.len(), kv_heads, head_dim));
            let (mut expected, rows) = (floats(&cache), floats(&src));
            for (row, &slot) in slots.iter().enumerate() {
                for head in 0..kv_heads {
                    let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
                    let at = ((block * kv_heads + head) * block_size + offset) * head_dim;
                    expected[at..at + head_dim]
                        .copy_from_slice(&rows[(row * kv_heads + head) * head_dim..][..head_dim]);
                }
            }
            kv_write(&cache, &src, slots).unwrap();
            check_bits("cache", &floats(&cache), &expected);
        }
    }

    #[test]
    fn wrong_inputs_are_errors_and_write_nothing() {
        let cache = tensor(1, (5, 2, 4, 3));
        let before = floats(&cache);
        let src = tensor(2, (3, 2, 3));
        assert!(kv_write(&cache, &src, &[0, 1, 20]).unwrap_err().to_string().contains("slot 20"));
        assert!(kv_write(&cache, &src, &[0, 1]).is_err());
        assert!(kv_write(&cache, &tensor(2, (3, 3, 2)), &[0, 1, 2]).is_err());
        assert!(kv_write(&cache.transpose(1, 2).unwrap(), &tensor(2, (3, 4, 3)), &[0, 1, 2]).is_err());
        check_bits("cache", &floats(&cache), &before);
    }
}
