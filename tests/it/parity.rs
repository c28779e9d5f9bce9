//! Numbers against other implementations: log-probabilities, logits, greedy tokens and rewards that transformers gave
//! for tiny checkpoints (`tests/fixtures/serve`, or the folder in `EURUS_SERVE_FIXTURES`), and candle's own Mistral.
//! And against ourselves: packed, paged, chunked and token by token give the same bits.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use eurus::engine::request::{SamplingParams, TokenId};
use eurus::engine::step::{BlockId, Chunk, Draw, Executor, Last, Outcome, Rows, SequenceId, StepPlan, Want};
use eurus::error::Result;
use eurus::model::Model;
use eurus::model::config::{HeadKind, ModelConfig};
use eurus::model::decoder::Attention;
use eurus::model::weights::Weights;
use eurus::ops::attention::inputs::Inputs;
use eurus::ops::attention::packed_attention;
use eurus::ops::rope::{RopeTable, Turn, split_rope};
use eurus::runner::Runner;
use eurus::runner::batch::{Bounds, ForwardBatch};
use eurus::runner::kv_cache::KvCache;

/// Bound on log-probabilities and logits: transformers adds up in another order.
const DIFFERENCE_MAX: f32 = 2e-4;

/// The checkpoint in `folder`, without going through `eurus::checkpoint`.
pub(crate) fn load(folder: &Path) -> Result<Model> {
    let read = |name: &str| std::fs::read_to_string(folder.join(name));
    let config = ModelConfig::parse(&read("config.json").unwrap(), read("generation_config.json").ok().as_deref())?;
    Model::load(config, weights(folder), &Device::Cpu)
}

/// As [`load`], with another configuration of the same tensors.
pub(crate) fn load_changed(folder: &Path, change: impl FnOnce(&mut ModelConfig)) -> Model {
    let json = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let mut config = ModelConfig::parse(&json, None).unwrap();
    change(&mut config);
    Model::load(config, weights(folder), &Device::Cpu).unwrap()
}

fn weights(folder: &Path) -> Weights {
    let mut tensors = HashMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if name.starts_with("model") && name.ends_with(".safetensors") {
            tensors.extend(candle_core::safetensors::load(&path, &Device::Cpu).unwrap());
        }
    }
    Weights::new(tensors)
}

/// A runner over a cache of its own.
pub(crate) fn runner(model: Model, block_count: usize, block_size: usize) -> Runner {
    let cache = KvCache::new(&model, block_count, block_size).unwrap();
    Runner::new(model, cache)
}

fn presets() -> Vec<PathBuf> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/serve");
    let root = std::env::var_os("EURUS_SERVE_FIXTURES").map_or(fixtures, PathBuf::from);
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.retain(|folder| folder.join("expected.json").exists());
    folders.sort();
    assert!(!folders.is_empty());
    folders
}

/// The presets, by name.
fn models() -> Vec<(String, PathBuf, Model)> {
    let named = |folder: PathBuf| {
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        let model = load(&folder).unwrap();
        (name, folder, model)
    };
    presets().into_iter().map(named).collect()
}

fn prompts(folder: &Path) -> Vec<Vec<TokenId>> {
    let expected = expected(folder);
    serde_json::from_value(expected["prompts"].clone()).unwrap()
}

fn expected(folder: &Path) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(folder.join("expected.json")).unwrap()).unwrap()
}

/// A sequence with scattered blocks of its own.
struct Track {
    id: u64,
    tokens: Vec<TokenId>,
    blocks: Vec<BlockId>,
}

impl Track {
    /// Sequence `id` of `count`, which share a cache of `count * blocks_each` blocks.
    fn new(id: usize, count: usize, tokens: &[TokenId], blocks_each: usize) -> Self {
        let blocks = (0..blocks_each).rev().map(|index| BlockId((index * count + id) as u32)).collect();
        Self { id: id as u64, tokens: tokens.to_vec(), blocks }
    }

