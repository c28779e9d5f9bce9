//! A model without weights behind a real engine. It keeps the tokens it was given in the cache slots it was given, and
//! reads them back through the block tables, so that a wrong table shows in what it says.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Condvar, Mutex},
};

use super::Setup;
use crate::{
    engine::{
        BlockId, Chunk, Draw, Engine, EngineHandle, Executor, Last, Limits, Outcome, Rows, StepOutput, StepPlan,
        TokenId, TokenLogProb, Want,
    },
    error::{Error, Result},
    metrics::Metrics,
};

/// Seed of the first script; the next seed has the next script.
pub(super) const FIRST_SEED: u64 = 100;
/// Drawn with this seed, a sequence fails.
pub(super) const BROKEN_SEED: u64 = 666;
/// A scored sequence that ends with this token has no finite reward.
pub(super) const NO_REWARD: TokenId = 299;
const BLOCK_SIZE: usize = 8;
const BLOCK_COUNT: usize = 600;

/// Steps that an executor may still take; tests hold it to look at what has happened until then.
#[derive(Clone)]
pub(super) struct Gate(Arc<(Mutex<u64>, Condvar)>);

impl Gate {
    pub(super) fn open() -> Self {
        Self::after(u64::MAX)
    }

    pub(super) fn after(steps: u64) -> Self {
        Self(Arc::new((Mutex::new(steps), Condvar::new())))
    }

    pub(super) fn release(&self) {
        self.allow(u64::MAX);
    }

    pub(super) fn allow(&self, steps: u64) {
        *self.0.0.lock().unwrap() = steps;
        self.0.1.notify_all();
    }

    fn pass(&self) {
        let mut steps = self.0.1.wait_while(self.0.0.lock().unwrap(), |steps| *steps == 0).unwrap();
        if *steps != u64::MAX {
            *steps -= 1;
        }
    }
}

pub(super) struct Fake {
    slots: Vec<TokenId>,
    replies: Vec<Vec<TokenId>>,
    gate: Gate,
}

impl Fake {
    pub(super) fn new(replies: Vec<Vec<TokenId>>, gate: Gate) -> Self {
        Self { slots: vec![TokenId::MAX; BLOCK_COUNT * BLOCK_SIZE], replies, gate }
    }

    pub(super) fn start(self, name: &str, setup: &Setup, metrics: &Metrics) -> EngineHandle {
        let limits = Limits {
            step_tokens: 48,
            running_max: setup.running_max,
            waiting_max: setup.waiting_max,
            len_max: setup.len_max,
        };
        Engine::start(name, limits, BLOCK_COUNT, BLOCK_SIZE, Box::new(self), metrics).unwrap().0
    }

    fn slot(blocks: &[BlockId], position: usize) -> usize {
        blocks[position / BLOCK_SIZE].0 as usize * BLOCK_SIZE + position % BLOCK_SIZE
    }

    fn write(&mut self, chunk: &Chunk) {
        for (offset, token) in chunk.tokens.iter().enumerate() {
            self.slots[Self::slot(&chunk.blocks, chunk.start + offset)] = *token;
        }
    }

    fn outcome(&self, chunk: &Chunk) -> Outcome {
        let len = chunk.start + chunk.tokens.len();
        let seen: Vec<TokenId> = (0..len).map(|position| self.slots[Self::slot(&chunk.blocks, position)]).collect();
        let (mut logprobs, mut scores) = (Vec::new(), Vec::new());
        match &chunk.rows {
            Rows::Nothing => {}
            Rows::LogProbs { targets, top } => logprobs = targets.iter().map(|token| row(*token, *top)).collect(),
            Rows::Scores => scores = (chunk.start..len).map(|end| reward(&seen[..=end])).collect(),
        }
        let last = match &chunk.want {
            Want::Nothing => Last::Nothing,
            Want::Token(draw) if draw.params.seed == BROKEN_SEED => Last::Failed(Error::internal("broken")),
            Want::Token(draw) => {
                let token = self.say(draw, &seen);
                Last::Token(token, draw.params.logprobs.map(|top| row(token, top)))
            }
            Want::Score => Last::Score(reward(&seen)),
        };
        Outcome { logprobs, scores, last }
    }

    /// The script of this seed; without one, a token that depends on the seed and on everything seen.
    fn say(&self, draw: &Draw, seen: &[TokenId]) -> TokenId {
        let script = draw.params.seed.checked_sub(FIRST_SEED).and_then(|index| self.replies.get(index as usize));
        match script {
            Some(script) => script.get(draw.generated_count).copied().unwrap_or(super::EOS),
            // Ordinary tokens only, so that it never ends by itself.
            None => 3 + (hash(&(draw.params.seed, seen)) % 250) as TokenId,
        }
    }
}

impl Executor for Fake {
    fn execute(&mut self, plan: &StepPlan, meanwhile: &mut dyn FnMut()) -> Result<StepOutput> {
        meanwhile();
        self.gate.pass();
        plan.chunks.iter().for_each(|chunk| self.write(chunk));
        Ok(StepOutput { outcomes: plan.chunks.iter().map(|chunk| self.outcome(chunk)).collect() })
    }
}

/// The reward of a sequence: a number that no other sequence has.
pub(super) fn reward(seen: &[TokenId]) -> f32 {
    if seen.last() == Some(&NO_REWARD) {
        return f32::NAN;
    }
    (hash(&seen) % 20_000_000) as f32 / 1_000_000.0 - 10.0
}

/// The log-probability of a token, which the fake takes from its id alone. Token 9 is impossible.
pub(super) fn logprob(token: TokenId) -> f32 {
    if token == 9 { f32::NEG_INFINITY } else { -((token % 16) as f32) / 8.0 }
}

fn row(token: TokenId, top: usize) -> TokenLogProb {
    TokenLogProb {
        token,
        logprob: logprob(token),
        top: (0..top as TokenId).map(|id| (id + 8, logprob(id + 8))).collect(),
    }
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}
