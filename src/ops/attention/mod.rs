//! Causal grouped-query attention over a block cache and over packed segments: shapes, checks and the cut into parallel pieces.
//! The arithmetic of a row is `rows`, the same for both, so a row has the same bits however its sequence is stored or chunked.

use super::lanes::{Body, Element};
use super::linear::small::Small;
use super::parallel;
use super::parameter::Precision;
use super::storage::{Shared, Weights, slice, written};
use crate::error::Result;
use brain::Operands;
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Shape, Storage, Tensor};
use rows::{Heads, Rows, Span, State};
use std::ops::Range;

mod brain;
#[cfg(feature = "cuda")]
mod device;
mod gradient;
pub mod inputs;
mod rows;
pub mod step;

/// Queries (tokens x heads of one key head) computed together: enough to pay for turning a tile of keys.
const QUERIES: usize = 96;

/// The chunks of several sequences in one step, and where the keys and values of their contexts lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PagedBatch {
    /// `[S + 1]`: the first row of each chunk, then the number of rows.
    pub q_starts: Vec<usize>,
    /// `[S]`: positions of the sequence after this chunk; row r of a chunk of n has position context - n + r.
    pub contexts: Vec<usize>,
    /// `[S]` block ids: position p lies in block `tables[s][p / block_size]`.
    pub tables: Vec<Vec<u32>>,
    /// Positions in a block.
    pub block_size: usize,
    /// Sliding window w: position p sees positions above p - w. None: everything up to p.
    pub window: Option<usize>,
}

/// The type of a cache in the host's memory that loses nothing beside attention in `precision`: bf16 where that is what it multiplies.
pub fn cache_dtype(precision: Precision) -> DType {
    if Small::of(precision).is_some() { DType::BF16 } else { DType::F32 }
}

/// Attention of `q` `[T, heads, head_dim]` f32 over `k_cache` and `v_cache` `[blocks, kv_heads, block_size, head_dim]`, f32, bf16 or
/// f16, to `[T, heads * head_dim]` f32. Query head h reads key head h / (heads / kv_heads). With [`Precision::Bf16`] queries and weights
/// are rounded where keys and values are bf16 and the processor has a matrix unit. Fails where the batch does not fit the tensors.
pub fn paged_attention(
    q: &Tensor,
    [k_cache, v_cache]: [&Tensor; 2],
    batch: &PagedBatch,
    scale: f32,
    precision: Precision,
) -> Result<Tensor> {
    let op = Paged { batch, scale, body: Body::best(), small: Small::of(precision) };
    Ok(q.apply_op3_no_bwd(k_cache, v_cache, &op)?)
}

/// Attention inside of segments laid one after the other: `q` `[T, heads, head_dim]`, `k` and `v` `[T, kv_heads, head_dim]`, f32,
/// to `[T, heads * head_dim]`. `starts` `[S + 1]` holds the first row of each segment, then T; positions count from each start.
///
/// Bit for bit what [`paged_attention`] computes for the same sequences in float32.
pub fn packed_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    starts: &[usize],
    window: Option<usize>,
    scale: f32,
) -> Result<Tensor> {
    let op = Packed { starts: starts.to_vec(), window, scale, body: Body::best() };
    Ok(q.apply_op3_no_bwd(k, v, &op)?)
}

/// The gradients of `q`, `k` and `v` side by side, `[T, (heads + 2 * kv_heads) * head_dim]`, from `dout` `[T, heads * head_dim]` f32,
/// that of [`packed_attention`]'s result.
pub fn packed_attention_backward(
    [q, k, v]: [&Tensor; 3],
    dout: &Tensor,
    starts: &[usize],
    window: Option<usize>,
    scale: f32,
) -> Result<Tensor> {
    let op = PackedGradient { dout: dout.clone(), starts: starts.to_vec(), window, scale, body: Body::best() };
    Ok(q.apply_op3_no_bwd(k, v, &op)?)
}

struct Paged<'a> {
    batch: &'a PagedBatch,
    scale: f32,
    body: Body,
    /// Multiplies keys and values of bf16; float32 without it.
    small: Option<Small>,
}

