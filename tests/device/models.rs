//! Whole models through the runner: what transformers gave for the checkpoints of tests/fixtures/serve, the same model on the CPU, and
//! one sequence alone against the same in company.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use eurus::engine::request::{SamplingParams, TokenId};
use eurus::engine::step::{BlockId, Chunk, Draw, Executor, Last, Outcome, Rows, SequenceId, StepPlan, Want};
#[cfg(feature = "emulator")]
use eurus::error::Error;
use eurus::model::Model;
use eurus::model::config::{HeadKind, ModelConfig};
use eurus::model::random::random_tensors;
use eurus::model::weights::Weights;
use eurus::ops::rope::RopeTable;
use eurus::runner::Runner;
use eurus::runner::kv_cache::KvCache;

use crate::device;

pub(crate) const BLOCK_SIZE: usize = 8;

/// The fixtures: cargo runs tests in the package's folder.
fn presets() -> Vec<PathBuf> {
    let folders = std::fs::read_dir("tests/fixtures/serve").unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<PathBuf> = folders.collect();
    folders.sort();
    assert_eq!(folders.len(), 5);
    folders
}

fn expected(folder: &Path) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(folder.join("expected.json")).unwrap()).unwrap()
}

fn prompts(folder: &Path) -> Vec<Vec<TokenId>> {
    serde_json::from_value(expected(folder)["prompts"].clone()).unwrap()
}

/// The checkpoint in `folder`, its tensors converted to `dtype` if there is one, with the rotary frequencies of the reference, which
/// rounded them to the type of the checkpoint.
fn load(folder: &Path, dtype: Option<DType>, device: &Device) -> Model {
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let config = ModelConfig::parse(&config, None).unwrap();
    let mut tensors = HashMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|ending| ending == "safetensors") && !path.ends_with("expected.safetensors") {
            tensors.extend(candle_core::safetensors::load(&path, &Device::Cpu).unwrap());
        }
    }
    if let Some(dtype) = dtype {
        tensors.values_mut().for_each(|tensor| *tensor = tensor.to_dtype(dtype).unwrap());
    }
    let round: fn(f32) -> f32 = match expected(folder)["dtype"].as_str().unwrap() {
        "torch.float16" => |x| half::f16::from_f32(x).to_f32(),
        "torch.bfloat16" => |x| half::bf16::from_f32(x).to_f32(),
        _ => |x| x,
    };
    let frequency = |i: usize| (config.rope_theta as f32).powf(-2.0 * i as f32 / config.head_dim as f32);
    let frequencies: Vec<f32> = (0..config.head_dim / 2).map(frequency).map(round).collect();
    let table = RopeTable::with_frequencies(&frequencies, config.positions_max, device).unwrap();
    let Model { config, decoder, head } = Model::load(config, Weights::new(tensors), device).unwrap();
    Model { decoder: decoder.with_rope(table), config, head }
}

pub(crate) fn runner(model: Model, block_count: usize) -> Runner {
    let cache = KvCache::new(&model, block_count, BLOCK_SIZE).unwrap();
    Runner::new(model, cache)
}

/// A sequence with scattered blocks of its own among those of `count`.
#[derive(Clone)]
pub(crate) struct Track {
    id: u64,
    pub(crate) tokens: Vec<TokenId>,
    blocks: Vec<BlockId>,
}

pub(crate) fn tracks(prompts: &[Vec<TokenId>], blocks_each: usize) -> Vec<Track> {
    let track = |(id, tokens): (usize, &Vec<TokenId>)| {
        let blocks = (0..blocks_each).rev().map(|index| BlockId((index * prompts.len() + id) as u32)).collect();
        Track { id: id as u64, tokens: tokens.clone(), blocks }
    };
    prompts.iter().enumerate().map(track).collect()
}

