//! What runs next. Owns all sequences and their blocks; owns no memory, no model and no thread.
//!
//! The whole state of a sequence is `computed < tokens.len()`: prompts, generated tokens and recomputation after preemption
//! are the same arithmetic. Older requests go first everywhere, so the oldest one whose reader keeps up always advances.

use std::collections::VecDeque;

use super::blocks::{BlockPool, BlockTable};
use super::limits::Limits;
use super::outbox::Outbox;
use super::request::{Request, TokenId};
use super::sequence::{Fate, Sequence};
use super::step::{Last, Outcome, SequenceId, StepOutput, StepPlan};
use crate::error::{Error, Result};

/// Steps a reader may stall before its sequence gives its place to one that waits.
const PARKED_STEPS_MAX: u32 = 64;

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
    outbox: Outbox,
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
            outbox: Outbox::default(),
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

    /// What to compute next. Every plan is answered by [`Self::commit`] or [`Self::fail`] before the next one; requests may be added
    /// in between. An empty plan needs no answer; it means that every sequence waits for its reader, or that preemption made room for
    /// the next.
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

    /// Takes in the results of `plan`, the last one made. Readers learn of them by [`Self::tell`].
    pub fn commit(&mut self, plan: &StepPlan, output: StepOutput) {
        if output.outcomes.len() != plan.chunks.len() {
            return self
                .fail(plan, &Error::internal("the executor answered for another number of chunks than planned"));
        }
        self.pool.settle();
        for (chunk, outcome) in plan.chunks.iter().zip(output.outcomes) {
            let Some(index) = self.running_index(chunk.id) else { continue };
            self.count(index, &outcome);
            match self.running[index].accept(chunk, outcome, &mut self.outbox) {
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

    /// The step failed as a whole: so does every sequence of it, and nothing that it was to compute can be found. Readers learn of it by
    /// [`Self::tell`].
    pub fn fail(&mut self, plan: &StepPlan, error: &Error) {
        self.pool.forget_unproven();
        for chunk in &plan.chunks {
            let Some(index) = self.running_index(chunk.id) else { continue };
            let mut sequence = self.end(index);
            sequence.fail(error.clone(), &mut self.outbox);
            self.pool.release(&mut sequence.table);
        }
    }

    /// Tells readers what came out of the steps so far. The next step may be planned before; their room counts as taken.
    pub fn tell(&mut self) {
        self.outbox.tell();
    }

    /// Everything fails; nothing is left. Readers are told first, in case the blocks are what is wrong.
    pub fn fail_all(&mut self, error: &Error) {
        let sequences: Vec<_> = self.running.drain(..).chain(self.waiting.drain(..)).collect();
        for sequence in &sequences {
            sequence.fail(error.clone(), &mut self.outbox);
            self.ended.push(sequence.id);
        }
        self.tell();
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

    /// Oldest first; what waits for its reader keeps its blocks and is passed over.
    fn plan_running(&mut self, draft: &mut Draft) {
        let mut index = 0;
        while index < self.running.len() && draft.budget > 0 {
            if !self.running[index].is_parked() {
                index = self.plan_one(index, draft);
            }
            index += 1;
        }
    }

    /// Plans as much of `running[index]` as budget and room allow, at the expense of others if there is no room for even
    /// one token. Returns its index after that.
    fn plan_one(&mut self, mut index: usize, draft: &mut Draft) -> usize {
        loop {
            let sequence = &mut self.running[index];
            reuse(&mut self.pool, sequence);
            let room = self.pool.reach(&sequence.table) - sequence.computed;
            if room > 0 {
                let len = sequence.pending().min(draft.budget).min(room);
                draft.push(&mut self.pool, sequence, len);
                return index;
            }
            let Some(victim) = self.victim(index) else { return index };
            self.preempt(victim, draft);
            index -= usize::from(victim < index);
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
        reuse(&mut self.pool, sequence);
        let fits = outstanding(&self.pool, sequence) + reserved <= self.pool.free_count();
        if !fits {
            self.pool.release(&mut sequence.table);
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use std::sync::Arc;

    use tokio::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::engine::request::{Event, Finish, SamplingParams, ScoreRows, Task, TokenLogProb, Usage};
    use crate::engine::step::{Rows, Want};

    const LIMITS: Limits = Limits { step_tokens: 20, running_max: 4, waiting_max: 8, len_max: 100 };

    fn scheduler(limits: Limits, block_count: usize) -> Scheduler {
        Scheduler::new(limits, BlockPool::new(block_count, 4))
    }

    fn ask(scheduler: &mut Scheduler, prompt: &[TokenId], params: SamplingParams) -> Receiver<Event> {
        let (reply, events) = channel(16);
        scheduler.add(Request { prompt: prompt.to_vec(), task: Task::Generate(Arc::new(params)), reply }).unwrap();
        events
    }

    fn tokens(max_tokens: usize) -> SamplingParams {
        SamplingParams { max_tokens, ..SamplingParams::default() }
    }

    /// Every drawn token is 7, every log-probability minus its target.
    fn answer(plan: &StepPlan) -> StepOutput {
        let logprob = |&token: &TokenId| TokenLogProb { token, logprob: -(token as f32), top: Vec::new() };
        let outcome = |chunk: &crate::engine::step::Chunk| Outcome {
            logprobs: match &chunk.rows {
                Rows::LogProbs { targets, .. } => targets.iter().map(logprob).collect(),
                _ => Vec::new(),
            },
            scores: Vec::new(),
            last: if let Want::Token(_) = chunk.want { Last::Token(7, None) } else { Last::Nothing },
        };
        StepOutput { outcomes: plan.chunks.iter().map(outcome).collect() }
    }

    fn step(scheduler: &mut Scheduler) -> StepPlan {
        let plan = scheduler.plan();
        scheduler.commit(&plan, answer(&plan));
        scheduler.tell();
        scheduler.audit().unwrap();
        plan
    }

    fn drain(events: &mut Receiver<Event>) -> Vec<Event> {
        std::iter::from_fn(|| events.try_recv().ok()).collect()
    }

    fn lens(plan: &StepPlan) -> Vec<(u64, usize, usize)> {
        plan.chunks.iter().map(|chunk| (chunk.id.0, chunk.start, chunk.tokens.len())).collect()
    }

    const PROMPT: [TokenId; 10] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10];

    #[test]
    fn equal_prompts_submitted_together_share_one_prefill() {
        let mut scheduler = scheduler(LIMITS, 16);
        let _events: Vec<_> = (0..3).map(|_| ask(&mut scheduler, &PROMPT, tokens(3))).collect();
        let plan = step(&mut scheduler);
        assert_eq!(lens(&plan), [(1, 0, 10), (2, 8, 2), (3, 8, 2)]);
        assert!(plan.chunks.iter().all(|chunk| chunk.blocks[..2] == plan.chunks[0].blocks[..2]));
        assert_eq!(scheduler.pool().used_count(), 2 + 3);
        let Counters { prefix_queries, prefix_hits, .. } = scheduler.counters();
        assert_eq!((prefix_queries, prefix_hits), (30, 16));
    }

    #[test]
    fn an_answer_is_reused_by_the_next_turn() {
        let mut scheduler = scheduler(LIMITS, 16);
        let mut events = ask(&mut scheduler, &PROMPT, tokens(4));
        (0..4).for_each(|_| drop(step(&mut scheduler)));
        let usage = Usage { prompt_tokens: 10, cached_tokens: 0, completion_tokens: 4 };
        assert_eq!(drain(&mut events).pop(), Some(Event::Done(Finish::Length, usage)));
        assert_eq!(scheduler.pool().used_count(), 0);
        let next = [&PROMPT[..], &[7, 7, 7, 7, 1]].concat();
        let _events = ask(&mut scheduler, &next, tokens(1));
        // Thirteen positions were computed: the last token drawn never is.
        assert_eq!(lens(&step(&mut scheduler)), [(2, 12, 3)]);
    }

    #[test]
    fn the_youngest_gives_its_blocks_and_draws_on_as_if_nothing_had_been() {
        let mut scheduler = scheduler(LIMITS, 6);
        let mut events = [ask(&mut scheduler, &PROMPT, tokens(14)), ask(&mut scheduler, &[9; 4], tokens(7))];
        let mut positions = Vec::new();
        while !scheduler.is_idle() {
            for chunk in step(&mut scheduler).chunks.iter().filter(|chunk| chunk.id.0 == 2) {
                if let Want::Token(draw) = &chunk.want {
                    positions.push(draw.position);
                }
            }
        }
        assert_eq!(positions, (4..11).collect::<Vec<_>>());
        assert_eq!(scheduler.counters().preemptions, 1);
        let counts = events.each_mut().map(|events| drain(events).len());
        assert_eq!(counts, [15, 8]);
    }

    #[test]
    fn a_stalled_reader_keeps_its_blocks_until_others_need_its_place() {
        let mut scheduler = scheduler(Limits { running_max: 2, ..LIMITS }, 32);
        let (reply, mut stalled) = channel(3);
        let task = Task::Generate(Arc::new(tokens(10)));
        scheduler.add(Request { prompt: PROMPT.to_vec(), task, reply }).unwrap();
        let (mut busy, _next) = (ask(&mut scheduler, &[3; 3], tokens(90)), ask(&mut scheduler, &[4; 3], tokens(1)));
        // Two tokens and the room for the last event: then the first is passed over, and the third waits for a place.
        assert_eq!(lens(&step(&mut scheduler)).len(), 2);
        assert_eq!(lens(&step(&mut scheduler)).len(), 2);
        for _ in 0..PARKED_STEPS_MAX {
            assert_eq!(lens(&step(&mut scheduler))[0].0, 2);
            drain(&mut busy);
        }
        assert_eq!(scheduler.running_ids().collect::<Vec<_>>(), [SequenceId(1), SequenceId(2)]);
        step(&mut scheduler);
        assert_eq!(scheduler.waiting_ids().collect::<Vec<_>>(), [(SequenceId(1), false), (SequenceId(3), true)]);
        assert_eq!(lens(&step(&mut scheduler))[1], (3, 0, 3));
        // It reads again: its prompt and its first token are still in the cache, two blocks of them full.
        assert_eq!(drain(&mut stalled).len(), 2);
        assert_eq!(lens(&step(&mut scheduler))[1], (1, 8, 4));
    }

    #[test]
    fn prompt_log_probabilities_cover_every_token_but_the_first() {
        let mut scheduler = scheduler(Limits { step_tokens: 4, ..LIMITS }, 16);
        let params = SamplingParams { prompt_logprobs: Some(0), ..tokens(0) };
        let mut events = ask(&mut scheduler, &PROMPT, params);
        let targets: Vec<_> = (0..3)
            .map(|_| match &step(&mut scheduler).chunks[0].rows {
                Rows::LogProbs { targets, .. } => targets.clone(),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(targets, [vec![2, 3, 4, 5], vec![6, 7, 8, 9], vec![10]]);
        let events = drain(&mut events);
        let Event::Prompt(logprobs) = &events[0] else { panic!("{events:?}") };
        assert_eq!(logprobs.iter().map(|one| -one.logprob as TokenId).collect::<Vec<_>>(), &PROMPT[1..]);
        assert!(matches!(events[1..], [Event::Done(Finish::Length, Usage { completion_tokens: 0, .. })]));
    }

    #[test]
    fn one_failure_is_its_own_and_leaves_no_cache_behind() {
        let mut scheduler = scheduler(LIMITS, 16);
        let (mut bad, mut good) = (ask(&mut scheduler, &PROMPT, tokens(2)), ask(&mut scheduler, &[5; 5], tokens(1)));
        let plan = scheduler.plan();
        let mut output = answer(&plan);
        output.outcomes[0].last = Last::Failed(Error::internal("not a number"));
        scheduler.commit(&plan, output);
        scheduler.tell();
        scheduler.audit().unwrap();
        assert_eq!(drain(&mut bad), [Event::Failed(Error::internal("not a number"))]);
        assert_eq!(drain(&mut good).len(), 2);
        let _events = ask(&mut scheduler, &PROMPT, tokens(1));
        assert_eq!(lens(&step(&mut scheduler)), [(3, 0, 10)]);
    }

    #[test]
    fn an_executor_that_answers_something_else_fails_the_sequence() {
        let mut scheduler = scheduler(LIMITS, 16);
        let wrong: [fn(&mut StepOutput); 4] = [
            |output| output.outcomes[0].last = Last::Score(1.0),
            |output| output.outcomes[0].last = Last::Nothing,
            |output| output.outcomes[0].scores.push(1.0),
            |output| output.outcomes.clear(),
        ];
        for spoil in wrong {
            let mut events = ask(&mut scheduler, &PROMPT, tokens(1));
            let plan = scheduler.plan();
            let mut output = answer(&plan);
            spoil(&mut output);
            scheduler.commit(&plan, output);
            scheduler.tell();
            assert!(matches!(drain(&mut events)[..], [Event::Failed(Error::Internal(_))]));
            assert!(scheduler.is_idle() && scheduler.pool().used_count() == 0);
        }
    }

    #[test]
    fn every_reward_of_a_sequence_is_read_once_in_order() {
        let mut scheduler = scheduler(Limits { step_tokens: 4, ..LIMITS }, 16);
        let (reply, mut events) = channel(3);
        scheduler.add(Request { prompt: PROMPT.to_vec(), task: Task::Score(ScoreRows::All), reply }).unwrap();
        while !scheduler.is_idle() {
            let plan = scheduler.plan();
            let chunk = &plan.chunks[0];
            let scores = (chunk.start..chunk.start + chunk.tokens.len()).map(|position| position as f32).collect();
            let last = if chunk.want == Want::Score { Last::Score(9.0) } else { Last::Nothing };
            scheduler.commit(&plan, StepOutput { outcomes: vec![Outcome { logprobs: Vec::new(), scores, last }] });
            scheduler.tell();
        }
        let usage = Usage { prompt_tokens: 10, ..Usage::default() };
        let all = (0..10).map(|position| position as f32).collect();
        assert_eq!(drain(&mut events), [Event::Scores(all), Event::Score(9.0), Event::Done(Finish::Scored, usage)]);
    }
}
