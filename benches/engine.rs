//! What the host does between two steps, while a GPU waits: `cargo bench --features cuda --bench engine`, without which block tables are
//! not laid out. Readers are told during the next step.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use candle_core::Device;
use criterion::{BatchSize, BenchmarkId, Criterion};
use eurus::engine::blocks::BlockPool;
use eurus::engine::limits::Limits;
use eurus::engine::request::{Event, Request, SamplingParams, Task};
use eurus::engine::scheduler::Scheduler;
use eurus::engine::step::{Last, Outcome, StepOutput, StepPlan, Want};
use eurus::ops::attention::inputs::Inputs;
use eurus::ops::sample::{Draw, Filters};
use eurus::runner::batch::{Bounds, ForwardBatch};
use tokio::sync::mpsc::{Receiver, channel};

const BLOCK_SIZE: usize = 16;
const CONTEXT: usize = 1000;
const STEPS: usize = 256;

fn answer(plan: &StepPlan) -> StepOutput {
    let outcomes = plan.chunks.iter().map(|chunk| {
        let last = if chunk.want == Want::Nothing { Last::Nothing } else { Last::Token(7, None) };
        Outcome { logprobs: Vec::new(), scores: Vec::new(), last }
    });
    StepOutput { outcomes: outcomes.collect() }
}

/// `count` sequences whose prompts are computed.
fn decoding(count: usize) -> (Scheduler, Vec<Receiver<Event>>) {
    let limits = Limits { step_tokens: 4096, running_max: count, waiting_max: count, len_max: 4096 };
    let mut scheduler = Scheduler::new(limits, BlockPool::new(count * 128, BLOCK_SIZE));
    let readers = (0..count).map(|index| {
        let (reply, events) = channel(2 * STEPS);
        let prompt = (0..CONTEXT).map(|i| (i * 7 + index * 13) as u32 % 32_000).collect();
        let params = SamplingParams { max_tokens: 2 * STEPS, ..SamplingParams::default() };
        scheduler.add(Request { prompt, task: Task::Generate(Arc::new(params)), reply }).unwrap();
        events
    });
    let readers = readers.collect();
    loop {
        let plan = scheduler.plan();
        let done = plan.chunks.len() == count && plan.token_count() == count;
        scheduler.commit(&plan, answer(&plan));
        scheduler.tell();
        if done {
            return (scheduler, readers);
        }
    }
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .without_plots()
        .configure_from_args();
    let mut runs = criterion.benchmark_group(format!("{STEPS} steps of decoding"));
    for count in [1, 8, 64] {
        runs.bench_function(BenchmarkId::new("plan and commit", count), |b| {
            b.iter_batched(
                || decoding(count),
                |(mut scheduler, readers)| {
                    for _ in 0..STEPS {
                        let plan = scheduler.plan();
                        assert_eq!(plan.chunks.len(), count);
                        scheduler.commit(&plan, answer(&plan));
                    }
                    (scheduler, readers)
                },
                BatchSize::LargeInput,
            )
        });
        let (mut scheduler, _readers) = decoding(count);
        let plan = scheduler.plan();
        let filters = Filters { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
        let draws = vec![Some(Draw { filters, seed: 1, counter: 2, logprob: false }); count];
        let bounds = Bounds {
            block_count: count * 128,
            block_size: BLOCK_SIZE,
            vocab: 32_000,
            positions_max: 4096,
            window: None,
        };
        runs.bench_function(BenchmarkId::new("lay out", count), |b| {
            b.iter(|| {
                for _ in 0..STEPS {
                    let batch = ForwardBatch::new(&plan, &bounds).unwrap();
                    let rows: Vec<u32> = (0..count as u32).collect();
                    black_box(Inputs::new(batch.integers(&rows, &draws), [32, 8], &Device::Cpu).unwrap());
                }
            })
        });
    }
    runs.finish();
    criterion.final_summary();
}