impl Track {
    pub(crate) fn chunk(&self, start: usize, rows: Rows, want: Want) -> Chunk {
        let (id, blocks) = (SequenceId(self.id), self.blocks.clone());
        Chunk { id, start, tokens: self.tokens[start..].to_vec(), blocks, rows, want }
    }
}

pub(crate) fn draw(position: usize, params: SamplingParams) -> Want {
    let params = Arc::new(params);
    Want::Token(Draw { params, position, generated_count: 0, history: Vec::new(), prompt_len: 0 })
}

pub(crate) fn execute(runner: &mut Runner, chunks: Vec<Chunk>) -> Vec<Outcome> {
    runner.execute(&StepPlan { chunks }, &mut || ()).unwrap().outcomes
}

/// The log-probabilities of the tokens of all prompts, then `steps` tokens of each, all sequences side by side.
fn generate(
    model: Model,
    prompts: &[Vec<TokenId>],
    steps: usize,
    params: &SamplingParams,
) -> (Vec<Vec<f32>>, Vec<Vec<TokenId>>) {
    let blocks_each = (prompts.iter().map(Vec::len).max().unwrap() + steps).div_ceil(BLOCK_SIZE);
    let mut runner = runner(model, prompts.len() * blocks_each);
    let mut tracks = tracks(prompts, blocks_each);
    let whole = |track: &Track| {
        let rows = Rows::LogProbs { targets: track.tokens[1..].to_vec(), top: 1 };
        track.chunk(0, rows, draw(track.tokens.len(), params.clone()))
    };
    let mut outcomes = execute(&mut runner, tracks.iter().map(whole).collect());
    let logprobs = outcomes.iter().map(|outcome| outcome.logprobs.iter().map(|entry| entry.logprob).collect());
    let logprobs = logprobs.collect();
    for step in 0..steps {
        for (track, outcome) in tracks.iter_mut().zip(&outcomes) {
            let Last::Token(token, _) = outcome.last else { panic!("{outcome:?}") };
            track.tokens.push(token);
        }
        let next = |track: &Track| {
            let end = track.tokens.len();
            track.chunk(end - 1, Rows::Nothing, draw(end, params.clone()))
        };
        if step + 1 < steps {
            outcomes = execute(&mut runner, tracks.iter().map(next).collect());
        }
    }
    let drawn = tracks.iter().zip(prompts).map(|(track, prompt)| track.tokens[prompt.len()..].to_vec());
    (logprobs, drawn.collect())
}

/// The reward at every token of each prompt.
fn rewards(model: Model, prompts: &[Vec<TokenId>]) -> Vec<Vec<f32>> {
    let blocks_each = prompts.iter().map(Vec::len).max().unwrap().div_ceil(BLOCK_SIZE);
    let mut runner = runner(model, prompts.len() * blocks_each);
    let tracks = tracks(prompts, blocks_each);
    let outcomes = execute(&mut runner, tracks.iter().map(|track| track.chunk(0, Rows::Scores, Want::Score)).collect());
    let scores = outcomes.into_iter().map(|outcome| {
        assert_eq!(outcome.last, Last::Score(*outcome.scores.last().unwrap()));
        outcome.scores
    });
    scores.collect()
}

fn largest_difference(found: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    let pairs = found.iter().flatten().zip(expected.iter().flatten());
    assert_eq!(found.iter().map(Vec::len).sum::<usize>(), expected.iter().map(Vec::len).sum::<usize>());
    pairs.map(|(found, expected)| (found - expected).abs()).fold(0.0, f32::max)
}