impl CustomOp3 for Paged<'_> {
    fn name(&self) -> &'static str {
        "paged_attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, heads, head_dim) = q_layout.shape().dims3()?;
        let (blocks, kv_heads, block_size, k_dim) = k_layout.shape().dims4()?;
        let batch = self.batch;
        check_heads(heads, kv_heads, batch.window)?;
        check_starts(&batch.q_starts, rows)?;
        if k_layout.dims() != v_layout.dims() || k_dim != head_dim || block_size != batch.block_size {
            candle_core::bail!(
                "paged_attention: queries {:?}, keys {:?}, values {:?}, blocks of {}",
                q_layout.dims(),
                k_layout.dims(),
                v_layout.dims(),
                batch.block_size
            );
        }
        let chunks = batch.chunks(blocks)?;
        let shape = Heads { heads, kv_heads, head_dim, window: batch.window, scale: self.scale };
        let q: &[f32] = slice("paged_attention", q, q_layout)?;
        let k = Weights::new("paged_attention", k, k_layout)?;
        let v = Weights::new("paged_attention", v, v_layout)?;
        let out = match (k, v) {
            (Weights::F32(k), Weights::F32(v)) => self.attend(&shape, q, &chunks, [k, v], exact),
            (Weights::Bf16(k), Weights::Bf16(v)) => match self.small {
                Some(small) => self.attend(&shape, q, &chunks, [k, v], |rows, state, operands| {
                    rows.compute_in_bf16(small, state, operands);
                }),
                None => self.attend(&shape, q, &chunks, [k, v], exact),
            },
            (Weights::F16(k), Weights::F16(v)) => self.attend(&shape, q, &chunks, [k, v], exact),
            _ => candle_core::bail!("paged_attention: keys and values of different types"),
        };
        Ok((CpuStorage::F32(out), Shape::from((rows, heads * head_dim))))
    }
}

impl Paged<'_> {
    /// All chunks, over caches of any type.
    fn attend<'kv, E: Element>(
        &self,
        shape: &Heads,
        q: &[f32],
        chunks: &[Chunk],
        [k, v]: [&'kv [E]; 2],
        compute: impl Fn(&Rows<'_, 'kv, E>, &mut State, &mut Operands) + Sync,
    ) -> Vec<f32> {
        let (block_size, kv_heads, head_dim) = (self.batch.block_size, shape.kv_heads, shape.head_dim);
        let fetch = |chunk: usize, kv_head: usize, positions: Range<usize>, span: &mut Span<'kv, E>| {
            let table = &self.batch.tables[chunk];
            let mut position = positions.start;
            while position < positions.end {
                let offset = position % block_size;
                let count = (block_size - offset).min(positions.end - position);
                let block = table[position / block_size] as usize;
                let start = ((block * kv_heads + kv_head) * block_size + offset) * head_dim;
                for i in (start..).step_by(head_dim).take(count) {
                    span.push(&k[i..i + head_dim], &v[i..i + head_dim]);
                }
                position += count;
            }
        };
        attend(self.body, shape, q, chunks, fetch, compute)
    }
}

impl PagedBatch {
    /// The chunks, once the batch is found consistent with itself and a cache of `blocks` blocks.
    fn chunks(&self, blocks: usize) -> candle_core::Result<Vec<Chunk>> {
        let count = self.q_starts.len() - 1;
        if self.contexts.len() != count || self.tables.len() != count {
            candle_core::bail!(
                "paged_attention: {count} chunks, {} contexts, {} block tables",
                self.contexts.len(),
                self.tables.len()
            );
        }
        let mut chunks = Vec::with_capacity(count);
        for (index, (bounds, &context)) in self.q_starts.windows(2).zip(&self.contexts).enumerate() {
            let rows = bounds[0]..bounds[1];
            let table = &self.tables[index];
            if context < rows.len() || context.div_ceil(self.block_size) > table.len() {
                candle_core::bail!(
                    "paged_attention: chunk {index} has {} rows, {context} positions and {} blocks of {}",
                    rows.len(),
                    table.len(),
                    self.block_size
                );
            }
            if let Some(block) = table.iter().find(|&&block| block as usize >= blocks) {
                candle_core::bail!("paged_attention: block {block} is outside of a cache of {blocks} blocks");
            }
            chunks.push(Chunk { position: context - rows.len(), rows });
        }
        Ok(chunks)
    }
}

