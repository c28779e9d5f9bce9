//! The thread that drives a scheduler and an executor, and the handle through which others reach it. The only place of this
//! module with threads, time and atomics; decisions are the scheduler's.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::blocks::BlockPool;
use super::limits::Limits;
use super::request::{Event, Request};
use super::scheduler::Scheduler;
use super::step::{Executor, StepPlan};
use super::telemetry::Telemetry;
use crate::error::{Error, Result};
use crate::metrics::Metrics;

/// How often the engine looks whether readers have made room, when it can do nothing else.
const PARKED_WAIT: Duration = Duration::from_millis(2);

/// Submits requests to one engine. Clones reach the same engine; it ends when all are dropped and its work is done.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    name: Arc<str>,
    limits: Limits,
    block_size: usize,
    status: Arc<EngineStatus>,
    inbox: SyncSender<Arrival>,
}

#[derive(Debug)]
struct Arrival {
    request: Request,
    at: Instant,
}

/// How an engine is, readable at any moment without asking it.
#[derive(Debug)]
pub struct EngineStatus {
    started: Instant,
    /// Milliseconds from `started` to the last step's end, or to when work arrived at an idle engine.
    progress_ms: AtomicU64,
    busy: AtomicBool,
    dead: OnceLock<String>,
    running: AtomicUsize,
    waiting: AtomicUsize,
    blocks_used: AtomicUsize,
    blocks_total: usize,
    /// Requests that were submitted and not yet admitted, whether the thread has seen them or not.
    queued: AtomicUsize,
}

impl EngineStatus {
    /// Time since the last step ended, or since work arrived; zero for an idle engine.
    pub fn step_age(&self) -> Duration {
        if !self.is_busy() {
            return Duration::ZERO;
        }
        self.started.elapsed().saturating_sub(Duration::from_millis(self.progress_ms.load(Ordering::Relaxed)))
    }

    /// Whether there is work. A busy engine whose [`Self::step_age`] grows is stalled.
    pub fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed)
    }

    /// Why the engine ended before its time, if it did.
    pub fn dead(&self) -> Option<&str> {
        self.dead.get().map(String::as_str)
    }

    /// Sequences that hold blocks.
    pub fn running(&self) -> usize {
        self.running.load(Ordering::Relaxed)
    }

    /// Sequences that wait for blocks, preempted ones included.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Requests submitted and not yet admitted.
    pub fn queued(&self) -> usize {
        self.queued.load(Ordering::SeqCst)
    }

    /// Blocks that live sequences own.
    pub fn blocks_used(&self) -> usize {
        self.blocks_used.load(Ordering::Relaxed)
    }

    /// Blocks in all.
    pub fn blocks_total(&self) -> usize {
        self.blocks_total
    }

    fn progress(&self) {
        self.progress_ms.store(self.started.elapsed().as_millis() as u64, Ordering::Relaxed);
    }
}

impl EngineHandle {
    /// Hands over a request without waiting. Its events come through its reply channel.
    ///
    /// # Errors
    /// As [`Limits::check`]; [`Error::Overloaded`] when the queue is full, [`Error::Unavailable`] when the engine is gone.
    pub fn submit(&self, request: Request) -> Result<()> {
        self.limits.check(&request, self.status.blocks_total, self.block_size)?;
        let waiting_max = self.limits.waiting_max;
        let one_more = |queued: usize| (queued < waiting_max).then_some(queued + 1);
        if self.status.queued.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more).is_err() {
            return Err(match self.status.dead() {
                Some(reason) => gone(&self.name, reason),
                None => Error::Overloaded(format!("{waiting_max} requests wait for model {} already", self.name)),
            });
        }
        // From here the dying thread waits for this request to arrive or to be given up, so none is lost between.
        let result = match self.status.dead() {
            Some(reason) => Err(gone(&self.name, reason)),
            None => self.inbox.try_send(Arrival { request, at: Instant::now() }).map_err(|error| match error {
                TrySendError::Full(_) => Error::Overloaded(format!("the inbox of model {} is full", self.name)),
                TrySendError::Disconnected(_) => gone(&self.name, "it has ended"),
            }),
        };
        if result.is_err() {
            self.status.queued.fetch_sub(1, Ordering::SeqCst);
        }
        result
    }

    /// The bounds every request must meet.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// How the engine is.
    pub fn status(&self) -> &Arc<EngineStatus> {
        &self.status
    }

    /// The model's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