/// In float32, whatever the checkpoint is stored in.
#[test]
fn every_preset_gives_the_tokens_and_numbers_of_transformers() {
    let Some(device) = device() else { return };
    for folder in presets() {
        let (name, prompts) = (folder.file_name().unwrap().to_str().unwrap(), prompts(&folder));
        let model = load(&folder, Some(DType::F32), &device);
        if model.config.head == HeadKind::Reward {
            let expected: Vec<f32> = serde_json::from_value(expected(&folder)["rewards"].clone()).unwrap();
            let found = rewards(model, &prompts);
            let pairs = found.iter().zip(&expected);
            let worst = pairs.map(|(found, expected)| (found[found.len() - 1] - expected).abs()).fold(0.0, f32::max);
            println!("{name}: rewards differ by at most {worst:.1e}");
            assert!(worst < 2e-4, "{name}: rewards differ by {worst}");
            continue;
        }
        let tensors = candle_core::safetensors::load(folder.join("expected.safetensors"), &Device::Cpu).unwrap();
        let (logprobs, drawn) = generate(model, &prompts, 24, &SamplingParams::default());
        let reference = |i: usize| {
            tensors.get(&format!("logprobs_{i}")).map(|tensor| tensor.flatten_all().unwrap().to_vec1().unwrap())
        };
        let reference: Vec<Vec<f32>> = (0..prompts.len()).map(|i| reference(i).unwrap_or_default()).collect();
        let worst = largest_difference(&logprobs, &reference);
        println!("{name}: log-probabilities differ by at most {worst:.1e}");
        assert!(worst < 2e-4, "{name}: log-probabilities differ by {worst}");
        for (i, drawn) in drawn.iter().enumerate() {
            let expected: Vec<i64> = tensors[&format!("greedy_{i}")].to_vec1().unwrap();
            assert_eq!(drawn.iter().map(|&token| i64::from(token)).collect::<Vec<_>>(), expected, "{name}, prompt {i}");
        }
    }
}

/// In 2 bytes a number the same checkpoint is computed with activations that are rounded in every operation: log-probabilities within
/// a few hundredths of those that the CPU computes from the same weights in float32. Not so for experts: rounding decides which of two
/// nearly equal ones computes a row, and then other numbers come out.
#[test]
fn presets_of_two_bytes_stay_near_the_cpu() {
    let Some(device) = device() else { return };
    for folder in presets() {
        let (name, prompts) = (folder.file_name().unwrap().to_str().unwrap(), prompts(&folder));
        for (dtype, most) in [(DType::BF16, 0.12), (DType::F16, 0.02)] {
            let [on, off] = [&device, &Device::Cpu].map(|device| load(&folder, Some(dtype), device));
            if on.config.experts.is_some() {
                continue;
            }
            let worst = match on.config.head {
                HeadKind::Reward => largest_difference(&rewards(on, &prompts), &rewards(off, &prompts)),
                HeadKind::Language => {
                    let params = SamplingParams::default();
                    let [on, off] = [on, off].map(|model| generate(model, &prompts, 2, &params).0);
                    largest_difference(&on, &off)
                }
            };
            println!("{name} in {dtype:?}: differs by at most {worst:.1e}");
            assert!(worst < most, "{name} in {dtype:?}: differs by {worst}");
        }
    }
}

/// A model whose heads have the size that tensor cores take.
pub(crate) fn random(head_dim: usize, dtype: DType, device: &Device) -> Model {
    random_with(|_| {}, head_dim, dtype, device)
}

/// [`random`] with tensors changed.
pub(crate) fn random_with(
    change: impl Fn(&mut HashMap<String, Tensor>),
    head_dim: usize,
    dtype: DType,
    device: &Device,
) -> Model {
    let json = format!(
        r#"{{"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": {head_dim},
        "intermediate_size": 96, "vocab_size": 300, "max_position_embeddings": 900, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "sliding_window": null, "tie_word_embeddings": false}}"#
    );
    let config = ModelConfig::parse(&json, None).unwrap();
    let mut tensors = random_tensors(&config, 3).unwrap();
    for (name, tensor) in &mut tensors {
        // Ten times the usual deviation, for scores and logits that matter.
        let scale = if name.ends_with("norm.weight") { 1.0 } else { 10.0 };
        *tensor = (&*tensor * scale).unwrap().to_dtype(dtype).unwrap();
    }
    change(&mut tensors);
    Model::load(config, Weights::new(tensors), device).unwrap()
}

