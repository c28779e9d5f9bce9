//! The kernels of kernels/*.cu as the host sees them: their names and parameters, and the launch of each for given shapes.
//! A [`Launch`] is plain data: `cuda` gives it to a driver, tests to the emulator.

use candle_core::DType;

/// An argument of a kernel, in its place.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Argument {
    /// Of memory on the device.
    Address(u64),
    /// A number of things.
    Count(i32),
    /// A factor or an addend.
    Real(f32),
}

/// One call of a kernel over a grid of one-dimensional blocks.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// The kernel's symbol.
    pub kernel: String,
    /// Blocks in each dimension.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Shared memory beyond what the kernel declares. Above 48 KiB a driver must be asked to allow it.
    pub shared_bytes: u32,
    /// In the kernel's order.
    pub arguments: Vec<Argument>,
}

/// Kernels that differ in the types and sizes they are compiled for.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// kernels/`file`.cu has them.
    pub file: &'static str,
    /// Their symbols are `name`_`variant`.
    pub name: &'static str,
    /// See `name`.
    pub variants: &'static [&'static str],
    /// Parameters of each.
    pub parameter_count: usize,
    /// Whether they multiply on tensor cores.
    pub tensor_cores: bool,
}

const TYPES: &[&str] = &["f32", "bf16", "f16"];
const HALVES_AND_HEADS: &[&str] = &["bf16_64", "bf16_128", "f16_64", "f16_128"];
const TYPES_AND_ROWS: &[&str] =
    &["f32_1", "f32_2", "f32_4", "f32_8", "bf16_1", "bf16_2", "bf16_4", "bf16_8", "f16_1", "f16_2", "f16_4", "f16_8"];

const fn family(file: &'static str, name: &'static str, parameter_count: usize) -> Family {
    Family { file, name, variants: TYPES, parameter_count, tensor_cores: false }
}

const fn on_tensor_cores(name: &'static str, parameter_count: usize) -> Family {
    Family { file: name, name, variants: HALVES_AND_HEADS, parameter_count, tensor_cores: true }
}

/// Every kernel there is; tests compare it with what the compiler made.
pub const FAMILIES: &[Family] = &[
    family("rms_norm", "rms_norm", 5),
    family("rms_norm", "add_rms_norm", 7),
    family("rope_kv", "rope_kv", 10),
    family("swiglu", "swiglu", 3),
    family("embed", "embed", 4),
    family("experts", "add_expert", 5),
    family("logprobs", "target_scores", 4),
    family("sample", "sample", 4),
    on_tensor_cores("decode_attention", 15),
    family("decode_attention", "combine_splits", 5),
    on_tensor_cores("prefill_attention", 15),
    family("plain_attention", "plain_attention", 17),
    Family { variants: TYPES_AND_ROWS, ..family("linear", "linear", 6) },
];

/// Positions of a split of [`decode_attention`]: part of the definition of its result.
pub const SPLIT_LEN: usize = 256;
/// Query rows of a tile of [`prefill_attention`]: tokens times query heads of a key head.
const PREFILL_ROWS: usize = 64;
/// Positions that attention on tensor cores loads together.
const TILE: usize = 64;
/// Largest vocabulary of [`sample`].
pub const SAMPLE_VOCAB_MAX: usize = 1 << 19;
/// Marks a row that fills up a batch: its slot, and its token where none could be drawn.
pub const NONE: u32 = u32::MAX;

/// The compiled kernels by file, for Hopper, and as PTX for what else is as new as Ampere.
#[cfg(feature = "cuda")]
pub const IMAGES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// How a row of logits is drawn from, in the layout of kernels/sample.cu; the fields are those of [`super::sample::Filters`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub struct Draw {
    /// With `counter`, the arguments of [`super::sample::uniform`].
    pub seed: u64,
    /// See `seed`.
    pub counter: u64,
    /// 0 takes the largest.
    pub temperature: f32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub min_p: f32,
    /// 0 is off.
    pub top_k: u32,
}

