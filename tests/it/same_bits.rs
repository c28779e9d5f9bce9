//! The promise that nothing beside a request changes its answer: whatever else runs, however the prompt is chunked,
//! reused, preempted or interrupted, and with any number of threads, tokens, log-probabilities and rewards are, bit for
//! bit, those of the same request alone. Random mixes of requests against real (tiny) models.

use std::path::Path;
use std::sync::Arc;

use candle_core::DType;
use eurus::engine::{
    BlockPool, Counters, Event, Executor, Limits, Request, SamplingParams, Scheduler, ScoreRows, Task, TokenId,
    TokenLogProb,
};
use eurus::model::Model;
use eurus::model::config::ModelConfig;
use eurus::ops::parallel;
use eurus::runner::Runner;
use eurus::runner::kv_cache::KvCache;
use tokio::sync::mpsc::{Receiver, channel};

use crate::checkpoint::gguf;
use crate::parity::{load_changed, runner};

const MIXES: u64 = 50;
const VOCAB: u64 = 512;
const LEN_MAX: usize = 350;
const BLOCK_SIZES: [usize; 3] = [3, 8, 16];

/// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `low..=high`.
    fn within(&mut self, low: usize, high: usize) -> usize {
        low + (self.next() % (high - low + 1) as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.within(1, n) == 1
    }

    fn pick<T: Copy>(&mut self, options: &[T]) -> T {
        options[self.within(0, options.len() - 1)]
    }

    fn tokens(&mut self, len: usize) -> Vec<TokenId> {
        (0..len).map(|_| (3 + self.next() % (VOCAB - 3)) as TokenId).collect()
    }
}

/// One request of a mix and what happens to it.
#[derive(Debug, Clone)]
struct Ask {
    prompt: Vec<TokenId>,
    task: Task,
    /// Before which step it arrives.
    arrival: usize,
    /// The receiver is dropped once it has got this many events.
    leaves_after: Option<usize>,
    /// The receiver is looked at every so many steps.
    patience: usize,
}

/// Requests and the bounds they run under.
#[derive(Debug)]
struct Mix {
    asks: Vec<Ask>,
    limits: Limits,
    block_count: usize,
    block_size: usize,
    threads: usize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Policy,
    Reward,
}

fn params(random: &mut Random) -> SamplingParams {
    let mut params = SamplingParams {
        temperature: random.pick(&[0.0, 0.0, 0.7, 1.0, 1.5]),
        seed: random.next(),
        max_tokens: random.within(1, 24),
        stop_token_ids: vec![2, random.within(3, 511) as TokenId],
        logprobs: random.pick(&[None, Some(0), Some(3)]),
        prompt_logprobs: random.pick(&[None, None, None, None, Some(0), Some(2)]),
        ..SamplingParams::default()
    };
    if random.one_in(3) {
        params.top_p = random.pick(&[0.5, 0.9, 0.99]);
        params.top_k = random.pick(&[0, 5, 40]);
        params.min_p = random.pick(&[0.0, 0.02]);
    }
    if random.one_in(4) {
        params.repetition_penalty = 1.2;
        params.presence_penalty = random.pick(&[0.0, 0.5]);
        params.frequency_penalty = random.pick(&[0.0, 0.3]);
        params.min_tokens = random.within(0, 5);
        params.logit_bias = vec![(random.within(3, 511) as TokenId, 3.0)];
    }
    params
}

fn mix(kind: Kind, random: &mut Random) -> Mix {
    let shared = random.tokens(300);
    let count = random.within(2, 7);
    let asks: Vec<Ask> = (0..count)
        .map(|_| {
            // Mostly short, sometimes long.
            let most = random.pick(&[10, 40, 40, 40, 40, 60, 60, 300]);
            let len = random.within(1, most);
            let shared_len = if random.one_in(3) { 0 } else { random.within(len / 2, len) };
            let mut prompt = shared[..shared_len].to_vec();
            prompt.extend(random.tokens(len - shared_len));
            let task = match kind {
                Kind::Policy => Task::Generate(Arc::new(params(random))),
                Kind::Reward => Task::Score(random.pick(&[ScoreRows::Last, ScoreRows::Last, ScoreRows::All])),
            };
            let most = if kind == Kind::Policy { 6 } else { 0 };
            let leaves_after = random.one_in(6).then(|| random.within(0, most));
            Ask { prompt, task, arrival: random.within(0, 12), leaves_after, patience: random.pick(&[1, 1, 1, 4, 9]) }
        })
        .collect();
    let block_size = random.pick(&BLOCK_SIZES);
    let needed = asks.iter().map(|ask| (ask.prompt.len() + 24).div_ceil(block_size)).max().unwrap();
    let limits = Limits {
        step_tokens: random.pick(&[2, 7, 16, 33, 64, 512]),
        running_max: random.within(1, 8),
        waiting_max: 100,
        len_max: LEN_MAX,
    };
    // Room for the largest alone, or for a little more: sequences that grow take blocks from each other.
    let block_count = needed + random.pick(&[0, 0, 1, 3, 200]);
    Mix { asks, limits, block_count, block_size, threads: random.within(1, 2) }
}