fn gone(name: &str, reason: &str) -> Error {
    Error::Unavailable(format!("the engine of model {name} is gone: {reason}"))
}

/// One scheduler and one executor on a thread of their own.
pub struct Engine {
    executor: Box<dyn Executor>,
    desk: Desk,
    /// The last step found nothing to compute.
    parked: bool,
}

/// What an engine does beside computing, also while its executor does.
struct Desk {
    name: Arc<str>,
    scheduler: Scheduler,
    telemetry: Telemetry,
    status: Arc<EngineStatus>,
    inbox: Receiver<Arrival>,
    /// How many of `status.queued` are in the scheduler, not in the inbox.
    queued_seen: usize,
}

impl Engine {
    /// Starts the thread. It ends when all handles are dropped and all accepted requests are answered; join it then.
    /// A `len_max` beyond what the blocks hold is lowered to that.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a limit of zero, [`Error::Internal`] if there is no thread to be had.
    pub fn start(
        name: &str,
        limits: Limits,
        block_count: usize,
        block_size: usize,
        executor: Box<dyn Executor>,
        metrics: &Metrics,
    ) -> Result<(EngineHandle, JoinHandle<()>)> {
        let bounds = [
            ("step_tokens", limits.step_tokens),
            ("running_max", limits.running_max),
            ("waiting_max", limits.waiting_max),
            ("len_max", limits.len_max),
            ("block_count", block_count),
            ("block_size", block_size),
        ];
        if let Some((field, _)) = bounds.into_iter().find(|(_, bound)| *bound == 0) {
            return Err(Error::invalid(field, format!("{field} must be at least 1")));
        }
        let limits = Limits { len_max: limits.len_max.min(block_count.saturating_mul(block_size)), ..limits };
        let status = Arc::new(EngineStatus {
            started: Instant::now(),
            progress_ms: AtomicU64::new(0),
            busy: AtomicBool::new(false),
            dead: OnceLock::new(),
            running: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            blocks_used: AtomicUsize::new(0),
            blocks_total: block_count,
            queued: AtomicUsize::new(0),
        });
        let (sender, inbox) = sync_channel(limits.waiting_max);
        let name: Arc<str> = name.into();
        let desk = Desk {
            name: Arc::clone(&name),
            scheduler: Scheduler::new(limits, BlockPool::new(block_count, block_size)),
            telemetry: Telemetry::new(metrics, &name, block_count),
            status: Arc::clone(&status),
            inbox,
            queued_seen: 0,
        };
        let engine = Self { executor, desk, parked: false };
        let thread = std::thread::Builder::new().name(format!("engine {name}"));
        let thread = thread.spawn(move || engine.run()).map_err(Error::internal)?;
        Ok((EngineHandle { name, limits, block_size, status, inbox: sender }, thread))
    }

    fn run(mut self) {
        while self.desk.receive(self.parked) {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.step())) {
                let reason = panic.downcast_ref::<&str>().map(|text| text.to_string());
                let reason = reason.or_else(|| panic.downcast_ref::<String>().cloned());
                return self.desk.die(reason.unwrap_or_else(|| "panic".into()));
            }
        }
    }

    fn step(&mut self) {
        let Self { executor, desk, parked } = self;
        let preemptions = desk.scheduler.counters().preemptions;
        let plan = desk.scheduler.plan();
        *parked = plan.chunks.is_empty() && desk.scheduler.counters().preemptions == preemptions;
        if plan.chunks.is_empty() {
            desk.tell(&plan);
        } else {
            match executor.execute(&plan, &mut || desk.meanwhile(&plan)) {
                Ok(output) => {
                    desk.telemetry.executed(&plan, &output);
                    desk.scheduler.commit(&plan, output);
                }
                Err(error) => {
                    // It may have failed before it came to that.
                    desk.tell(&plan);
                    desk.scheduler.fail(&plan, &error);
                }
            }
            desk.report();
        }
        desk.status.progress();
    }
}

impl Desk {
    /// Takes in what has arrived, sleeping while there is nothing else to do. False when all is done and nobody is left.
    fn receive(&mut self, parked: bool) -> bool {
        if self.scheduler.is_idle() {
            self.scheduler.tell();
            self.status.busy.store(false, Ordering::Relaxed);
            let Ok(arrival) = self.inbox.recv() else { return false };
            self.status.progress();
            self.status.busy.store(true, Ordering::Relaxed);
            self.accept(arrival);
        } else if parked {
            match self.inbox.recv_timeout(PARKED_WAIT) {
                Ok(arrival) => self.accept(arrival),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(PARKED_WAIT),
            }
        }
        self.take_in();
        true
    }