impl Draw {
    /// Words of one.
    pub const WORDS: usize = 8;

    /// In the kernel's form. A row without a draw gets one that costs little.
    pub fn of(draw: Option<&super::sample::Draw>) -> Self {
        match draw {
            Some(super::sample::Draw { filters, seed, counter, logprob: _ }) => Self {
                seed: *seed,
                counter: *counter,
                temperature: filters.temperature,
                top_p: filters.top_p,
                min_p: filters.min_p,
                top_k: u32::try_from(filters.top_k).unwrap_or(u32::MAX),
            },
            None => Self { seed: 0, counter: 0, temperature: 0.0, top_p: 1.0, min_p: 0.0, top_k: 0 },
        }
    }

    /// Its bytes as they lie in memory.
    pub fn words(&self) -> [u32; Self::WORDS] {
        let Self { seed, counter, temperature, top_p, min_p, top_k } = *self;
        let [temperature, top_p, min_p] = [temperature, top_p, min_p].map(f32::to_bits);
        [seed as u32, (seed >> 32) as u32, counter as u32, (counter >> 32) as u32, temperature, top_p, min_p, top_k]
    }
}

/// What all rows of an attention share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements from one row of queries to the next.
    pub q_stride: usize,
    /// Positions in a block.
    pub block_size: usize,
    /// Entries of a block table, unused ones included.
    pub table_stride: usize,
    /// As in [`super::attention::PagedBatch`].
    pub window: Option<usize>,
    /// Factor of the scores.
    pub scale: f32,
}

