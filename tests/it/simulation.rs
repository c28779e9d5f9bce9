//! The scheduler under seeded random load, against a model whose answer depends on every cache slot it is shown.
//! One number determines a run: arrivals, lengths, pools, cancellations, stalled readers, failing steps.
//! `EURUS_SIMULATION_SEEDS` runs more of them.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use eurus::engine::{
    BlockPool, Event, Executor, Limits, Request, SamplingParams, Scheduler, ScoreRows, SequenceId, StepPlan, Task,
    TokenId,
};
use eurus::error::Error;
use tokio::sync::mpsc::{Receiver, channel};

mod fake_model;
use fake_model::{FakeModel, mix, oracle};

/// Seeds that found a defect, planted or not, which few others find. Whatever a longer run finds is added.
const REGRESSIONS: &[u64] = &[
    2,     // a failed step left its blocks findable
    38,    // and another sequence computed on from them
    771,   // a reused block was appended behind the partial one it replaces
    1_050, // rows read before a preemption were reported twice
    2_587, // a sequence was admitted in a step that preempted another
];

#[test]
fn twenty_thousand_seeds() {
    let count = std::env::var("EURUS_SIMULATION_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(20_000);
    let tally = run_seeds(0..count);
    // A simulation that meets nothing proves nothing.
    let often = count / 100;
    assert!(
        [tally.finished, tally.cancelled, tally.failed, tally.preempted, tally.parked, tally.reused, tally.refused]
            .iter()
            .all(|&times| times > often),
        "{tally:?}"
    );
}

#[test]
fn seeds_that_once_failed() {
    for &seed in REGRESSIONS {
        run_seeds(seed..seed + 1);
    }
}

#[test]
fn a_seed_determines_the_run() {
    assert_eq!(run_seed(7), run_seed(7));
}

/// What happened, to know that the load was worth it.
#[derive(Debug, Default, Clone, PartialEq)]
struct Tally {
    steps: u64,
    finished: u64,
    cancelled: u64,
    failed: u64,
    refused: u64,
    preempted: u64,
    parked: u64,
    reused: u64,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.finished += other.finished;
        self.cancelled += other.cancelled;
        self.failed += other.failed;
        self.refused += other.refused;
        self.preempted += other.preempted;
        self.parked += other.parked;
        self.reused += other.reused;
    }
}

#[track_caller]
fn run_seeds(seeds: Range<u64>) -> Tally {
    let run = |offset: usize| {
        let mut tally = Tally::default();
        for seed in seeds.clone().skip(offset).step_by(2) {
            let outcome = catch_unwind(AssertUnwindSafe(|| run_seed(seed)));
            match outcome.unwrap_or_else(|_| Err("panicked, see above".into())) {
                Ok(one) => tally.add(&one),
                Err(problem) => return Err((seed, problem)),
            }
        }
        Ok(tally)
    };
    let (even, odd) = std::thread::scope(|scope| {
        let other = scope.spawn(|| run(1));
        (run(0), other.join().unwrap())
    });
    match (even, odd) {
        (Ok(mut even), Ok(odd)) => {
            even.add(&odd);
            even
        }
        (Err((seed, problem)), Ok(_)) | (Ok(_), Err((seed, problem))) => panic!("seed {seed}: {problem}"),
        (Err(even), Err(odd)) => {
            let (seed, problem) = even.min(odd);
            panic!("seed {seed}: {problem}")
        }
    }
}

struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0)
    }

    /// Uniform in `range`.
    fn within(&mut self, range: Range<usize>) -> usize {
        range.start + (self.roll() % range.len() as u64) as usize
    }

    fn one_in(&mut self, times: usize) -> bool {
        self.within(0..times) == 0
    }
}

/// One request and its reader.
struct Client {
    arrives: u64,
    prompt: Vec<TokenId>,
    task: Task,
    channel_len: usize,
    /// Nothing is read in these steps.
    stalls: Range<u64>,
    /// Events read in one step at most.
    pace: usize,
    cancels: Option<u64>,
    id: Option<SequenceId>,
    receiver: Option<Receiver<Event>>,
    got: Vec<Event>,
    /// A failure was injected.
    fails: bool,
    ended: bool,
}

struct Simulation {
    dice: Dice,
    step: u64,
    limits: Limits,
    scheduler: Scheduler,
    model: FakeModel,
    clients: Vec<Client>,
    /// One in so many steps fails; 0 is never.
    failure_rarity: usize,
    admitted_before: bool,
    tally: Tally,
}