    /// Tells readers what the step before gave, reports, and takes in what has arrived, for the step after `plan`.
    fn meanwhile(&mut self, plan: &StepPlan) {
        self.tell(plan);
        self.take_in();
    }

    fn tell(&mut self, plan: &StepPlan) {
        self.scheduler.tell();
        self.telemetry.planned(plan);
        self.report();
    }

    fn take_in(&mut self) {
        while let Ok(arrival) = self.inbox.try_recv() {
            self.accept(arrival);
        }
    }

    fn accept(&mut self, Arrival { request, at }: Arrival) {
        let reply = request.reply.clone();
        match self.scheduler.add(request) {
            Ok(id) => {
                self.queued_seen += 1;
                self.telemetry.arrived(id, at);
            }
            Err(error) => {
                self.status.queued.fetch_sub(1, Ordering::SeqCst);
                let _ = reply.try_send(Event::Failed(error));
            }
        }
    }

    fn report(&mut self) {
        self.telemetry.report(&self.scheduler);
        self.status.running.store(self.scheduler.running_count(), Ordering::Relaxed);
        self.status.waiting.store(self.scheduler.waiting_count(), Ordering::Relaxed);
        self.status.blocks_used.store(self.scheduler.pool().used_count(), Ordering::Relaxed);
        let queued = self.scheduler.queued_count();
        self.status.queued.fetch_sub(self.queued_seen - queued, Ordering::SeqCst);
        self.queued_seen = queued;
    }

