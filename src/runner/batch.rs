//! A step plan laid out for the decoder: all chunks one after another, with the slots they write and the rows that
//! are read. Holds no tensors.

use super::kv_cache::KvCache;
use crate::engine::step::{Chunk, Rows, StepPlan, Want};
use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::ops::attention::PagedBatch;
use crate::ops::attention::inputs::Integers;
use crate::ops::kernels::NONE;
use crate::ops::sample::Draw;

/// What the cache and the model allow a plan to name.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Blocks of the cache.
    pub block_count: usize,
    /// Slots of one block.
    pub block_size: usize,
    /// Size of the vocabulary.
    pub vocab: usize,
    /// Positions a sequence may have.
    pub positions_max: usize,
    /// How many positions, itself included, a token sees; all if absent.
    pub window: Option<usize>,
}

/// The chunks of one plan, packed without padding: `T` rows.
#[derive(Debug)]
pub struct ForwardBatch {
    /// `[T]`.
    pub tokens: Vec<u32>,
    /// `[T]`, position of each row in its sequence.
    pub positions: Vec<u32>,
    /// `[T]`, cache slot of each row: `block * block_size + offset`.
    pub slots: Vec<u32>,
    /// Which slots each chunk sees.
    pub paged: PagedBatch,
    /// The rows that the head is applied to, in ascending order.
    pub reads: Vec<Read>,
}

/// One row that is read, and what for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Read {
    /// Index among all rows of the batch.
    pub row: usize,
    /// Index among the chunks of the plan.
    pub chunk: usize,
    /// Index among the rows of the chunk, where every row of it is read.
    pub each: Option<usize>,
    /// Whether this is the chunk's last row and something is wanted of it.
    pub last: bool,
}

impl Bounds {
    /// Those of the model that `config` describes over `cache`.
    pub fn new(config: &ModelConfig, cache: &KvCache) -> Self {
        Self {
            block_count: cache.block_count(),
            block_size: cache.block_size(),
            vocab: config.vocab,
            positions_max: config.positions_max,
            window: config.window,
        }
    }
}

impl ForwardBatch {
    /// Lays out `plan`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a token outside the vocabulary; [`Error::Internal`] for a plan that contradicts
    /// itself or the cache.
    pub fn new(plan: &StepPlan, bounds: &Bounds) -> Result<Self> {
        let count = plan.token_count();
        let mut batch = Self {
            tokens: Vec::with_capacity(count),
            positions: Vec::with_capacity(count),
            slots: Vec::with_capacity(count),
            paged: PagedBatch {
                q_starts: vec![0],
                contexts: Vec::with_capacity(plan.chunks.len()),
                tables: Vec::with_capacity(plan.chunks.len()),
                block_size: bounds.block_size,
                window: bounds.window,
            },
            reads: Vec::new(),
        };
        for (index, chunk) in plan.chunks.iter().enumerate() {
            check(chunk, bounds)?;
            batch.push(index, chunk, bounds.block_size);
        }
        Ok(batch)
    }

    /// The integers of the batch. `rows` are those that are read, `draws` how they are drawn from.
    pub fn integers<'a>(&'a self, rows: &'a [u32], draws: &'a [Option<Draw>]) -> Integers<'a> {
        let Self { tokens, positions, slots, paged, .. } = self;
        Integers { tokens, positions, slots, reads: rows, draws, paged }
    }

    /// Whether every sequence has one row, which is read.
    pub fn is_one_row_each(&self) -> bool {
        self.tokens.len() == self.paged.contexts.len() && self.reads.len() == self.tokens.len()
    }

    /// Adds sequences of one token, until there are `rows`, whose keys and values go nowhere. They see the cache's first slot, whatever
    /// is there, and nobody reads what they give.
    pub fn fill_up(&mut self, rows: usize) {
        for row in self.tokens.len()..rows {
            self.tokens.push(0);
            self.positions.push(0);
            self.slots.push(NONE);
            self.paged.q_starts.push(row + 1);
            self.paged.contexts.push(1);
            self.paged.tables.push(vec![0]);
        }
    }

    fn push(&mut self, index: usize, chunk: &Chunk, block_size: usize) {
        let first = self.tokens.len();
        let len = chunk.tokens.len();
        let each_count = match &chunk.rows {
            Rows::Nothing => 0,
            Rows::LogProbs { targets, .. } => targets.len(),
            Rows::Scores => len,
        };
        for (offset, &token) in chunk.tokens.iter().enumerate() {
            let position = chunk.start + offset;
            self.tokens.push(token);
            self.positions.push(position as u32);
            self.slots.push(chunk.blocks[position / block_size].0 * block_size as u32 + (position % block_size) as u32);
            let each = (offset < each_count).then_some(offset);
            let last = offset + 1 == len && chunk.want != Want::Nothing;
            if each.is_some() || last {
                self.reads.push(Read { row: first + offset, chunk: index, each, last });
            }
        }
        self.paged.q_starts.push(first + len);
        self.paged.contexts.push(chunk.start + len);
        self.paged.tables.push(chunk.blocks.iter().map(|block| block.0).collect());
    }
}