fn run_seed(seed: u64) -> Result<Tally, String> {
    let mut simulation = Simulation::new(seed);
    let work: usize = simulation.clients.iter().map(|client| client.prompt.len() + 20).sum();
    let step_max = simulation.clients.iter().map(|client| client.arrives.max(client.stalls.end)).max().unwrap_or(0)
        + 8 * work as u64;
    while simulation.clients.iter().any(|client| !client.ended) {
        if simulation.step > step_max {
            return Err(format!("no end after {step_max} steps"));
        }
        if !simulation.takes_in_late() {
            simulation.arrive()?;
        }
        simulation.advance().map_err(|problem| format!("step {}: {problem}", simulation.step))?;
        simulation.read();
        simulation.step += 1;
    }
    simulation.finish()
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let mut dice = Dice(mix(seed));
        // Half of the runs have far more to do than room to do it.
        let crowded = dice.one_in(2);
        let block_size = dice.within(1..5);
        let block_count = if crowded { dice.within(8..13) } else { dice.within(8..65) };
        let room = (block_count * block_size).min(64);
        let limits = Limits {
            step_tokens: if crowded { dice.within(4..16) } else { dice.within(4..65) },
            running_max: dice.within(1..13),
            waiting_max: dice.within(1..9),
            len_max: dice.within(room / 2..room + 8),
        };
        let vocab = dice.within(2..5) as TokenId;
        let model = FakeModel::new(block_count, block_size, vocab);
        let failure_rarity = if dice.one_in(3) { dice.within(4..40) } else { 0 };
        let prompts = if crowded { 4..10 } else { 1..7 };
        let clients = clients(&mut dice, prompts, room.min(limits.len_max), vocab);
        Self {
            dice,
            step: 0,
            limits,
            scheduler: Scheduler::new(limits, BlockPool::new(block_count, block_size)),
            model,
            clients,
            failure_rarity,
            admitted_before: false,
            tally: Tally::default(),
        }
    }

    /// Whether requests come in while this step runs, as they do in every other one.
    fn takes_in_late(&self) -> bool {
        !self.step.is_multiple_of(2)
    }

    /// Submits what is due; a full queue is tried again in the next step.
    fn arrive(&mut self) -> Result<(), String> {
        for client in &mut self.clients {
            if client.id.is_some() || client.ended || client.arrives > self.step {
                continue;
            }
            let (reply, receiver) = channel(client.channel_len);
            let max_tokens = if let Task::Generate(params) = &client.task { params.max_tokens } else { 0 };
            let len = client.prompt.len() + max_tokens;
            let cached_len = len - max_tokens.min(1);
            let fits = len <= self.limits.len_max && cached_len <= self.model.slots.len();
            let full = self.scheduler.queued_count() == self.limits.waiting_max;
            match self.scheduler.add(Request { prompt: client.prompt.clone(), task: client.task.clone(), reply }) {
                Ok(id) if fits && !full => {
                    client.id = Some(id);
                    client.receiver = Some(receiver);
                }
                Err(Error::Invalid { .. }) if !fits => {
                    client.ended = true;
                    self.tally.refused += 1;
                }
                Err(Error::Overloaded(_)) if fits && full => {}
                answer => return Err(format!("{len} tokens, queue full: {full}, answered {answer:?}")),
            }
        }
        Ok(())
    }

    /// One step, everything checked after each of its parts.
    fn advance(&mut self) -> Result<(), String> {
        for client in &mut self.clients {
            if client.cancels.is_some_and(|step| step <= self.step) && client.id.is_some() {
                client.receiver = None;
            }
        }
        let before: Vec<_> = self.scheduler.running_ids().collect();
        let preemptions = self.scheduler.counters().preemptions;
        let plan = self.scheduler.plan();
        self.note_ended()?;
        self.scheduler.audit()?;
        if plan.token_count() > self.limits.step_tokens || plan.chunks.iter().any(|chunk| chunk.tokens.is_empty()) {
            return Err(format!("a step of {} tokens", plan.token_count()));
        }
        if let Some(chunk) = plan.chunks.iter().find(|chunk| !self.scheduler.running_ids().any(|id| id == chunk.id)) {
            return Err(format!("{:?} was planned and does not run", chunk.id));
        }
        self.check_order(&before, &plan, self.scheduler.counters().preemptions - preemptions)?;
        if plan.chunks.is_empty() {
            self.scheduler.tell();
            return if self.takes_in_late() { self.arrive() } else { Ok(()) };
        }
        self.model.fail_step = self.failure_rarity > 0 && self.dice.one_in(self.failure_rarity);
        if self.failure_rarity > 0 && self.dice.one_in(self.failure_rarity) {
            self.model.fail_chunk = Some(self.dice.within(0..plan.chunks.len()));
        }
        let failing = if self.model.fail_step {
            0..plan.chunks.len()
        } else {
            self.model.fail_chunk.map_or(0..0, |index| index..index + 1)
        };
        for chunk in &plan.chunks[failing] {
            self.client(chunk.id).fails = true;
        }
        if self.takes_in_late() {
            self.arrive()?;
        }
        // As the engine does: what a step gave is told during the next one, or when there is none.
        let Self { model, scheduler, .. } = self;
        match model.execute(&plan, &mut || scheduler.tell()) {
            Ok(output) => scheduler.commit(&plan, output),
            Err(error) => scheduler.fail(&plan, &error),
        }
        if scheduler.is_idle() {
            scheduler.tell();
        }
        self.model.fail_chunk = None;
        self.note_ended()?;
        self.scheduler.audit()?;
        self.check_published()
    }

    fn client(&mut self, id: SequenceId) -> &mut Client {
        self.clients.iter_mut().find(|client| client.id == Some(id)).unwrap()
    }

    /// Requests end once; those that nobody listens to end with the next plan.
    fn note_ended(&mut self) -> Result<(), String> {
        for id in self.scheduler.ended().to_vec() {
            self.client(id).ended = true;
        }
        let left: Vec<_> = self.scheduler.running_ids().chain(self.scheduler.waiting_ids().map(|(id, _)| id)).collect();
        for client in &self.clients {
            let Some(id) = client.id else { continue };
            if client.ended == left.contains(&id) {
                return Err(format!("{id:?} ended: {}, but is still there: {}", client.ended, !client.ended));
            }
            if client.receiver.is_none() && !client.ended {
                return Err(format!("{id:?} was cancelled and lives"));
            }
        }
        Ok(())
    }

    /// Nobody overtakes, nobody is admitted while others lose their blocks or only to take theirs a step later.
    fn check_order(&mut self, before: &[SequenceId], plan: &StepPlan, preempted: u64) -> Result<(), String> {
        let admitted: Vec<_> = self.scheduler.running_ids().filter(|id| !before.contains(id)).collect();
        if let (Some(youngest), Some((oldest, _))) =
            (admitted.last(), self.scheduler.waiting_ids().find(|(_, ready)| *ready))
            && oldest < *youngest
        {
            return Err(format!("{youngest:?} was admitted before {oldest:?}"));
        }
        let victim = self.scheduler.waiting_ids().find(|(id, ready)| *ready && before.contains(id));
        if let (Some((victim, _)), Some(admitted)) = (victim, admitted.first()) {
            return Err(format!("{admitted:?} was admitted when {victim:?} had to go"));
        }
        if let (Some((victim, _)), true) = (victim, self.admitted_before) {
            return Err(format!("an admission cost {victim:?} its blocks one step later"));
        }
        if plan.chunks.is_empty() && preempted == 0 && self.clients.iter().any(Client::could_go_on) {
            return Err("nothing was planned, and not every reader stalls".into());
        }
        self.admitted_before = !admitted.is_empty();
        self.tally.preempted += preempted;
        self.tally.parked +=
            self.clients.iter().filter(|client| client.is_live() && !client.could_go_on()).count() as u64;
        Ok(())
    }

    /// What can be found in the cache is what it says.
    fn check_published(&self) -> Result<(), String> {
        for (block, tokens) in self.scheduler.pool().published() {
            let slots = &self.model.slots[block.0 as usize * self.model.block_size..];
            if slots.iter().zip(tokens).any(|(slot, token)| slot.token != *token) {
                return Err(format!("{block:?} is said to hold {tokens:?} and does not"));
            }
        }
        Ok(())
    }

    fn read(&mut self) {
        for client in &mut self.clients {
            if client.stalls.contains(&self.step) {
                continue;
            }
            for _ in 0..client.pace {
                let Some(event) = client.receiver.as_mut().and_then(|receiver| receiver.try_recv().ok()) else { break };
                client.got.push(event);
            }
        }
    }

    fn finish(mut self) -> Result<Tally, String> {
        if !self.scheduler.is_idle() || self.scheduler.pool().used_count() > 0 {
            return Err(format!("{} blocks leaked", self.scheduler.pool().used_count()));
        }
        for client in self.clients.iter_mut().filter(|client| client.id.is_some()) {
            while let Some(event) = client.receiver.as_mut().and_then(|receiver| receiver.try_recv().ok()) {
                client.got.push(event);
            }
            client.check(self.model.vocab, self.model.block_size)?;
            match client.got.last() {
                Some(Event::Done(..)) => self.tally.finished += 1,
                Some(Event::Failed(_)) => self.tally.failed += 1,
                _ => self.tally.cancelled += 1,
            }
        }
        self.tally.steps = self.step;
        self.tally.reused = self.scheduler.counters().prefix_hits;
        Ok(self.tally)
    }
}

