//! Checkpoints from folders, from the program itself and from a hub on this machine; damaged and hostile ones.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use eurus::checkpoint::{self, Checkpoint, HubOptions, Progress, Source, safetensors};
use eurus::error::{Error, Result};
use eurus::model::config::{Experts, HeadKind, ModelConfig};
use eurus::model::weights::Weights;
use tempfile::TempDir;

pub(crate) mod gguf;
mod gguf_kinds;
mod hub;
mod quantize;
mod sentencepiece;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/serve").join(name)
}

/// Options that reach neither the network nor the user's cache.
fn nowhere() -> HubOptions {
    HubOptions {
        revision: None,
        offline: true,
        token: None,
        endpoint: "http://127.0.0.1:1".to_owned(),
        cache: PathBuf::from("/nonexistent"),
    }
}

fn open(folder: &Path) -> Result<Checkpoint> {
    checkpoint::open(&Source::Folder(folder.to_owned()), &nowhere(), &mut |_| {})
}

fn load(folder: &Path) -> Result<Weights> {
    open(folder)?.load_weights(&Device::Cpu, &mut |_| {})
}

/// A copy of a fixture's model files that a test may damage.
fn copy(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let entry = entry.unwrap();
        if !entry.file_name().to_str().unwrap().starts_with("expected") {
            fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
        }
    }
    folder
}

/// Takes every tensor the configuration asks for.
fn take_all(config: &ModelConfig, mut weights: Weights) -> HashMap<String, Tensor> {
    let mut tensors = HashMap::new();
    for (name, shape) in config.weight_shapes() {
        tensors.insert(name.clone(), weights.take(&name, &shape).unwrap());
    }
    weights.finish().unwrap();
    tensors
}

