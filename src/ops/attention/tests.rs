//! Tests of attention: values against f64, bits across storage, chunking, batches, bodies and threads.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use crate::ops::kv_write::write_values;
use crate::ops::parallel::{set_threads, threads};
use crate::ops::samples::{check_bits, check_close, differences, floats, tensor, with_threads};
use candle_core::{DType, Device};

struct Case {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
}

const CASES: [Case; 6] = [
    Case { heads: 4, kv_heads: 4, head_dim: 64, window: None },
    Case { heads: 6, kv_heads: 2, head_dim: 32, window: Some(70) },
    Case { heads: 8, kv_heads: 1, head_dim: 128, window: None },
    Case { heads: 3, kv_heads: 3, head_dim: 20, window: Some(5) },
    Case { heads: 2, kv_heads: 1, head_dim: 112, window: Some(64) },
    Case { heads: 7, kv_heads: 1, head_dim: 9, window: None },
];
const SCALE: f32 = 0.3;

impl Case {
    /// Queries, keys and values of `len` positions.
    fn inputs(&self, seed: u64, len: usize) -> [Tensor; 3] {
        let kv = (len, self.kv_heads, self.head_dim);
        [tensor(seed, (len, self.heads, self.head_dim)), tensor(seed + 100, kv), tensor(seed + 200, kv)]
    }

    fn packed(&self, [q, k, v]: &[Tensor; 3], starts: &[usize]) -> Vec<f32> {
        floats(&packed_attention(q, k, v, starts, self.window, SCALE).unwrap())
    }

    /// Those of queries, keys and values, in their shapes.
    fn gradients(&self, [q, k, v]: &[Tensor; 3], dout: &Tensor, starts: &[usize]) -> [Tensor; 3] {
        let all = packed_attention_backward([q, k, v], dout, starts, self.window, SCALE).unwrap();
        let part = |first: usize, x: &Tensor| {
            let columns = all.narrow(1, first * self.head_dim, x.dim(1).unwrap() * self.head_dim).unwrap();
            columns.contiguous().unwrap().reshape(x.shape()).unwrap()
        };
        [part(0, q), part(self.heads, k), part(self.heads + self.kv_heads, v)]
    }

    fn naive(&self, [q, k, v]: &[Tensor; 3]) -> Vec<f64> {
        let (len, d) = (q.dim(0).unwrap(), self.head_dim);
        let [q, k, v] = [q, k, v].map(|t| floats(t).into_iter().map(f64::from).collect::<Vec<_>>());
        let mut out = Vec::new();
        for position in 0..len {
            for head in 0..self.heads {
                let kv = head / (self.heads / self.kv_heads);
                let q = &q[(position * self.heads + head) * d..][..d];
                let first = self.window.map_or(0, |w| (position + 1).saturating_sub(w));
                let at = |j: usize| (j * self.kv_heads + kv) * d;
                let weights: Vec<f64> = (first..=position)
                    .map(|j| q.iter().zip(&k[at(j)..]).map(|(q, k)| q * k).sum::<f64>() * f64::from(SCALE))
                    .map(f64::exp)
                    .collect();
                let total: f64 = weights.iter().sum();
                out.extend(
                    (0..d).map(|i| weights.iter().zip(first..).map(|(w, j)| w * v[at(j) + i]).sum::<f64>() / total),
                );
            }
        }
        out
    }
}

/// A cache whose sequences lie in scattered blocks between garbage, and the tables to find them.
struct Cache {
    k: Tensor,
    v: Tensor,
    block_size: usize,
    blocks: usize,
    tables: Vec<Vec<u32>>,
}

