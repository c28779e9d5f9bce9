//! The border between scheduling and arithmetic: what to compute in one step, and what came out.
//! Owned plain data, so a plan outlives later changes of the scheduler and needs no locks.

use std::sync::Arc;

use super::request::{SamplingParams, TokenId, TokenLogProb};
use crate::error::{Error, Result};

/// Identity of a sequence inside one engine, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// A block of the paged cache: `block_size` consecutive slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// Everything one step computes. Chunks run as one batch: all of them write their keys and values of a layer
/// before any of them attends in that layer, so a chunk may read blocks that an EARLIER chunk of the same plan writes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepPlan {
    /// At most one chunk for each sequence.
    pub chunks: Vec<Chunk>,
}

impl StepPlan {
    /// Tokens computed by this step.
    pub fn token_count(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.tokens.len()).sum()
    }
}

/// Consecutive tokens of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    /// Whose tokens.
    pub id: SequenceId,
    /// Position of the first token; positions below it are in the cache already.
    pub start: usize,
    /// The tokens to compute, at least one.
    pub tokens: Vec<TokenId>,
    /// Block table of the sequence, covering positions `0..start + tokens.len()`.
    pub blocks: Vec<BlockId>,
    /// What every row is read for.
    pub rows: Rows,
    /// What the last row is read for.
    pub want: Want,
}

/// What every row of a chunk is read for.
#[derive(Debug, Clone, PartialEq)]
pub enum Rows {
    /// Nothing.
    Nothing,
    /// Row i: the log-probability of `targets[i]`, and the `top` best tokens. `targets` may be one shorter than the chunk.
    LogProbs {
        /// The token that follows each row.
        targets: Vec<TokenId>,
        /// Alternatives to report.
        top: usize,
    },
    /// The raw reward of every row.
    Scores,
}

/// What the last row of a chunk is read for.
#[derive(Debug, Clone, PartialEq)]
pub enum Want {
    /// Nothing: more of the prompt follows in a later step.
    Nothing,
    /// The next token.
    Token(Draw),
    /// The raw reward.
    Score,
}

/// Everything that determines one drawn token besides the logits.
#[derive(Debug, Clone, PartialEq)]
pub struct Draw {
    /// The rules.
    pub params: Arc<SamplingParams>,
    /// Position the drawn token will have: the generator's counter.
    pub position: usize,
    /// Tokens generated so far: stop tokens are masked while this is below `min_tokens`.
    pub generated_count: usize,
    /// All tokens so far, only where [`SamplingParams::needs_history`].
    pub history: Vec<TokenId>,
    /// How many of `history` are prompt.
    pub prompt_len: usize,
}

/// What one step computed, one outcome for each chunk, in order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepOutput {
    /// Same order as the plan's chunks.
    pub outcomes: Vec<Outcome>,
}

/// What came out of one chunk.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// For [`Rows::LogProbs`].
    pub logprobs: Vec<TokenLogProb>,
    /// For [`Rows::Scores`].
    pub scores: Vec<f32>,
    /// For the last row.
    pub last: Last,
}

/// What the last row gave.
#[derive(Debug, Clone, PartialEq)]
pub enum Last {
    /// Nothing was wanted.
    Nothing,
    /// The drawn token; its log-probability if `params.logprobs` asked for it.
    Token(TokenId, Option<TokenLogProb>),
    /// The raw reward.
    Score(f32),
    /// This sequence failed (its logits are not numbers, say); the others of the step stand.
    Failed(Error),
}

/// The only trait between scheduling and arithmetic.
pub trait Executor: Send {
    /// Runs one step. An error fails every sequence of the plan; the engine goes on. `meanwhile` is what the engine has to do that does
    /// not depend on the step. It is called at least once, unless the step fails before: when a GPU has all of its work, or at first.
    fn execute(&mut self, plan: &StepPlan, meanwhile: &mut dyn FnMut()) -> Result<StepOutput>;
}
