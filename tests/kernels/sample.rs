//! Drawing tokens: the rule of the CPU body, token by token.

use candle_core::DType;
use eurus::ops::kernels::{self, Draw, NONE};
use eurus::ops::sample::{Filters, pick, uniform};

use crate::emulator::Library;
use crate::samples::{Buffer, Numbers, Random, TYPES, check_shapes};

fn draw(dtype: DType, logits: &Numbers, draws: &[Draw], seed: u64) -> Vec<u32> {
    let rows = draws.len();
    let (tokens, draws) = (Buffer::poisoned(4 * rows), Buffer::of(draws));
    let addresses = [tokens.address(), logits.address(), draws.address()];
    Library::sound().run(&kernels::sample(dtype, addresses, [rows, logits.floats.len() / rows]), seed);
    tokens.numbers()
}

fn random_draw(random: &mut Random, vocab: usize) -> Draw {
    let (top_k, top_p, min_p) = (random.between(1, vocab + 1) as u32, random.uniform() as f32, random.uniform() as f32);
    let on = |random: &mut Random| random.between(0, 1) == 0;
    Draw {
        seed: random.seed() << 20,
        counter: random.seed() << 7,
        temperature: random.choose(&[0.0, 0.3, 1.0, 1.0, 2.5]),
        top_p: if on(random) { top_p } else { 1.0 },
        min_p: if on(random) { min_p * min_p } else { 0.0 },
        top_k: if on(random) { top_k } else { 0 },
    }
}

/// What the CPU draws, or None where the uniform number is too near to the border between two tokens for the last bits of two sums.
fn expected(logits: &[f32], draw: &Draw) -> Option<u32> {
    let Draw { temperature, top_p, min_p, top_k, .. } = *draw;
    let at = uniform(draw.seed, draw.counter);
    let token = |at: f64, top_p: f32| {
        let filters = Filters { temperature, top_k: top_k as usize, top_p, min_p };
        pick(logits, &filters, at.clamp(0.0, 1.0 - f64::EPSILON)).unwrap()
    };
    let (found, near) = (token(at, top_p), 2e-6);
    let tops = if top_p < 1.0 { vec![top_p * (1.0 - near), (top_p * (1.0 + near)).min(1.0)] } else { vec![top_p] };
    let ends = [at - f64::from(near), at + f64::from(near)];
    tops.iter().flat_map(|top_p| ends.map(|at| token(at, *top_p))).all(|token| token == found).then_some(found)
}

#[test]
fn tokens_are_those_the_cpu_draws() {
    let skipped = std::cell::Cell::new(0);
    check_shapes(&TYPES, 170, |random, dtype| {
        let most = random.choose(&[3, 40, 700, 3000]);
        let (rows, vocab) = (random.between(1, 3), random.between(1, most));
        let (scale, coarse) = (random.choose(&[0.5, 5.0, 20.0]), random.between(0, 1) == 0);
        let mut logits = random.numbers(dtype, rows * vocab, scale).floats;
        for (i, logit) in logits.iter_mut().enumerate() {
            // Coarse steps make ties.
            *logit = if coarse { (*logit * 2.0).round() / 2.0 } else { *logit };
            if i % vocab != 0 && random.between(0, 9) == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
        let logits = Numbers::new(dtype, &logits);
        let draws: Vec<Draw> = (0..rows).map(|_| random_draw(random, vocab)).collect();
        let got = draw(dtype, &logits, &draws, random.seed());
        for (row, draw) in draws.iter().enumerate() {
            match expected(&logits.floats[row * vocab..][..vocab], draw) {
                Some(token) if token != got[row] => return Err(format!("{} instead of {token}: {draw:?}", got[row])),
                Some(_) => {}
                None => skipped.set(skipped.get() + 1),
            }
        }
        Ok(())
    });
    assert!(skipped.get() < 5, "{} draws were left out", skipped.get());
}

#[test]
fn rows_that_are_no_distribution_give_no_token() {
    let never = f32::NEG_INFINITY;
    let rows = [[0.0, f32::NAN, 1.0], [f32::INFINITY, 0.0, 0.0], [never; 3], [never, 3.0, never]].concat();
    for temperature in [0.0, 1.0] {
        let draws = [Draw { seed: 1, counter: 2, temperature, top_p: 0.5, min_p: 0.0, top_k: 2 }; 4];
        for dtype in TYPES {
            assert_eq!(draw(dtype, &Numbers::new(dtype, &rows), &draws, 1), [NONE, NONE, NONE, 1]);
        }
    }
}
