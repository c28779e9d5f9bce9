//! Pure work on many items by several threads, results in the order of the items whatever the number of threads.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::ops::parallel::threads;

/// Items that a thread takes at a time.
const BLOCK: usize = 32;

/// `run` of each of `items`, in order.
pub(super) fn map<T: Sync, R: Send>(items: &[T], run: impl Fn(&T) -> R + Sync) -> Vec<R> {
    map_blocks(items, BLOCK, run)
}

/// As [`map`], for few items that each take long.
pub(super) fn map_each<T: Sync, R: Send>(items: &[T], run: impl Fn(&T) -> R + Sync) -> Vec<R> {
    map_blocks(items, 1, run)
}

fn map_blocks<T: Sync, R: Send>(items: &[T], len: usize, run: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let workers = threads().min(items.len().div_ceil(len));
    if workers <= 1 {
        return items.iter().map(run).collect();
    }
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let block = next.fetch_add(1, Ordering::Relaxed);
            let Some(items) = items.chunks(len).nth(block) else { return done };
            done.push((block, items.iter().map(&run).collect::<Vec<R>>()));
        }
    };
    let mut blocks = std::thread::scope(|scope| {
        let others: Vec<_> = (1..workers).map(|_| scope.spawn(work)).collect();
        let mut blocks = work();
        for other in others {
            match other.join() {
                Ok(done) => blocks.extend(done),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        blocks
    });
    blocks.sort_unstable_by_key(|(block, _)| *block);
    blocks.into_iter().flat_map(|(_, done)| done).collect()
}
