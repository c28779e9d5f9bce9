//! What runs next. Owns all sequences and their blocks; owns no memory, no model and no thread.
//!
//! The whole state of a sequence is `computed < tokens.len()`: prompts, generated tokens and recomputation after preemption
//! are the same arithmetic. Older requests go first everywhere, so the oldest one whose reader keeps up always advances.

use std::collections::VecDeque;

use super::blocks::{BlockPool, BlockTable};
use super::request::{Request, Task, TokenId};
use super::sequence::{Fate, Sequence, events_max};
use super::step::{Last, Outcome, SequenceId, StepOutput, StepPlan};
use crate::error::{Error, Result};

/// Steps a reader may stall before its sequence gives its place to one that waits.
const PARKED_STEPS_MAX: u32 = 64;

/// Bounds of one engine, all at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Tokens computed in one step.
    pub step_tokens: usize,
    /// Sequences that hold blocks.
    pub running_max: usize,
    /// Requests that wait for their first step.
    pub waiting_max: usize,
    /// Tokens of one sequence, prompt and completion.
    pub len_max: usize,
}

impl Limits {
    /// Whether `request` can ever be served within these limits by a pool of `block_count` blocks.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `prompt` or `max_tokens`, or [`Error::Internal`] for a reply channel without room for
    /// the events of one step.
    pub fn check(&self, request: &Request, block_count: usize, block_size: usize) -> Result<()> {
        let prompt_len = request.prompt.len();
        let cache_len = block_count.saturating_mul(block_size);
        if prompt_len == 0 {
            return Err(Error::invalid("prompt", "the prompt is empty: at least one token is needed"));
        }
        if prompt_len > self.len_max {
            let message = format!("the prompt has {prompt_len} tokens, this model takes at most {}", self.len_max);
            return Err(Error::invalid("prompt", message));
        }
        if prompt_len > cache_len {
            let message = format!("the prompt has {prompt_len} tokens, the cache holds {cache_len}");
            return Err(Error::invalid("prompt", message));
        }
        if let Task::Generate(params) = &request.task {
            let max_tokens = params.max_tokens;
            if max_tokens == 0 && params.prompt_logprobs.is_none() {
                return Err(Error::invalid(
                    "max_tokens",
                    "0 is for reading prompt log-probabilities; ask for 1 or more",
                ));
            }
            let len_max = self.len_max.min(cache_len.saturating_add(1));
            if prompt_len.saturating_add(max_tokens) > len_max {
                let message = format!(
                    "{prompt_len} tokens of prompt and max_tokens {max_tokens} exceed the {len_max} tokens there is room for"
                );
                return Err(Error::invalid("max_tokens", message));
            }
        }
        if request.reply.max_capacity() < events_max(&request.task, false) {
            return Err(Error::internal("the reply channel is too small for the events of one step"));
        }
        Ok(())
    }
}

/// Totals since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Prompt tokens looked up in the prefix index at first admission.
    pub prefix_queries: u64,
    /// Of these, found.
    pub prefix_hits: u64,
    /// Sequences that lost their blocks.
    pub preemptions: u64,
    /// Sequences whose reader left.
    pub cancelled: u64,
    /// Prompt tokens of admitted sequences.
    pub prompt_tokens: u64,
    /// Tokens drawn.
    pub generated_tokens: u64,
    /// Tokens of scored sequences.
    pub reward_tokens: u64,
}

/// All sequences of one engine, and which of their tokens are computed next.
#[derive(Debug)]
pub struct Scheduler {
    /// In order of arrival; these hold no blocks.
    waiting: VecDeque<Sequence>,
    /// In order of arrival; these hold blocks.
    running: Vec<Sequence>,
    pool: BlockPool,
    limits: Limits,
    arrival_count: u64,
    counters: Counters,
    ended: Vec<SequenceId>,
}

/// A plan in the making.
struct Draft {
    plan: StepPlan,
    budget: usize,
    preempted: bool,
}

impl Scheduler {
    /// Nothing to do yet, on the blocks of `pool`.
    pub fn new(limits: Limits, pool: BlockPool) -> Self {
        assert!(limits.step_tokens > 0 && limits.running_max > 0 && limits.len_max > 0, "limits of at least one");
        Self {
            waiting: VecDeque::new(),
            running: Vec::with_capacity(limits.running_max),
            pool,
            limits,
            arrival_count: 0,
            counters: Counters::default(),
            ended: Vec::new(),
        }
    }