impl Cache {
    fn new(case: &Case, dtype: DType, block_size: usize, lens: &[usize]) -> Self {
        let needed: usize = lens.iter().map(|len| len.div_ceil(block_size)).sum();
        let blocks = needed + 3;
        let shape = (blocks, case.kv_heads, block_size, case.head_dim);
        let nan = Tensor::full(f32::NAN, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let mut free: Vec<u32> = (0..blocks as u32).collect();
        free.sort_by_key(|block| (u64::from(*block) * 7919 + 13) % 101);
        let tables = lens.iter().map(|len| free.split_off(free.len() - len.div_ceil(block_size))).collect();
        Self { k: nan.copy().unwrap(), v: nan, block_size, blocks, tables }
    }

    fn write(&self, sequence: usize, [_, k, v]: &[Tensor; 3], positions: Range<usize>) {
        let slot = |p: usize| {
            self.tables[sequence][p / self.block_size] * self.block_size as u32 + (p % self.block_size) as u32
        };
        let slots: Vec<u32> = positions.clone().map(slot).collect();
        let (count, heads) = (positions.len(), [0, k.dim(1).unwrap()]);
        for (cache, numbers) in [(&self.k, k), (&self.v, v)] {
            let part = numbers.narrow(0, positions.start, count).unwrap();
            // The second of them counts as the values.
            let rows = Tensor::cat(&[&part, &part], 1).unwrap().flatten_from(1).unwrap();
            write_values(cache, &rows, heads, &slots).unwrap();
        }
    }

    fn attend(&self, body: Body, case: &Case, q: &Tensor, batch: &PagedBatch) -> Vec<f32> {
        assert!(self.blocks > 0);
        let op = Paged { batch, scale: SCALE, body, small: None };
        floats(&q.apply_op3_no_bwd(&self.k, &self.v, &op).unwrap().reshape(((), case.heads * case.head_dim)).unwrap())
    }

    fn batch(&self, case: &Case, q_starts: Vec<usize>, contexts: Vec<usize>) -> PagedBatch {
        PagedBatch { q_starts, contexts, tables: self.tables.clone(), block_size: self.block_size, window: case.window }
    }
}

#[test]
fn values_are_those_of_the_formula() {
    for (index, case) in CASES.iter().enumerate() {
        let inputs = case.inputs(index as u64, 150);
        let got = case.packed(&inputs, &[0, 150]);
        check_close(&format!("case {index}"), &got, &case.naive(&inputs), 1e-5);
    }
}

#[test]
fn segments_do_not_see_each_other() {
    let case = &CASES[1];
    let inputs = case.inputs(1, 140);
    let all = case.packed(&inputs, &[0, 3, 3, 100, 140]);
    let width = case.heads * case.head_dim;
    for (first, last) in [(0, 3), (3, 100), (100, 140)] {
        let alone = inputs.clone().map(|t| t.narrow(0, first, last - first).unwrap());
        let got = case.packed(&alone, &[0, last - first]);
        check_bits(&format!("rows {first}..{last}"), &got, &all[first * width..last * width]);
    }
}

#[test]
fn paged_is_packed_bit_for_bit_whatever_the_blocks_chunks_and_neighbours() {
    let lens = [150, 1, 67];
    for (index, case) in CASES.iter().enumerate() {
        let width = case.heads * case.head_dim;
        let inputs: Vec<_> = (0..3).map(|s| case.inputs(10 * index as u64 + s, lens[s as usize])).collect();
        let f32 = DType::F32;
        for (dtype, block_size) in [(f32, 1), (f32, 4), (f32, 16), (f32, 24), (DType::BF16, 16), (DType::F16, 4)] {
            // A cache of fewer bits is one of f32 that was given what it can hold.
            let held = |x: &Tensor| x.to_dtype(dtype).unwrap().to_dtype(f32).unwrap();
            let all = inputs.iter().zip(lens);
            let expected: Vec<_> =
                all.map(|([q, k, v], len)| case.packed(&[q.clone(), held(k), held(v)], &[0, len])).collect();
            for step in [1, 5, 64, 150] {
                let cache = Cache::new(case, dtype, block_size, &lens);
                // All sequences together, `step` positions of each at a time.
                for first in (0..150).step_by(step) {
                    let parts: Vec<_> = lens.iter().map(|&len| first.min(len)..(first + step).min(len)).collect();
                    let mut starts = vec![0];
                    for (s, part) in parts.iter().enumerate() {
                        cache.write(s, &inputs[s], part.clone());
                        starts.push(starts[s] + part.len());
                    }
                    let q: Vec<_> =
                        parts.iter().zip(&inputs).map(|(p, i)| i[0].narrow(0, p.start, p.len()).unwrap()).collect();
                    let q = Tensor::cat(&q, 0).unwrap();
                    let batch = cache.batch(case, starts.clone(), parts.iter().map(|p| p.end).collect());
                    let got = cache.attend(Body::best(), case, &q, &batch);
                    for (s, part) in parts.iter().enumerate() {
                        let what = format!(
                            "case {index}, {dtype:?}, blocks of {block_size}, steps of {step}, sequence {s}, {part:?}"
                        );
                        let got = &got[starts[s] * width..starts[s + 1] * width];
                        check_bits(&what, got, &expected[s][part.start * width..part.end * width]);
                    }
                }
            }
        }
    }
}

#[test]
fn in_bf16_values_are_near_and_have_the_same_bits_whatever_the_chunks() {
    let len = 150;
    let Some(small) = Small::of(Precision::Bf16) else { return };
    for (index, case) in CASES.iter().enumerate() {
        let inputs = case.inputs(index as u64, len);
        let run = |step: usize| {
            let cache = Cache::new(case, DType::BF16, 16, &[len]);
            let mut out = Vec::new();
            for first in (0..len).step_by(step) {
                let count = step.min(len - first);
                cache.write(0, &inputs, first..first + count);
                let batch = cache.batch(case, vec![0, count], vec![first + count]);
                let op = Paged { batch: &batch, scale: SCALE, body: Body::best(), small: Some(small) };
                let q = inputs[0].narrow(0, first, count).unwrap();
                out.extend(floats(&q.apply_op3_no_bwd(&cache.k, &cache.v, &op).unwrap()));
            }
            out
        };
        let all = run(len);
        // Numbers up to 1: the rounding of scores is a share of the weights.
        check_close(&format!("case {index}"), &all, &case.naive(&inputs), 0.02);
        for step in [1, 5, 64] {
            check_bits(&format!("case {index}, steps of {step}"), &run(step), &all);
        }
    }
}

#[test]
fn in_bf16_nobody_multiplies_an_infinite_value_that_it_does_not_see() {
    let (case, len) = (&CASES[0], 90);
    let [q, k, v] = case.inputs(1, len);
    let row = case.kv_heads * case.head_dim;
    let mut numbers = floats(&v);
    numbers[80 * row..81 * row].fill(f32::INFINITY);
    let v = Tensor::from_vec(numbers, v.dims(), &Device::Cpu).unwrap();
    let inputs = [q, k, v];
    let Some(small) = Small::of(Precision::Bf16) else { return };
    let cache = Cache::new(case, DType::BF16, 16, &[len]);
    cache.write(0, &inputs, 0..len);
    let batch = cache.batch(case, vec![0, len], vec![len]);
    let op = Paged { batch: &batch, scale: SCALE, body: Body::best(), small: Some(small) };
    let out = floats(&inputs[0].apply_op3_no_bwd(&cache.k, &cache.v, &op).unwrap());
    let width = case.heads * case.head_dim;
    assert!(out[..80 * width].iter().all(|x| x.is_finite()) && out[80 * width..].iter().all(|x| !x.is_finite()));
}

#[test]
fn every_body_and_number_of_threads_gives_the_same_bits() {
    let before = threads();
    for (index, case) in CASES.iter().enumerate() {
        let inputs = case.inputs(index as u64, 130);
        let expected = case.packed(&inputs, &[0, 130]);
        let cache = Cache::new(case, DType::F32, 16, &[130]);
        cache.write(0, &inputs, 0..130);
        let batch = cache.batch(case, vec![0, 130], vec![130]);
        for body in Body::all() {
            check_bits(&format!("case {index}"), &cache.attend(body, case, &inputs[0], &batch), &expected);
        }
        for count in [1, 2, 3] {
            set_threads(count);
            check_bits(&format!("{count} threads"), &case.packed(&inputs, &[0, 130]), &expected);
        }
    }
    set_threads(before);
}

#[test]
fn batches_that_do_not_fit_are_errors() {
    let case = &CASES[0];
    let inputs = case.inputs(1, 8);
    let cache = Cache::new(case, DType::F32, 4, &[8]);
    let good = cache.batch(case, vec![0, 8], vec![8]);
    let run = |batch: &PagedBatch| paged_attention(&inputs[0], [&cache.k, &cache.v], batch, SCALE, Precision::F32);
    assert!(run(&good).is_ok());
    let bad = [
        PagedBatch { q_starts: vec![], ..good.clone() },
        PagedBatch { q_starts: vec![0, 7], ..good.clone() },
        PagedBatch { q_starts: vec![0, 9, 8], ..good.clone() },
        PagedBatch { contexts: vec![7], ..good.clone() },
        PagedBatch { contexts: vec![9], ..good.clone() },
        PagedBatch { contexts: vec![], ..good.clone() },
        PagedBatch { tables: vec![vec![0, 99]], ..good.clone() },
        PagedBatch { block_size: 8, ..good.clone() },
        PagedBatch { window: Some(0), ..good.clone() },
    ];
    for (index, batch) in bad.iter().enumerate() {
        assert!(run(batch).is_err(), "bad batch {index}");
    }
    let strided = inputs[0].transpose(0, 1).unwrap();
    assert!(paged_attention(&strided, [&cache.k, &cache.v], &good, SCALE, Precision::F32).is_err());
    let half = inputs[0].to_dtype(DType::F16).unwrap();
    assert!(paged_attention(&half, [&cache.k, &cache.v], &good, SCALE, Precision::F32).is_err());
    assert!(packed_attention(&inputs[0], &inputs[1], &inputs[2], &[0, 5], None, SCALE).is_err());
}

#[test]
fn gradients_are_those_of_differences() {
    for case in CASES.iter().filter(|case| case.head_dim <= 32) {
        let starts = [0usize, 1, 6, 6, 17];
        let inputs = case.inputs(1, 17);
        let dout = tensor(7, (17, case.heads * case.head_dim));
        let gradients = case.gradients(&inputs, &dout, &starts);
        let forward = |inputs: [Tensor; 3]| {
            let segment = |bounds: &[usize]| {
                let part = |x: &Tensor| x.narrow(0, bounds[0], bounds[1] - bounds[0]).unwrap();
                case.naive(&[part(&inputs[0]), part(&inputs[1]), part(&inputs[2])])
            };
            starts.windows(2).filter(|bounds| bounds[0] < bounds[1]).flat_map(segment).collect::<Vec<_>>()
        };
        for (index, name) in ["dq", "dk", "dv"].into_iter().enumerate() {
            let at = |x: &Tensor| {
                let mut inputs = inputs.clone();
                inputs[index] = x.clone();
                forward(inputs)
            };
            let expected = differences(&inputs[index], at, &floats(&dout));
            let what = format!("{name}, {} heads of {}", case.heads, case.head_dim);
            check_close(&what, &floats(&gradients[index]), &expected, 1e-3);
        }
    }
}

/// Many tiles: the gradient of a sum of the values is what each position was looked at.
#[test]
fn gradients_over_many_tiles_are_those_of_candle() {
    for case in CASES.iter().take(5) {
        let (len, share) = (200, case.heads / case.kv_heads);
        let inputs = case.inputs(3, len);
        let dout = tensor(9, (len, case.heads * case.head_dim));
        let vars = inputs.clone().map(|x| candle_core::Var::from_tensor(&x).unwrap());
        let head_major = |x: &Tensor, times: usize| {
            let x = x.transpose(0, 1).unwrap().unsqueeze(1).unwrap();
            let x = x.repeat((1, times, 1, 1)).unwrap();
            let (heads, times, len, d) = x.dims4().unwrap();
            x.reshape((heads * times, len, d)).unwrap()
        };
        let [q, k, v] =
            [(&vars[0], 1), (&vars[1], share), (&vars[2], share)].map(|(x, n)| head_major(x.as_tensor(), n));
        let seen = |i: usize, j: usize| j <= i && case.window.is_none_or(|w| i - j < w);
        let mask: Vec<f32> =
            (0..len * len).map(|at| if seen(at / len, at % len) { 0.0 } else { f32::NEG_INFINITY }).collect();
        let mask = Tensor::from_vec(mask, (1, len, len), &Device::Cpu).unwrap();
        let scores = (q.matmul(&k.t().unwrap()).unwrap() * f64::from(SCALE)).unwrap().broadcast_add(&mask).unwrap();
        let weights = scores.broadcast_sub(&scores.max_keepdim(2).unwrap().detach()).unwrap().exp().unwrap();
        let weights = weights.broadcast_div(&weights.sum_keepdim(2).unwrap()).unwrap();
        let out = weights.matmul(&v).unwrap().transpose(0, 1).unwrap().flatten_from(1).unwrap();
        let expected = (out * &dout).unwrap().sum_all().unwrap().backward().unwrap();
        let starts = [0, len];
        let gradients = case.gradients(&inputs, &dout, &starts);
        for (var, got) in vars.iter().zip(&gradients) {
            let expected: Vec<f64> = floats(expected.get(var).unwrap()).into_iter().map(f64::from).collect();
            check_close(&format!("{} heads", case.heads), &floats(got), &expected, 1e-4);
        }
        let alone = with_threads(1, || case.gradients(&inputs, &dout, &starts));
        for (alone, got) in alone.iter().zip(&gradients) {
            check_bits("one thread", &floats(alone), &floats(got));
        }
    }
}
