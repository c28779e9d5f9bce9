//! GGUF files: tokens and logits beside llama.cpp's (tests/reference/gguf_reference.py), files in parts, files of other kinds.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device;
use eurus::checkpoint::{self, Checkpoint, Source, Storage};
use eurus::error::Result;
use eurus::model::Model;
use eurus::model::config::HeadKind;
use eurus::model::weights::Format;
use eurus::text::tokenizer::{Bos, Special};

use super::nowhere;
use crate::parity::packed;

pub(super) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf").join(name)
}

pub(super) fn open(path: &Path) -> Result<Checkpoint> {
    checkpoint::open(&Source::parse(path.to_str().unwrap())?, &nowhere(), &mut |_| {})
}

fn load(path: &Path) -> Model {
    let checkpoint = open(path).unwrap();
    let weights = checkpoint.load_weights(&Device::Cpu, &mut |_| {}).unwrap();
    Model::load(checkpoint.config, weights, &Device::Cpu).unwrap()
}

/// The model of a fixture.
pub(crate) fn model(name: &str) -> Model {
    load(&fixture(name))
}

fn expected() -> serde_json::Value {
    serde_json::from_str(&fs::read_to_string(fixture("expected.json")).unwrap()).unwrap()
}

fn numbers(value: &serde_json::Value) -> Vec<f64> {
    serde_json::from_value(value.clone()).unwrap()
}

/// The last token's logits after `tokens`.
fn logits(model: &Model, tokens: &[u32]) -> Vec<f64> {
    let states = packed(model, &[tokens.to_vec()]);
    let last = model.head.apply(&states.narrow(0, tokens.len() - 1, 1).unwrap()).unwrap();
    last.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f64::from).collect()
}

/// The root of the mean squared difference, over the deviation of `exact`.
fn distance(a: &[f64], b: &[f64], exact: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let mean = exact.iter().sum::<f64>() / exact.len() as f64;
    let squares = |all: &mut dyn Iterator<Item = f64>| all.map(|x| x * x).sum::<f64>();
    let off = squares(&mut a.iter().zip(b).map(|(a, b)| a - b));
    (off / squares(&mut exact.iter().map(|x| x - mean))).sqrt()
}

#[test]
fn texts_are_tokenised_as_llama_cpp_does() {
    let tokenizer = open(&fixture("q4_0.gguf")).unwrap().tokenizer().unwrap();
    for text in expected()["texts"].as_array().unwrap() {
        let ids: Vec<u32> = serde_json::from_value(text["ids"].clone()).unwrap();
        let text = text["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, Special::Parse, Bos::Add).unwrap(), ids, "{text:?}");
    }
}

/// Exact are the weights as they are stored, in float64. llama.cpp is off by the rounding of activations, to bf16 or to eight bits:
/// we may be off by little more, and where weights are bf16 hardly at all.
#[test]
fn logits_are_as_near_to_exact_ones_as_those_of_llama_cpp() {
    let expected = expected();
    let tokens: Vec<u32> = serde_json::from_value(expected["texts"][0]["ids"].clone()).unwrap();
    for (name, file) in expected["files"].as_object().unwrap() {
        let (exact, theirs) = (numbers(&file["exact"]), numbers(&file["llama_cpp"]));
        let ours = logits(&model(name), &tokens);
        let (off, theirs_off) = (distance(&ours, &exact, &exact), distance(&theirs, &exact, &exact));
        let between = distance(&ours, &theirs, &exact);
        eprintln!("{name}: off by {off:.1e}, llama.cpp by {theirs_off:.1e}, from each other {between:.1e}");
        let most = if name == "bf16.gguf" { 1e-5 } else { 1.25 * theirs_off };
        assert!(off <= most, "{name}: off by {off}, llama.cpp by {theirs_off}");
    }
}

#[test]
fn a_checkpoint_says_what_the_file_says() {
    let checkpoint = open(&fixture("q4_k_m.gguf")).unwrap();
    assert_eq!(checkpoint.name, "q4_k_m");
    let config = &checkpoint.config;
    assert_eq!((config.hidden, config.layers, config.heads, config.kv_heads, config.head_dim), (256, 1, 4, 2, 64));
    assert_eq!((config.vocab, config.positions_max, config.intermediate), (512, 512, 256));
    assert_eq!((config.rms_eps, config.rope_theta, config.head), (1e-5, 10_000.0, HeadKind::Language));
    assert_eq!((config.bos, config.eos.as_slice(), config.tied), (Some(1), &[2][..], false));
    assert!(checkpoint.chat_template().unwrap().source().contains("[INST]"));
    let mut formats: Vec<Format> = Vec::new();
    for info in checkpoint.headers() {
        if let Storage::Quantized(format) = info.storage
            && !formats.contains(&format)
        {
            formats.push(format);
        }
    }
    assert!(formats.contains(&Format::Q4K) && formats.contains(&Format::Q6K), "{formats:?}");
    checkpoint.check_tensors().unwrap();
}

#[test]
fn experts_in_tensors_of_their_own_are_those_in_one() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("apart.gguf");
    let bytes = fs::read(fixture("experts_q4_k_m.gguf")).unwrap();
    fs::write(&path, with_experts_apart(&bytes, 8)).unwrap();
    let tokens = [1, 5, 300, 17, 44];
    assert_eq!(logits(&load(&path), &tokens), logits(&model("experts_q4_k_m.gguf"), &tokens));
}