impl Client {
    fn is_live(&self) -> bool {
        self.id.is_some() && !self.ended
    }

    /// Whether the reader has room for what a step may send.
    fn could_go_on(&self) -> bool {
        // With what is not told yet.
        let waits = self.receiver.as_ref().map_or(0, |receiver| self.channel_len - receiver.capacity());
        let rows = match &self.task {
            Task::Generate(params) => params.prompt_logprobs.is_some() && self.got.is_empty() && waits == 0,
            Task::Score(rows) => *rows == ScoreRows::All,
        };
        self.is_live() && self.channel_len - waits >= 2 + usize::from(rows)
    }

    /// What was read is what the request gives when run alone, up to where it was cancelled or failed.
    fn check(&self, vocab: TokenId, block_size: usize) -> Result<(), String> {
        let mut got = self.got.clone();
        let all_rows = matches!(&self.task, Task::Score(ScoreRows::All))
            || matches!(&self.task, Task::Generate(params) if params.prompt_logprobs.is_some());
        if let Some(Event::Done(_, usage)) = got.last_mut() {
            let cached = std::mem::take(&mut usage.cached_tokens);
            if cached % block_size != 0 || cached >= self.prompt.len() || (all_rows && cached > 0) {
                return Err(format!("{:?}: {cached} of {} tokens were cached", self.id, self.prompt.len()));
            }
        }
        if self.fails && got.last() == Some(&Event::Failed(Error::internal("injected"))) {
            got.pop();
        } else if self.receiver.is_some() && !matches!(got.last(), Some(Event::Done(..))) {
            return Err(format!("{:?} ended without an answer", self.id));
        }
        let alone = oracle(&self.prompt, &self.task, vocab);
        if !alone.starts_with(&got) {
            return Err(format!("{:?} gave {got:?}\nand alone {alone:?}", self.id));
        }
        Ok(())
    }
}