#[test]
fn the_fixtures_open_and_their_tensors_are_exactly_those_in_the_files() {
    for (name, files) in [
        ("mistral-window", &["model.safetensors"][..]),
        ("mistral-bf16", &["model.safetensors"]),
        ("llama-eos-list", &["model.safetensors"]),
        ("mixtral", &["model.safetensors"]),
        ("reward", &["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
    ] {
        let checkpoint = open(&fixture(name)).unwrap();
        assert_eq!(checkpoint.name, name);
        assert_eq!(checkpoint.headers().len(), checkpoint.config.weight_shapes().len(), "{name}");
        let found = take_all(&checkpoint.config, checkpoint.load_weights(&Device::Cpu, &mut |_| {}).unwrap());
        let mut count = 0;
        for file in files {
            let expected = candle_core::safetensors::load(fixture(name).join(file), &Device::Cpu).unwrap();
            count += expected.len();
            for (tensor, expected) in expected {
                assert_eq!(found[&tensor].dtype(), expected.dtype(), "{name} {tensor}");
                let values =
                    |tensor: &Tensor| tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>();
                assert_eq!(values(&found[&tensor]).unwrap(), values(&expected).unwrap(), "{name} {tensor}");
            }
        }
        assert_eq!(count, found.len(), "{name}");
    }
}

#[test]
fn configurations_say_what_the_fixtures_are() {
    let config = |name: &str| open(&fixture(name)).unwrap().config;
    assert_eq!(config("mistral-window").window, Some(16));
    assert_eq!((config("mistral-bf16").head_dim, config("mistral-bf16").dtype), (32, Some(DType::BF16)));
    assert_eq!((config("llama-eos-list").eos, config("llama-eos-list").rope_theta), (vec![2, 7], 1e6));
    assert_eq!((config("reward").head, config("reward").window), (HeadKind::Reward, Some(4096)));
    assert_eq!(config("mixtral").experts, Some(Experts { count: 8, per_token: 2 }));
    assert_eq!(config("mistral-window").experts, None);
}

#[test]
fn the_built_in_models_open_like_any_other() {
    for (name, head) in [("eurus-mini/policy", HeadKind::Language), ("eurus-mini/reward", HeadKind::Reward)] {
        let source = Source::parse(name).unwrap();
        let checkpoint = checkpoint::open(&source, &nowhere(), &mut |_| {}).unwrap();
        assert_eq!((checkpoint.name.as_str(), checkpoint.config.head), (name, head));
        let facts = &checkpoint.tokenizer_config;
        assert_eq!((facts.bos_token.as_deref(), facts.eos_token.as_deref()), (Some("<s>"), Some("</s>")));
        assert!(facts.chat_template.as_deref().is_some_and(|template| template.contains("message")));
        let tokenizer: tokenizers::Tokenizer = checkpoint.tokenizer_json.parse().unwrap();
        let largest = tokenizer.get_vocab(true).into_values().max().unwrap();
        assert_eq!(checkpoint.tokenizer().unwrap().vocab_size(), largest as usize + 1);
        let mut foreign = checkpoint.clone();
        foreign.config.vocab = largest as usize;
        let message = foreign.tokenizer().unwrap_err().to_string();
        assert!(message.contains(&format!("has token {largest}, the embedding only {largest} rows")), "{message}");
        let weights = checkpoint.load_weights(&Device::Cpu, &mut |_| {}).unwrap();
        let tensors = take_all(&checkpoint.config, weights);
        let count: usize = tensors.values().map(Tensor::elem_count).sum();
        assert_eq!(count as u64, checkpoint.config.parameter_count());
    }
}

#[test]
fn progress_counts_every_byte_once() {
    let checkpoint = open(&fixture("reward")).unwrap();
    let mut seen = Vec::new();
    let weights = checkpoint.load_weights(&Device::Cpu, &mut |progress| match progress {
        Progress::Load { done, total } => seen.push((done, total)),
        Progress::Download { .. } => panic!("nothing is downloaded"),
    });
    drop(weights.unwrap());
    let total = checkpoint.headers().iter().map(|info| info.bytes).sum();
    assert!(seen.is_sorted() && seen.iter().all(|(_, of)| *of == total));
    assert_eq!((seen.first(), seen.last()), (Some(&(0, total)), Some(&(total, total))));
    assert_eq!(total, 269_312);
}

#[test]
fn written_tensors_are_read_back() {
    let folder = copy("mistral-bf16");
    let before = open(folder.path()).unwrap();
    let tensors = take_all(&before.config, before.load_weights(&Device::Cpu, &mut |_| {}).unwrap());
    let path = folder.path().join("model.safetensors");
    let written = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();
    safetensors::write(&path, &tensors).unwrap();
    // The header may list them in another order; the data of all tensors is the same.
    assert_eq!(fs::metadata(&path).unwrap().len().abs_diff(written.len() as u64), 0);
    let again = open(folder.path()).unwrap();
    let again = take_all(&again.config, again.load_weights(&Device::Cpu, &mut |_| {}).unwrap());
    for (name, tensor) in &tensors {
        let bytes =
            |tensor: &Tensor| tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(bytes(tensor), bytes(&again[name]), "{name}");
    }
}

#[track_caller]
fn check_refused<T>(result: Result<T>, part: &str) {
    match result.err() {
        Some(Error::Checkpoint(message)) if message.contains(part) => {}
        other => panic!("{part:?} is not in {other:?}"),
    }
}

const FIRST: &str = "model-00001-of-00002.safetensors";
const SECOND: &str = "model-00002-of-00002.safetensors";
const INDEX: &str = "model.safetensors.index.json";

fn edit(path: &Path, change: impl Fn(String) -> String) {
    let text = fs::read_to_string(path).unwrap();
    let changed = change(text.clone());
    assert_ne!(changed, text, "the edit changes nothing");
    fs::write(path, changed).unwrap();
}

#[test]
fn shards_that_do_not_fit_together_are_named() {
    let folder = copy("reward");
    fs::remove_file(folder.path().join(SECOND)).unwrap();
    check_refused(open(folder.path()), &format!("names missing files: {SECOND}"));

    let folder = copy("reward");
    edit(&folder.path().join(INDEX), |text| text.replacen(FIRST, "../../../etc/passwd", 1));
    check_refused(open(folder.path()), "\"../../../etc/passwd\"; a shard is a .safetensors file beside the index");

    let folder = copy("reward");
    fs::copy(folder.path().join(FIRST), folder.path().join(SECOND)).unwrap();
    check_refused(open(folder.path()), &format!("is in {FIRST} and in {SECOND}"));

    let folder = copy("reward");
    edit(&folder.path().join(INDEX), |text| text.replacen(FIRST, SECOND, 1));
    check_refused(open(folder.path()), &format!("into {SECOND}, it is in {FIRST}"));

    let folder = copy("reward");
    edit(&folder.path().join(INDEX), |text| text.replacen("model.norm.weight", "model.norm.bias", 1));
    check_refused(open(folder.path()), "does not list tensor model.norm.weight");

    let folder = copy("reward");
    edit(&folder.path().join(INDEX), |text| {
        text.replacen(r#""model.norm.weight""#, &format!(r#""extra": "{SECOND}", "model.norm.weight""#), 1)
    });
    check_refused(open(folder.path()), &format!("lists tensor extra, which {SECOND} lacks"));

    let folder = copy("reward");
    fs::remove_file(folder.path().join(INDEX)).unwrap();
    check_refused(open(folder.path()), "no model.safetensors and no model.safetensors.index.json");
    fs::write(folder.path().join("pytorch_model.bin"), "").unwrap();
    check_refused(open(folder.path()), "pytorch_model.bin is not read");
}

#[cfg(unix)]
#[test]
fn links_out_of_the_folder_are_not_followed() {
    let outside = tempfile::tempdir().unwrap();
    for file in [FIRST, "config.json", "tokenizer.model", INDEX] {
        let folder = copy("reward");
        let target = outside.path().join(file);
        fs::rename(folder.path().join(file), &target).unwrap();
        std::os::unix::fs::symlink(&target, folder.path().join(file)).unwrap();
        check_refused(open(folder.path()), "is a link that leaves the checkpoint's folder");
    }
    let folder = copy("reward");
    fs::rename(folder.path().join(FIRST), folder.path().join("other")).unwrap();
    std::os::unix::fs::symlink("other", folder.path().join(FIRST)).unwrap();
    open(folder.path()).unwrap();
}

#[test]
fn tensors_that_do_not_fit_the_configuration_are_all_named() {
    let folder = copy("reward");
    edit(&folder.path().join("config.json"), |text| {
        text.replacen("\"vocab_size\": 512", "\"vocab_size\": 513", 1)
            .replacen("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 2", 1)
            .replacen("\"intermediate_size\": 112", "\"intermediate_size\": 96", 1)
    });
    let message = load(folder.path()).unwrap_err().to_string();
    let part = "7 wrong (model.embed_tokens.weight is [512, 64] instead of [513, 64], \
                model.layers.0.mlp.down_proj.weight is [64, 112] instead of [64, 96], ";
    assert!(message.contains(part), "{message}");
    assert!(message.contains("9 not used by this model (model.layers.2.input_layernorm.weight, "), "{message}");

    let folder = copy("reward");
    edit(&folder.path().join("config.json"), |text| text.replacen("EurusRewardModel", "MistralForCausalLM", 1));
    let message = load(folder.path()).unwrap_err().to_string();
    let expected = "the tensors do not fit config.json: 1 missing (lm_head.weight); \
                    1 not used by this model (regression_head.weight)";
    assert_eq!(message, expected);
}

#[test]
fn element_types_that_are_no_floats_are_named_and_old_extras_passed_over() {
    let folder = copy("mistral-window");
    let checkpoint = open(folder.path()).unwrap();
    let mut tensors = take_all(&checkpoint.config, checkpoint.load_weights(&Device::Cpu, &mut |_| {}).unwrap());
    let path = folder.path().join("model.safetensors");
    let frequencies = Tensor::zeros(8, DType::I64, &Device::Cpu).unwrap();
    tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), frequencies);
    safetensors::write(&path, &tensors).unwrap();
    take_all(&checkpoint.config, load(folder.path()).unwrap());

    let norm = Tensor::zeros(64, DType::F64, &Device::Cpu).unwrap();
    tensors.insert("model.norm.weight".to_owned(), norm);
    safetensors::write(&path, &tensors).unwrap();
    check_refused(load(folder.path()), "1 wrong (model.norm.weight is F64 instead of f32, f16 or bf16)");
}

#[test]
fn a_file_that_shrinks_after_it_was_opened_is_an_error() {
    let folder = copy("mistral-window");
    let checkpoint = open(folder.path()).unwrap();
    let path = folder.path().join("model.safetensors");
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(fs::metadata(&path).unwrap().len() - 1).unwrap();
    check_refused(checkpoint.load_weights(&Device::Cpu, &mut |_| {}), "model.safetensors: reading ");
}

/// xorshift64*: damage that is the same in every run.
struct Noise(u64);

impl Noise {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(high).unwrap() % bound
    }
}