    /// Puts a request at the end of the queue.
    ///
    /// # Errors
    /// As [`Limits::check`], and [`Error::Overloaded`] when the queue is full. Nothing is sent to the reply then.
    pub fn add(&mut self, request: Request) -> Result<SequenceId> {
        self.limits.check(&request, self.pool.block_count(), self.pool.block_size())?;
        if self.queued_count() >= self.limits.waiting_max {
            return Err(Error::Overloaded(format!("{} requests wait already", self.limits.waiting_max)));
        }
        self.arrival_count += 1;
        let id = SequenceId(self.arrival_count);
        self.waiting.push_back(Sequence::new(id, request));
        Ok(id)
    }

    /// What to compute next. Every plan is answered by [`Self::commit`] or [`Self::fail`] before the next one. An empty
    /// plan needs no answer; it means that every sequence waits for its reader, or that preemption made room for the next.
    pub fn plan(&mut self) -> StepPlan {
        self.ended.clear();
        self.drop_cancelled();
        self.waiting.iter_mut().chain(&mut self.running).for_each(Sequence::note_reader);
        let mut draft = Draft { plan: StepPlan::default(), budget: self.limits.step_tokens, preempted: false };
        self.plan_running(&mut draft);
        if !draft.preempted {
            self.plan_waiting(&mut draft);
        }
        draft.plan
    }

    /// Takes in the results of `plan`, the last one made.
    pub fn commit(&mut self, plan: &StepPlan, output: StepOutput) {
        if output.outcomes.len() != plan.chunks.len() {
            return self
                .fail(plan, &Error::internal("the executor answered for another number of chunks than planned"));
        }
        self.pool.settle();
        for (chunk, outcome) in plan.chunks.iter().zip(output.outcomes) {
            let Some(index) = self.running_index(chunk.id) else { continue };
            self.count(index, &outcome);
            match self.running[index].accept(chunk, outcome) {
                Fate::Continues => {}
                Fate::Finished => {
                    let mut sequence = self.end(index);
                    self.pool.release(&mut sequence.table);
                }
                Fate::Failed => {
                    let mut sequence = self.end(index);
                    self.pool.discard(&mut sequence.table);
                }
            }
        }
    }

    /// The step failed as a whole: so does every sequence of it, and nothing that it was to compute can be found.
    pub fn fail(&mut self, plan: &StepPlan, error: &Error) {
        self.pool.forget_unproven();
        for chunk in &plan.chunks {
            let Some(index) = self.running_index(chunk.id) else { continue };
            let mut sequence = self.end(index);
            sequence.fail(error.clone());
            self.pool.release(&mut sequence.table);
        }
    }

    /// Everything fails; nothing is left. Readers are told first, in case the blocks are what is wrong.
    pub fn fail_all(&mut self, error: &Error) {
        let sequences: Vec<_> = self.running.drain(..).chain(self.waiting.drain(..)).collect();
        for sequence in &sequences {
            sequence.fail(error.clone());
            self.ended.push(sequence.id);
        }
        self.pool.forget_unproven();
        for mut sequence in sequences {
            self.pool.release(&mut sequence.table);
        }
    }

    /// Whether there is no sequence at all.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Sequences that hold blocks.
    pub fn running_count(&self) -> usize {
        self.running.len()
    }

    /// Sequences that hold none: those not yet admitted, and at most `running_max` preempted ones.
    pub fn waiting_count(&self) -> usize {
        self.waiting.len()
    }

    /// Requests not yet admitted, at most `waiting_max`.
    pub fn queued_count(&self) -> usize {
        self.waiting.iter().filter(|sequence| sequence.cached.is_none()).count()
    }

    /// The blocks.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// Totals since the start.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Sequences that finished, failed or were cancelled since the last plan was asked for.
    pub fn ended(&self) -> &[SequenceId] {
        &self.ended
    }

    /// Sequences that hold blocks, oldest first.
    pub fn running_ids(&self) -> impl Iterator<Item = SequenceId> {
        self.running.iter().map(|sequence| sequence.id)
    }

    /// Sequences that wait for blocks, oldest first, and whether their readers have room for what comes next.
    pub fn waiting_ids(&self) -> impl Iterator<Item = (SequenceId, bool)> {
        self.waiting.iter().map(|sequence| (sequence.id, !sequence.is_parked()))
    }

