//! A step's attention on a GPU: which kernels run over which rows. Tensor cores where there is a kernel for the type and head size: one
//! for sequences with one new row, one for longer chunks. A row's result depends on its sequence and its chunk only.

use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp3, DType, Layout as TensorLayout, Shape, Storage, Tensor,
};
use std::ops::Range;

use super::inputs::{Inputs, Integers, Words};
use super::{check_heads, check_starts};
use crate::ops::cuda;
use crate::ops::kernels::{self, AttentionShape};
use crate::ops::rope::Turn;

/// What sums over parts of a context may take: so many rows attend at once. Little where tests are to see several parts.
const SCRATCH_BYTES: usize = if cfg!(feature = "emulator") { 32 << 10 } else { 64 << 20 };
/// Blocks of a grid in its second and third dimension.
const GRID_MAX: usize = 65_535;
/// Most query heads to a key head for the kernel of chunks.
const SHARE_MAX: usize = 64;

/// Where each array begins among the words of [`Inputs`].
#[derive(Debug, Default)]
pub(super) struct Layout {
    slots: usize,
    sequences: usize,
    contexts: usize,
    q_starts: usize,
    tables: usize,
    table_stride: usize,
    /// Parts of the longest context there is room for.
    splits: usize,
    tiles: usize,
    tile_count: usize,
    /// Sequences with one row each that follow each other.
    runs: Vec<Range<usize>>,
}

impl Layout {
    pub(super) fn new(
        integers: &Integers<'_>,
        [heads, kv_heads]: [usize; 2],
        context_max: usize,
        words: &mut Words,
    ) -> Self {
        let paged = integers.paged;
        let row_count = |sequence: usize| paged.q_starts[sequence + 1] - paged.q_starts[sequence];
        let sequence_count = paged.contexts.len();
        let table_stride = context_max.div_ceil(paged.block_size.max(1));
        // What lies beyond is not read.
        let padded = |table: &Vec<u32>| {
            let mut table = table.clone();
            table.resize(table_stride, 0);
            table
        };
        let mut tiles = kernels::prefill_tiles(&paged.q_starts, &paged.contexts, heads / kv_heads.max(1));
        tiles.retain(|[sequence, _]| row_count(*sequence as usize) > 1);
        let mut runs: Vec<Range<usize>> = Vec::new();
        for sequence in (0..sequence_count).filter(|&sequence| row_count(sequence) == 1) {
            match runs.last_mut() {
                Some(run) if run.end == sequence => run.end += 1,
                _ => runs.push(sequence..sequence + 1),
            }
        }
        let sequences = (0..sequence_count).flat_map(|sequence| vec![sequence as u32; row_count(sequence)]);
        Self {
            slots: words.push(integers.slots.iter().copied()),
            sequences: words.push(sequences),
            contexts: words.push(paged.contexts.iter().map(|&context| context as u32)),
            q_starts: words.push(paged.q_starts.iter().map(|&start| start as u32)),
            tables: words.push(paged.tables.iter().flat_map(padded)),
            table_stride,
            splits: kernels::splits(context_max),
            tile_count: tiles.len(),
            tiles: words.push(tiles.into_iter().flatten()),
            runs,
        }
    }
}

/// See [`super::step::step_attention`].
pub(super) struct Step<'a> {
    pub(super) turn: &'a Turn<'a>,
    pub(super) inputs: &'a Inputs<'a>,
    pub(super) scale: f32,
}

/// Addresses and sizes of one layer.
struct Call<'a> {
    device: &'a CudaDevice,
    dtype: DType,
    shape: AttentionShape,
    layout: &'a Layout,
    integers: &'a Integers<'a>,
    words: u64,
    positions: u64,
    out: u64,
    qkv: u64,
    caches: [u64; 2],
}

