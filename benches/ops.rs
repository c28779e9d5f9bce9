//! Micro-benchmarks of the operations on the CPU, on 1 and 2 threads: `cargo bench --bench ops`.
//! Throughput is read as elements = floating-point operations, or bytes = weights and cache read.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use candle_core::{DType, Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput};
use eurus::ops::attention::{PagedBatch, paged_attention};
use eurus::ops::linear::Linear;
use eurus::ops::memory::set_up;
use eurus::ops::parallel::set_threads;
use eurus::ops::parameter::{Parameter, Precision};
use eurus::ops::rms_norm::rms_norm;
use eurus::ops::sample::{Filters, pick, uniform};
use std::hint::black_box;
use std::time::Duration;

/// More than any cache here, so that a decode step's weights come from memory as they do in a model.
const WEIGHTS_BYTES: usize = 192 << 20;

fn random(shape: impl Into<candle_core::Shape>) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
}

fn linear(criterion: &mut Criterion) {
    for (k, columns) in [(768, 2048), (2048, 5632)] {
        for dtype in [DType::BF16, DType::F32] {
            let bytes = k * columns * dtype.size_in_bytes();
            let copies = WEIGHTS_BYTES.div_ceil(bytes);
            let weight = || Linear::dense(random((columns, k)).to_dtype(dtype).unwrap()).unwrap();
            let layers: Vec<Linear> = (0..copies).map(|_| weight()).collect();
            let mut runs = criterion.benchmark_group(format!("linear {dtype:?} {k}x{columns}"));
            for rows in [1, 8, 512] {
                let x = random((rows, k));
                runs.throughput(match rows {
                    1 => Throughput::Bytes(bytes as u64),
                    _ => Throughput::Elements(2 * (rows * k * columns) as u64),
                });
                for threads in [1, 2] {
                    set_threads(threads);
                    let mut layer = layers.iter().cycle();
                    let id = BenchmarkId::new(format!("{rows} rows"), format!("{threads} threads"));
                    runs.bench_function(id, |b| b.iter(|| layer.next().map(|l| black_box(l.forward(&x).unwrap()))));
                }
            }
        }
    }
}

/// Both gradients of a layer, as training takes them.
fn gradients(criterion: &mut Criterion) {
    let rows = 2048;
    for (k, columns) in [(384, 384), (384, 2048), (1024, 384)] {
        let (x, dy, weight) = (random((rows, k)), random((rows, columns)), random((columns, k)));
        let mut runs = criterion.benchmark_group(format!("gradients {k}x{columns}"));
        runs.throughput(Throughput::Elements(4 * (rows * k * columns) as u64));
        for precision in [Precision::F32, Precision::Bf16] {
            let weight = Parameter::trained(&weight).unwrap().computed_in(precision);
            let layer = Linear::dense(weight).unwrap();
            for threads in [1, 2] {
                set_threads(threads);
                let id = BenchmarkId::new(format!("{precision:?}"), format!("{threads} threads"));
                runs.bench_function(id, |b| b.iter(|| black_box(layer.backward(&x, &dy).unwrap())));
            }
        }
    }
}

fn attention(criterion: &mut Criterion) {
    let (heads, kv_heads, head_dim, block_size) = (32, 4, 64, 16);
    let mut runs = criterion.benchmark_group(format!("attention {heads}/{kv_heads}x{head_dim}"));
    for (what, rows, context, sequences) in [("decode", 1, 2048, 8), ("decode", 1, 2048, 1), ("prefill", 512, 512, 1)] {
        let blocks = context / block_size;
        let [k, v] = [(); 2].map(|()| random((blocks * sequences, kv_heads, block_size, head_dim)));
        let table = |s: usize| (0..blocks).map(|block| (block * sequences + s) as u32).collect();
        let batch = PagedBatch {
            q_starts: (0..=sequences).map(|s| s * rows).collect(),
            contexts: vec![context; sequences],
            tables: (0..sequences).map(table).collect(),
            block_size,
            window: None,
        };
        let q = random((rows * sequences, heads, head_dim));
        let pairs: usize = (0..rows).map(|row| context - row).sum::<usize>() * sequences;
        runs.throughput(match rows {
            1 => Throughput::Bytes((8 * sequences * context * kv_heads * head_dim) as u64),
            _ => Throughput::Elements((4 * pairs * heads * head_dim) as u64),
        });
        for threads in [1, 2] {
            set_threads(threads);
            let id = BenchmarkId::new(format!("{what}, {sequences} x {context}"), format!("{threads} threads"));
            runs.bench_function(id, |b| {
                b.iter(|| black_box(paged_attention(&q, [&k, &v], &batch, 0.125, Precision::F32).unwrap()))
            });
        }
    }
}

fn norms(criterion: &mut Criterion) {
    let weight = random(2048).to_dtype(DType::BF16).unwrap();
    let mut runs = criterion.benchmark_group("rms_norm 2048");
    for rows in [1, 512] {
        let x = random((rows, 2048));
        for threads in [1, 2] {
            set_threads(threads);
            let id = BenchmarkId::new(format!("{rows} rows"), format!("{threads} threads"));
            runs.bench_function(id, |b| b.iter(|| black_box(rms_norm(&x, &weight, 1e-5).unwrap())));
        }
    }
}

fn sampling(criterion: &mut Criterion) {
    let logits: Vec<f32> = random(32_000).to_vec1().unwrap();
    let filters = |top_k, top_p, min_p| Filters { temperature: 1.0, top_k, top_p, min_p };
    let mut runs = criterion.benchmark_group("sample 32000");
    for (what, filters) in [
        ("temperature", filters(0, 1.0, 0.0)),
        ("top-p 0.9", filters(0, 0.9, 0.0)),
        ("top-k 50", filters(50, 1.0, 0.0)),
        ("min-p 0.05", filters(0, 1.0, 0.05)),
    ] {
        let mut draw = 0;
        runs.bench_function(what, |b| {
            b.iter(|| {
                draw += 1;
                black_box(pick(&logits, &filters, uniform(1, draw)).unwrap())
            })
        });
    }
}

fn main() {
    set_up();
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .without_plots()
        .configure_from_args();
    linear(&mut criterion);
    gradients(&mut criterion);
    attention(&mut criterion);
    norms(&mut criterion);
    sampling(&mut criterion);
    criterion.final_summary();
}