    fn chunk(&self, start: usize, end: usize, rows: Rows, want: Want) -> Chunk {
        let (id, blocks) = (SequenceId(self.id), self.blocks.clone());
        Chunk { id, start, tokens: self.tokens[start..end].to_vec(), blocks, rows, want }
    }
}

fn greedy(position: usize) -> Want {
    let params = Arc::new(SamplingParams::default());
    Want::Token(Draw { params, position, generated_count: 0, history: Vec::new(), prompt_len: 0 })
}

fn execute(runner: &mut Runner, chunks: Vec<Chunk>) -> Vec<Outcome> {
    runner.execute(&StepPlan { chunks }, &mut || ()).unwrap().outcomes
}

/// Hidden states of all rows of `chunks`, `[T][hidden]`.
fn hidden(runner: &Runner, chunks: Vec<Chunk>) -> Tensor {
    let all: Vec<u32> = (0..chunks.iter().map(|chunk| chunk.tokens.len() as u32).sum()).collect();
    hidden_of(&all, runner, chunks)
}

/// Hidden states of some rows of `chunks`.
fn hidden_of(reads: &[u32], runner: &Runner, chunks: Vec<Chunk>) -> Tensor {
    let bounds = Bounds::new(&runner.model().config, runner.cache());
    let batch = ForwardBatch::new(&StepPlan { chunks }, &bounds).unwrap();
    let config = &runner.model().config;
    let heads = [config.heads, config.kv_heads];
    runner.forward(&Inputs::new(batch.integers(reads, &[]), heads, &Device::Cpu).unwrap()).unwrap()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn every_preset_gives_the_numbers_of_transformers() {
    for folder in presets() {
        let name = folder.file_name().unwrap().to_str().unwrap();
        let model = load(&folder).unwrap_or_else(|error| panic!("{name}: {error}"));
        let model = with_rope_of_the_reference(model, &folder);
        match model.config.head {
            HeadKind::Language => check_language(name, &folder, model),
            HeadKind::Reward => check_rewards(name, &folder, model),
        }
    }
}

/// The reference casts a whole module to the type of the checkpoint and back, and the rotary frequencies with it, so
/// they are rounded there. `from_pretrained` does not round them, and neither do we: with the frequencies of
/// `rope_theta`, logits differ from these fixtures by 1e-3 (f16) and 5e-2 (bf16).
fn with_rope_of_the_reference(model: Model, folder: &Path) -> Model {
    let round: fn(f32) -> f32 = match expected(folder)["dtype"].as_str().unwrap() {
        "torch.float16" => |x| half::f16::from_f32(x).to_f32(),
        "torch.bfloat16" => |x| half::bf16::from_f32(x).to_f32(),
        _ => |x| x,
    };
    let Model { config, decoder, head } = model;
    let frequency = |i: usize| (config.rope_theta as f32).powf(-2.0 * i as f32 / config.head_dim as f32);
    let frequencies: Vec<f32> = (0..config.head_dim / 2).map(frequency).map(round).collect();
    let table = RopeTable::with_frequencies(&frequencies, config.positions_max, &Device::Cpu).unwrap();
    Model { decoder: decoder.with_rope(table), config, head }
}

#[track_caller]
fn check_language(name: &str, folder: &Path, model: Model) {
    const STEPS: usize = 24;
    const BLOCK_SIZE: usize = 8;
    let prompts = prompts(folder);
    let tensors = candle_core::safetensors::load(folder.join("expected.safetensors"), &Device::Cpu).unwrap();
    let longest = prompts.iter().map(Vec::len).max().unwrap();
    let blocks_each = (longest + STEPS).div_ceil(BLOCK_SIZE);
    let mut runner = runner(model, prompts.len() * blocks_each, BLOCK_SIZE);
    let mut tracks: Vec<Track> =
        prompts.iter().enumerate().map(|(i, prompt)| Track::new(i, prompts.len(), prompt, blocks_each)).collect();

    let whole = |track: &Track| {
        let rows = Rows::LogProbs { targets: track.tokens[1..].to_vec(), top: 3 };
        track.chunk(0, track.tokens.len(), rows, greedy(track.tokens.len()))
    };
    let states = hidden(&runner, tracks.iter().map(whole).collect());
    let logits = runner.model().head.apply(&states).unwrap();
    let mut outcomes = execute(&mut runner, tracks.iter().map(whole).collect());
    let (mut worst_logit, mut worst_logprob, mut row) = (0.0f32, 0.0f32, 0);
    for (i, prompt) in prompts.iter().enumerate() {
        row += prompt.len();
        let last = floats(&logits.narrow(0, row - 1, 1).unwrap());
        worst_logit = worst_logit.max(difference(&last, &floats(&tensors[&format!("logits_{i}")])));
        let found: Vec<f32> = outcomes[i].logprobs.iter().map(|entry| entry.logprob).collect();
        let expected = tensors.get(&format!("logprobs_{i}")).map(floats).unwrap_or_default();
        worst_logprob = worst_logprob.max(difference(&found, &expected));
        for entry in outcomes[i].logprobs.iter().filter(|entry| entry.token == entry.top[0].0) {
            assert_eq!(entry.logprob, entry.top[0].1, "{name}");
        }
    }
    for step in 0..STEPS {
        for (track, outcome) in tracks.iter_mut().zip(&outcomes) {
            let Last::Token(token, None) = outcome.last else { panic!("{name}: {outcome:?}") };
            track.tokens.push(token);
        }
        let next = |track: &Track| {
            let end = track.tokens.len();
            track.chunk(end - 1, end, Rows::Nothing, greedy(end))
        };
        if step + 1 < STEPS {
            outcomes = execute(&mut runner, tracks.iter().map(next).collect());
        }
    }
    for (i, track) in tracks.iter().enumerate() {
        let expected: Vec<i64> = tensors[&format!("greedy_{i}")].to_vec1().unwrap();
        let found: Vec<i64> = track.tokens[prompts[i].len()..].iter().map(|&token| i64::from(token)).collect();
        assert_eq!(found, expected, "{name}, prompt {i}");
    }
    eprintln!("{name}: logits differ by at most {worst_logit:.1e}, log-probabilities by {worst_logprob:.1e}");
    assert!(worst_logit < DIFFERENCE_MAX, "{name}: logits differ by {worst_logit}");
    assert!(worst_logprob < DIFFERENCE_MAX, "{name}: log-probabilities differ by {worst_logprob}");
}

#[track_caller]
fn check_rewards(name: &str, folder: &Path, model: Model) {
    let prompts = prompts(folder);
    let expected: Vec<f32> = serde_json::from_value(expected(folder)["rewards"].clone()).unwrap();
    let longest = prompts.iter().map(Vec::len).max().unwrap();
    let blocks_each = longest.div_ceil(8);
    let mut runner = runner(model, prompts.len() * blocks_each, 8);
    let chunk = |(i, prompt): (usize, &Vec<TokenId>)| {
        Track::new(i, prompts.len(), prompt, blocks_each).chunk(0, prompt.len(), Rows::Scores, Want::Score)
    };
    let outcomes = execute(&mut runner, prompts.iter().enumerate().map(chunk).collect());
    let mut worst = 0.0f32;
    for (outcome, (expected, prompt)) in outcomes.iter().zip(expected.iter().zip(&prompts)) {
        let Last::Score(reward) = outcome.last else { panic!("{name}: {outcome:?}") };
        // Relative, but not to a reward that is near zero by chance.
        worst = worst.max((reward - expected).abs() / expected.abs().max(0.1));
        assert_eq!((outcome.scores.len(), outcome.scores.last()), (prompt.len(), Some(&reward)), "{name}");
    }
    eprintln!("{name}: rewards {expected:.3?} differ by at most {worst:.1e} of themselves");
    assert!(worst < 1e-4, "{name}: rewards differ by {worst} of themselves");
}

/// The log-probability of each token of `texts` but the first, or under a reward model the one reward of each, as a server's
/// step over a cache in scattered blocks gives them.
pub(crate) fn served(model: Model, texts: &[Vec<TokenId>]) -> Vec<Vec<f32>> {
    let blocks_each = texts.iter().map(Vec::len).max().unwrap().div_ceil(8);
    let kind = model.config.head;
    let mut runner = runner(model, texts.len() * blocks_each, 8);
    let chunk = |(index, text): (usize, &Vec<TokenId>)| {
        let track = Track::new(index, texts.len(), text, blocks_each);
        match kind {
            HeadKind::Reward => track.chunk(0, text.len(), Rows::Nothing, Want::Score),
            HeadKind::Language => {
                let rows = Rows::LogProbs { targets: text[1..].to_vec(), top: 0 };
                track.chunk(0, text.len(), rows, greedy(text.len()))
            }
        }
    };
    let outcomes = execute(&mut runner, texts.iter().enumerate().map(chunk).collect());
    let numbers = |outcome: Outcome| match outcome.last {
        Last::Score(reward) => vec![reward],
        _ => outcome.logprobs.iter().map(|entry| entry.logprob).collect(),
    };
    outcomes.into_iter().map(numbers).collect()
}

/// Attention of whole sequences without a cache.
struct Packed {
    starts: Vec<usize>,
    window: Option<usize>,
    scale: f32,
}

impl Attention for Packed {
    fn attend(&self, _layer: usize, qkv: &Tensor, turn: &Turn<'_>) -> Result<Tensor> {
        let [q, k, v] = split_rope(qkv, turn)?;
        packed_attention(&q, &k, &v, &self.starts, self.window, self.scale)
    }
}

/// The hidden states of all `prompts` `[T, hidden]`, each whole and next to the others, without a cache.
pub(crate) fn packed(model: &Model, prompts: &[Vec<TokenId>]) -> Tensor {
    let mut starts = vec![0];
    starts.extend(prompts.iter().scan(0, |end, prompt| {
        *end += prompt.len();
        Some(*end)
    }));
    let positions: Vec<u32> = prompts.iter().flat_map(|prompt| 0..prompt.len() as u32).collect();
    let packed =
        Packed { starts, window: model.config.window, scale: (1.0 / (model.config.head_dim as f64).sqrt()) as f32 };
    let tokens = Tensor::new(prompts.concat(), &Device::Cpu).unwrap();
    model.decoder.forward(&tokens, &Tensor::new(positions, &Device::Cpu).unwrap(), &packed, None).unwrap()
}

#[track_caller]
fn check_bits(what: &str, found: &Tensor, expected: &Tensor) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let unequal = floats(found).iter().zip(floats(expected)).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    assert_eq!(unequal, 0, "{what}: {unequal} numbers, largest difference {}", {
        difference(&floats(found), &floats(expected))
    });
}