impl AttentionShape {
    /// Query heads that share a key head.
    fn share(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// `out`, `x` `[T, width]`, `weight` `[width]`.
pub fn rms_norm(dtype: DType, addresses: [u64; 3], [rows, width]: [usize; 2], eps: f32) -> Launch {
    let launch = Launch::new(format!("rms_norm_{}", suffix(dtype)), [rows, 1, 1], 256);
    launch.addresses(&addresses).counts(&[width]).real(eps)
}

/// `out`, `sum`, `x`, `residual` `[T, width]`, `weight` `[width]`; the sum may take the place of `x` or `residual`.
pub fn add_rms_norm(dtype: DType, addresses: [u64; 5], [rows, width]: [usize; 2], eps: f32) -> Launch {
    let launch = Launch::new(format!("add_rms_norm_{}", suffix(dtype)), [rows, 1, 1], 256);
    launch.addresses(&addresses).counts(&[width]).real(eps)
}

/// `qkv` `[T, (heads + 2 kv_heads) head_dim]`, both caches, the table of [`super::rope::RopeTable`], `positions` and `slots` `[T]`.
/// Queries are turned in place; of a row whose slot is [`NONE`] nothing is written. Of the shape, heads and block size count.
pub fn rope_kv(dtype: DType, addresses: [u64; 6], rows: usize, shape: &AttentionShape) -> Launch {
    let launch = Launch::new(format!("rope_kv_{}", suffix(dtype)), [rows, 1, 1], 256);
    launch.addresses(&addresses).counts(&[shape.heads, shape.kv_heads, shape.head_dim, shape.block_size])
}

/// `out` `[T, width]`, `gate_up` `[T, 2 width]`.
pub fn swiglu(dtype: DType, addresses: [u64; 2], [rows, width]: [usize; 2]) -> Launch {
    let parts = width.div_ceil(256 * 16 / dtype.size_in_bytes());
    Launch::new(format!("swiglu_{}", suffix(dtype)), [parts, rows, 1], 256).addresses(&addresses).counts(&[width])
}

/// `out` `[T, width]`, `ids` `[T]`, `weight` `[vocab, width]`; every id must be below the vocabulary.
pub fn embed(dtype: DType, addresses: [u64; 3], [rows, width]: [usize; 2]) -> Launch {
    Launch::new(format!("embed_{}", suffix(dtype)), [rows, 1, 1], 128).addresses(&addresses).counts(&[width])
}

/// `sum` `[T, width]`, `y` `[R, width]`, `rows` `[R]`, each below T and there once, `shares` `[R]` f32.
pub fn add_expert(dtype: DType, addresses: [u64; 4], [rows, width]: [usize; 2]) -> Launch {
    Launch::new(format!("add_expert_{}", suffix(dtype)), [rows, 1, 1], 128).addresses(&addresses).counts(&[width])
}

/// `scores` `[R, 3]` f32, `logits` `[R, vocab]`, `targets` `[R]`: the numbers of [`super::logprobs::TargetScore`], NaN where the row
/// is no distribution or the target outside of the vocabulary.
pub fn target_scores(dtype: DType, addresses: [u64; 3], [rows, vocab]: [usize; 2]) -> Launch {
    Launch::new(format!("target_scores_{}", suffix(dtype)), [rows, 1, 1], 512).addresses(&addresses).counts(&[vocab])
}

/// `tokens` `[R]`, `logits` `[R, vocab]`, `draws` `[R]` of [`Draw`]; a token is [`NONE`] where the row is no distribution.
pub fn sample(dtype: DType, addresses: [u64; 3], [rows, vocab]: [usize; 2]) -> Launch {
    Launch::new(format!("sample_{}", suffix(dtype)), [rows, 1, 1], 512).addresses(&addresses).counts(&[vocab])
}

/// Splits for contexts of up to `context_max` positions.
pub fn splits(context_max: usize) -> usize {
    context_max.div_ceil(SPLIT_LEN).max(1)
}

/// One row for each of `sequences`: `partial` `[S, heads, splits, head_dim]` and `stats` `[S, heads, splits, 2]` f32, `q`, both
/// caches, `tables` `[S, table_stride]`, `contexts` `[S]`. bf16 and f16, heads of 64 and 128; [`combine_splits`] finishes it.
pub fn decode_attention(
    dtype: DType,
    addresses: [u64; 7],
    [sequences, splits]: [usize; 2],
    shape: &AttentionShape,
) -> Launch {
    let grid = [splits, shape.kv_heads * shape.share().div_ceil(16), sequences];
    let launch = Launch::new(format!("decode_attention_{}_{}", suffix(dtype), shape.head_dim), grid, 128);
    let launch = launch.shared(tile_bytes(shape)).addresses(&addresses);
    let counts = [shape.q_stride, shape.heads, shape.kv_heads, shape.table_stride, shape.block_size];
    launch.counts(&counts).counts(&[shape.window.unwrap_or(0), SPLIT_LEN]).real(shape.scale)
}

/// `out` `[R, heads * head_dim]` of what [`decode_attention`] or [`plain_attention`] left in `partial` and `stats`.
pub fn combine_splits(dtype: DType, addresses: [u64; 3], [rows, splits]: [usize; 2], shape: &AttentionShape) -> Launch {
    let launch = Launch::new(format!("combine_splits_{}", suffix(dtype)), [shape.heads, rows, 1], 128);
    launch.addresses(&addresses).counts(&[splits, shape.head_dim])
}

/// The tiles of [`prefill_attention`] for chunks that begin at rows `q_starts` `[S + 1]`, with `share` query heads to a key head:
/// sequence and first row, those with the longest context first, so that no processor starts one when the others are done.
pub fn prefill_tiles(q_starts: &[usize], contexts: &[usize], share: usize) -> Vec<[u32; 2]> {
    let tokens = PREFILL_ROWS / share;
    let mut tiles = Vec::new();
    for (sequence, bounds) in q_starts.windows(2).enumerate() {
        let rows = (bounds[0]..bounds[1]).step_by(tokens.max(1));
        // What the last row of the tile sees, at most.
        tiles.extend(rows.map(|row| (contexts[sequence] - (bounds[1] - bounds[1].min(row + tokens)), sequence, row)));
    }
    tiles.sort_by_key(|&(seen, sequence, row)| (std::cmp::Reverse(seen), sequence, row));
    tiles.into_iter().map(|(_, sequence, row)| [sequence as u32, row as u32]).collect()
}

/// `out` `[T, heads * head_dim]`, `q`, both caches, `tiles` `[tiles, 2]` of [`prefill_tiles`], `q_starts` `[S + 1]`,
/// `contexts` `[S]`, `tables` `[S, table_stride]`. bf16 and f16, heads of 64 and 128, at most 64 query heads to a key head.
pub fn prefill_attention(dtype: DType, addresses: [u64; 8], tiles: usize, shape: &AttentionShape) -> Launch {
    let kernel = format!("prefill_attention_{}_{}", suffix(dtype), shape.head_dim);
    let launch = Launch::new(kernel, [tiles, shape.kv_heads, 1], 128).shared(tile_bytes(shape)).addresses(&addresses);
    let counts = [shape.q_stride, shape.heads, shape.kv_heads, shape.table_stride, shape.block_size];
    launch.counts(&counts).counts(&[shape.window.unwrap_or(0)]).real(shape.scale)
}

/// Any type and any even head size up to 256: `partial`, `stats` as [`decode_attention`] for rows, `q`, both caches, `tables`,
/// `sequences` `[T]`, `positions` `[T]`, [`NONE`] for a row that sees nothing.
pub fn plain_attention(
    dtype: DType,
    addresses: [u64; 8],
    [rows, splits]: [usize; 2],
    shape: &AttentionShape,
) -> Launch {
    let grid = [splits, shape.kv_heads * shape.share().div_ceil(4), rows];
    let launch = Launch::new(format!("plain_attention_{}", suffix(dtype)), grid, 128).addresses(&addresses);
    let counts = [shape.q_stride, shape.heads, shape.kv_heads, shape.head_dim, shape.table_stride, shape.block_size];
    let launch = launch.counts(&counts).counts(&[shape.window.unwrap_or(0), SPLIT_LEN]).real(shape.scale);
    launch.shared(4 * shape.head_dim * size_of::<f32>())
}

/// `y` `[rows, columns]`, `x` `[rows, k]`, `weight` `[columns, k]`, for 1 to 8 rows.
pub fn linear(dtype: DType, addresses: [u64; 3], [rows, columns, k]: [usize; 3]) -> Launch {
    assert!((1..=8).contains(&rows), "{rows} rows are not few");
    let kernel = format!("linear_{}_{}", suffix(dtype), rows.next_power_of_two());
    Launch::new(kernel, [columns.div_ceil(16), 1, 1], 256).addresses(&addresses).counts(&[rows, columns, k])
}

/// Two tiles of keys and of values in a 2-byte type.
fn tile_bytes(shape: &AttentionShape) -> usize {
    2 * 2 * TILE * shape.head_dim * 2
}

fn suffix(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::BF16 => "bf16",
        DType::F16 => "f16",
        other => panic!("there are no kernels for {other:?}"),
    }
}

impl Family {
    /// The symbols of its kernels.
    pub fn symbols(&self) -> impl Iterator<Item = String> {
        self.variants.iter().map(|variant| format!("{}_{variant}", self.name))
    }
}

impl Launch {
    fn new(kernel: String, grid: [usize; 3], threads: u32) -> Self {
        Self { kernel, grid: grid.map(|blocks| blocks as u32), threads, shared_bytes: 0, arguments: Vec::new() }
    }

    fn shared(mut self, bytes: usize) -> Self {
        self.shared_bytes = bytes as u32;
        self
    }

    fn addresses(mut self, addresses: &[u64]) -> Self {
        self.arguments.extend(addresses.iter().map(|&address| Argument::Address(address)));
        self
    }

    fn counts(mut self, counts: &[usize]) -> Self {
        self.arguments.extend(counts.iter().map(|&count| Argument::Count(count as i32)));
        self
    }

    fn real(mut self, x: f32) -> Self {
        self.arguments.push(Argument::Real(x));
        self
    }
}