pub(crate) fn texts(count: usize, len: usize) -> Vec<Vec<TokenId>> {
    (0..count).map(|i| (0..len + 13 * i).map(|at| ((at * at + 7 * i) % 300) as u32).collect()).collect()
}

#[test]
fn heads_for_tensor_cores_stay_near_the_cpu() {
    let Some(device) = device() else { return };
    for (dtype, most) in [(DType::BF16, 0.25), (DType::F16, 0.04)] {
        for head_dim in [64, 128] {
            let prompts = texts(3, 70);
            let params = SamplingParams::default();
            let [on, off] =
                [&device, &Device::Cpu].map(|device| generate(random(head_dim, dtype, device), &prompts, 1, &params));
            let worst = largest_difference(&on.0, &off.0);
            println!("heads of {head_dim} in {dtype:?}: log-probabilities differ by at most {worst:.1e}");
            assert!(worst < most, "heads of {head_dim} in {dtype:?}: {worst}");
        }
    }
}

/// Alone, a sequence has the same tokens as among others, and log-probabilities within what the library's other order of sums for
/// another number of rows changes.
#[test]
fn a_sequence_is_alone_what_it_is_in_company() {
    let Some(device) = device() else { return };
    for (dtype, most) in [(DType::F32, 2e-5), (DType::BF16, 0.1)] {
        let prompts = texts(5, 20);
        let params = SamplingParams { temperature: 0.8, seed: 11, ..SamplingParams::default() };
        let (together, tokens) = generate(random(64, dtype, &device), &prompts, 6, &params);
        for (i, prompt) in prompts.iter().enumerate() {
            let (alone, drawn) = generate(random(64, dtype, &device), std::slice::from_ref(prompt), 6, &params);
            let worst = largest_difference(&alone, &together[i..=i]);
            assert!(worst <= most, "{dtype:?}, sequence {i}: log-probabilities differ by {worst}");
            if dtype == DType::F32 {
                assert_eq!(drawn[0], tokens[i], "sequence {i}");
            }
        }
    }
}

/// Whether this process has a device of 64 MiB, which the test `name` may fill: other tests need their memory, and a GPU's would be too
/// much to fill. If not, the test has run in a process that has one.
#[cfg(feature = "emulator")]
pub(crate) fn in_small_process(name: &str) -> bool {
    const SIZE: &str = "EURUS_EMULATOR_MIB";
    if std::env::var_os(SIZE).is_some() {
        return true;
    }
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    let output = child.args(["--exact", name, "--nocapture"]).env(SIZE, "64").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    false
}

/// A step that finds no memory is an error that says so, and the next one works.
#[cfg(feature = "emulator")]
#[test]
fn a_step_without_memory_is_unavailable_and_the_next_one_is_not() {
    if !in_small_process("models::a_step_without_memory_is_unavailable_and_the_next_one_is_not") {
        return;
    }
    let device = eurus::device::open(eurus::device::Choice::Emulator).unwrap();
    let mut runner = runner(random(64, DType::F32, &device), 100);
    let track = tracks(&texts(1, 200), 60).remove(0);
    let step = |runner: &mut Runner| {
        let chunks = vec![track.chunk(0, Rows::Nothing, draw(200, SamplingParams::default()))];
        runner.execute(&StepPlan { chunks }, &mut || ())
    };
    let expected = step(&mut runner).unwrap();
    let mut filled = Vec::new();
    for bytes in [16 << 20, 1 << 20, 1 << 12] {
        while let Ok(tensor) = Tensor::zeros(bytes, DType::U8, &device) {
            filled.push(tensor);
        }
    }
    let error = step(&mut runner).unwrap_err();
    drop(filled);
    assert!(matches!(error, Error::Unavailable(_)), "{error}");
    assert_eq!(step(&mut runner).unwrap(), expected);
}
