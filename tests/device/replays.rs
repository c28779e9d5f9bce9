//! Steps of decoding that are recorded and replayed, against the same steps computed one by one.

use std::collections::HashMap;

use candle_core::{DType, Tensor};
use eurus::device::Choice;
use eurus::engine::request::{SamplingParams, TokenId};
use eurus::engine::step::{Executor, Last, Outcome, Rows, StepPlan};
use eurus::runner::Runner;

#[cfg(feature = "emulator")]
use crate::models::in_small_process;
use crate::models::{BLOCK_SIZE, Track, draw, execute, random, random_with, runner, texts, tracks};
use crate::{choice, device};

/// Whether prompts are computed before anything else, or stand for as many zeros in the cache, which takes no time.
#[derive(Clone, Copy, PartialEq)]
enum Prompts {
    Computed,
    Zeros,
}

/// What each step gives to prompts of `lens` tokens: `steps` tokens to the first, one less to each of the next.
fn decode(runner: &mut Runner, lens: &[usize], steps: usize, prompts: Prompts) -> Vec<Vec<Outcome>> {
    let texts: Vec<_> = texts(lens.len(), 800).iter().zip(lens).map(|(text, &len)| text[..len].to_vec()).collect();
    let blocks_each = (lens.iter().max().unwrap() + steps).div_ceil(BLOCK_SIZE);
    let mut tracks = tracks(&texts, blocks_each);
    let params = |id: usize| SamplingParams {
        temperature: [0.0, 0.9][id % 2],
        top_k: id % 3 * 20,
        seed: id as u64,
        logprobs: id.is_multiple_of(3).then_some(0),
        ..SamplingParams::default()
    };
    let mut history = Vec::new();
    for step in 0..steps {
        let running = tracks.iter().enumerate().take(lens.len().min(steps - step));
        let chunk = |(id, track): (usize, &Track)| {
            let end = track.tokens.len();
            let start = if step == 0 && prompts == Prompts::Computed { 0 } else { end - 1 };
            track.chunk(start, Rows::Nothing, draw(end, params(id)))
        };
        let (plan, mut told) = (StepPlan { chunks: running.map(chunk).collect() }, false);
        let outcomes = runner.execute(&plan, &mut || told = true).unwrap().outcomes;
        assert!(told);
        for (track, outcome) in tracks.iter_mut().zip(&outcomes) {
            let Last::Token(token, _) = outcome.last else { panic!("{outcome:?}") };
            track.tokens.push(token);
        }
        history.push(outcomes);
    }
    history
}

/// The tokens of one sequence, and their log-probabilities where they were asked for.
fn of_sequence(history: &[Vec<Outcome>], sequence: usize) -> Vec<(TokenId, Option<f32>)> {
    let read = |outcome: &Outcome| match &outcome.last {
        Last::Token(token, logprob) => (*token, logprob.as_ref().map(|logprob| logprob.logprob)),
        other => panic!("{other:?}"),
    };
    history.iter().filter_map(|outcomes| outcomes.get(sequence)).map(read).collect()
}

/// Replays `steps` of decoding after prompts of `lens` tokens `count` times, and gives what computing all of them gives.
#[track_caller]
fn check(lens: &[usize], steps: usize, prompts: Prompts, count: u64) {
    let Some(device) = device() else { return };
    for (dtype, head_dim, most) in [(DType::F32, 64, 2e-5), (DType::BF16, 64, 0.1), (DType::F16, 128, 0.02)] {
        let runner = || runner(random(head_dim, dtype, &device), 400);
        let (mut replayed, mut computed) = (runner(), runner().without_replays());
        let [on, off] = [&mut replayed, &mut computed].map(|runner| decode(runner, lens, steps, prompts));
        assert_eq!((replayed.replayed(), computed.replayed()), (count, 0));
        for sequence in 0..lens.len() {
            let [on, off] = [&on, &off].map(|history| of_sequence(history, sequence));
            for ((token, logprob), (expected, expected_logprob)) in on.into_iter().zip(off) {
                // A GPU's library adds up in another order where a batch is filled up: in two bytes a sequence may go another way.
                if token != expected && dtype != DType::F32 && choice() == Choice::Cuda {
                    break;
                }
                assert_eq!((token, logprob.is_some()), (expected, expected_logprob.is_some()), "{dtype:?}, {sequence}");
                let difference = logprob.unwrap_or(0.0) - expected_logprob.unwrap_or(0.0);
                assert!(difference.abs() < most, "{dtype:?}, sequence {sequence}: differs by {difference}");
            }
        }
    }
}