    /// Checks everything that must hold between two calls.
    ///
    /// # Errors
    /// The first contradiction, in words.
    pub fn audit(&self) -> Result<(), String> {
        let sorted = |ids: &[SequenceId]| ids.is_sorted_by(|a, b| a < b);
        if !sorted(&self.running_ids().collect::<Vec<_>>())
            || !sorted(&self.waiting_ids().map(|w| w.0).collect::<Vec<_>>())
        {
            return Err("sequences are out of order of arrival".into());
        }
        if self.running.len() > self.limits.running_max || self.queued_count() > self.limits.waiting_max {
            return Err(format!("{} run, {} are queued", self.running.len(), self.queued_count()));
        }
        for sequence in &self.waiting {
            if sequence.computed > 0 || !sequence.table.blocks().is_empty() {
                return Err(format!("{:?} waits and holds blocks", sequence.id));
            }
        }
        for sequence in &self.running {
            let covered = sequence.table.blocks().len() * self.pool.block_size();
            if sequence.computed >= sequence.tokens.len() || sequence.computed > covered || covered == 0 {
                return Err(format!("{:?} runs without work or without blocks", sequence.id));
            }
        }
        self.pool.audit(
            self.running.iter().map(|sequence| -> (&BlockTable, &[TokenId]) { (&sequence.table, &sequence.tokens) }),
        )
    }

    fn drop_cancelled(&mut self) {
        let Self { waiting, running, pool, counters, ended, .. } = self;
        let mut stays = |sequence: &mut Sequence| {
            if !sequence.is_cancelled() {
                return true;
            }
            pool.release(&mut sequence.table);
            ended.push(sequence.id);
            counters.cancelled += 1;
            false
        };
        running.retain_mut(&mut stays);
        waiting.retain_mut(&mut stays);
    }

    /// Oldest first. A prompt leaves one token of the budget to every younger sequence, so that it does not stop them.
    fn plan_running(&mut self, draft: &mut Draft) {
        let mut index = 0;
        while index < self.running.len() && draft.budget > 0 {
            let sequence = &self.running[index];
            if !sequence.is_parked() {
                let mut len = sequence.pending();
                if len > 1 {
                    let younger_count = self.running[index + 1..].iter().filter(|other| !other.is_parked()).count();
                    len = len.min(draft.budget.saturating_sub(younger_count).max(1));
                }
                index = self.plan_one(index, len, draft);
            }
            index += 1;
        }
    }

    /// Plans up to `len` tokens of `running[index]`, at the expense of others if there is no room for even one. Returns
    /// its index after that.
    fn plan_one(&mut self, mut index: usize, len: usize, draft: &mut Draft) -> usize {
        let mark = self.running[index].table.mark();
        let computed = self.running[index].computed;
        loop {
            let sequence = &mut self.running[index];
            reuse(&mut self.pool, sequence);
            let room = self.pool.reach(&sequence.table) - sequence.computed;
            if room > 0 {
                let len = len.min(sequence.pending()).min(room);
                draft.push(&mut self.pool, sequence, len);
                return index;
            }
            // What was reused took the last free blocks, and replaced no partial block, which would be free now.
            if sequence.computed > computed {
                self.pool.undo_reuse(&mut sequence.table, mark);
                sequence.computed = computed;
            }
            match self.victim(index) {
                Some(victim) => {
                    self.preempt(victim, draft);
                    index -= usize::from(victim < index);
                }
                None => return index,
            }
        }
    }

    /// Whom to take blocks from so that `running[asking]` can advance: whoever waits for a reader, else the youngest, unless
    /// it is planned already. Sequences before `asking` that are not parked are.
    fn victim(&self, asking: usize) -> Option<usize> {
        let parked = self.running.iter().rposition(Sequence::is_parked);
        parked.or_else(|| self.running.len().checked_sub(1).filter(|&youngest| youngest > asking))
    }

    fn preempt(&mut self, index: usize, draft: &mut Draft) {
        let mut sequence = self.running.remove(index);
        self.pool.release(&mut sequence.table);
        sequence.restart();
        let place = self.waiting.partition_point(|other| other.id < sequence.id);
        self.waiting.insert(place, sequence);
        self.counters.preemptions += 1;
        draft.preempted = true;
    }

