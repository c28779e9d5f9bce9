//! How fast memory can be read, which is the limit of generation with few sequences: every weight is read once a step.

use std::fmt;
use std::hint::black_box;
use std::time::Instant;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::ops::parallel;

/// What a thread reads side by side: several streams keep more requests to memory under way.
const STREAMS: usize = 4;
/// Words of a cache line.
const LINE: usize = 8;

/// What to read.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Size of the buffer in MiB; far larger than the caches
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub mib: u32,
    /// Threads that read; by default all cores
    #[arg(long)]
    pub threads: Option<usize>,
    /// How often the buffer is read
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub passes: u32,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Rates in 10^9 bytes a second.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Size of the buffer.
    pub mib: u32,
    /// Threads that read.
    pub threads: usize,
    /// Half of the passes are as fast.
    pub median_gb_per_second: f64,
    /// The fastest pass.
    pub best_gb_per_second: f64,
}

/// Reads a buffer again and again.
///
/// # Errors
/// If there is no memory for it.
pub fn run(options: &Options) -> Result<Report> {
    if let Some(threads) = options.threads {
        parallel::set_threads(threads);
    }
    let threads = parallel::threads();
    let words = (options.mib as usize) << 17;
    let mut buffer: Vec<u64> = Vec::new();
    buffer.try_reserve_exact(words).map_err(|error| Error::internal(format!("{} MiB: {error}", options.mib)))?;
    // Written, or every page would be the same one of zeros.
    buffer.extend((0..words as u64).map(|word| word | 1));
    let part = words.div_ceil(threads);
    let mut rates: Vec<f64> = (0..options.passes)
        .map(|_| {
            let started = Instant::now();
            parallel::for_each(threads, |thread| {
                let (start, end) = ((thread * part).min(words), ((thread + 1) * part).min(words));
                black_box(read(&buffer[start..end]));
            });
            (words * size_of::<u64>()) as f64 / started.elapsed().as_secs_f64() / 1e9
        })
        .collect();
    rates.sort_by(f64::total_cmp);
    Ok(Report {
        mib: options.mib,
        threads,
        median_gb_per_second: rates[rates.len() / 2],
        best_gb_per_second: rates[rates.len() - 1],
    })
}

/// Every word, in four streams; their sum keeps the compiler from leaving any out.
fn read(words: &[u64]) -> u64 {
    let stream = (words.len() / STREAMS).max(1);
    let mut streams = words.chunks(stream).map(|words| words.as_chunks::<LINE>().0);
    let [a, b, c, d] = std::array::from_fn(|_| streams.next().unwrap_or_default());
    let mut sums = [[0_u64; LINE]; STREAMS];
    for (((a, b), c), d) in a.iter().zip(b).zip(c).zip(d) {
        for i in 0..LINE {
            sums[0][i] = sums[0][i].wrapping_add(a[i]);
            sums[1][i] = sums[1][i].wrapping_add(b[i]);
            sums[2][i] = sums[2][i].wrapping_add(c[i]);
            sums[3][i] = sums[3][i].wrapping_add(d[i]);
        }
    }
    sums.iter().flatten().fold(0, |sum, word| sum.wrapping_add(*word))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mib, threads, median_gb_per_second, best_gb_per_second } = self;
        write!(f, "{mib} MiB, {threads} threads: {median_gb_per_second:.1} GB/s read, {best_gb_per_second:.1} at best")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read() {
        let words: Vec<u64> = (0..4096).collect();
        assert_eq!(read(&words), 4096 * 4095 / 2);
        let changed = |place: usize| {
            let mut words = words.clone();
            words[place] += 1;
            read(&words)
        };
        assert!([0, 1023, 1024, 2048, 3072, 4095].into_iter().all(|place| changed(place) != read(&words)));
    }
}