struct Packed {
    starts: Vec<usize>,
    window: Option<usize>,
    scale: f32,
    body: Body,
}

impl CustomOp3 for Packed {
    fn name(&self) -> &'static str {
        "packed_attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, shape) = packed_shape([q_layout, k_layout, v_layout], &self.starts, self.window, self.scale)?;
        let Heads { heads, kv_heads, head_dim, .. } = shape;
        let chunks: Vec<Chunk> =
            self.starts.windows(2).map(|bounds| Chunk { position: 0, rows: bounds[0]..bounds[1] }).collect();
        let q: &[f32] = slice("packed_attention", q, q_layout)?;
        let k: &[f32] = slice("packed_attention", k, k_layout)?;
        let v: &[f32] = slice("packed_attention", v, v_layout)?;
        let row =
            |chunk: usize, position: usize, kv_head| ((self.starts[chunk] + position) * kv_heads + kv_head) * head_dim;
        let out = attend(
            self.body,
            &shape,
            q,
            &chunks,
            |chunk, kv_head, positions, span| {
                for i in positions.map(|position| row(chunk, position, kv_head)) {
                    span.push(&k[i..i + head_dim], &v[i..i + head_dim]);
                }
            },
            exact,
        );
        Ok((CpuStorage::F32(out), Shape::from((rows, heads * head_dim))))
    }
}

/// Queries, keys and values of packed segments that fit each other: the number of rows, and the heads.
fn packed_shape(
    [q, k, v]: [&Layout; 3],
    starts: &[usize],
    window: Option<usize>,
    scale: f32,
) -> candle_core::Result<(usize, Heads)> {
    let (rows, heads, head_dim) = q.shape().dims3()?;
    let (_, kv_heads, _) = k.shape().dims3()?;
    check_heads(heads, kv_heads, window)?;
    check_starts(starts, rows)?;
    if k.dims() != v.dims() || k.dims() != [rows, kv_heads, head_dim] {
        candle_core::bail!("packed_attention: queries {:?}, keys {:?}, values {:?}", q.dims(), k.dims(), v.dims());
    }
    Ok((rows, Heads { heads, kv_heads, head_dim, window, scale }))
}

/// The gradients of queries, keys and values, side by side.
struct PackedGradient {
    /// `[T, heads * head_dim]`; here because candle's operations take three tensors.
    dout: Tensor,
    starts: Vec<usize>,
    window: Option<usize>,
    scale: f32,
    body: Body,
}

impl CustomOp3 for PackedGradient {
    fn name(&self) -> &'static str {
        "packed_attention gradient"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, shape) = packed_shape([q_layout, k_layout, v_layout], &self.starts, self.window, self.scale)?;
        let Heads { heads, kv_heads, head_dim, .. } = shape;
        let (dout, dout_layout) = self.dout.storage_and_layout();
        let Storage::Cpu(dout) = &*dout else { candle_core::bail!("{}: dout is on another device", self.name()) };
        if dout_layout.dims() != [rows, heads * head_dim] {
            candle_core::bail!("{}: queries {:?}, dout {:?}", self.name(), q_layout.dims(), dout_layout.dims());
        }
        let dout: &[f32] = slice(self.name(), dout, dout_layout)?;
        let q: &[f32] = slice(self.name(), q, q_layout)?;
        let k: &[f32] = slice(self.name(), k, k_layout)?;
        let v: &[f32] = slice(self.name(), v, v_layout)?;
        let share = heads / kv_heads;
        let width = (heads + 2 * kv_heads) * head_dim;
        let mut segments: Vec<&[usize]> = self.starts.windows(2).collect();
        segments.sort_by_key(|bounds| std::cmp::Reverse(bounds[1] - bounds[0]));
        let piece = |index: usize, out: &Shared<'_, f32>| {
            let (bounds, kv_head) = (segments[index / kv_heads], index % kv_heads);
            let (first, len) = (bounds[0], bounds[1] - bounds[0]);
            let q_at = |row: usize, head: usize| ((first + row) * heads + kv_head * share + head) * head_dim;
            let k_at = |row: usize| ((first + row) * kv_heads + kv_head) * head_dim;
            let segment = gradient::Segment {
                body: self.body,
                shape: &shape,
                len,
                q: &|row, head| &q[q_at(row, head)..][..head_dim],
                dout: &|row, head| &dout[q_at(row, head)..][..head_dim],
                k: &|row| &k[k_at(row)..][..head_dim],
                v: &|row| &v[k_at(row)..][..head_dim],
            };
            let gradients = segment.gradients();
            for row in 0..len {
                let write = |head: usize, from: &[f32]| {
                    let start = (first + row) * width + head * head_dim;
                    // SAFETY: rows of a segment and key head belong to one index of this loop, so no other thread has them.
                    #[allow(unsafe_code)]
                    unsafe {
                        out.write(start, &from[row * gradients.width..][..head_dim]);
                    }
                };
                for (head, dq) in gradients.dq.iter().enumerate() {
                    write(kv_head * share + head, dq);
                }
                write(heads + kv_head, &gradients.dk);
                write(heads + kv_heads + kv_head, &gradients.dv);
            }
        };
        // SAFETY: all heads of all rows of all segments, which cover the rows, are everything.
        #[allow(unsafe_code)]
        let out = unsafe {
            written(rows * width, |out| parallel::for_each(segments.len() * kv_heads, |index| piece(index, out)))
        };
        Ok((CpuStorage::F32(out), Shape::from((rows, width))))
    }
}