#[test]
fn packed_paged_chunked_and_token_by_token_give_the_same_bits() {
    for (name, folder, model) in models() {
        let prompts = prompts(&folder);
        let count = prompts.len();
        let expected = packed(&model, &prompts);
        for (block_size, chunk_len) in [(4, 1), (16, 5), (1, 16), (8, 1000)] {
            let blocks_each = 61usize.div_ceil(block_size);
            let runner = runner(load(&folder).unwrap(), count * blocks_each, block_size);
            let tracks: Vec<Track> =
                prompts.iter().enumerate().map(|(i, prompt)| Track::new(i, count, prompt, blocks_each)).collect();
            let chunk = |track: &Track, start: usize| {
                (start < track.tokens.len()).then(|| {
                    let end = (start + chunk_len).min(track.tokens.len());
                    track.chunk(start, end, Rows::Nothing, Want::Nothing)
                })
            };
            let mut found: Vec<Vec<Tensor>> = vec![Vec::new(); count];
            for start in (0..61).step_by(chunk_len) {
                let chunks: Vec<Chunk> = tracks.iter().filter_map(|track| chunk(track, start)).collect();
                let states = hidden(&runner, chunks.clone());
                let mut row = 0;
                for chunk in &chunks {
                    found[chunk.id.0 as usize].push(states.narrow(0, row, chunk.tokens.len()).unwrap());
                    row += chunk.tokens.len();
                }
            }
            let found = Tensor::cat(&found.concat(), 0).unwrap();
            check_bits(&format!("{name}, blocks of {block_size}, chunks of {chunk_len}"), &found, &expected);
            let alone: Vec<Tensor> = tracks
                .iter()
                .map(|track| hidden(&runner, vec![track.chunk(0, track.tokens.len(), Rows::Nothing, Want::Nothing)]))
                .collect();
            check_bits(&format!("{name}, alone"), &Tensor::cat(&alone, 0).unwrap(), &expected);
        }
    }
}