    /// Oldest first, and none before an older one, except past those whose readers stall. A sequence is admitted only if
    /// all that run and itself can compute all they have and one token more: admission alone never causes preemption.
    fn plan_waiting(&mut self, draft: &mut Draft) {
        let mut reserved: usize = self.running.iter().map(|sequence| outstanding(&self.pool, sequence)).sum();
        let mut index = 0;
        while index < self.waiting.len() && draft.budget > 0 {
            if self.waiting[index].is_parked() {
                index += 1;
                continue;
            }
            if self.running.len() >= self.limits.running_max || !self.has_room_for(index, reserved) {
                return self.give_way(draft);
            }
            let Some(mut sequence) = self.waiting.remove(index) else { return };
            self.count_admission(&mut sequence);
            let len = sequence.pending().min(draft.budget);
            draft.push(&mut self.pool, &mut sequence, len);
            reserved += outstanding(&self.pool, &sequence);
            let place = self.running.partition_point(|other| other.id < sequence.id);
            self.running.insert(place, sequence);
        }
    }

    /// Adopts what `waiting[index]` can reuse and says whether the rest fits; if not, nothing is adopted.
    fn has_room_for(&mut self, index: usize, reserved: usize) -> bool {
        let sequence = &mut self.waiting[index];
        let mark = sequence.table.mark();
        reuse(&mut self.pool, sequence);
        let fits = outstanding(&self.pool, sequence) + reserved <= self.pool.free_count();
        if !fits {
            self.pool.undo_reuse(&mut sequence.table, mark);
            sequence.computed = 0;
        }
        fits
    }

    /// A ready sequence cannot be admitted: one that runs only in name makes room for the next step, if its reader has
    /// stalled for long or nothing else would happen.
    fn give_way(&mut self, draft: &mut Draft) {
        let patience = if draft.plan.chunks.is_empty() { 0 } else { PARKED_STEPS_MAX };
        if let Some(index) = self.running.iter().rposition(|sequence| sequence.parked_steps > patience) {
            self.preempt(index, draft);
        }
    }

    fn running_index(&self, id: SequenceId) -> Option<usize> {
        self.running.binary_search_by_key(&id, |sequence| sequence.id).ok()
    }

    fn end(&mut self, index: usize) -> Sequence {
        let sequence = self.running.remove(index);
        self.ended.push(sequence.id);
        sequence
    }

    fn count_admission(&mut self, sequence: &mut Sequence) {
        if sequence.cached.is_none() {
            sequence.cached = Some(sequence.computed);
            self.counters.prompt_tokens += sequence.prompt_len() as u64;
            if !sequence.needs_rows() {
                self.counters.prefix_queries += sequence.prompt_len() as u64;
                self.counters.prefix_hits += sequence.computed as u64;
            }
        }
    }

    fn count(&mut self, index: usize, outcome: &Outcome) {
        match outcome.last {
            Last::Token(..) => self.counters.generated_tokens += 1,
            Last::Score(_) => self.counters.reward_tokens += self.running[index].prompt_len() as u64,
            Last::Nothing | Last::Failed(_) => {}
        }
    }
}

impl Draft {
    /// Adds the next `len` tokens of `sequence`, for which there is room.
    fn push(&mut self, pool: &mut BlockPool, sequence: &mut Sequence, len: usize) {
        let end = sequence.computed + len;
        pool.grow(&mut sequence.table, end);
        debug_assert!(pool.is_writable(&sequence.table, sequence.computed), "a shared block would be written");
        self.plan.chunks.push(sequence.chunk(len));
        pool.publish(&mut sequence.table, &sequence.tokens, end);
        self.budget -= len;
    }
}

/// Adopts what others have computed of the pending tokens, if that is more than one token and no row is to be read.
fn reuse(pool: &mut BlockPool, sequence: &mut Sequence) {
    if sequence.pending() > 1 && !sequence.needs_rows() {
        sequence.computed = sequence.computed.max(pool.reuse(&mut sequence.table, &sequence.tokens));
    }
}

/// Blocks that `sequence` will foreseeably ask for.
fn outstanding(pool: &BlockPool, sequence: &Sequence) -> usize {
    pool.blocks_for(sequence.foreseeable_len()).saturating_sub(sequence.table.blocks().len())
}
