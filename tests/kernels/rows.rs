//! Kernels that work on rows: normalisation, rotation and cache writes, activation, embedding, scores of targets.

use candle_core::{DType, Device, Tensor};
use eurus::ops::embed::embed;
use eurus::ops::experts::Route;
use eurus::ops::kernels::{self, AttentionShape, NONE};
use eurus::ops::kv_write::{write_keys, write_values};
use eurus::ops::logprobs::target_scores;
use eurus::ops::rms_norm::{add_rms_norm, rms_norm};
use eurus::ops::rope::{RopeTable, Turn, turn_queries};
use eurus::ops::swiglu::swiglu;

use crate::emulator::Library;
use crate::samples::{Buffer, Numbers, Random, TYPES, check_shapes, compare, floats, rounding};

/// Of each type.
const SHAPES: u64 = 170;

/// Widths of whole vectors and others, of less than a block and more.
fn width(random: &mut Random) -> usize {
    let most = random.choose(&[7, 64, 600, 3000]);
    let width = random.between(1, most);
    if random.between(0, 1) == 0 { width.next_multiple_of(8) } else { width }
}

fn ids(random: &mut Random, count: usize, below: usize) -> Vec<u32> {
    (0..count).map(|_| random.between(0, below - 1) as u32).collect()
}

#[test]
fn rms_norm_is_the_cpu_body_s() {
    check_shapes(&TYPES, SHAPES, |random, dtype| {
        let (rows, width) = (random.between(1, 4), width(random));
        let (x, weight) = (random.numbers(dtype, rows * width, 4.0), random.numbers(dtype, width, 2.0));
        let out = Buffer::poisoned(rows * width * dtype.size_in_bytes());
        let addresses = [out.address(), x.address(), weight.address()];
        Library::sound().run(&kernels::rms_norm(dtype, addresses, [rows, width], 1e-5), random.seed());
        let expected = rms_norm(&x.tensor((rows, width)), &weight.tensor(width), 1e-5).unwrap();
        compare(&out.floats(dtype), &floats(&expected), 1e-6, rounding(dtype) + 2e-6)
    });
}

#[test]
fn rms_norm_after_an_addition_is_the_cpu_body_s() {
    check_shapes(&TYPES, SHAPES, |random, dtype| {
        let (rows, width) = (random.between(1, 4), width(random));
        let [x, residual] = [0, 1].map(|_| random.numbers(dtype, rows * width, 4.0));
        let weight = random.numbers(dtype, width, 2.0);
        let out = Buffer::poisoned(rows * width * dtype.size_in_bytes());
        let (expected_sum, _) = {
            let shape = (rows, width);
            add_rms_norm(&x.tensor(shape), &residual.tensor(shape), &weight.tensor(width), 1e-5).unwrap()
        };
        // The sum replaces the residual, as in a decoder; what is normalised is the rounded one.
        let addresses = [out.address(), residual.address(), x.address(), residual.address(), weight.address()];
        Library::sound().run(&kernels::add_rms_norm(dtype, addresses, [rows, width], 1e-5), random.seed());
        let sum = Numbers::new(dtype, &floats(&expected_sum));
        compare(&residual.buffer.floats(dtype), &sum.floats, 0.0, 0.0).map_err(|error| format!("sum: {error}"))?;
        let expected = rms_norm(&sum.tensor((rows, width)), &weight.tensor(width), 1e-5).unwrap();
        compare(&out.floats(dtype), &floats(&expected), 1e-6, rounding(dtype) + 2e-6)
    });
}

#[test]
fn rotation_and_cache_writes_are_the_cpu_body_s() {
    check_shapes(&TYPES, SHAPES, rope_kv);
}

