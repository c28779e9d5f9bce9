//! Every metric of the process, declared in one place with its help text and buckets.
//! Owned by the composition root and shared by reference; nothing is global, so tests do not see each other.

use prometheus::{
    Encoder, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder, core::Collector,
};

use crate::error::{Error, Result};

const LATENCY_SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
const MODEL: &[&str] = &["model"];

/// The metrics, by the name they have on `/metrics` without the `eurus_` prefix.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// HTTP requests by route template and status.
    pub requests_total: IntCounterVec,
    /// Sequences that hold blocks.
    pub running: IntGaugeVec,
    /// Sequences that wait for blocks or budget.
    pub waiting: IntGaugeVec,
    /// Cache blocks owned by live sequences.
    pub kv_blocks_used: IntGaugeVec,
    /// Cache blocks in all.
    pub kv_blocks_total: IntGaugeVec,
    /// Prompt tokens looked up in the prefix index.
    pub prefix_cache_queries_total: IntCounterVec,
    /// Prompt tokens found there.
    pub prefix_cache_hits_total: IntCounterVec,
    /// Sequences that lost their blocks and were recomputed.
    pub preemptions_total: IntCounterVec,
    /// Sequences cancelled because nobody listens any more.
    pub cancelled_total: IntCounterVec,
    /// Prompt tokens computed or reused.
    pub prompt_tokens_total: IntCounterVec,
    /// Tokens drawn.
    pub generation_tokens_total: IntCounterVec,
    /// Tokens read by a reward head.
    pub reward_tokens_total: IntCounterVec,
    /// From arrival in the engine to the first token.
    pub time_to_first_token_seconds: HistogramVec,
    /// Between consecutive tokens of one sequence.
    pub inter_token_latency_seconds: HistogramVec,
    /// From arrival in the engine to the first step.
    pub queue_seconds: HistogramVec,
    /// From arrival in the engine to the reward.
    pub reward_seconds: HistogramVec,
    /// HTTP requests by route template, to the last byte.
    pub request_seconds: HistogramVec,
    /// Best-of-n candidates by outcome: chosen, rejected.
    pub candidates_total: IntCounterVec,
    /// Seconds each stage of the start took.
    pub startup_seconds: HistogramVec,
}

impl Metrics {
    /// All metrics at zero.
    ///
    /// # Errors
    /// Only if two metrics share a name, which a test would show.
    pub fn new() -> Result<Self> {
        let registry = Registry::new();
        let r = &registry;
        Ok(Self {
            requests_total: counter(r, "requests_total", "HTTP requests", &["route", "status"])?,
            running: gauge(r, "running", "Sequences that hold cache blocks")?,
            waiting: gauge(r, "waiting", "Sequences that wait for cache blocks or step budget")?,
            kv_blocks_used: gauge(r, "kv_blocks_used", "Cache blocks owned by live sequences")?,
            kv_blocks_total: gauge(r, "kv_blocks_total", "Cache blocks in all")?,
            prefix_cache_queries_total: counter(
                r,
                "prefix_cache_queries_total",
                "Prompt tokens looked up in the prefix index",
                MODEL,
            )?,
            prefix_cache_hits_total: counter(
                r,
                "prefix_cache_hits_total",
                "Prompt tokens found in the prefix index",
                MODEL,
            )?,
            preemptions_total: counter(
                r,
                "preemptions_total",
                "Sequences whose blocks were taken and that are recomputed",
                MODEL,
            )?,
            cancelled_total: counter(r, "cancelled_total", "Sequences dropped because the client left", MODEL)?,
            prompt_tokens_total: counter(r, "prompt_tokens_total", "Prompt tokens of admitted sequences", MODEL)?,
            generation_tokens_total: counter(r, "generation_tokens_total", "Tokens drawn", MODEL)?,
            reward_tokens_total: counter(r, "reward_tokens_total", "Tokens of scored sequences", MODEL)?,
            time_to_first_token_seconds: histogram(r, "time_to_first_token_seconds", "Arrival to first token", MODEL)?,
            inter_token_latency_seconds: histogram(
                r,
                "inter_token_latency_seconds",
                "Between consecutive tokens of a sequence",
                MODEL,
            )?,
            queue_seconds: histogram(r, "queue_seconds", "Arrival to first step", MODEL)?,
            reward_seconds: histogram(r, "reward_seconds", "Arrival to reward", MODEL)?,
            request_seconds: histogram(r, "request_seconds", "HTTP requests, to the last byte", &["route"])?,
            candidates_total: counter(r, "candidates_total", "Best-of-n candidates", &["outcome"])?,
            startup_seconds: histogram(r, "startup_seconds", "Stages of the start", &["stage"])?,
            registry,
        })
    }

    /// The Prometheus text format.
    ///
    /// # Errors
    /// If a metric cannot be encoded.
    pub fn render(&self) -> Result<String> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).map_err(Error::internal)?;
        String::from_utf8(text).map_err(Error::internal)
    }

    /// Names of all metrics that have been touched, for the test that compares them with the documentation.
    pub fn names(&self) -> Vec<String> {
        self.registry.gather().iter().map(|family| family.name().to_string()).collect()
    }
}

fn counter(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec> {
    register(registry, IntCounterVec::new(Opts::new(format!("eurus_{name}"), help), labels))
}

fn gauge(registry: &Registry, name: &str, help: &str) -> Result<IntGaugeVec> {
    register(registry, IntGaugeVec::new(Opts::new(format!("eurus_{name}"), help), MODEL))
}

fn histogram(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> Result<HistogramVec> {
    let options = HistogramOpts::new(format!("eurus_{name}"), help).buckets(LATENCY_SECONDS.to_vec());
    register(registry, HistogramVec::new(options, labels))
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, collector: prometheus::Result<C>) -> Result<C> {
    let collector = collector.map_err(Error::internal)?;
    registry.register(Box::new(collector.clone())).map_err(Error::internal)?;
    Ok(collector)
}
