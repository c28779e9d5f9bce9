//! The one fork-join pool of the CPU bodies: lazily started workers that spin briefly, then park.
//! Who computes what never changes a result: operations hand out whole outputs, never parts of a sum.

use super::storage::{Shared, written};
use std::any::Any;
use std::ops::{Range, RangeInclusive};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// How long an idle worker watches for the next loop before it parks, and the caller for stragglers: the operations of one
/// layer follow each other within this time, and waking a parked thread costs several microseconds.
const SPIN: Duration = Duration::from_micros(40);
/// More threads than any host of this program has; the seats of a loop are counted in 16 bits.
const THREADS_MAX: usize = 1024;

/// Pieces of a loop over blocks that every thread should find.
const PIECES: usize = 8;
/// Items that one block after the other goes over, at most.
const GROUP: usize = 16;

/// Sets how many threads a loop may use, the caller included; 0 means 1. Takes effect at the next loop.
pub fn set_threads(n: usize) {
    POOL.threads.store(n.clamp(1, THREADS_MAX), Ordering::Relaxed);
}

/// Keeps each worker that starts from now on on a processor of its own, as far as there are enough and the system allows it. Callers
/// stay free to move.
pub fn pin_workers() {
    POOL.pinned.store(true, Ordering::Relaxed);
}

/// How many threads a loop may use, the caller included: what was set, or the available parallelism.
pub fn threads() -> usize {
    match POOL.threads.load(Ordering::Relaxed) {
        0 => {
            let n = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
            POOL.threads.store(n, Ordering::Relaxed);
            n
        }
        n => n,
    }
}

/// Calls `body` once for every index below `count`, less than 2^31, on several threads and in no particular order; returns when all are
/// done.
///
/// A panic in `body` reaches the caller after the loop has wound down; indices not yet started are skipped then. Loops do not
/// nest and callers do not queue: where the pool is taken, the caller runs its loop alone.
pub fn for_each(count: usize, body: impl Fn(usize) + Sync) {
    for_each_init(count, || (), |(), index| body(index));
}

/// [`for_each`] with a value of its own, made by `init`, for every thread that takes part.
pub(super) fn for_each_init<T>(count: usize, init: impl Fn() -> T + Sync, body: impl Fn(&mut T, usize) + Sync) {
    let work = |indices: &mut Indices<'_>| {
        if let Some(first) = indices.next() {
            let mut own = init();
            body(&mut own, first);
            indices.for_each(|index| body(&mut own, index));
        }
    };
    assert!(count < 1 << 31, "a loop of {count} pieces");
    let helpers = (threads() - 1).min(count.saturating_sub(1));
    if helpers == 0 || !POOL.run(count, helpers, &work) {
        work(&mut Indices { taken: &AtomicU64::new(0), count, is_worker: false });
    }
}

/// Runs `body(own, item, rows)` for each of `items` and each block of `each` of `rows` rows, as [`for_each_init`]. A thread takes several
/// items with the same block, which its own cache should hold; all blocks come before the next items, so that these are in a cache, too,
/// for all blocks but the first.
pub(super) fn for_each_block<T>(
    items: usize,
    (rows, each): (usize, usize),
    init: impl Fn() -> T + Sync,
    body: impl Fn(&mut T, usize, Range<usize>) + Sync,
) {
    let blocks = rows.div_ceil(each);
    let group = (items * blocks).div_ceil(PIECES * threads()).clamp(1, GROUP);
    for_each_init(items.div_ceil(group) * blocks, init, |own, index| {
        let (first, row) = (index / blocks * group, index % blocks * each);
        for item in first..items.min(first + group) {
            body(own, item, row..rows.min(row + each));
        }
    });
}

/// Rows of a block of [`for_each_block`], a multiple of `unit`: about as many as the last of `sizes` at most, fewer where `items` are too
/// few for all threads, down to the first.
pub(super) fn rows_of_block(items: usize, rows: usize, sizes: RangeInclusive<usize>, unit: usize) -> usize {
    let wanted = (PIECES * threads()).div_ceil(items.max(1)).min(rows.div_ceil(*sizes.start()));
    let blocks = wanted.max(rows.div_ceil(*sizes.end())).max(1);
    rows.div_ceil(blocks).max(1).next_multiple_of(unit)
}