fn rope_kv(random: &mut Random, dtype: DType) -> Result<(), String> {
    let (rows, kv_heads, share) = (random.between(1, 5), random.between(1, 3), random.between(1, 4));
    let (heads, head_dim) = (kv_heads * share, 2 * random.between(1, 70));
    let (blocks, block_size) = (random.between(2, 4), random.between(3, 17));
    let shape = AttentionShape {
        heads,
        kv_heads,
        head_dim,
        q_stride: 0,
        block_size,
        table_stride: 0,
        window: None,
        scale: 1.0,
    };
    let qkv = random.numbers(dtype, rows * (heads + 2 * kv_heads) * head_dim, 2.0);
    let caches = [0, 1].map(|_| random.numbers(dtype, blocks * kv_heads * block_size * head_dim, 2.0));
    let turns = RopeTable::new(head_dim, 1e4, 300, &Device::Cpu).unwrap();
    let table = Buffer::of(&table_of(head_dim, 300));
    let positions = ids(random, rows, 300);
    // Different slots, in no order.
    let step = random.between(1, blocks * block_size / rows) as u32;
    let mut slots: Vec<u32> = (0..rows as u32).rev().map(|row| row * step).collect();
    let idle = random.between(0, 2 * rows);
    if let Some(slot) = slots.get_mut(idle) {
        *slot = NONE;
    }
    let (position_buffer, slot_buffer) = (Buffer::of(&positions), Buffer::of(&slots));
    let addresses = [&qkv.buffer, &caches[0].buffer, &caches[1].buffer, &table, &position_buffer, &slot_buffer];
    let launch = kernels::rope_kv(dtype, addresses.map(Buffer::address), rows, &shape);
    Library::sound().run(&launch, random.seed());

    let ids = Tensor::from_slice(&positions, rows, &Device::Cpu).unwrap();
    let all = qkv.tensor((rows, (heads + 2 * kv_heads) * head_dim));
    let turn = Turn { positions: &ids, table: &turns, heads: [heads, kv_heads] };
    let q = floats(&turn_queries(&all, &turn).unwrap());
    let turned = qkv.buffer.floats(dtype);
    let tolerance = rounding(dtype) + 1e-6;
    for (row, turned) in turned.chunks((heads + 2 * kv_heads) * head_dim).enumerate() {
        let expected = match slots[row] {
            NONE => &qkv.floats[row * (heads + 2 * kv_heads) * head_dim..][..heads * head_dim],
            _ => &q[row * heads * head_dim..][..heads * head_dim],
        };
        compare(&turned[..heads * head_dim], expected, 1e-6, tolerance).map_err(|error| format!("q: {error}"))?;
    }
    let live: Vec<u32> = (0..rows as u32).filter(|&row| slots[row as usize] != NONE).collect();
    let live_slots: Vec<u32> = live.iter().map(|&row| slots[row as usize]).collect();
    let rows_of =
        |x: &Tensor| x.index_select(&Tensor::from_slice(&live, live.len(), &Device::Cpu).unwrap(), 0).unwrap();
    let expected = caches.each_ref().map(|cache| cache.tensor((blocks, kv_heads, block_size, head_dim)));
    if !live.is_empty() {
        let (all, turn) = (rows_of(&all), Turn { positions: &rows_of(&ids), ..turn });
        write_keys(&expected[0], &all, &turn, &live_slots).unwrap();
        write_values(&expected[1], &all, turn.heads, &live_slots).unwrap();
    }
    for (what, cache, expected) in [("k", &caches[0], &expected[0]), ("v", &caches[1], &expected[1])] {
        let got = cache.buffer.floats(dtype);
        compare(&got, &floats(expected), 1e-6, tolerance).map_err(|error| format!("{what}: {error}"))?;
    }
    Ok(())
}

/// The cosines and sines that [`RopeTable`] holds, by rotating unit vectors: a query, with an empty key and value beside it.
fn table_of(head_dim: usize, positions: usize) -> Vec<f32> {
    let turns = RopeTable::new(head_dim, 1e4, positions, &Device::Cpu).unwrap();
    let unit = |i: usize| f32::from(i % (3 * head_dim) < head_dim / 2);
    let units: Vec<f32> = (0..positions * 3 * head_dim).map(unit).collect();
    let x = Tensor::from_vec(units, (positions, 3 * head_dim), &Device::Cpu).unwrap();
    let ids = Tensor::arange(0, positions as u32, &Device::Cpu).unwrap();
    floats(&turn_queries(&x, &Turn { positions: &ids, table: &turns, heads: [1, 1] }).unwrap())
}

#[test]
fn swiglu_is_the_cpu_body_s() {
    check_shapes(&TYPES, SHAPES, |random, dtype| {
        let (rows, width) = (random.between(1, 4), width(random));
        let gate_up = random.numbers(dtype, rows * 2 * width, 8.0);
        let out = Buffer::poisoned(rows * width * dtype.size_in_bytes());
        let launch = kernels::swiglu(dtype, [out.address(), gate_up.address()], [rows, width]);
        Library::sound().run(&launch, random.seed());
        let expected = swiglu(&gate_up.tensor((rows, 2 * width))).unwrap();
        // The smallest f16 are less exact.
        compare(&out.floats(dtype), &floats(&expected), 1e-6, rounding(dtype) + 2e-6)
    });
}