/// Requests that share prefixes, some of them several times the same.
fn clients(dice: &mut Dice, prompts: Range<usize>, room: usize, vocab: TokenId) -> Vec<Client> {
    let document: Vec<TokenId> = (0..room).map(|_| dice.within(0..vocab as usize) as TokenId).collect();
    let horizon = dice.within(1..30);
    let mut clients = Vec::new();
    for _ in 0..dice.within(prompts) {
        let shared_max = if dice.one_in(2) { room / 2 } else { room / 6 + 1 };
        let mut prompt = document[..dice.within(0..shared_max)].to_vec();
        prompt.extend((0..dice.within(1..9)).map(|_| dice.within(0..vocab as usize) as TokenId));
        let arrives = dice.within(0..horizon) as u64;
        let twin_count = if dice.one_in(4) { dice.within(2..5) } else { 1 };
        let kind = dice.within(0..10);
        for _ in 0..twin_count {
            let task = task(dice, kind, room.saturating_sub(prompt.len()), vocab);
            clients.push(client(dice, arrives, prompt.clone(), task));
        }
    }
    clients
}

fn task(dice: &mut Dice, kind: usize, room: usize, vocab: TokenId) -> Task {
    match kind {
        0 => return Task::Score(ScoreRows::All),
        1 | 2 => return Task::Score(ScoreRows::Last),
        _ => {}
    }
    let prompt_logprobs = (kind == 3).then(|| dice.within(0..3));
    let oversized = usize::from(dice.one_in(20)) * 100;
    Task::Generate(Arc::new(SamplingParams {
        repetition_penalty: if dice.one_in(4) { 1.5 } else { 1.0 },
        seed: dice.within(0..4) as u64,
        max_tokens: dice.within(usize::from(prompt_logprobs.is_none())..room.clamp(2, 32)) + oversized,
        min_tokens: dice.within(0..4),
        stop_token_ids: if dice.one_in(4) { vec![dice.within(0..vocab as usize) as TokenId] } else { Vec::new() },
        logprobs: dice.one_in(4).then(|| dice.within(0..3)),
        prompt_logprobs,
        ..SamplingParams::default()
    }))
}

fn client(dice: &mut Dice, arrives: u64, prompt: Vec<TokenId>, task: Task) -> Client {
    let stall_start = arrives + dice.within(0..10) as u64;
    let stall_len = match dice.within(0..8) {
        0 | 1 => dice.within(1..30),
        2 => dice.within(60..100),
        _ => 0,
    };
    Client {
        arrives,
        prompt,
        task,
        channel_len: dice.within(3..6),
        stalls: stall_start..stall_start + stall_len as u64,
        pace: dice.within(1..4),
        cancels: dice.one_in(6).then(|| arrives + dice.within(0..20) as u64),
        id: None,
        receiver: None,
        got: Vec::new(),
        fails: false,
        ended: false,
    }
}
