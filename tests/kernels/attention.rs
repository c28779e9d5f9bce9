//! Attention over block caches: decoding in splits, prefill in tiles, and the plain kernel for everything else.

use candle_core::DType;
use eurus::ops::attention::{PagedBatch, paged_attention};
use eurus::ops::kernels::{self, AttentionShape, NONE};
use eurus::ops::parameter::Precision;

use crate::emulator::Library;
use crate::samples::{Buffer, Numbers, Random, TYPES, check_shapes, compare, floats, rounding};

const HALVES: [DType; 2] = [DType::BF16, DType::F16];

/// Sequences with their caches. Block 0, unused slots and unused entries of tables lead to numbers that are none.
pub(crate) struct Case {
    dtype: DType,
    shape: AttentionShape,
    batch: PagedBatch,
    q: Numbers,
    caches: [Numbers; 2],
    /// `[S, table_stride]`
    tables: Vec<u32>,
    /// The CPU body's result, `[T, heads * head_dim]`.
    expected: Vec<f32>,
    /// What float32 scores, added up in another order, move the result by: it grows with the queries.
    order: f32,
}

/// What a case is made of.
struct Sizes {
    head_dim: usize,
    share_max: usize,
    rows_max: usize,
    context_max: usize,
}

impl Case {
    fn new(random: &mut Random, dtype: DType, sizes: &Sizes) -> Self {
        let (sequences, kv_heads) = (random.between(1, 3), random.between(1, 2));
        let heads = kv_heads * random.between(1, sizes.share_max);
        let (head_dim, block_size) = (sizes.head_dim, random.choose(&[1, 5, 16, 32]));
        let chunks: Vec<usize> = (0..sequences).map(|_| random.between(1, sizes.rows_max)).collect();
        let contexts: Vec<usize> = chunks
            .iter()
            .map(|&rows| {
                let most = random.choose(&[3, 70, sizes.context_max]);
                rows + random.between(0, most)
            })
            .collect();
        let window = (random.between(0, 1) == 0).then(|| random.between(1, sizes.context_max));
        let most = contexts.iter().map(|context| context.div_ceil(block_size)).max().unwrap();
        let table_stride = most + random.between(0, 2);
        let blocks: usize = 1 + contexts.iter().map(|context| context.div_ceil(block_size)).sum::<usize>();
        let mut unused: Vec<u32> = (1..blocks as u32).collect();
        let mut tables = vec![0; sequences * table_stride];
        for (table, context) in tables.chunks_mut(table_stride).zip(&contexts) {
            for block in &mut table[..context.div_ceil(block_size)] {
                *block = unused.swap_remove(random.between(0, unused.len() - 1));
            }
        }
        let caches = [0, 1].map(|_| {
            let mut cache = random.numbers(dtype, blocks * kv_heads * block_size * head_dim, 1.0).floats;
            hide_unused(&mut cache, &tables, &contexts, &[table_stride, kv_heads, block_size, head_dim]);
            Numbers::new(dtype, &cache)
        });
        let q_starts: Vec<usize> = (0..=sequences).map(|count| chunks[..count].iter().sum()).collect();
        let rows = q_starts[sequences];
        // Queries lie in the rows of a product that has keys and values too.
        let q_stride = (heads + random.choose(&[0, 2 * kv_heads])) * head_dim;
        // The large ones would overflow where a maximum is not taken off.
        let size = random.choose(&[3.0, 3.0, 400.0]);
        let q = random.numbers(dtype, rows * q_stride, size);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let shape = AttentionShape { heads, kv_heads, head_dim, q_stride, block_size, table_stride, window, scale };
        let batch = PagedBatch {
            q_starts,
            contexts,
            tables: tables.chunks(table_stride).map(<[u32]>::to_vec).collect(),
            block_size,
            window,
        };
        let queries = q.tensor((rows, q_stride)).narrow(1, 0, heads * head_dim).unwrap().contiguous().unwrap();
        let queries = queries.reshape((rows, heads, head_dim)).unwrap();
        let [k, v] = [0, 1].map(|i| caches[i].tensor((blocks, kv_heads, block_size, head_dim)));
        let expected = floats(&paged_attention(&queries, [&k, &v], &batch, scale, Precision::F32).unwrap());
        Self { dtype, shape, batch, q, caches, tables, expected, order: 1e-6 * size }
    }

    fn contexts(&self) -> Buffer {
        Buffer::of(&self.batch.contexts.iter().map(|&context| context as u32).collect::<Vec<_>>())
    }

    fn rows(&self) -> usize {
        *self.batch.q_starts.last().unwrap()
    }