impl CustomOp3 for Step<'_> {
    fn name(&self) -> &'static str {
        "step attention"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &TensorLayout,
        _: &CpuStorage,
        _: &TensorLayout,
        _: &CpuStorage,
        _: &TensorLayout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        candle_core::bail!("{}: a CPU does it in parts", self.name())
    }

    fn cuda_fwd(
        &self,
        qkv: &CudaStorage,
        qkv_layout: &TensorLayout,
        keys: &CudaStorage,
        keys_layout: &TensorLayout,
        values: &CudaStorage,
        values_layout: &TensorLayout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let shape = self.shape([qkv_layout, keys_layout, values_layout])?;
        let (rows, device, dtype) = (qkv_layout.dims()[0], &qkv.device, cuda::dtype(self.name(), qkv)?);
        let out = cuda::output(device, dtype, rows * shape.heads * shape.head_dim)?;
        let call = Call {
            device,
            dtype,
            shape,
            layout: &self.inputs.layout,
            integers: &self.inputs.integers,
            words: tensor_address(&self.inputs.words, DType::U32)?,
            positions: tensor_address(&self.inputs.positions, DType::U32)?,
            out: cuda::base(self.name(), &out)?,
            qkv: cuda::address(self.name(), qkv, qkv_layout, dtype)?,
            caches: [
                cuda::address(self.name(), keys, keys_layout, dtype)?,
                cuda::address(self.name(), values, values_layout, dtype)?,
            ],
        };
        call.turn_and_write(tensor_address(self.turn.table.tensor(), DType::F32)?, rows)?;
        call.attend(rows)?;
        Ok((out, Shape::from((rows, shape.heads * shape.head_dim))))
    }
}

/// Where a contiguous tensor lies.
fn tensor_address(tensor: &Tensor, dtype: DType) -> candle_core::Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) => cuda::address("step attention", storage, layout, dtype),
        _ => candle_core::bail!("step attention: the inputs are on another device"),
    }
}

impl Step<'_> {
    /// The sizes of rows and caches that fit each other and the inputs.
    fn shape(&self, [qkv, keys, values]: [&TensorLayout; 3]) -> candle_core::Result<AttentionShape> {
        let ((rows, width), (blocks, kv_heads, block_size, head_dim)) = (qkv.shape().dims2()?, keys.shape().dims4()?);
        let (integers, (positions_max, table_dim)) = (&self.inputs.integers, self.turn.table.tensor().dims2()?);
        let paged = integers.paged;
        let heads = self.turn.heads[0];
        let fits = self.turn.heads[1] == kv_heads
            && (heads + 2 * kv_heads) * head_dim == width
            && [integers.tokens.len(), integers.positions.len(), integers.slots.len()] == [rows; 3]
            && keys.dims() == values.dims()
            && (block_size, head_dim) == (paged.block_size, table_dim);
        if !fits {
            let (qkv, keys, name) = (qkv.dims(), keys.dims(), self.name());
            candle_core::bail!("{name}: {qkv:?} over {keys:?} with {heads} heads and {} slots", integers.slots.len());
        }
        check_heads(heads, kv_heads, paged.window)?;
        check_starts(&paged.q_starts, rows)?;
        paged.chunks(blocks)?;
        if let Some(position) = integers.positions.iter().find(|&&position| position as usize >= positions_max) {
            candle_core::bail!("rope: position {position} is outside of the table of {positions_max} positions");
        }
        let outside = |&&slot: &&u32| slot as usize >= blocks * block_size && slot != kernels::NONE;
        if let Some(slot) = integers.slots.iter().find(outside) {
            candle_core::bail!("kv_write: slot {slot} is outside of a cache of {} slots", blocks * block_size);
        }
        Ok(AttentionShape {
            heads,
            kv_heads,
            head_dim,
            q_stride: width,
            block_size,
            table_stride: self.inputs.layout.table_stride,
            window: paged.window,
            scale: self.scale,
        })
    }
}