/// What each ask of `mix` got.
#[track_caller]
fn run(runner: &mut Runner, mix: &Mix) -> (Vec<Vec<Event>>, Counters) {
    parallel::set_threads(mix.threads);
    let mut scheduler = Scheduler::new(mix.limits, BlockPool::new(mix.block_count, mix.block_size));
    let mut receivers: Vec<Option<Receiver<Event>>> = mix.asks.iter().map(|_| None).collect();
    let mut events: Vec<Vec<Event>> = mix.asks.iter().map(|_| Vec::new()).collect();
    for step in 0.. {
        assert!(step < 20_000, "no end: {mix:?}");
        for (ask, receiver) in mix.asks.iter().zip(&mut receivers).filter(|(ask, _)| ask.arrival == step) {
            let (reply, events) = channel(3);
            *receiver = Some(events);
            scheduler.add(Request { prompt: ask.prompt.clone(), task: ask.task.clone(), reply }).unwrap();
        }
        let plan = scheduler.plan();
        if !plan.chunks.is_empty() {
            let output = runner.execute(&plan, &mut || ()).unwrap();
            scheduler.commit(&plan, output);
            scheduler.tell();
        }
        for (i, ask) in mix.asks.iter().enumerate().filter(|(_, ask)| step % ask.patience == 0) {
            listen(ask, &mut receivers[i], &mut events[i]);
        }
        if scheduler.is_idle() && mix.asks.iter().all(|ask| ask.arrival <= step) {
            break;
        }
    }
    // What was sent after the last look.
    for (i, ask) in mix.asks.iter().enumerate() {
        listen(ask, &mut receivers[i], &mut events[i]);
    }
    assert_eq!(scheduler.pool().used_count(), 0);
    (events, scheduler.counters())
}

/// Takes what has arrived, and leaves when that is enough for `ask`.
fn listen(ask: &Ask, receiver: &mut Option<Receiver<Event>>, events: &mut Vec<Event>) {
    while ask.leaves_after != Some(events.len()) {
        match receiver.as_mut().map(Receiver::try_recv) {
            Some(Ok(event)) => events.push(event),
            _ => return,
        }
    }
    *receiver = None;
}

/// An event as numbers that are equal only if all bits are; how many tokens were reused is left out.
fn bits(event: &Event) -> Vec<u64> {
    let float = |x: f32| u64::from(x.to_bits());
    let logprob = |entry: &TokenLogProb| {
        let mut numbers = vec![u64::from(entry.token), float(entry.logprob)];
        numbers.extend(entry.top.iter().flat_map(|&(token, x)| [u64::from(token), float(x)]));
        numbers
    };
    match event {
        Event::Prompt(entries) => std::iter::once(1).chain(entries.iter().flat_map(logprob)).collect(),
        Event::Token { id, logprob: None } => vec![2, u64::from(*id)],
        Event::Token { id, logprob: Some(entry) } => [vec![3, u64::from(*id)], logprob(entry)].concat(),
        Event::Scores(scores) => std::iter::once(4).chain(scores.iter().map(|&x| float(x))).collect(),
        Event::Score(score) => vec![5, float(*score)],
        Event::Done(finish, usage) => {
            let finish = match finish {
                eurus::engine::Finish::Stop(token) => 10 + u64::from(*token),
                eurus::engine::Finish::Length => 0,
                eurus::engine::Finish::Scored => 1,
            };
            vec![6, finish, usage.prompt_tokens as u64, usage.completion_tokens as u64]
        }
        Event::Failed(error) => panic!("{error}"),
    }
}

/// The same request with nothing beside it, in whole chunks, under bounds that never matter.
fn alone(runner: &mut Runner, ask: &Ask) -> Vec<Event> {
    let ask = Ask { arrival: 0, leaves_after: None, patience: 1, ..ask.clone() };
    let limits = Limits { step_tokens: 512, running_max: 8, waiting_max: 8, len_max: LEN_MAX };
    let mix = Mix { asks: vec![ask], limits, block_count: 40, block_size: 16, threads: 1 };
    run(runner, &mix).0.remove(0)
}

