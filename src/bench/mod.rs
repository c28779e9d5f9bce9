//! `eurus bench`: a load generator for any OpenAI-style server, timings of a model without a server and of memory,
//! and a writer of random checkpoints to measure with. Micro-benchmarks of single operations are in `benches/`.

pub mod bon_curve;
pub mod countdown;
pub mod kernels;
pub mod make_model;
pub mod memory;
pub mod model;
mod problems;
pub mod sample_pairs;
pub mod serve;
pub mod train;
pub mod trees;

/// Median, 99th percentile and maximum of a sample, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct Quantiles {
    /// Half of the sample lies at or below it.
    pub p50_ms: f64,
    /// 99 of 100 lie at or below it.
    pub p99_ms: f64,
    /// The largest.
    pub max_ms: f64,
}

impl Quantiles {
    /// Nearest-rank quantiles of `seconds`; zeros for an empty sample.
    pub fn of(mut seconds: Vec<f64>) -> Self {
        seconds.sort_by(f64::total_cmp);
        let rank = |q: f64| {
            let index = (q * seconds.len() as f64).ceil() as usize;
            seconds.get(index.saturating_sub(1)).copied().unwrap_or_default() * 1e3
        };
        Self { p50_ms: rank(0.5), p99_ms: rank(0.99), max_ms: rank(1.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_nearest_ranks() {
        let sample = (1..=200).rev().map(|ms| f64::from(ms) / 1e3).collect();
        assert_eq!(Quantiles::of(sample), Quantiles { p50_ms: 100.0, p99_ms: 198.0, max_ms: 200.0 });
        assert_eq!(Quantiles::of(vec![]), Quantiles::default());
    }
}