/// Cuts `data` into chunks of `len` elements (the last may be shorter) and calls `body(index, chunk)` for each, as [`for_each`].
pub(super) fn for_each_chunk(data: &mut [f32], len: usize, body: impl Fn(usize, &mut [f32]) + Sync) {
    let (total, len) = (data.len(), len.max(1));
    let shared = Shared::new(data);
    for_each(total.div_ceil(len), |index| {
        let start = index * len;
        // SAFETY: chunks of different indices do not overlap, and every index is handed out once.
        #[allow(unsafe_code)]
        let chunk = unsafe { shared.part(start, len.min(total - start)) };
        body(index, chunk);
    });
}

/// A vector of `total` zeros, cut into chunks of `len` elements that `body(index, chunk)` changes, as `for_each_chunk` does. Each thread
/// clears a chunk just before it changes it, while it is in the cache.
pub fn filled<T: Copy + Default + Send>(total: usize, len: usize, body: impl Fn(usize, &mut [T]) + Sync) -> Vec<T> {
    let len = len.max(1);
    // SAFETY: the chunks are cleared, and cover the vector.
    #[allow(unsafe_code)]
    unsafe {
        written(total, |out| {
            for_each(total.div_ceil(len), |index| {
                let start = index * len;
                // SAFETY: chunks of different indices do not overlap, and every index is handed out once.
                body(index, out.cleared(start, len.min(total - start)));
            });
        })
    }
}

static POOL: Pool = Pool::new();

/// `gate` is one word: number of the loop (upper 32 bits), free seats (16), workers inside (16). A worker may look at `task`
/// only after it took a seat; the caller withdraws the free seats when its own share is done and leaves when nobody is inside.
struct Pool {
    threads: AtomicUsize,
    pinned: AtomicBool,
    /// Held by the caller of the running loop.
    workers: Mutex<Vec<Worker>>,
    gate: AtomicU64,
    task: AtomicPtr<Task<'static>>,
}

const INSIDE: u64 = 1;
const SEAT: u64 = 1 << 16;
const SEATS: u64 = 0xffff << 16;
const LOOP: u64 = 1 << 32;

fn inside(gate: u64) -> u64 {
    gate & (SEAT - 1)
}

struct Worker {
    thread: Thread,
    parked: Arc<AtomicBool>,
}

/// The indices of one loop that no thread has taken yet: the caller takes them from the front, workers from the back. The rows of
/// one operation are mostly those of the next, so a thread finds what it wrote in its own cache, and what it reads in order.
struct Indices<'a> {
    /// How many were asked for from the front (lower 32 bits) and from the back.
    taken: &'a AtomicU64,
    count: usize,
    is_worker: bool,
}

/// One index from the front.
const FRONT: u64 = 1;
/// One index from the back.
const BACK: u64 = 1 << 32;

impl Iterator for Indices<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let taken = self.taken.fetch_add(if self.is_worker { BACK } else { FRONT }, Ordering::Relaxed);
        let (front, back) = ((taken % BACK) as usize, (taken / BACK) as usize);
        let index = if self.is_worker { self.count.wrapping_sub(1 + back) } else { front };
        (front + back < self.count).then_some(index)
    }
}

/// What a thread does with the indices it can get.
type Work<'a> = &'a (dyn Fn(&mut Indices<'_>) + Sync);

/// One loop: lives on the caller's stack.
struct Task<'a> {
    work: Work<'a>,
    /// See [`Indices`].
    taken: AtomicU64,
    count: usize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    caller: Thread,
}

impl Task<'_> {
    /// Takes indices until none is left; the first panic of all threads is kept and ends the loop.
    fn work(&self, is_worker: bool) {
        let mut indices = Indices { taken: &self.taken, count: self.count, is_worker };
        let taken = catch_unwind(AssertUnwindSafe(|| (self.work)(&mut indices)));
        if let Err(panic) = taken {
            self.taken.store(self.count as u64, Ordering::Relaxed);
            let mut first = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
            if first.is_none() {
                *first = Some(panic);
            } else {
                // Dropping a payload runs foreign code that may panic again, here outside of any catch.
                std::mem::forget(panic);
            }
        }
    }
}