#[test]
fn a_chunk_sees_what_an_earlier_chunk_of_the_same_step_writes() {
    for (name, folder, model) in models() {
        let prompt = prompts(&folder).pop().unwrap();
        let expected = packed(&model, std::slice::from_ref(&prompt));
        let runner = runner(model, 16, 8);
        let track = Track::new(0, 1, &prompt, 16);
        let chunks = [(0, 40), (40, 48), (48, prompt.len())]
            .map(|(start, end)| track.chunk(start, end, Rows::Nothing, Want::Nothing));
        check_bits(&name, &hidden(&runner, chunks.to_vec()), &expected);
    }
}

#[test]
fn rows_that_are_not_read_change_nothing() {
    for (name, folder, model) in models() {
        let prompt = prompts(&folder).pop().unwrap();
        let expected = packed(&model, std::slice::from_ref(&prompt));
        let runner = runner(model, 16, 8);
        let track = Track::new(0, 1, &prompt, 16);
        let chunk = |start, end| vec![track.chunk(start, end, Rows::Nothing, Want::Nothing)];
        assert_eq!(hidden_of(&[], &runner, chunk(0, 40)).dims(), [0, runner.model().config.hidden]);
        let reads = [0, 5, prompt.len() as u32 - 41];
        let places = Tensor::new(&reads.map(|read| read + 40), &Device::Cpu).unwrap();
        let expected = expected.index_select(&places, 0).unwrap();
        check_bits(&name, &hidden_of(&reads, &runner, chunk(40, prompt.len())), &expected);
    }
}