#[test]
fn tiles_of_some_formats_take_more_memory_than_their_blocks() {
    for (name, least, most) in [("bf16.gguf", 1.0, 1.0), ("q8_0.gguf", 1.0, 1.0), ("q4_k_m.gguf", 1.01, 1.04)] {
        let checkpoint = open(&fixture(name)).unwrap();
        let ratio = checkpoint.memory_bytes(None) as f64 / checkpoint.weight_bytes() as f64;
        assert!((least..=most).contains(&ratio), "{name}: {ratio}");
    }
}

/// `file` in two parts, the tokenizer in the first, as gguf-split cuts it.
pub(super) fn split(file: &Path, folder: &Path) -> [PathBuf; 2] {
    let bytes = fs::read(file).unwrap();
    let parsed = Cut::parse(&bytes);
    let half = parsed.entries.len() / 2;
    [(0, &parsed.entries[..half]), (1, &parsed.entries[half..])].map(|(no, entries)| {
        let path = folder.join(format!("tiny-{:05}-of-00002.gguf", no + 1));
        fs::write(&path, parsed.part(&bytes, no, entries)).unwrap();
        path
    })
}

/// A key of the metadata: its name, type and value as they are written.
pub(super) type Key = (String, Vec<u8>);

/// A value as it is written: the number of its type, and its bytes.
pub(super) fn typed<const N: usize>(kind: u32, value: [u8; N]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &value].concat()
}

/// The GGUF file `bytes` with other metadata.
pub(super) fn edited(bytes: &[u8], change: impl FnOnce(&mut Vec<Key>)) -> Vec<u8> {
    let mut parsed = Cut::parse(bytes);
    let before = parsed.keys.clone();
    change(&mut parsed.keys);
    assert_ne!(parsed.keys, before, "the edit changes nothing");
    parsed.file(bytes, &parsed.keys, &parsed.entries)
}

/// The GGUF file `bytes` with a tensor for every one of `count` experts, as files of 2023 have them, in the place of one for all.
pub(super) fn with_experts_apart(bytes: &[u8], count: usize) -> Vec<u8> {
    let parsed = Cut::parse(bytes);
    let mut entries = Vec::new();
    for (entry, start, len) in &parsed.entries {
        let len_of_name = u64::from_le_bytes(entry[..8].try_into().unwrap()) as usize;
        let (name, rest) = entry[8..].split_at(len_of_name);
        let name = String::from_utf8(name.to_vec()).unwrap();
        let Some(name) = name.strip_suffix("_exps.weight") else {
            entries.push((entry.clone(), *start, *len));
            continue;
        };
        for expert in 0..count {
            let name = format!("{name}.{expert}.weight");
            // Two dimensions in the place of three, whose last one counts the experts, and the type.
            let entry =
                [&name.len().to_le_bytes()[..], name.as_bytes(), &2_u32.to_le_bytes(), &rest[4..20], &rest[28..]];
            entries.push((entry.concat(), start + expert * (len / count), len / count));
        }
    }
    assert_ne!(entries.len(), parsed.entries.len());
    parsed.file(bytes, &parsed.keys, &entries)
}

/// Where the parts of a GGUF file with 32-byte alignment are.
struct Cut {
    /// Names, and types and values as they are written.
    keys: Vec<Key>,
    /// Name, dimensions and type; offset; bytes of data.
    entries: Vec<(Vec<u8>, usize, usize)>,
    data: usize,
}

impl Cut {
    fn parse(bytes: &[u8]) -> Self {
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let (count, key_count) = (u64_at(8), u64_at(16));
        let (mut at, mut keys) = (24, Vec::new());
        fn skip(kind: u32, at: usize, bytes: &[u8]) -> usize {
            let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            match kind {
                0 | 1 | 7 => at + 1,
                2 | 3 => at + 2,
                8 => at + 8 + u64_at(at),
                9 => {
                    let kind = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
                    (0..u64_at(at + 4)).fold(at + 12, |at, _| skip(kind, at, bytes))
                }
                10..=12 => at + 8,
                _ => at + 4,
            }
        }
        for _ in 0..key_count {
            let name = at + 8..at + 8 + u64_at(at) as usize;
            let end = skip(u32_at(name.end), name.end + 4, bytes);
            at = end;
            keys.push((String::from_utf8(bytes[name.clone()].to_vec()).unwrap(), bytes[name.end..end].to_vec()));
        }
        let mut entries = Vec::new();
        for _ in 0..count {
            let start = at;
            at += 8 + u64_at(at) as usize;
            at += 4 + 8 * u32_at(at) as usize + 4;
            entries.push((bytes[start..at].to_vec(), u64_at(at) as usize, 0));
            at += 8;
        }
        let data = at.next_multiple_of(32);
        let mut ends: Vec<usize> = entries.iter().map(|entry| entry.1).chain([bytes.len() - data]).collect();
        ends.sort_unstable();
        for entry in &mut entries {
            entry.2 = ends.iter().find(|end| **end > entry.1).unwrap() - entry.1;
        }
        Self { keys, entries, data }
    }