impl Pool {
    const fn new() -> Self {
        Self {
            threads: AtomicUsize::new(0),
            pinned: AtomicBool::new(false),
            workers: Mutex::new(Vec::new()),
            gate: AtomicU64::new(0),
            task: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    /// Runs a loop with at most `helpers` workers; false, and nothing done, where another loop is running.
    fn run(&'static self, count: usize, helpers: usize, work: Work<'_>) -> bool {
        let mut workers = match self.workers.try_lock() {
            Ok(workers) => workers,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        self.start_workers(&mut workers, helpers);
        let task =
            Task { work, taken: AtomicU64::new(0), count, panic: Mutex::new(None), caller: std::thread::current() };
        self.open(&task, &workers, helpers);
        task.work(false);
        self.close();
        drop(workers);
        let panic = task.panic.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
        true
    }

    fn start_workers(&'static self, workers: &mut MutexGuard<'_, Vec<Worker>>, wanted: usize) {
        while workers.len() < wanted {
            let parked = Arc::new(AtomicBool::new(false));
            let flag = parked.clone();
            let (number, pinned) = (workers.len() + 1, self.pinned.load(Ordering::Relaxed));
            let life = move || {
                if pinned {
                    pin(number);
                }
                self.serve(&flag)
            };
            let spawned = std::thread::Builder::new().name(format!("ops-{number}")).spawn(life);
            // Without a thread the loop is only slower.
            let Ok(handle) = spawned else { return };
            workers.push(Worker { thread: handle.thread().clone(), parked });
        }
    }

    /// Publishes `task` and wakes workers for its seats.
    fn open(&self, task: &Task<'_>, workers: &[Worker], seats: usize) {
        self.task.store(std::ptr::from_ref(task).cast_mut().cast(), Ordering::Relaxed);
        // Nobody is inside and no seat is free between loops, so only this thread changes the gate here.
        let number = self.gate.load(Ordering::Relaxed) & !(LOOP - 1);
        let gate = number.wrapping_add(LOOP) + seats as u64 * SEAT;
        // SeqCst here and in `serve`: either this thread sees the worker parked, or the worker sees the open gate.
        self.gate.store(gate, Ordering::SeqCst);
        for worker in workers.iter().take(seats) {
            if worker.parked.load(Ordering::SeqCst) {
                worker.thread.unpark();
            }
        }
    }

    /// Withdraws the free seats and waits for the workers inside.
    fn close(&self) {
        let mut gate = self.gate.fetch_and(!SEATS, Ordering::AcqRel);
        let start = Instant::now();
        while inside(gate) != 0 {
            if start.elapsed() < SPIN {
                std::hint::spin_loop();
            } else {
                // The last worker to leave unparks; a token left over from before only makes this loop turn once more.
                std::thread::park();
            }
            gate = self.gate.load(Ordering::Acquire);
        }
    }

    /// The life of a worker.
    fn serve(&self, parked: &AtomicBool) {
        let mut seen = 0;
        loop {
            let gate = self.await_seat(seen, parked);
            let taken = self.gate.compare_exchange(gate, gate - SEAT + INSIDE, Ordering::Acquire, Ordering::Relaxed);
            if taken.is_err() {
                // Another worker took a seat, or the loop is over: look again, this loop may still have seats.
                continue;
            }
            seen = gate / LOOP;
            let task = self.task.load(Ordering::Relaxed);
            // SAFETY: this thread is counted inside a loop that was open, so its caller is in `run` and stays there until the
            // count is given back below; the store of `task` came before the gate opened (acquired above).
            #[allow(unsafe_code)]
            let task = unsafe { &*task };
            task.work(true);
            let caller = task.caller.clone();
            // From here on the task may be gone.
            let gate = self.gate.fetch_sub(INSIDE, Ordering::Release);
            if gate & SEATS == 0 && inside(gate) == 1 {
                caller.unpark();
            }
        }
    }

    /// Waits for a gate with a free seat in a loop other than `seen`, spinning first.
    fn await_seat(&self, seen: u64, parked: &AtomicBool) -> u64 {
        let open = |gate: u64| gate & SEATS != 0 && gate / LOOP != seen;
        let start = Instant::now();
        loop {
            let gate = self.gate.load(Ordering::Relaxed);
            if open(gate) {
                return gate;
            }
            if start.elapsed() < SPIN {
                for _ in 0..16 {
                    std::hint::spin_loop();
                }
                continue;
            }
            parked.store(true, Ordering::SeqCst);
            if !open(self.gate.load(Ordering::SeqCst)) {
                std::thread::park();
            }
            parked.store(false, Ordering::Relaxed);
        }
    }
}

/// Keeps this thread on the processor that is number `number` of those it may use, beginning again after the last.
#[cfg(target_os = "linux")]
fn pin(number: usize) {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    let Ok(allowed) = sched_getaffinity(None) else { return };
    let processors: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|processor| allowed.is_set(*processor)).collect();
    if let Some(processor) = processors.get(number % processors.len().max(1)) {
        let mut one = CpuSet::new();
        one.set(*processor);
        // A sandbox may forbid it; then the system places the thread, as without this.
        let _ = sched_setaffinity(None, &one);
    }
}

#[cfg(not(target_os = "linux"))]
fn pin(_number: usize) {}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use std::sync::Barrier;

    #[track_caller]
    fn check_each_once(count: usize, run: impl Fn(&(dyn Fn(usize) + Sync))) {
        let visits: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
        run(&|index| {
            visits[index].fetch_add(1, Ordering::Relaxed);
        });
        assert!(visits.iter().all(|visits| visits.load(Ordering::Relaxed) == 1), "{count} indices");
    }

    /// The work of `for_each`.
    fn each(body: impl Fn(usize) + Sync) -> impl Fn(&mut Indices<'_>) + Sync {
        move |indices| indices.for_each(&body)
    }

    fn pool() -> &'static Pool {
        Box::leak(Box::new(Pool::new()))
    }

