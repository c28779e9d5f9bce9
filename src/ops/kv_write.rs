//! Writes the keys and values of new tokens into their slots of the block cache.

use super::lanes::{Body, Isa, Kernel};
use super::parallel;
use super::rope::{Angles, Turn, Turned};
use super::storage::{Shared, range, slice};
use crate::error::{Error, Result};
use candle_core::{CpuStorage, InplaceOp2, Layout, Storage, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::ops::Range;

/// Turns the keys of row t of `qkv` `[T, (heads + 2 * kv_heads) * head_dim]` f32 and copies them to slot `slots[t]` of `cache` `[blocks,
/// kv_heads, block_size, head_dim]`, in place; slot = block * block_size + offset. A cache of f32 keeps every bit, one of bf16 or f16 the
/// nearest number. Fails on shapes that do not fit, positions outside of the table and slots outside of the cache.
pub fn write_keys(cache: &Tensor, qkv: &Tensor, turn: &Turn<'_>, slots: &[u32]) -> Result<()> {
    let (positions, positions_layout) = turn.positions.storage_and_layout();
    let (table, table_layout) = turn.table.tensor().storage_and_layout();
    let (Storage::Cpu(positions), Storage::Cpu(table)) = (&*positions, &*table) else {
        return Err(Error::internal("kv_write: the angles are on another device"));
    };
    let angles = Angles::new(slice("kv_write", positions, positions_layout)?, table, table_layout)?;
    let op = KvWrite { slots, heads: turn.heads, first: turn.heads[0], angles: Some(angles), body: Body::best() };
    Ok(cache.inplace_op2(qkv, &op)?)
}

/// As [`write_keys`] for the values, as they are, of rows of `heads` query heads and key heads.
pub fn write_values(cache: &Tensor, qkv: &Tensor, heads: [usize; 2], slots: &[u32]) -> Result<()> {
    let op = KvWrite { slots, heads, first: heads[0] + heads[1], angles: None, body: Body::best() };
    Ok(cache.inplace_op2(qkv, &op)?)
}

/// From this many rows on other threads take part: waking them takes as long as the copy of a few.
const ROWS_MIN: usize = 64;

struct KvWrite<'a> {
    slots: &'a [u32],
    /// Query heads and key heads of a row.
    heads: [usize; 2],
    /// The first head of a row that is written.
    first: usize,
    /// Where heads are turned on the way.
    angles: Option<Angles<'a>>,
    body: Body,
}

impl InplaceOp2 for KvWrite<'_> {
    fn name(&self) -> &'static str {
        "kv_write"
    }

    fn cpu_fwd(
        &self,
        cache: &mut CpuStorage,
        cache_layout: &Layout,
        qkv: &CpuStorage,
        qkv_layout: &Layout,
    ) -> candle_core::Result<()> {
        let (blocks, kv_heads, block_size, head_dim) = cache_layout.shape().dims4()?;
        let width = (self.heads[0] + 2 * self.heads[1]) * head_dim;
        if self.heads[1] != kv_heads || qkv_layout.dims() != [self.slots.len(), width] {
            candle_core::bail!(
                "kv_write: {} slots and a cache of {:?} do not take {:?}",
                self.slots.len(),
                cache_layout.dims(),
                qkv_layout.dims()
            );
        }
        if let Some(angles) = &self.angles
            && (angles.rows() != self.slots.len() || angles.head_dim != head_dim)
        {
            let (rows, slots) = (angles.rows(), self.slots.len());
            candle_core::bail!("kv_write: angles of {rows} rows and head_dim {} for {slots} slots", angles.head_dim);
        }
        if let Some(slot) = self.slots.iter().find(|&&slot| slot as usize >= blocks * block_size) {
            candle_core::bail!("kv_write: slot {slot} is outside of a cache of {} slots", blocks * block_size);
        }
        let qkv: &[f32] = slice("kv_write", qkv, qkv_layout)?;
        let (start, end) = range("kv_write", cache_layout)?;
        let rows = Rows {
            qkv,
            width,
            first: self.first * head_dim,
            angles: self.angles.as_ref(),
            slots: self.slots,
            kv_heads,
            block_size,
            head_dim,
            body: self.body,
        };
        match cache {
            CpuStorage::F32(cache) => rows.write(&mut cache[start..end]),
            CpuStorage::BF16(cache) => rows.write(&mut cache[start..end]),
            CpuStorage::F16(cache) => rows.write(&mut cache[start..end]),
            _ => candle_core::bail!("kv_write: the cache must be f32, bf16 or f16"),
        }
        Ok(())
    }
}

/// Rows to be written, checked.
struct Rows<'a> {
    /// `[T, width]`
    qkv: &'a [f32],
    width: usize,
    /// Column of the first head.
    first: usize,
    angles: Option<&'a Angles<'a>>,
    slots: &'a [u32],
    kv_heads: usize,
    block_size: usize,
    head_dim: usize,
    body: Body,
}