/// candle's Mistral with the given weights: logits at every position of `tokens`.
fn oracle(config: &ModelConfig, tensors: HashMap<String, Tensor>, tokens: &[TokenId]) -> Vec<f32> {
    let config = candle_transformers::models::mistral::Config {
        vocab_size: config.vocab,
        hidden_size: config.hidden,
        intermediate_size: config.intermediate,
        num_hidden_layers: config.layers,
        num_attention_heads: config.heads,
        head_dim: Some(config.head_dim),
        num_key_value_heads: config.kv_heads,
        hidden_act: candle_nn::Activation::Silu,
        max_position_embeddings: config.positions_max,
        rms_norm_eps: config.rms_eps,
        rope_theta: config.rope_theta,
        // candle's mask lets a token see one position more than transformers does.
        sliding_window: config.window.map(|window| window - 1),
        use_flash_attn: false,
    };
    let weights = candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let mut model = candle_transformers::models::mistral::Model::new(&config, weights).unwrap();
    let mut logits = Vec::new();
    for end in 1..=tokens.len() {
        model.clear_kv_cache();
        let ids = Tensor::new(&tokens[..end], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        logits.extend(floats(&model.forward(&ids, 0).unwrap()));
    }
    logits
}

/// Weights of the scale that keeps logits of order one, from a fixed seed.
fn random_weights(config: &ModelConfig) -> HashMap<String, Tensor> {
    let mut counter = 0;
    let mut normal = |scale: f64| {
        counter += 1;
        // Twelve uniforms make nearly a normal number.
        let sum: f64 = (0..12).map(|i| eurus::ops::sample::uniform(5, counter * 12 + i)).sum();
        ((sum - 6.0) * scale) as f32
    };
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let norm = name.contains("norm");
        let scale = if norm { 0.2 } else { 1.6 / (shape[shape.len() - 1] as f64).sqrt() };
        let offset = if norm { 1.0 } else { 0.0 };
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| normal(scale) + offset).collect();
        (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
    };
    config.weight_shapes().into_iter().map(tensor).collect()
}