impl Call<'_> {
    fn word(&self, index: usize) -> u64 {
        self.words + 4 * index as u64
    }

    /// Of element `index` of an array of the type of activations that begins at `start`.
    fn number(&self, start: u64, index: usize) -> u64 {
        start + (index * self.dtype.size_in_bytes()) as u64
    }

    fn turn_and_write(&self, table: u64, rows: usize) -> candle_core::Result<()> {
        let [keys, values] = self.caches;
        let addresses = [self.qkv, keys, values, table, self.positions, self.word(self.layout.slots)];
        cuda::launch(self.device, &kernels::rope_kv(self.dtype, addresses, rows, &self.shape))
    }

    fn attend(&self, rows: usize) -> candle_core::Result<()> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let tensor_cores = self.dtype != DType::F32 && [64, 128].contains(&head_dim) && heads / kv_heads <= SHARE_MAX;
        if !tensor_cores {
            return self.in_parts(0..rows, |rows, scratch| self.plain(rows, scratch));
        }
        if self.layout.tile_count > 0 {
            self.prefill()?;
        }
        for run in &self.layout.runs {
            self.in_parts(run.clone(), |run, scratch| self.decode(run, scratch))?;
        }
        Ok(())
    }

    /// Cuts `all` rows so that what their parts of contexts leave fits into [`SCRATCH_BYTES`], and calls `work` with rows and the
    /// addresses of sums and statistics.
    fn in_parts(
        &self,
        all: Range<usize>,
        work: impl Fn(Range<usize>, [u64; 2]) -> candle_core::Result<()>,
    ) -> candle_core::Result<()> {
        let parts = self.shape.heads * self.layout.splits;
        let row_bytes = parts * (self.shape.head_dim + 2) * size_of::<f32>();
        let count = (SCRATCH_BYTES / row_bytes).clamp(1, GRID_MAX);
        let most = count.min(all.len());
        let scratch = cuda::output(self.device, DType::F32, most * row_bytes / size_of::<f32>())?;
        let partial = cuda::base("step attention", &scratch)?;
        let stats = partial + (most * parts * self.shape.head_dim * size_of::<f32>()) as u64;
        for first in all.clone().step_by(count) {
            work(first..all.end.min(first + count), [partial, stats])?;
        }
        Ok(())
    }

    fn prefill(&self) -> candle_core::Result<()> {
        let [keys, values] = self.caches;
        let Layout { tiles, q_starts, contexts, tables, tile_count, .. } = *self.layout;
        let [tiles, q_starts, contexts, tables] = [tiles, q_starts, contexts, tables].map(|array| self.word(array));
        let addresses = [self.out, self.qkv, keys, values, tiles, q_starts, contexts, tables];
        cuda::launch(self.device, &kernels::prefill_attention(self.dtype, addresses, tile_count, &self.shape))
    }

    /// The sequences `run`, whose only rows follow each other.
    fn decode(&self, run: Range<usize>, [partial, stats]: [u64; 2]) -> candle_core::Result<()> {
        let [keys, values] = self.caches;
        let (shape, layout, row) = (&self.shape, self.layout, self.integers.paged.q_starts[run.start]);
        let q = self.number(self.qkv, row * shape.q_stride);
        let tables = self.word(layout.tables + run.start * layout.table_stride);
        let addresses = [partial, stats, q, keys, values, tables, self.word(layout.contexts + run.start)];
        let counts = [run.len(), layout.splits];
        cuda::launch(self.device, &kernels::decode_attention(self.dtype, addresses, counts, shape))?;
        self.combine(row, counts, [partial, stats])
    }

    fn plain(&self, rows: Range<usize>, [partial, stats]: [u64; 2]) -> candle_core::Result<()> {
        let [keys, values] = self.caches;
        let (shape, layout) = (&self.shape, self.layout);
        let q = self.number(self.qkv, rows.start * shape.q_stride);
        let (tables, sequences) = (self.word(layout.tables), self.word(layout.sequences + rows.start));
        let positions = self.positions + 4 * rows.start as u64;
        let addresses = [partial, stats, q, keys, values, tables, sequences, positions];
        let counts = [rows.len(), layout.splits];
        cuda::launch(self.device, &kernels::plain_attention(self.dtype, addresses, counts, shape))?;
        self.combine(rows.start, counts, [partial, stats])
    }

    fn combine(&self, first_row: usize, counts: [usize; 2], [partial, stats]: [u64; 2]) -> candle_core::Result<()> {
        let out = self.number(self.out, first_row * self.shape.heads * self.shape.head_dim);
        cuda::launch(self.device, &kernels::combine_splits(self.dtype, [out, partial, stats], counts, &self.shape))
    }
}