fn check_heads(heads: usize, kv_heads: usize, window: Option<usize>) -> candle_core::Result<()> {
    if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        candle_core::bail!("attention: {heads} query heads do not share {kv_heads} key heads evenly");
    }
    if window == Some(0) {
        candle_core::bail!("attention: a window of 0 positions sees nothing");
    }
    Ok(())
}

fn check_starts(starts: &[usize], rows: usize) -> candle_core::Result<()> {
    if starts.first() != Some(&0) || starts.last() != Some(&rows) || !starts.is_sorted() {
        candle_core::bail!("attention: row starts {starts:?} do not cover {rows} rows");
    }
    Ok(())
}

/// Consecutive rows of one sequence, the first at `position`.
struct Chunk {
    position: usize,
    rows: Range<usize>,
}

/// Rows in float32.
fn exact<E: Element>(rows: &Rows<'_, '_, E>, state: &mut State, _: &mut Operands) {
    rows.compute(state);
}

/// One piece of work: some rows of chunk `chunk` for one key head.
struct Piece {
    chunk: usize,
    rows: Range<usize>,
    position: usize,
}

/// All rows of all chunks, which cover `q`, by `compute`; `fetch(chunk, kv_head, positions, span)` pushes the keys and values of those
/// positions in order.
fn attend<'a, E: Element>(
    body: Body,
    shape: &Heads,
    q: &[f32],
    chunks: &[Chunk],
    fetch: impl Fn(usize, usize, Range<usize>, &mut Span<'a, E>) + Sync,
    compute: impl Fn(&Rows<'_, 'a, E>, &mut State, &mut Operands) + Sync,
) -> Vec<f32> {
    if q.is_empty() {
        return Vec::new();
    }
    let tokens = (QUERIES / (shape.heads / shape.kv_heads)).max(1);
    let mut pieces = Vec::new();
    for (chunk, Chunk { position, rows }) in chunks.iter().enumerate() {
        for first in rows.clone().step_by(tokens) {
            let rows_here = first..rows.end.min(first + tokens);
            pieces.push(Piece { chunk, position: position + first - rows.start, rows: rows_here });
        }
    }
    // The longest first, so that no thread starts one when the others are done.
    pieces.sort_by_key(|piece| std::cmp::Reverse(piece.position + piece.rows.len()));
    // SAFETY: the chunks cover all rows, and all key heads of a row are everything.
    #[allow(unsafe_code)]
    unsafe {
        written(q.len(), |out| {
            let own = || (State::new(shape.head_dim), Operands::default());
            parallel::for_each_init(pieces.len() * shape.kv_heads, own, |(state, operands), index| {
                let (piece, kv_head) = (&pieces[index / shape.kv_heads], index % shape.kv_heads);
                let rows = Rows {
                    body,
                    shape,
                    q,
                    out,
                    rows: piece.rows.clone(),
                    position: piece.position,
                    kv_head,
                    fetch: &|positions, span| fetch(piece.chunk, kv_head, positions, span),
                };
                compute(&rows, state, operands);
            });
        })
    }
}

#[cfg(test)]
mod tests;
