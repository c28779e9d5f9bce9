//! Single operations on the device against their CPU bodies, on the same numbers.

use candle_core::{DType, Device, Tensor};
use eurus::ops::attention::PagedBatch;
use eurus::ops::attention::inputs::{Inputs, Integers};
use eurus::ops::attention::step::step_attention;
use eurus::ops::embed::{embed, select};
use eurus::ops::experts::route;
use eurus::ops::host;
use eurus::ops::linear::Linear;
use eurus::ops::logprobs::target_scores;
use eurus::ops::parameter::Precision;
use eurus::ops::rms_norm::{add_rms_norm, rms_norm};
use eurus::ops::rope::{RopeTable, Turn};
use eurus::ops::sample::{self, Draw, Drawn, Draws, Filters, uniform};
use eurus::ops::swiglu::swiglu;

use crate::{check_close, device, epsilon, numbers};

const TYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// The same numbers on the device, and widened on the host.
fn both(tensor: &Tensor, device: &Device) -> [Tensor; 2] {
    [tensor.to_device(device).unwrap(), host::tensor(tensor).unwrap()]
}

#[test]
fn rows_are_what_the_cpu_makes_of_them() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        for (rows, width) in [(1, 64), (5, 200), (17, 48)] {
            let (half, seed) = (epsilon(dtype) / 2.0, rows as u64);
            let [x, x_host] = both(&numbers(seed, &[rows, width], 4.0, dtype), &device);
            let [y, y_host] = both(&numbers(seed + 1, &[rows, width], 4.0, dtype), &device);
            let [weight, weight_host] = both(&numbers(seed + 2, &[width], 2.0, dtype), &device);
            let normed = rms_norm(&x, &weight, 1e-5).unwrap();
            assert_eq!(normed.dtype(), dtype);
            check_close("norm", &normed, &rms_norm(&x_host, &weight_host, 1e-5).unwrap(), 2e-6, half + 3e-6);
            let (sum, normed) = add_rms_norm(&x, &y, &weight, 1e-5).unwrap();
            let (sum_host, _) = add_rms_norm(&x_host, &y_host, &weight_host, 1e-5).unwrap();
            check_close("sum", &sum, &sum_host, 1e-7, half);
            // What is normalised is the rounded sum.
            let normed_host = rms_norm(&host::tensor(&sum).unwrap(), &weight_host, 1e-5).unwrap();
            check_close("norm of the sum", &normed, &normed_host, 2e-6, half + 3e-6);
            if width % 2 == 0 {
                check_close("swiglu", &swiglu(&x).unwrap(), &swiglu(&x_host).unwrap(), 1e-6, half + 3e-6);
            }
        }
    }
}

#[test]
fn embedded_and_selected_rows_are_the_weight_s() {
    let Some(device) = device() else { return };
    let ids = [3u32, 0, 9, 3];
    for dtype in TYPES {
        let [weight, weight_host] = both(&numbers(1, &[10, 33], 1.0, dtype), &device);
        let [on, off] = [&device, &Device::Cpu].map(|device| Tensor::new(&ids, device).unwrap());
        let expected = embed(&off, &weight_host.into()).unwrap();
        check_close("embedded", &embed(&on, &weight.clone().into()).unwrap(), &expected, 0.0, 0.0);
        check_close("selected", &select(&weight, &on).unwrap(), &expected, 0.0, 0.0);
    }
}

#[test]
fn experts_are_added_as_on_the_cpu() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        let [logits, logits_host] = both(&numbers(1, &[7, 4], 2.0, dtype), &device);
        let [x, x_host] = both(&numbers(2, &[7, 40], 1.0, dtype), &device);
        let routes = route(&logits, 2).unwrap();
        assert_eq!(routes, route(&logits_host, 2).unwrap());
        let [on, off] = [&x, &x_host].map(|x| {
            let sum = x.zeros_like().unwrap();
            routes.iter().for_each(|route| route.add_to(&sum, &route.gather(x).unwrap()).unwrap());
            sum
        });
        check_close("sum", &on, &off, 1e-6, 2.0 * epsilon(dtype));
        // The shares of a row add up to 1.
        check_close("row", &on, &x_host, 1e-6, 2.0 * epsilon(dtype));
    }
}