#[track_caller]
fn check_oracle(config: ModelConfig, tensors: HashMap<String, Tensor>, tokens: &[TokenId]) {
    let mut named = tensors.clone();
    if config.tied {
        named.insert("lm_head.weight".to_owned(), tensors["model.embed_tokens.weight"].clone());
    }
    let expected = oracle(&config, named, tokens);
    let model = Model::load(config, Weights::new(tensors), &Device::Cpu).unwrap();
    let blocks = tokens.len().div_ceil(16);
    let runner = runner(model, blocks, 16);
    let track = Track::new(0, 1, tokens, blocks);
    let states = hidden(&runner, vec![track.chunk(0, tokens.len(), Rows::Nothing, Want::Nothing)]);
    let found = floats(&runner.model().head.apply(&states).unwrap());
    let worst = difference(&found, &expected);
    eprintln!("candle's Mistral: {} logits differ by at most {worst:.1e}", found.len());
    assert!(worst < 1e-4, "logits differ by {worst}");
}

#[test]
fn candles_own_mistral_agrees_on_random_weights() {
    let json = r#"{"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
        "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 24,
        "intermediate_size": 200, "vocab_size": 330, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0, "sliding_window": WINDOW, "tie_word_embeddings": false}"#;
    for window in ["null", "9"] {
        let config = ModelConfig::parse(&json.replace("WINDOW", window), None).unwrap();
        let tokens: Vec<u32> = (0..50).map(|i| i * 77 % 330).collect();
        let weights = random_weights(&config);
        check_oracle(config, weights, &tokens);
    }
}

fn mini(part: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/eurus-mini").join(part)
}

fn mini_tokenizer() -> tokenizers::Tokenizer {
    tokenizers::Tokenizer::from_file(mini("policy/tokenizer.json")).unwrap()
}

/// `<s>[INST] prompt [/INST]`.
fn mini_prompt(tokenizer: &tokenizers::Tokenizer, prompt: &str) -> Vec<TokenId> {
    let text = format!("[INST] {prompt} [/INST]");
    [&[1], tokenizer.encode(text, false).unwrap().get_ids()].concat()
}

/// The tokens after each prompt, up to and with the end of sequence.
fn answers(runner: &mut Runner, prompts: &[Vec<TokenId>], blocks_each: usize) -> Vec<Vec<TokenId>> {
    const EOS: TokenId = 2;
    let mut tracks: Vec<Track> =
        prompts.iter().enumerate().map(|(i, prompt)| Track::new(i, prompts.len(), prompt, blocks_each)).collect();
    let mut computed = vec![0; prompts.len()];
    for _ in 0..96 {
        let open: Vec<usize> = (0..tracks.len()).filter(|&i| tracks[i].tokens.last() != Some(&EOS)).collect();
        let next = |&i: &usize| {
            let end = tracks[i].tokens.len();
            tracks[i].chunk(computed[i], end, Rows::Nothing, greedy(end))
        };
        let chunks: Vec<Chunk> = open.iter().map(next).collect();
        for (i, outcome) in open.into_iter().zip(execute(runner, chunks)) {
            let Last::Token(token, _) = outcome.last else { panic!("{outcome:?}") };
            computed[i] = tracks[i].tokens.len();
            tracks[i].tokens.push(token);
        }
    }
    tracks.iter().zip(prompts).map(|(track, prompt)| track.tokens[prompt.len()..].to_vec()).collect()
}