    fn out(&self, rows: usize) -> Buffer {
        Buffer::poisoned(rows * self.shape.heads * self.shape.head_dim * self.dtype.size_in_bytes())
    }

    fn splits(&self) -> usize {
        kernels::splits(*self.batch.contexts.iter().max().unwrap())
    }

    /// Memory for what the kernels leave for `combine_splits`.
    fn parts(&self, rows: usize, splits: usize) -> [Buffer; 2] {
        let count = rows * self.shape.heads * splits * 4;
        [Buffer::poisoned(count * self.shape.head_dim), Buffer::poisoned(count * 2)]
    }

    fn combine(&self, parts: &[Buffer; 2], [rows, splits]: [usize; 2], seed: u64) -> Vec<f32> {
        let out = self.out(rows);
        let addresses = [out.address(), parts[0].address(), parts[1].address()];
        let launch = kernels::combine_splits(self.dtype, addresses, [rows, splits], &self.shape);
        Library::sound().run(&launch, seed);
        out.floats(self.dtype)
    }

    /// Sequences `first..first + count`, one row each.
    fn decode(&self, library: &Library, [first, count, splits]: [usize; 3], seed: u64) -> Vec<f32> {
        let (contexts, tables, parts) = (self.contexts(), Buffer::of(&self.tables), self.parts(count, splits));
        let from = |buffer: &Buffer, stride: usize| buffer.address() + (first * stride) as u64;
        let addresses = [
            parts[0].address(),
            parts[1].address(),
            from(&self.q.buffer, self.shape.q_stride * self.dtype.size_in_bytes()),
            self.caches[0].address(),
            self.caches[1].address(),
            from(&tables, self.shape.table_stride * 4),
            from(&contexts, 4),
        ];
        library.run(&kernels::decode_attention(self.dtype, addresses, [count, splits], &self.shape), seed);
        self.combine(&parts, [count, splits], seed)
    }

    fn prefill(&self, library: &Library, seed: u64) -> Vec<f32> {
        let tiles =
            kernels::prefill_tiles(&self.batch.q_starts, &self.batch.contexts, self.shape.heads / self.shape.kv_heads);
        let (contexts, tables, tile_buffer) = (self.contexts(), Buffer::of(&self.tables), Buffer::of(&tiles));
        let q_starts = Buffer::of(&self.batch.q_starts.iter().map(|&row| row as u32).collect::<Vec<_>>());
        let out = self.out(self.rows());
        let [k, v] = [0, 1].map(|i| &self.caches[i].buffer);
        let addresses = [&out, &self.q.buffer, k, v, &tile_buffer, &q_starts, &contexts, &tables].map(Buffer::address);
        library.run(&kernels::prefill_attention(self.dtype, addresses, tiles.len(), &self.shape), seed);
        out.floats(self.dtype)
    }

    fn plain(&self, seed: u64) -> Vec<f32> {
        let (rows, splits) = (self.rows(), self.splits());
        let (mut sequences, mut positions) = (Vec::new(), Vec::new());
        for (sequence, bounds) in self.batch.q_starts.windows(2).enumerate() {
            for row in bounds[0]..bounds[1] {
                sequences.push(sequence as u32);
                positions.push((self.batch.contexts[sequence] - (bounds[1] - row)) as u32);
            }
        }
        let (sequences, positions, tables) = (Buffer::of(&sequences), Buffer::of(&positions), Buffer::of(&self.tables));
        let parts = self.parts(rows, splits);
        let [k, v] = [0, 1].map(|i| &self.caches[i].buffer);
        let addresses = [&parts[0], &parts[1], &self.q.buffer, k, v, &tables, &sequences, &positions];
        let addresses = addresses.map(Buffer::address);
        Library::sound().run(&kernels::plain_attention(self.dtype, addresses, [rows, splits], &self.shape), seed);
        self.combine(&parts, [rows, splits], seed)
    }

    /// Weights between 0 and 1 are rounded to the type before they meet values of at most 1, and the sum is rounded once more.
    fn compare(&self, got: &[f32], tensor_cores: bool) -> Result<(), String> {
        let weights = if tensor_cores { rounding(self.dtype) } else { 0.0 };
        compare(got, &self.expected, weights + self.order, rounding(self.dtype) + 3e-6)
            .map_err(|error| format!("{error}; {:?}, {:?}", self.shape, self.batch.contexts))
    }
}