/// More rows than a kernel for few takes, and fewer and fewer of them.
#[test]
fn replayed_steps_give_what_others_give() {
    // 12 rows four times, of which 11, 11, 10 and 9 are somebody's; 8, of which 7, 6 and 5 are; 4, of which 3 are.
    check(&[40, 3, 20, 9, 1, 30, 8, 16, 5, 12, 2], 14, Prompts::Computed, 8);
}

/// From three parts of attention to four in one recording.
#[test]
fn contexts_grow_in_a_replayed_step() {
    check(&[764, 20], 8, Prompts::Zeros, 6);
}

#[test]
fn a_row_of_a_replayed_step_that_is_no_distribution_fails_alone() {
    const POISON: TokenId = 299;
    let Some(device) = device() else { return };
    let poison = |tensors: &mut HashMap<String, Tensor>| {
        let weight = tensors.get_mut("model.embed_tokens.weight").unwrap();
        let row = (weight.narrow(0, 0, 1).unwrap() * f64::NAN).unwrap();
        *weight = Tensor::cat(&[&weight.narrow(0, 0, POISON as usize).unwrap(), &row], 0).unwrap();
    };
    let mut runner = runner(random_with(poison, 64, DType::BF16, &device), 60);
    let mut tracks = tracks(&texts(3, 5), 5);
    let mut step = |tracks: &[Track], start: fn(&Track) -> usize| {
        let chunk = |track: &Track| {
            track.chunk(start(track), Rows::Nothing, draw(track.tokens.len(), SamplingParams::default()))
        };
        execute(&mut runner, tracks.iter().map(chunk).collect())
    };
    let last = |track: &Track| track.tokens.len() - 1;
    step(&tracks, |_| 0);
    for _ in 0..3 {
        tracks.iter_mut().for_each(|track| track.tokens.push(7));
        assert!(step(&tracks, last).iter().all(|outcome| matches!(outcome.last, Last::Token(..))));
    }
    [7, POISON, 7].into_iter().zip(&mut tracks).for_each(|(token, track)| track.tokens.push(token));
    let outcomes = step(&tracks, last);
    let [first, broken, third] = outcomes.as_slice() else { panic!("{outcomes:?}") };
    assert!(matches!(&broken.last, Last::Failed(error) if error.to_string().contains("NaN")), "{broken:?}");
    assert!([first, third].iter().all(|outcome| matches!(outcome.last, Last::Token(..))), "{outcomes:?}");
    // The last and two of the three before.
    assert_eq!(runner.replayed(), 3);
}

/// It is computed as any other. In a process of its own, whose device is small.
#[cfg(feature = "emulator")]
#[test]
fn a_step_that_finds_no_memory_to_be_recorded_is_not() {
    const NAME: &str = "replays::a_step_that_finds_no_memory_to_be_recorded_is_not";
    if !in_small_process(NAME) {
        return;
    }
    let device = eurus::device::open(Choice::Emulator).unwrap();
    let (mut runner, mut computed) = (runner(random(64, DType::F32, &device), 4), {
        let runner = runner(random(64, DType::F32, &device), 4);
        runner.without_replays()
    });
    let mut track = tracks(&texts(1, 20), 4).remove(0);
    let mut step = |start: usize| {
        let end = track.tokens.len();
        let chunk = || vec![track.chunk(start, Rows::Nothing, draw(end, SamplingParams::default()))];
        let [found, expected] = [&mut runner, &mut computed].map(|runner| execute(runner, chunk()).remove(0).last);
        assert_eq!(found, expected);
        track.tokens.push(5);
        runner.replayed()
    };
    step(0);
    step(20);
    let mut filled = Vec::new();
    for bytes in [1 << 20, 1 << 16, 1 << 12] {
        while let Ok(tensor) = Tensor::zeros(bytes, DType::U8, &device) {
            filled.push(tensor);
        }
    }
    // A step needs some of this at a time, and all that it needs at times is more.
    filled.truncate(filled.len() - 2);
    assert_eq!(step(21), 0);
    drop(filled);
    assert_eq!(step(22), 0);
}