    fn part(&self, bytes: &[u8], no: u16, entries: &[(Vec<u8>, usize, usize)]) -> Vec<u8> {
        let own = |name: &str, value: u16| (name.to_owned(), typed(2, value.to_le_bytes()));
        let mut keys = if no == 0 { self.keys.clone() } else { Vec::new() };
        keys.extend([
            own("split.no", no),
            own("split.count", 2),
            own("split.tensors.count", self.entries.len() as u16),
        ]);
        self.file(bytes, &keys, entries)
    }

    fn file(&self, bytes: &[u8], keys: &[Key], entries: &[(Vec<u8>, usize, usize)]) -> Vec<u8> {
        let mut out = [b"GGUF", &3_u32.to_le_bytes()[..], &(entries.len() as u64).to_le_bytes()].concat();
        out.extend((keys.len() as u64).to_le_bytes());
        for (name, value) in keys {
            out.extend((name.len() as u64).to_le_bytes());
            out.extend(name.as_bytes());
            out.extend(value);
        }
        let mut offset = 0_usize;
        for (entry, _, len) in entries {
            out.extend(entry);
            out.extend((offset as u64).to_le_bytes());
            offset += len.next_multiple_of(32);
        }
        for (_, start, len) in entries {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(&bytes[self.data + start..][..*len]);
        }
        out
    }
}

#[test]
fn files_in_parts_are_one_model_whichever_part_is_named() {
    let scratch = tempfile::tempdir().unwrap();
    let parts = split(&fixture("q4_0.gguf"), scratch.path());
    let tokens = [1, 5, 300, 17];
    let whole = logits(&model("q4_0.gguf"), &tokens);
    for part in &parts {
        assert_eq!(open(part).unwrap().name, "tiny");
        assert_eq!(logits(&load(part), &tokens), whole);
    }
    fs::rename(&parts[1], scratch.path().join("x")).unwrap();
    let error = open(&parts[0]).unwrap_err().to_string();
    assert!(error.contains("tiny-00002-of-00002.gguf: is missing: the model has 2 parts"), "{error}");
    fs::copy(&parts[0], &parts[1]).unwrap();
    let error = open(&parts[0]).unwrap_err().to_string();
    assert!(error.contains("says that it is part 1 of 2, its name 2 of 2"), "{error}");
}

/// The fixture with `from` replaced by as many bytes.
fn changed(from: &str, to: &str) -> Result<Checkpoint> {
    assert_eq!(from.len(), to.len());
    let mut bytes = fs::read(fixture("q4_0.gguf")).unwrap();
    let at = bytes.windows(from.len()).position(|part| part == from.as_bytes()).unwrap();
    bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("changed.gguf");
    fs::write(&path, bytes).unwrap();
    let checkpoint = open(&path)?;
    checkpoint.check_tensors()?;
    Ok(checkpoint)
}

#[test]
fn other_kinds_of_files_are_refused_by_name() {
    for (from, to, part) in [
        ("general.architecture", "general.architectura", "architecture that is not named"),
        ("llama.embedding_length", "llama.embedding_lengtX", "hidden_size"),
        ("llama.attention.layer_norm_rms_epsilon", "llama.attention.layer_norm_rms_epsiloX", "rms_epsilon is missing"),
        ("tokenizer.ggml.scores", "tokenizer.ggml.scoreX", "tokenizer.ggml.scores is missing"),
        ("tokenizer.ggml.model", "tokenizer.ggml.modeX", "tokenizer.ggml.model that is not named"),
        ("blk.0.attn_q.weight", "blk.0.attn_X.weight", "1 missing (model.layers.0.self_attn.q_proj.weight)"),
        ("blk.0.ffn_up.weight", "blk.7.ffn_up.weight", "model.layers.7.mlp.up_proj.weight"),
        ("output.weight", "outpuX.weight", "outpuX.weight"),
    ] {
        let error = changed(from, to).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        assert!(error.contains("changed.gguf") || error.contains("tensors do not fit"), "{error}");
    }
}

#[test]
fn a_cut_file_is_refused() {
    let bytes = fs::read(fixture("q4_0.gguf")).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("cut.gguf");
    fs::write(&path, &bytes[..bytes.len() - 40]).unwrap();
    let error = open(&path).unwrap_err().to_string();
    assert!(error.contains("cut.gguf") && error.contains("ends after the file"), "{error}");
}