/// Few rows take our own kernel, more the library: both against the CPU's order of sums.
#[test]
fn products_are_the_cpu_s() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        for rows in [1, 2, 3, 8, 9, 20] {
            let (columns, k) = (48, 136);
            let [x, x_host] = both(&numbers(rows as u64, &[rows, k], 1.0, dtype), &device);
            let [weight, weight_host] = both(&numbers(99, &[columns, k], 1.0, dtype), &device);
            let [on, off] = [weight, weight_host].map(|weight| Linear::dense(weight).unwrap());
            let what = format!("{dtype:?}, {rows} rows");
            let expected = off.forward(&x_host).unwrap();
            check_close(&what, &on.forward(&x).unwrap(), &expected, 2e-5, epsilon(dtype) / 2.0 + 1e-6);
        }
    }
}

#[test]
fn tokens_are_drawn_as_on_the_cpu() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        let (rows, vocab) = (24, 700);
        let mut numbers = host::floats(&numbers(5, &[rows, vocab], 6.0, dtype)).unwrap();
        numbers[3 * vocab + 5] = f32::NAN;
        let logits = Tensor::from_vec(numbers, (rows, vocab), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let draws: Vec<Option<Draw>> = (0..rows as u64)
            .map(|row| {
                let temperature = [0.0, 0.7, 1.0, 1.5][row as usize % 4];
                let top_p = if row % 3 == 0 { 0.9 } else { 1.0 };
                let min_p = if row % 5 == 0 { 0.05 } else { 0.0 };
                let filters = Filters { temperature, top_k: row as usize % 7 * 10, top_p, min_p };
                let seed = (uniform(1, row) * 1e18) as u64;
                (row % 6 != 5).then_some(Draw { filters, seed, counter: row, logprob: row % 2 == 0 })
            })
            .collect();
        let [on, off] = both(&logits, &device);
        let drawn = |logits: &Tensor, device: &Device| {
            sample::read(&sample::draw(logits, &Draws::new(&draws, device).unwrap()).unwrap(), &draws).unwrap()
        };
        let (on, expected) = (drawn(&on, &device), drawn(&off, &Device::Cpu));
        assert_eq!(expected.iter().filter(|drawn| drawn.is_none()).count(), 5);
        let tokens = |drawn: &[Option<Drawn>]| drawn.iter().map(|drawn| drawn.map(|it| it.token)).collect::<Vec<_>>();
        assert_eq!(tokens(&on), tokens(&expected), "{dtype:?}");
        for (on, expected) in on.iter().flatten().zip(expected.iter().flatten()) {
            assert_eq!(on.logprob.is_some(), expected.logprob.is_some());
            let difference = on.logprob.unwrap_or(0.0) - expected.logprob.unwrap_or(0.0);
            assert!(difference.abs() < 2e-5, "{dtype:?}: {on:?} instead of {expected:?}");
        }
    }
}

#[test]
fn targets_score_as_on_the_cpu() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        let [on, off] = both(&numbers(2, &[6, 300], 5.0, dtype), &device);
        let targets = [0, 299, 17, 17, 150, 3];
        let [got, expected] = [&on, &off].map(|logits| target_scores(logits, &targets).unwrap());
        for (got, expected) in got.iter().zip(&expected) {
            assert!((got.logprob - expected.logprob).abs() < 2e-5, "{got:?} instead of {expected:?}");
            assert!((got.entropy - expected.entropy).abs() < 2e-5, "{got:?} instead of {expected:?}");
            assert_eq!(got.correct, expected.correct);
        }
        assert!(target_scores(&on, &[300; 6]).is_err());
        assert!(target_scores(&on, &[0; 5]).is_err());
    }
}

/// A layer's attention in one step: sequences that go on by a token, chunks that begin anywhere, in any mixture.
struct Step {
    heads: [usize; 2],
    head_dim: usize,
    block_size: usize,
    window: Option<usize>,
    /// New rows and positions in all, for each sequence.
    chunks: Vec<[usize; 2]>,
}