impl Rows<'_> {
    /// Writes every head of every row; threads take different heads.
    fn write<T: Narrow>(&self, cache: &mut [T]) {
        let few = self.slots.len() < ROWS_MIN;
        let together = if few { self.kv_heads } else { self.kv_heads.div_ceil(parallel::threads()) }.max(1);
        let cache = &Shared::new(cache);
        let write = |group: usize| {
            let heads = group * together..self.kv_heads.min((group + 1) * together);
            self.write_heads(heads, cache);
        };
        match self.kv_heads.div_ceil(together) {
            1 => write(0),
            groups => parallel::for_each(groups, write),
        }
    }

    /// Writes neighbouring heads of every row.
    fn write_heads<T: Narrow>(&self, heads: Range<usize>, cache: &Shared<'_, T>) {
        let Self { head_dim, block_size, kv_heads, .. } = *self;
        let len = heads.len() * head_dim;
        let (mut turned, mut numbers) = (vec![0.0; len], vec![T::default(); len]);
        for (row, &slot) in self.slots.iter().enumerate() {
            let x = &self.qkv[row * self.width + self.first + heads.start * head_dim..][..len];
            let x = match self.angles {
                None => x,
                Some(angles) => {
                    self.body.run(Turned { x, angles: angles.of(row), out: &mut turned });
                    &turned
                }
            };
            T::narrow(self.body, x, &mut numbers);
            let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
            for (head, numbers) in heads.clone().zip(numbers.chunks_exact(head_dim)) {
                let at = ((block * kv_heads + head) * block_size + offset) * head_dim;
                // SAFETY: no other thread has this head, and its rows are written one after the other.
                #[allow(unsafe_code)]
                unsafe {
                    cache.write(at, numbers);
                }
            }
        }
    }
}

/// A type of numbers in a cache.
trait Narrow: Copy + Default + Send {
    /// The nearest numbers to `x`, as many.
    fn narrow(body: Body, x: &[f32], out: &mut [Self]);
}

impl Narrow for f32 {
    fn narrow(_: Body, x: &[f32], out: &mut [Self]) {
        out.copy_from_slice(x);
    }
}

impl Narrow for bf16 {
    fn narrow(body: Body, x: &[f32], out: &mut [Self]) {
        body.run(Rounded { x, out });
    }
}

impl Narrow for f16 {
    fn narrow(_: Body, x: &[f32], out: &mut [Self]) {
        out.convert_from_f32_slice(x);
    }
}

/// Numbers rounded to bf16.
struct Rounded<'a> {
    x: &'a [f32],
    out: &'a mut [bf16],
}

impl Kernel for Rounded<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        // Compiled for the instruction set, so this is vectorised.
        self.out.iter_mut().zip(self.x).for_each(|(out, x)| *out = bf16::from_f32(*x));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use crate::ops::rope::{RopeTable, split_rope};
    use crate::ops::samples::{check_bits, floats, tensor};
    use candle_core::{DType, Device};

    const HEADS: [usize; 2] = [4, 2];
    const HEAD_DIM: usize = 6;
    const SHAPE: (usize, usize, usize, usize) = (50, HEADS[1], 4, HEAD_DIM);

    fn table() -> RopeTable {
        RopeTable::new(HEAD_DIM, 100.0, 300, &Device::Cpu).unwrap()
    }

    fn rows(count: usize) -> Tensor {
        tensor(2, (count, (HEADS[0] + 2 * HEADS[1]) * HEAD_DIM))
    }

    /// Writes keys and values of `qkv` with row r at position 2r.
    fn write([keys, values]: [&Tensor; 2], qkv: &Tensor, slots: &[u32]) -> Result<[Tensor; 2]> {
        let positions: Vec<u32> = (0..slots.len() as u32).map(|row| 2 * row).collect();
        let table = table();
        let turn = Turn { positions: &Tensor::new(&positions[..], &Device::Cpu).unwrap(), table: &table, heads: HEADS };
        write_keys(keys, qkv, &turn, slots)?;
        write_values(values, qkv, HEADS, slots)?;
        let [_, k, v] = split_rope(qkv, &turn)?;
        Ok([k, v])
    }

    #[test]
    fn rows_land_in_their_slots_and_nowhere_else() {
        // Few rows, and as many as several threads write.
        let scattered: Vec<u32> = (0..150).map(|i| i * 7 % 200).collect();
        for slots in [&[19, 0, 6][..], &scattered] {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let caches = [3, 4].map(|seed| tensor(seed, SHAPE).to_dtype(dtype).unwrap());
                let before = caches.each_ref().map(floats);
                let expected = write(caches.each_ref(), &rows(slots.len()), slots).unwrap();
                for ((cache, mut all), rows) in caches.iter().zip(before).zip(&expected) {
                    let rows = floats(&rows.to_dtype(dtype).unwrap());
                    for (row, &slot) in slots.iter().enumerate() {
                        for head in 0..HEADS[1] {
                            let (block, offset) = (slot as usize / 4, slot as usize % 4);
                            let at = ((block * HEADS[1] + head) * 4 + offset) * HEAD_DIM;
                            let from = (row * HEADS[1] + head) * HEAD_DIM;
                            all[at..at + HEAD_DIM].copy_from_slice(&rows[from..from + HEAD_DIM]);
                        }
                    }
                    check_bits(&format!("{dtype:?}"), &floats(cache), &all);
                }
            }
        }
    }

    #[test]
    fn wrong_inputs_are_errors_and_write_nothing() {
        let caches = [3, 4].map(|seed| tensor(seed, SHAPE));
        let before = caches.each_ref().map(floats);
        let refused = |qkv: &Tensor, slots: &[u32]| write(caches.each_ref(), qkv, slots).unwrap_err().to_string();
        assert!(refused(&rows(3), &[0, 1, 200]).contains("slot 200"));
        refused(&rows(3), &[0, 1]);
        refused(&rows(1).reshape((3, ())).unwrap(), &[0, 1, 2]);
        let many: Vec<u32> = (0..151).collect();
        assert!(refused(&rows(151), &many).contains("position 300"));
        let turned = [0, 1].map(|i| caches[i].transpose(1, 2).unwrap());
        assert!(write(turned.each_ref(), &rows(3), &[0, 1, 2]).is_err());
        for (cache, before) in caches.iter().zip(&before) {
            check_bits("cache", &floats(cache), before);
        }
    }
}