#[test]
fn embedding_is_the_cpu_body_s() {
    check_shapes(&TYPES, SHAPES, |random, dtype| {
        let (rows, width, vocab) = (random.between(1, 6), width(random), random.between(1, 9));
        let (weight, ids) = (random.numbers(dtype, vocab * width, 2.0), ids(random, rows, vocab));
        let (out, id_buffer) = (Buffer::poisoned(rows * width * dtype.size_in_bytes()), Buffer::of(&ids));
        let addresses = [out.address(), id_buffer.address(), weight.address()];
        Library::sound().run(&kernels::embed(dtype, addresses, [rows, width]), random.seed());
        let ids = Tensor::from_slice(&ids, rows, &Device::Cpu).unwrap();
        compare(&out.floats(dtype), &floats(&embed(&ids, &weight.tensor((vocab, width)).into()).unwrap()), 0.0, 0.0)
    });
}

#[test]
fn sums_of_experts_are_the_cpu_body_s() {
    check_shapes(&TYPES, SHAPES, |random, dtype| {
        let (rows, width) = (random.between(1, 6), width(random));
        let chosen: Vec<u32> = (0..rows as u32).filter(|_| random.between(0, 2) > 0).collect();
        let shares: Vec<f32> = chosen.iter().map(|_| random.between(0, 100) as f32 / 100.0).collect();
        let (sum, y) = (random.numbers(dtype, rows * width, 2.0), random.numbers(dtype, chosen.len() * width, 2.0));
        let sums = sum.tensor((rows, width));
        let [row_buffer, share_buffer] = [Buffer::of(&chosen), Buffer::of(&shares)];
        let addresses = [sum.address(), y.address(), row_buffer.address(), share_buffer.address()];
        if !chosen.is_empty() {
            let launch = kernels::add_expert(dtype, addresses, [chosen.len(), width]);
            Library::sound().run(&launch, random.seed());
            let route = Route { expert: 0, rows: chosen.clone(), shares };
            route.add_to(&sums, &y.tensor((chosen.len(), width))).unwrap();
        }
        compare(&sum.buffer.floats(dtype), &floats(&sums), 1e-7, rounding(dtype))
    });
}

#[test]
fn scores_of_targets_are_the_cpu_body_s() {
    check_shapes(&TYPES, SHAPES, |random, dtype| {
        let (rows, vocab) = (random.between(1, 3), width(random));
        let scale = random.choose(&[0.1, 3.0, 30.0, 200.0]);
        let mut logits = random.numbers(dtype, rows * vocab, scale).floats;
        let targets = ids(random, rows, vocab);
        for (row, logits) in logits.chunks_mut(vocab).enumerate() {
            // Impossible tokens, but never all.
            let impossible = random.between(0, 5);
            for id in ids(random, impossible, vocab) {
                logits[id as usize] = f32::NEG_INFINITY;
            }
            logits[random.between(0, vocab - 1)] = scale / 2.0;
            if random.between(0, 2) == 0 {
                logits[targets[row] as usize] = scale;
            }
        }
        let (logits, target_buffer) = (Numbers::new(dtype, &logits), Buffer::of(&targets));
        let out = Buffer::poisoned(rows * 3 * 4);
        let addresses = [out.address(), logits.address(), target_buffer.address()];
        Library::sound().run(&kernels::target_scores(dtype, addresses, [rows, vocab]), random.seed());
        let expected = target_scores(&logits.tensor((rows, vocab)), &targets).unwrap();
        let expected = expected.iter().flat_map(|score| [score.logprob, score.entropy, f32::from(score.correct)]);
        // The scores are float32 whatever the logits are.
        compare(&out.numbers::<f32>(), &expected.collect::<Vec<_>>(), 5e-6, 2e-6)
    });
}

#[test]
fn rows_that_are_no_distribution_have_no_scores() {
    let never = f32::NEG_INFINITY;
    let broken =
        [[0.0, f32::NAN, 1.0], [f32::INFINITY, 0.0, 0.0], [never; 3], [never, f32::NAN, never], [never, 3.0, never]];
    let rows = [&broken[..], &[[0.0, 1.0, 0.0]; 2]].concat();
    // The last two are no tokens.
    let targets = Buffer::of(&[1u32, 1, 1, 1, 1, 3, NONE]);
    for dtype in TYPES {
        let (logits, out) = (Numbers::new(dtype, &rows.concat()), Buffer::poisoned(7 * 3 * 4));
        let addresses = [out.address(), logits.address(), targets.address()];
        Library::sound().run(&kernels::target_scores(dtype, addresses, [7, 3]), 1);
        let scores = out.numbers::<f32>();
        assert!(scores[..12].iter().all(|score| score.is_nan()), "{scores:?}");
        assert_eq!(scores[12..15], [0.0, 0.0, 1.0]);
        assert!([15, 18].map(|at| scores[at]).iter().all(|score| score.is_nan()), "{scores:?}");
        assert_eq!([16, 19].map(|at| scores[at].is_finite()), [true; 2], "{scores:?}");
    }
}