    /// Answers everybody, including those who are submitting just now. The process decides what to do about it.
    fn die(mut self, reason: String) {
        let error = gone(&self.name, &reason);
        let _ = self.status.dead.set(reason);
        self.scheduler.fail_all(&error);
        self.report();
        self.status.busy.store(false, Ordering::Relaxed);
        while self.status.queued() > 0 {
            match self.inbox.try_recv() {
                Ok(arrival) => {
                    let _ = arrival.request.reply.try_send(Event::Failed(error.clone()));
                    self.status.queued.fetch_sub(1, Ordering::SeqCst);
                }
                Err(_) => std::thread::yield_now(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use std::sync::mpsc::channel;

    use tokio::sync::mpsc;

    use super::*;
    use crate::engine::request::{Finish, SamplingParams, ScoreRows, Task, TokenId};
    use crate::engine::step::{Last, Outcome, StepOutput, Want};

    const LIMITS: Limits = Limits { step_tokens: 8, running_max: 2, waiting_max: 3, len_max: 1000 };

    struct Fake<F>(F);

    impl<F: FnMut(&StepPlan) -> Result<StepOutput> + Send> Executor for Fake<F> {
        fn execute(&mut self, plan: &StepPlan, meanwhile: &mut dyn FnMut()) -> Result<StepOutput> {
            meanwhile();
            (self.0)(plan)
        }
    }

    /// Every token is its own position, every reward the prompt's length.
    fn answer(plan: &StepPlan) -> Result<StepOutput> {
        let outcome = |chunk: &crate::engine::step::Chunk| Outcome {
            logprobs: Vec::new(),
            scores: Vec::new(),
            last: match &chunk.want {
                Want::Nothing => Last::Nothing,
                Want::Token(draw) => Last::Token(draw.position as TokenId, None),
                Want::Score => Last::Score((chunk.start + chunk.tokens.len()) as f32),
            },
        };
        Ok(StepOutput { outcomes: plan.chunks.iter().map(outcome).collect() })
    }

    fn start(
        executor: impl FnMut(&StepPlan) -> Result<StepOutput> + Send + 'static,
    ) -> (EngineHandle, JoinHandle<()>, Arc<Metrics>) {
        let metrics = Arc::new(Metrics::new().unwrap());
        let (handle, thread) = Engine::start("m", LIMITS, 16, 4, Box::new(Fake(executor)), &metrics).unwrap();
        (handle, thread, metrics)
    }

    fn generate(prompt_len: usize, max_tokens: usize, room: usize) -> (Request, mpsc::Receiver<Event>) {
        let (reply, events) = mpsc::channel(room);
        let task = Task::Generate(Arc::new(SamplingParams { max_tokens, ..SamplingParams::default() }));
        (Request { prompt: (0..prompt_len as TokenId).collect(), task, reply }, events)
    }

    fn read(mut events: mpsc::Receiver<Event>) -> Vec<Event> {
        std::iter::from_fn(|| events.blocking_recv()).collect()
    }

    fn is_last(event: &Event) -> bool {
        matches!(event, Event::Done(..) | Event::Failed(_))
    }

    #[track_caller]
    fn check_metric(metrics: &Metrics, line: &str) {
        let text = metrics.render().unwrap();
        assert!(text.lines().any(|have| have == line), "no {line} in\n{text}");
    }

    #[test]
    fn slow_readers_get_every_token_and_the_engine_ends_when_all_handles_are_dropped() {
        let (handle, thread, metrics) = start(answer);
        let (request, events) = generate(10, 30, 2);
        let (reply, rewards) = mpsc::channel(2);
        handle.submit(request).unwrap();
        handle.submit(Request { prompt: vec![1; 7], task: Task::Score(ScoreRows::Last), reply }).unwrap();
        drop(handle);
        let events = read(events);
        let ids: Vec<_> = events
            .iter()
            .filter_map(|event| if let Event::Token { id, .. } = event { Some(*id) } else { None })
            .collect();
        assert_eq!(ids, (10..40).collect::<Vec<_>>());
        assert!(matches!(events.last(), Some(Event::Done(Finish::Length, usage)) if usage.completion_tokens == 30));
        assert_eq!(read(rewards)[0], Event::Score(7.0));
        thread.join().unwrap();
        check_metric(&metrics, "eurus_generation_tokens_total{model=\"m\"} 30");
        check_metric(&metrics, "eurus_prompt_tokens_total{model=\"m\"} 17");
        check_metric(&metrics, "eurus_reward_tokens_total{model=\"m\"} 7");
        check_metric(&metrics, "eurus_time_to_first_token_seconds_count{model=\"m\"} 1");
        check_metric(&metrics, "eurus_inter_token_latency_seconds_count{model=\"m\"} 29");
        check_metric(&metrics, "eurus_queue_seconds_count{model=\"m\"} 2");
        check_metric(&metrics, "eurus_reward_seconds_count{model=\"m\"} 1");
        check_metric(&metrics, "eurus_kv_blocks_used{model=\"m\"} 0");
        check_metric(&metrics, "eurus_kv_blocks_total{model=\"m\"} 16");
    }

    /// Looks at what its reader knows before and after the engine does what it has to.
    struct Looking {
        events: mpsc::Receiver<Event>,
        seen: std::sync::mpsc::Sender<[Option<Event>; 2]>,
    }

    impl Executor for Looking {
        fn execute(&mut self, plan: &StepPlan, meanwhile: &mut dyn FnMut()) -> Result<StepOutput> {
            let before = self.events.try_recv().ok();
            meanwhile();
            let _ = self.seen.send([before, self.events.try_recv().ok()]);
            answer(plan)
        }
    }

    #[test]
    fn readers_are_told_while_the_next_step_runs() {
        let (request, events) = generate(10, 2, 8);
        let (seen, looks) = channel();
        let executor = Box::new(Looking { events, seen });
        let (handle, thread) = Engine::start("m", LIMITS, 16, 4, executor, &Metrics::new().unwrap()).unwrap();
        handle.submit(request).unwrap();
        drop(handle);
        thread.join().unwrap();
        // Two steps for the prompt of 10 tokens.
        let token = Event::Token { id: 10, logprob: None };
        assert_eq!(looks.iter().collect::<Vec<_>>(), [[None, None], [None, None], [None, Some(token)]]);
    }

    #[test]
    fn a_failed_step_fails_its_sequences_only() {
        let mut step_count = 0;
        let (handle, thread, _) = start(move |plan| {
            step_count += 1;
            if step_count == 1 { Err(Error::internal("out of memory")) } else { answer(plan) }
        });
        let (request, events) = generate(3, 2, 4);
        handle.submit(request).unwrap();
        assert_eq!(read(events), [Event::Failed(Error::internal("out of memory"))]);
        let (request, events) = generate(3, 2, 4);
        handle.submit(request).unwrap();
        assert!(matches!(read(events).last(), Some(Event::Done(..))));
        assert_eq!(handle.status().dead(), None);
        drop(handle);
        thread.join().unwrap();
    }

    #[test]
    fn a_full_queue_refuses_at_once_while_the_engine_computes() {
        let (go, gate) = channel::<()>();
        let (entered, inside) = channel::<()>();
        let (handle, thread, _) = start(move |plan| {
            entered.send(()).unwrap();
            gate.recv().unwrap();
            answer(plan)
        });
        let (request, first) = generate(3, 1, 4);
        handle.submit(request).unwrap();
        inside.recv().unwrap();
        let waiting: Vec<_> = (0..LIMITS.waiting_max)
            .map(|_| {
                let (request, events) = generate(3, 1, 4);
                handle.submit(request).unwrap();
                events
            })
            .collect();
        assert_eq!((handle.status().queued(), handle.status().running()), (LIMITS.waiting_max, 1));
        assert!(handle.status().is_busy());
        assert!(matches!(handle.submit(generate(3, 1, 4).0), Err(Error::Overloaded(_))));
        drop(inside);
        go.send(()).unwrap();
        // The executor panics at its next entry, since nobody listens to it: what was submitted is answered nonetheless.
        drop(go);
        assert!(read(first).last().is_some_and(is_last));
        assert!(waiting.into_iter().all(|events| read(events).last().is_some_and(is_last)));
        thread.join().unwrap();
        assert_eq!(handle.status().queued(), 0);
    }

    #[test]
    fn a_panic_is_told_to_everybody() {
        let mut step_count = 0;
        let (handle, thread, _) = start(move |plan| {
            step_count += 1;
            if step_count == 50 { panic!("bad slot") } else { answer(plan) }
        });
        let submit_until_dead = || {
            let mut accepted = Vec::new();
            loop {
                let (request, events) = generate(3, 1, 4);
                match handle.submit(request) {
                    Ok(()) => accepted.push(events),
                    Err(Error::Overloaded(_)) => std::thread::yield_now(),
                    Err(error) => return (accepted, error),
                }
            }
        };
        let outcomes: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(submit_until_dead)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for (accepted, error) in outcomes {
            assert_eq!(error, Error::Unavailable("the engine of model m is gone: bad slot".into()));
            for events in accepted {
                let events = read(events);
                assert_eq!(events.iter().filter(|event| is_last(event)).count(), 1, "{events:?}");
            }
        }
        thread.join().unwrap();
        assert_eq!((handle.status().dead(), handle.status().queued()), (Some("bad slot"), 0));
        assert_eq!((handle.status().running(), handle.status().blocks_used()), (0, 0));
    }

    #[test]
    fn a_dropped_reader_frees_its_blocks() {
        let (handle, thread, metrics) = start(answer);
        let (request, events) = generate(10, 40, 2);
        handle.submit(request).unwrap();
        drop(events);
        let (request, events) = generate(2, 2, 4);
        handle.submit(request).unwrap();
        assert!(read(events).last().is_some_and(is_last));
        drop(handle);
        thread.join().unwrap();
        check_metric(&metrics, "eurus_cancelled_total{model=\"m\"} 1");
        check_metric(&metrics, "eurus_kv_blocks_used{model=\"m\"} 0");
    }

    #[test]
    fn what_can_never_fit_is_refused() {
        let (handle, thread, _) = start(answer);
        assert_eq!(handle.limits().len_max, 64);
        let field = |request| match handle.submit(request) {
            Err(Error::Invalid { field, .. }) => field.unwrap(),
            other => panic!("{other:?}"),
        };
        assert_eq!(field(generate(0, 1, 4).0), "prompt");
        assert_eq!(field(generate(65, 1, 4).0), "prompt");
        assert_eq!(field(generate(60, 5, 4).0), "max_tokens");
        assert_eq!(field(generate(3, usize::MAX, 4).0), "max_tokens");
        assert_eq!(field(generate(3, 0, 4).0), "max_tokens");
        assert!(matches!(handle.submit(generate(3, 1, 1).0), Err(Error::Internal(_))));
        let zero = Limits { running_max: 0, ..LIMITS };
        let metrics = Metrics::new().unwrap();
        let error = Engine::start("m", zero, 1, 1, Box::new(Fake(answer)), &metrics).map(|_| ()).unwrap_err();
        assert_eq!(error, Error::invalid("running_max", "running_max must be at least 1"));
        drop(handle);
        thread.join().unwrap();
    }
}