impl Step {
    #[track_caller]
    fn check(&self, dtype: DType, device: &Device) {
        let what = format!("{dtype:?}, heads of {}, {:?}", self.head_dim, self.chunks);
        let (batch, positions, slots) = self.batch();
        let (rows, [heads, kv_heads]) = (positions.len(), self.heads);
        let blocks = batch.tables.iter().map(Vec::len).sum::<usize>() + 1;
        let qkv = numbers(1, &[rows, (heads + 2 * kv_heads) * self.head_dim], 1.0, dtype);
        let caches = [2, 3].map(|seed| numbers(seed, &[blocks, kv_heads, self.block_size, self.head_dim], 1.0, dtype));
        let integers = Integers::unread(&positions, &slots, &batch);
        let run = |device: &Device, place: &dyn Fn(&Tensor) -> Tensor| {
            let table = RopeTable::new(self.head_dim, 1e4, 2000, device).unwrap();
            let inputs = Inputs::new(integers, self.heads, device).unwrap();
            let turn = Turn { positions: &inputs.positions, table: &table, heads: self.heads };
            let [keys, values] = [&caches[0], &caches[1]].map(place);
            let out = step_attention(&place(&qkv), &turn, [&keys, &values], &inputs, 0.125, Precision::F32).unwrap();
            [out, keys, values]
        };
        let got = run(device, &|tensor| tensor.to_device(device).unwrap());
        // A copy, for the cache is written.
        let expected = run(&Device::Cpu, &|tensor| host::tensor(tensor).unwrap().copy().unwrap());
        let half = epsilon(dtype) / 2.0;
        for (name, got, expected) in [("keys", &got[1], &expected[1]), ("values", &got[2], &expected[2])] {
            check_close(&format!("{what}: {name}"), got, expected, 2e-6, half + 1e-6);
        }
        // Turned queries and keys, and the weights of values, are rounded on the way.
        check_close(&what, &got[0], &expected[0], 4.0 * half + 5e-6, 4.0 * half);
    }

    fn batch(&self) -> (PagedBatch, Vec<u32>, Vec<u32>) {
        let (mut q_starts, mut tables, mut next) = (vec![0], Vec::new(), 1);
        let (mut positions, mut slots) = (Vec::new(), Vec::new());
        for [rows, context] in &self.chunks {
            let count = context.div_ceil(self.block_size) as u32;
            let table: Vec<u32> = (next..next + count).rev().collect();
            for position in context - rows..*context {
                positions.push(position as u32);
                let block = table[position / self.block_size] as usize;
                slots.push((block * self.block_size + position % self.block_size) as u32);
            }
            q_starts.push(positions.len());
            tables.push(table);
            next += count;
        }
        let contexts = self.chunks.iter().map(|[_, context]| *context).collect();
        let batch = PagedBatch { q_starts, contexts, tables, block_size: self.block_size, window: self.window };
        (batch, positions, slots)
    }
}

#[test]
fn attention_of_a_step_is_the_cpu_s() {
    let Some(device) = device() else { return };
    let mixed = vec![[1, 300], [1, 7], [5, 5], [40, 290], [1, 1], [1, 513], [3, 20]];
    for dtype in TYPES {
        for (head_dim, heads) in [(64, [4, 2]), (128, [2, 2]), (32, [8, 1]), (10, [3, 3])] {
            for window in [None, Some(50)] {
                let step = Step { heads, head_dim, block_size: 16, window, chunks: mixed.clone() };
                step.check(dtype, &device);
            }
        }
        for chunks in [vec![[1, 1]], vec![[1, 40], [1, 41]], vec![[70, 70]], vec![[2, 600]]] {
            Step { heads: [6, 2], head_dim: 64, block_size: 5, window: None, chunks }.check(dtype, &device);
        }
    }
}

#[test]
fn a_step_that_does_not_fit_its_cache_is_an_error() {
    let Some(device) = device() else { return };
    let step = Step { heads: [2, 1], head_dim: 64, block_size: 4, window: None, chunks: vec![[2, 8]] };
    let (batch, positions, slots) = step.batch();
    let table = RopeTable::new(64, 1e4, 7, &device).unwrap();
    let attend = |slots: &[u32], batch: &PagedBatch, blocks: usize| {
        let positions: Vec<u32> = positions.iter().map(|position| position - 2).collect();
        let integers = Integers::unread(&positions, slots, batch);
        let inputs = Inputs::new(integers, [2, 1], &device).unwrap();
        let turn = Turn { positions: &inputs.positions, table: &table, heads: [2, 1] };
        let qkv = numbers(1, &[2, 4 * 64], 1.0, DType::BF16).to_device(&device).unwrap();
        let cache = || numbers(2, &[blocks, 1, 4, 64], 1.0, DType::BF16).to_device(&device).unwrap();
        step_attention(&qkv, &turn, [&cache(), &cache()], &inputs, 1.0, Precision::F32).map(drop)
    };
    attend(&slots, &batch, 3).unwrap();
    let part = |result: eurus::error::Result<()>, part: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    part(attend(&slots, &batch, 2), "block 2");
    part(attend(&[1, 12], &batch, 3), "slot 12");
    part(attend(&[1], &batch, 3), "1 slots");
    let short = PagedBatch { contexts: vec![9], ..batch.clone() };
    part(attend(&slots, &short, 3), "9 positions and 2 blocks");
}