/// Makes every slot that holds no position of a sequence no number. `[table_stride, kv_heads, block_size, head_dim]`.
fn hide_unused(cache: &mut [f32], tables: &[u32], contexts: &[usize], sizes: &[usize; 4]) {
    let [table_stride, kv_heads, block_size, head_dim] = *sizes;
    let mut used = vec![false; cache.len()];
    for (table, &context) in tables.chunks(table_stride).zip(contexts) {
        for position in 0..context {
            for head in 0..kv_heads {
                let block = table[position / block_size] as usize;
                let start = ((block * kv_heads + head) * block_size + position % block_size) * head_dim;
                used[start..start + head_dim].fill(true);
            }
        }
    }
    cache.iter_mut().zip(used).filter(|(_, used)| !used).for_each(|(x, _)| *x = f32::NAN);
}

/// Whether decoding of a random case is right.
pub(crate) fn check_decode(library: &Library, random: &mut Random, dtype: DType) -> Result<(), String> {
    let head_dim = random.choose(&[64, 128]);
    let share_max = random.choose(&[4, 8, 18]);
    let case = Case::new(random, dtype, &Sizes { head_dim, share_max, rows_max: 1, context_max: 600 });
    let sequences = case.batch.contexts.len();
    let splits = case.splits() + random.between(0, 1);
    case.compare(&case.decode(library, [0, sequences, splits], random.seed()), true)
}

/// Whether prefill of a random case is right.
pub(crate) fn check_prefill(library: &Library, random: &mut Random, dtype: DType) -> Result<(), String> {
    let head_dim = random.choose(&[64, 128]);
    let rows_max = random.choose(&[3, 20, 40]);
    let case = Case::new(random, dtype, &Sizes { head_dim, share_max: 5, rows_max, context_max: 150 });
    case.compare(&case.prefill(library, random.seed()), true)
}

#[test]
fn decoding_is_the_cpu_body_s() {
    check_shapes(&HALVES, 260, |random, dtype| check_decode(Library::sound(), random, dtype));
}

#[test]
fn prefill_is_the_cpu_body_s() {
    check_shapes(&HALVES, 260, |random, dtype| check_prefill(Library::sound(), random, dtype));
}

#[test]
fn plain_attention_is_the_cpu_body_s() {
    check_shapes(&TYPES, 170, |random, dtype| {
        let head_dim = 2 * random.between(1, 128);
        let case = Case::new(random, dtype, &Sizes { head_dim, share_max: 6, rows_max: 4, context_max: 300 });
        case.compare(&case.plain(random.seed()), false)
    });
}

#[test]
fn a_sequence_has_the_same_bits_beside_others() {
    for seed in 0..30 {
        let mut random = Random::new(seed);
        let sizes = Sizes { head_dim: 64, share_max: 4, rows_max: 1, context_max: 600 };
        let case = Case::new(&mut random, DType::BF16, &sizes);
        let sequences = case.batch.contexts.len();
        let all = case.decode(Library::sound(), [0, sequences, case.splits()], seed);
        for (sequence, expected) in all.chunks(all.len() / sequences).enumerate() {
            let splits = kernels::splits(case.batch.contexts[sequence]);
            let alone = case.decode(Library::sound(), [sequence, 1, splits], seed + 1000);
            assert_eq!(alone, expected, "shape {seed}, sequence {sequence}");
        }
    }
}

#[test]
fn rows_that_fill_up_a_batch_give_zeros() {
    let sizes = Sizes { head_dim: 128, share_max: 4, rows_max: 1, context_max: 100 };
    let mut case = Case::new(&mut Random::new(3), DType::BF16, &sizes);
    let sequences = case.batch.contexts.len();
    case.tables.fill(NONE);
    case.batch.contexts.fill(0);
    assert!(case.decode(Library::sound(), [0, sequences, 2], 1).iter().all(|&x| x == 0.0));
}

#[test]
fn tiles_cover_every_row_once() {
    for seed in 0..100 {
        let mut random = Random::new(seed);
        let sizes = Sizes { head_dim: 2, share_max: 64, rows_max: 70, context_max: 9 };
        let case = Case::new(&mut random, DType::F32, &sizes);
        let share = case.shape.heads / case.shape.kv_heads;
        let tokens = 64 / share;
        let mut covered: Vec<usize> = kernels::prefill_tiles(&case.batch.q_starts, &case.batch.contexts, share)
            .into_iter()
            .flat_map(|[sequence, row]| {
                row as usize..case.batch.q_starts[sequence as usize + 1].min(row as usize + tokens)
            })
            .collect();
        covered.sort_unstable();
        assert_eq!(covered, (0..case.rows()).collect::<Vec<_>>());
    }
}
