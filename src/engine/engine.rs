//! The thread that drives a scheduler and an executor, and the handle through which others reach it. The only place of this
//! module with threads, time and atomics; decisions are the scheduler's.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::blocks::BlockPool;
use super::request::{Event, Request};
use super::scheduler::{Limits, Scheduler};
use super::step::Executor;
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
    name: Arc<str>,
    scheduler: Scheduler,
    executor: Box<dyn Executor>,
    telemetry: Telemetry,
    status: Arc<EngineStatus>,
    inbox: Receiver<Arrival>,
    /// How many of `status.queued` are in the scheduler, not in the inbox.
    queued_seen: usize,
    /// The last step found nothing to compute.
    parked: bool,
}

impl Engine {
    /// Starts the thread. It ends when all handles are dropped and all accepted requests are answered; join it then.
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
        let engine = Self {
            name: Arc::clone(&name),
            scheduler: Scheduler::new(limits, BlockPool::new(block_count, block_size)),
            executor,
            telemetry: Telemetry::new(metrics, &name, block_count),
            status: Arc::clone(&status),
            inbox,
            queued_seen: 0,
            parked: false,
        };
        let thread = std::thread::Builder::new().name(format!("engine {name}"));
        let thread = thread.spawn(move || engine.run()).map_err(Error::internal)?;
        Ok((EngineHandle { name, limits, block_size, status, inbox: sender }, thread))
    }

    fn run(mut self) {
        while self.receive() {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.step())) {
                let reason = panic.downcast_ref::<&str>().map(|text| text.to_string());
                let reason = reason.or_else(|| panic.downcast_ref::<String>().cloned());
                return self.die(reason.unwrap_or_else(|| "panic".into()));
            }
        }
    }

    /// Takes in what has arrived, sleeping while there is nothing else to do. False when all is done and nobody is left.
    fn receive(&mut self) -> bool {
        if self.scheduler.is_idle() {
            self.status.busy.store(false, Ordering::Relaxed);
            let Ok(arrival) = self.inbox.recv() else { return false };
            self.status.progress();
            self.status.busy.store(true, Ordering::Relaxed);
            self.accept(arrival);
        } else if self.parked {
            match self.inbox.recv_timeout(PARKED_WAIT) {
                Ok(arrival) => self.accept(arrival),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(PARKED_WAIT),
            }
        }
        while let Ok(arrival) = self.inbox.try_recv() {
            self.accept(arrival);
        }
        true
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

    fn step(&mut self) {
        let preemptions = self.scheduler.counters().preemptions;
        let plan = self.scheduler.plan();
        self.telemetry.planned(&plan);
        self.report();
        self.parked = plan.chunks.is_empty() && self.scheduler.counters().preemptions == preemptions;
        if !plan.chunks.is_empty() {
            match self.executor.execute(&plan) {
                Ok(output) => {
                    self.telemetry.executed(&plan, &output);
                    self.scheduler.commit(&plan, output);
                }
                Err(error) => self.scheduler.fail(&plan, &error),
            }
            self.report();
        }
        self.status.progress();
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