#[track_caller]
fn check(preset: &str, kind: Kind) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/serve").join(preset);
    let change = |config: &mut ModelConfig| {
        config.positions_max = LEN_MAX;
        // Longer than a tile of the attention, so that where tiles begin would be seen.
        config.window = config.window.map(|_| 90);
    };
    check_model(preset, kind, || load_changed(&folder, change));
}

#[track_caller]
fn check_model(preset: &str, kind: Kind, model: impl Fn() -> Model) {
    check_runner(preset, kind, |block_count, block_size| runner(model(), block_count, block_size));
}

#[track_caller]
fn check_runner(preset: &str, kind: Kind, runner: impl Fn(usize, usize) -> Runner) {
    let mut reference = runner(40, 16);
    let mut runners = BLOCK_SIZES.map(|block_size| runner((LEN_MAX + 24) / block_size + 201, block_size));
    let mut total = Counters::default();
    let mut whole = 0;
    for number in 0..MIXES {
        let mut random = Random((number << 32) + preset.bytes().map(u64::from).sum::<u64>());
        let mix = mix(kind, &mut random);
        let index = BLOCK_SIZES.iter().position(|&size| size == mix.block_size).unwrap();
        let (found, counters) = run(&mut runners[index], &mix);
        total.preemptions += counters.preemptions;
        total.prefix_hits += counters.prefix_hits;
        total.cancelled += counters.cancelled;
        for (i, (ask, found)) in mix.asks.iter().zip(&found).enumerate() {
            let expected = alone(&mut reference, ask);
            let found: Vec<_> = found.iter().map(bits).collect();
            let expected: Vec<_> = expected.iter().map(bits).collect();
            // Whoever leaves early has seen the beginning.
            let len = ask.leaves_after.map_or(expected.len(), |count| count.min(expected.len()));
            assert_eq!(found, expected[..len], "{preset}, mix {number}, request {i}: {mix:?}");
            whole += usize::from(len == expected.len());
        }
    }
    eprintln!("{preset}: {whole} whole answers, {total:?}");
    // The mixes are worth nothing if they run undisturbed.
    assert!(total.prefix_hits > 400 && total.cancelled > 10, "{total:?}");
    assert!(kind == Kind::Reward || total.preemptions > 10, "{total:?}");
}

#[test]
fn a_windowed_policy_answers_the_same_in_any_company() {
    check("mistral-window", Kind::Policy);
}

#[test]
fn a_bf16_policy_answers_the_same_in_any_company() {
    check("mistral-bf16", Kind::Policy);
}

#[test]
fn a_policy_of_experts_answers_the_same_in_any_company() {
    check("mixtral", Kind::Policy);
}

#[test]
fn a_policy_of_quantised_experts_answers_the_same_in_any_company() {
    check_model("quantised experts", Kind::Policy, || gguf::model("experts_q4_k_m.gguf"));
}

#[test]
fn a_policy_that_multiplies_in_bf16_answers_the_same_in_any_company() {
    check_model("bf16", Kind::Policy, || {
        let mut model = gguf::model("bf16.gguf");
        // Nothing is packed where the processor does not multiply bf16; then this is the test of float32.
        model.pack().unwrap();
        model
    });
}

#[test]
fn a_policy_with_a_cache_of_bf16_answers_the_same_in_any_company() {
    check_runner("cache in bf16", Kind::Policy, |block_count, block_size| {
        let model = gguf::model("bf16.gguf");
        let cache = KvCache::of(&model, DType::BF16, block_count, block_size).unwrap();
        Runner::new(model, cache)
    });
}

#[test]
fn a_policy_whose_attention_multiplies_in_bf16_answers_the_same_in_any_company() {
    check_runner("attention in bf16", Kind::Policy, |block_count, block_size| {
        let mut model = gguf::model("bf16.gguf");
        model.pack().unwrap();
        let cache = KvCache::of(&model, DType::BF16, block_count, block_size).unwrap();
        Runner::new(model, cache)
    });
}

#[test]
fn a_policy_with_one_key_head_answers_the_same_in_any_company() {
    check("llama-eos-list", Kind::Policy);
}

#[test]
fn rewards_are_the_same_in_any_company() {
    check("reward", Kind::Reward);
}

#[test]
fn a_policy_in_q8_0_answers_the_same_in_any_company() {
    check_model("q8_0", Kind::Policy, || gguf::model("q8_0.gguf"));
}

#[test]
fn a_policy_in_q4_k_and_q6_k_answers_the_same_in_any_company() {
    check_model("q4_k_m", Kind::Policy, || gguf::model("q4_k_m.gguf"));
}