/// The value of a sum of products with parentheses; 0 for what is not one.
fn value(text: &mut std::iter::Peekable<std::str::Chars<'_>>) -> i64 {
    let factor = |text: &mut std::iter::Peekable<std::str::Chars<'_>>| match text.next() {
        Some('(') => {
            let inner = value(text);
            text.next();
            inner
        }
        digit => digit.and_then(|digit| digit.to_digit(10)).map_or(0, i64::from),
    };
    let (mut sum, mut sign) = (0, 1);
    loop {
        let mut product = factor(text);
        while text.next_if_eq(&'*').is_some() {
            product *= factor(text);
        }
        sum += sign * product;
        match text.next_if(|&c| c == '+' || c == '-') {
            Some(operator) => sign = if operator == '+' { 1 } else { -1 },
            None => return sum,
        }
    }
}

/// Whether `answer` ends in a boxed expression of exactly `numbers` whose value is `target`.
fn solves(answer: &str, numbers: &[i64], target: i64) -> bool {
    let Some(boxed) = answer.rsplit_once("\\boxed{").and_then(|(_, rest)| rest.split_once('}')) else { return false };
    let mut used: Vec<i64> = boxed.0.chars().filter_map(|c| c.to_digit(10)).map(i64::from).collect();
    let mut numbers = numbers.to_vec();
    used.sort_unstable();
    numbers.sort_unstable();
    used == numbers && value(&mut boxed.0.chars().peekable()) == target
}

#[test]
fn the_miniature_policy_solves_as_many_held_out_problems_as_when_it_was_trained() {
    const COUNT: usize = 60;
    let tokenizer = mini_tokenizer();
    let problems = std::fs::read_to_string(mini("heldout.jsonl")).unwrap();
    let problems: Vec<serde_json::Value> =
        problems.lines().take(COUNT).map(|line| serde_json::from_str(line).unwrap()).collect();
    let prompts: Vec<Vec<TokenId>> =
        problems.iter().map(|problem| mini_prompt(&tokenizer, problem["prompt"].as_str().unwrap())).collect();
    let mut runner = runner(load(&mini("policy")).unwrap(), COUNT * 10, 16);
    let answers = answers(&mut runner, &prompts, 10);
    let mut solved = 0;
    for (problem, answer) in problems.iter().zip(&answers) {
        let text = tokenizer.decode(answer, true).unwrap();
        let numbers: Vec<i64> = serde_json::from_value(problem["nums"].clone()).unwrap();
        solved += usize::from(solves(&text, &numbers, problem["target"].as_i64().unwrap()));
    }
    eprintln!("eurus-mini solves {solved} of {COUNT}");
    // It was measured at 61.0 % of all 300, greedily.
    assert!((30..=45).contains(&solved), "{solved} of {COUNT} solved");
}

#[test]
fn candles_own_mistral_agrees_on_the_miniature_policy() {
    let folder = mini("policy");
    let tokenizer = mini_tokenizer();
    let prompt = mini_prompt(&tokenizer, "Use the numbers 2, 5, 2, 8 to make 36.");
    let mut runner = runner(load(&folder).unwrap(), 10, 16);
    let answer = answers(&mut runner, std::slice::from_ref(&prompt), 10).remove(0);
    let config = runner.model().config.clone();
    let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    check_oracle(config, tensors, &[prompt, answer].concat());
}
