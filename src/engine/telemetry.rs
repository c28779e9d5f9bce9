//! What one engine reports about itself: gauges and counters by model, and latencies from the times at which each sequence
//! arrived, was first planned and was last answered. Decides nothing.

use std::collections::HashMap;
use std::time::Instant;

use prometheus::{Histogram, IntCounter, IntGauge};

use super::scheduler::{Counters, Scheduler};
use super::step::{Last, SequenceId, StepOutput, StepPlan};
use crate::metrics::Metrics;

#[derive(Debug)]
pub(super) struct Telemetry {
    running: IntGauge,
    waiting: IntGauge,
    blocks_used: IntGauge,
    prefix_queries: IntCounter,
    prefix_hits: IntCounter,
    preemptions: IntCounter,
    cancelled: IntCounter,
    prompt_tokens: IntCounter,
    generated_tokens: IntCounter,
    reward_tokens: IntCounter,
    queue_seconds: Histogram,
    first_token_seconds: Histogram,
    inter_token_seconds: Histogram,
    reward_seconds: Histogram,
    reported: Counters,
    times: HashMap<SequenceId, Times>,
}

#[derive(Debug)]
struct Times {
    arrived: Instant,
    planned: Option<Instant>,
    drawn: Option<Instant>,
}

impl Telemetry {
    /// The metrics of `model`, at zero.
    pub(super) fn new(metrics: &Metrics, model: &str, block_count: usize) -> Self {
        let label = &[model];
        metrics.kv_blocks_total.with_label_values(label).set(block_count as i64);
        Self {
            running: metrics.running.with_label_values(label),
            waiting: metrics.waiting.with_label_values(label),
            blocks_used: metrics.kv_blocks_used.with_label_values(label),
            prefix_queries: metrics.prefix_cache_queries_total.with_label_values(label),
            prefix_hits: metrics.prefix_cache_hits_total.with_label_values(label),
            preemptions: metrics.preemptions_total.with_label_values(label),
            cancelled: metrics.cancelled_total.with_label_values(label),
            prompt_tokens: metrics.prompt_tokens_total.with_label_values(label),
            generated_tokens: metrics.generation_tokens_total.with_label_values(label),
            reward_tokens: metrics.reward_tokens_total.with_label_values(label),
            queue_seconds: metrics.queue_seconds.with_label_values(label),
            first_token_seconds: metrics.time_to_first_token_seconds.with_label_values(label),
            inter_token_seconds: metrics.inter_token_latency_seconds.with_label_values(label),
            reward_seconds: metrics.reward_seconds.with_label_values(label),
            reported: Counters::default(),
            times: HashMap::new(),
        }
    }

    pub(super) fn arrived(&mut self, id: SequenceId, arrived: Instant) {
        self.times.insert(id, Times { arrived, planned: None, drawn: None });
    }

    pub(super) fn planned(&mut self, plan: &StepPlan) {
        let now = Instant::now();
        for chunk in &plan.chunks {
            if let Some(times) = self.times.get_mut(&chunk.id)
                && times.planned.is_none()
            {
                times.planned = Some(now);
                self.queue_seconds.observe((now - times.arrived).as_secs_f64());
            }
        }
    }

    pub(super) fn executed(&mut self, plan: &StepPlan, output: &StepOutput) {
        let now = Instant::now();
        for (chunk, outcome) in plan.chunks.iter().zip(&output.outcomes) {
            let Some(times) = self.times.get_mut(&chunk.id) else { continue };
            match outcome.last {
                Last::Token(..) => match times.drawn.replace(now) {
                    None => self.first_token_seconds.observe((now - times.arrived).as_secs_f64()),
                    Some(previous) => self.inter_token_seconds.observe((now - previous).as_secs_f64()),
                },
                Last::Score(_) => self.reward_seconds.observe((now - times.arrived).as_secs_f64()),
                Last::Nothing | Last::Failed(_) => {}
            }
        }
    }

    /// Brings everything up to date with the scheduler.
    pub(super) fn report(&mut self, scheduler: &Scheduler) {
        for id in scheduler.ended() {
            self.times.remove(id);
        }
        self.running.set(scheduler.running_count() as i64);
        self.waiting.set(scheduler.waiting_count() as i64);
        self.blocks_used.set(scheduler.pool().used_count() as i64);
        let (now, before) = (scheduler.counters(), std::mem::replace(&mut self.reported, scheduler.counters()));
        self.prefix_queries.inc_by(now.prefix_queries - before.prefix_queries);
        self.prefix_hits.inc_by(now.prefix_hits - before.prefix_hits);
        self.preemptions.inc_by(now.preemptions - before.preemptions);
        self.cancelled.inc_by(now.cancelled - before.cancelled);
        self.prompt_tokens.inc_by(now.prompt_tokens - before.prompt_tokens);
        self.generated_tokens.inc_by(now.generated_tokens - before.generated_tokens);
        self.reward_tokens.inc_by(now.reward_tokens - before.reward_tokens);
    }
}