fn check(chunk: &Chunk, bounds: &Bounds) -> Result<()> {
    let end = chunk.start + chunk.tokens.len();
    let problem = if chunk.tokens.is_empty() {
        "no tokens".to_owned()
    } else if end > bounds.positions_max {
        format!("{end} positions, but the model has {}", bounds.positions_max)
    } else if chunk.blocks.len() * bounds.block_size < end {
        format!("{} blocks of {} slots for {end} positions", chunk.blocks.len(), bounds.block_size)
    } else if let Some(block) = chunk.blocks.iter().find(|block| block.0 as usize >= bounds.block_count) {
        format!("block {} of a cache of {}", block.0, bounds.block_count)
    } else if matches!(&chunk.rows, Rows::LogProbs { targets, .. } if targets.len() > chunk.tokens.len()) {
        "more targets than tokens".to_owned()
    } else if let Some(token) = chunk.tokens.iter().find(|&&token| token as usize >= bounds.vocab) {
        let message = format!("token {token} is outside the vocabulary of {}", bounds.vocab);
        return Err(Error::invalid("prompt", message));
    } else {
        return Ok(());
    };
    Err(Error::Internal(format!("the plan's chunk of sequence {} has {problem}", chunk.id.0)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::sync::Arc;

    use super::*;
    use crate::engine::request::SamplingParams;
    use crate::engine::step::{BlockId, Draw, SequenceId};

    const BOUNDS: Bounds = Bounds { block_count: 10, block_size: 4, vocab: 100, positions_max: 12, window: Some(7) };

    fn chunk(start: usize, tokens: &[u32], blocks: &[u32]) -> Chunk {
        Chunk {
            id: SequenceId(5),
            start,
            tokens: tokens.to_vec(),
            blocks: blocks.iter().map(|&block| BlockId(block)).collect(),
            rows: Rows::Nothing,
            want: Want::Nothing,
        }
    }

    fn token() -> Want {
        let params = Arc::new(SamplingParams::default());
        Want::Token(Draw { params, position: 0, generated_count: 0, history: Vec::new(), prompt_len: 0 })
    }

    #[test]
    fn chunks_are_packed_and_slots_follow_the_block_table() {
        let targets = vec![11, 12];
        let chunks = vec![
            chunk(3, &[10, 11, 12], &[9, 2]),
            Chunk { rows: Rows::LogProbs { targets, top: 0 }, want: token(), ..chunk(0, &[10, 11, 12], &[1]) },
            Chunk { want: Want::Score, ..chunk(8, &[50], &[4, 0, 7]) },
            Chunk { rows: Rows::Scores, ..chunk(0, &[60, 61], &[3]) },
        ];
        let batch = ForwardBatch::new(&StepPlan { chunks }, &BOUNDS).unwrap();
        assert_eq!(batch.tokens, [10, 11, 12, 10, 11, 12, 50, 60, 61]);
        assert_eq!(batch.positions, [3, 4, 5, 0, 1, 2, 8, 0, 1]);
        assert_eq!(batch.slots, [39, 8, 9, 4, 5, 6, 28, 12, 13]);
        assert_eq!(batch.paged.q_starts, [0, 3, 6, 7, 9]);
        assert_eq!(batch.paged.contexts, [6, 3, 9, 2]);
        assert_eq!(batch.paged.tables, [vec![9, 2], vec![1], vec![4, 0, 7], vec![3]]);
        assert_eq!((batch.paged.block_size, batch.paged.window), (4, Some(7)));
        let read = |row, chunk, each, last| Read { row, chunk, each, last };
        let expected = [
            read(3, 1, Some(0), false),
            read(4, 1, Some(1), false),
            read(5, 1, None, true),
            read(6, 2, None, true),
            read(7, 3, Some(0), false),
            read(8, 3, Some(1), false),
        ];
        assert_eq!(batch.reads, expected);
    }

    #[test]
    fn a_batch_is_filled_up_with_rows_that_are_written_nowhere() {
        let last = |start, blocks: &[u32]| Chunk { want: token(), ..chunk(start, &[10], blocks) };
        let mut batch =
            ForwardBatch::new(&StepPlan { chunks: vec![last(5, &[9, 2]), last(0, &[1])] }, &BOUNDS).unwrap();
        assert!(batch.is_one_row_each());
        batch.fill_up(4);
        assert_eq!((batch.tokens, batch.positions), (vec![10, 10, 0, 0], vec![5, 0, 0, 0]));
        assert_eq!(batch.slots, [9, 4, NONE, NONE]);
        assert_eq!(batch.paged.q_starts, [0, 1, 2, 3, 4]);
        assert_eq!(batch.paged.contexts, [6, 1, 1, 1]);
        assert_eq!(batch.paged.tables, [vec![9, 2], vec![1], vec![0], vec![0]]);
        assert_eq!(batch.reads.len(), 2);

        let more = Chunk { want: token(), ..chunk(0, &[10, 11], &[1]) };
        for other in [more, chunk(0, &[10], &[1])] {
            let plan = StepPlan { chunks: vec![last(5, &[9, 2]), other] };
            assert!(!ForwardBatch::new(&plan, &BOUNDS).unwrap().is_one_row_each());
        }
    }

    #[track_caller]
    fn check_refused(chunk: Chunk, expected: &str) {
        let message = ForwardBatch::new(&StepPlan { chunks: vec![chunk] }, &BOUNDS).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }

    #[test]
    fn plans_that_contradict_themselves_are_refused() {
        check_refused(chunk(0, &[], &[0]), "no tokens");
        check_refused(chunk(3, &[1, 2], &[0]), "1 blocks of 4 slots for 5 positions");
        check_refused(chunk(0, &[1], &[10]), "block 10 of a cache of 10");
        check_refused(chunk(12, &[1], &[0, 1, 2, 3]), "13 positions, but the model has 12");
        check_refused(chunk(0, &[99, 100], &[0]), "token 100 is outside the vocabulary of 100");
        let rows = Rows::LogProbs { targets: vec![1, 2], top: 0 };
        check_refused(Chunk { rows, ..chunk(0, &[1], &[0]) }, "more targets than tokens");
    }
}