    #[test]
    fn every_index_is_visited_once() {
        let pool = pool();
        for helpers in [1, 2, 7, 1, 3] {
            for count in [0, 1, 2, 3, 100, 5000] {
                check_each_once(count, |body| assert!(pool.run(count, helpers, &each(body))));
                check_each_once(count, |body| for_each(count, body));
            }
        }
    }

    #[test]
    fn many_callers_and_nested_loops_do_not_wait_for_each_other() {
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for count in 0..200 {
                        check_each_once(count, |body| for_each(count, body));
                    }
                    check_each_once(30 * 30, |body| for_each(30, |i| for_each(30, |j| body(30 * i + j))));
                });
            }
        });
    }

    #[test]
    fn workers_take_part() {
        let pool = pool();
        for _ in 0..200 {
            // Three threads or this never ends.
            let all = Barrier::new(3);
            assert!(pool.run(
                3,
                2,
                &each(|_| {
                    all.wait();
                })
            ));
        }
    }

    #[test]
    fn the_caller_begins_at_the_front_and_workers_at_the_back() {
        let (pool, caller) = (pool(), std::thread::current().id());
        // Both threads take one of the two, or this never ends.
        let both = Barrier::new(2);
        let body = |index| {
            both.wait();
            assert_eq!(index == 0, std::thread::current().id() == caller);
        };
        (0..100).for_each(|_| assert!(pool.run(2, 1, &each(body))));
    }

    #[test]
    fn a_taken_pool_is_left_alone() {
        let pool = pool();
        assert!(pool.run(4, 2, &each(|_| assert!(!pool.run(4, 2, &each(|_| unreachable!()))))));
    }

    #[test]
    fn a_panic_reaches_the_caller_from_any_thread_and_the_pool_goes_on() {
        let pool = pool();
        let caller = std::thread::current().id();
        for round in 0..100 {
            let both = Barrier::new(2);
            let caught = catch_unwind(AssertUnwindSafe(|| {
                let work = each(|index| {
                    if index < 2 {
                        both.wait();
                        // In turn: on the caller, on the worker, on both.
                        let here = std::thread::current().id() == caller;
                        if round % 3 == 2 || here == (round % 3 == 0) {
                            std::panic::panic_any(round);
                        }
                    }
                });
                pool.run(50, 1, &work)
            }));
            assert_eq!(caught.unwrap_err().downcast_ref(), Some(&round));
            check_each_once(20, |body| assert!(pool.run(20, 1, &each(body))));
        }
    }

    #[test]
    fn chunks_cover_a_slice() {
        for (len, chunk) in [(0, 3), (1, 3), (9, 3), (10, 3), (10, 100), (5, 0)] {
            let mut data = vec![0.0; len];
            for_each_chunk(&mut data, chunk, |index, chunk| chunk.iter_mut().for_each(|x| *x += 1.0 + index as f32));
            let expected: Vec<f32> = (0..len).map(|i| 1.0 + (i / chunk.max(1)) as f32).collect();
            assert_eq!(data, expected);
            let new = filled(len, chunk, |index, chunk: &mut [f32]| {
                chunk.iter_mut().for_each(|x| *x += 1.0 + index as f32);
            });
            assert_eq!(new, expected);
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn pinned_workers_have_one_processor_each_and_callers_all_of_theirs() {
        use rustix::thread::sched_getaffinity;
        let (pool, before) = (pool(), sched_getaffinity(None).unwrap());
        pool.pinned.store(true, Ordering::Relaxed);
        let caller = std::thread::current().id();
        let (all, found) = (Barrier::new(3), Mutex::new(Vec::new()));
        let work = each(|_| {
            if std::thread::current().id() != caller {
                found.lock().unwrap().push(sched_getaffinity(None).unwrap());
            }
            all.wait();
        });
        assert!(pool.run(3, 2, &work));
        drop(work);
        let found = found.into_inner().unwrap();
        assert!(found.len() == 2 && found.iter().all(|set| set.count() == 1));
        assert_eq!(found[0] == found[1], before.count() == 1);
        assert_eq!(sched_getaffinity(None).unwrap(), before);
    }

    #[test]
    fn every_item_meets_every_row_once() {
        for (items, rows, each) in [(0, 5, 2), (3, 0, 2), (1, 1, 32), (7, 100, 32), (300, 65, 64), (64, 4096, 512)] {
            let met: Vec<AtomicUsize> = (0..items * rows).map(|_| AtomicUsize::new(0)).collect();
            for_each_block(
                items,
                (rows, each),
                || (),
                |(), item, block| {
                    assert!(!block.is_empty() && block.start.is_multiple_of(each) && block.len() <= each);
                    for row in block {
                        met[item * rows + row].fetch_add(1, Ordering::Relaxed);
                    }
                },
            );
            assert!(met.iter().all(|times| times.load(Ordering::Relaxed) == 1), "{items} x {rows}");
        }
        // Many items, blocks as equal as can be; few items; nothing at all.
        assert_eq!(rows_of_block(1_000, 2048, 64..=672, 32), 512);
        assert_eq!(rows_of_block(1, 128, 64..=672, 32), 64);
        assert_eq!((rows_of_block(0, 0, 64..=672, 32), rows_of_block(5, 1, 64..=672, 1)), (32, 1));
    }

    #[test]
    fn at_least_one_thread_runs() {
        let before = threads();
        set_threads(0);
        assert!(threads() >= 1);
        set_threads(before);
    }
}