fn damaged(sound: &[u8], noise: &mut Noise) -> Vec<u8> {
    let mut bytes = sound.to_vec();
    // Headers come first and are the more interesting part.
    let reach = if noise.below(2) == 0 { bytes.len().min(400) } else { bytes.len() };
    match noise.below(4) {
        0 => bytes[noise.below(reach)] ^= 1 << noise.below(8),
        1 => bytes.truncate(noise.below(reach)),
        2 => bytes.extend_from_within(..reach),
        _ => {
            let start = noise.below(reach);
            let end = (start + 1 + noise.below(16)).min(bytes.len());
            bytes[start..end].fill(u8::try_from(noise.below(256)).unwrap());
        }
    }
    bytes
}

#[test]
fn damaged_files_load_or_are_refused_but_never_panic() {
    let folder = copy("reward");
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    for (file, rounds) in [("config.json", 400), ("tokenizer.model", 400), (INDEX, 200), (FIRST, 200), (SECOND, 100)] {
        let path = folder.path().join(file);
        let sound = fs::read(&path).unwrap();
        let mut refused = 0;
        for round in 0..rounds {
            fs::write(&path, damaged(&sound, &mut noise)).unwrap();
            match load(folder.path()) {
                Ok(_) => {}
                Err(Error::Checkpoint(message) | Error::Unsupported(message)) => {
                    assert!(!message.is_empty() && message.len() < 4000, "{file} {round}: {message}");
                    refused += 1;
                }
                Err(other) => panic!("{file} {round}: {other:?}"),
            }
        }
        assert!(refused > rounds / 10, "{file}: {refused} of {rounds} refused");
        fs::write(&path, sound).unwrap();
        load(folder.path()).unwrap();
    }
}

#[test]
fn folders_without_a_model_say_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    check_refused(open(folder.path()), "no config.json; is this the folder of a model?");
    let folder = copy("reward");
    fs::remove_file(folder.path().join("tokenizer.model")).unwrap();
    check_refused(open(folder.path()), "no tokenizer.json and no tokenizer.model");
    check_refused(open(&folder.path().join("nothing")), "No such file");
    fs::write(folder.path().join("tokenizer.json"), [0xff, 0xfe]).unwrap();
    check_refused(open(folder.path()), "tokenizer.json: is not UTF-8 text");
    fs::remove_file(folder.path().join("config.json")).unwrap();
    fs::create_dir(folder.path().join("config.json")).unwrap();
    check_refused(open(folder.path()), "config.json: is not a file");
}
