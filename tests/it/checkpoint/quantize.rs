//! Checkpoints rounded to few bits: how near numbers stay, beside llama.cpp's own files; that what is written is what loading rounds
//! to; and what is refused.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use eurus::checkpoint::{self, Checkpoint, Rounding, Source, Storage, safetensors, write_rounded};
use eurus::error::{Error, Result};
use eurus::model::Model;
use eurus::model::config::HeadKind;
use eurus::model::weights::{Matrix, quantize};
use eurus::ops::embed::embed;
use eurus::ops::parameter::Parameter;
use eurus::text::tokenizer::{Bos, Special};

use super::gguf;
use super::{copy, edit, fixture, nowhere};
use crate::parity::packed;

const TOKENS: [u32; 9] = [1, 5, 300, 17, 44, 44, 260, 9, 301];

fn open(name: &str) -> Result<Checkpoint> {
    checkpoint::open(&Source::parse(name)?, &nowhere(), &mut |_| {})
}

fn round(checkpoint: &Checkpoint, rounding: Rounding, out: &Path) -> Result<Checkpoint> {
    write_rounded(checkpoint, rounding, out, &mut |_| {})?;
    open(out.to_str().unwrap())
}

fn load(checkpoint: &Checkpoint, rounding: Option<Rounding>) -> Model {
    let weights = checkpoint.load_rounded(rounding, &Device::Cpu, &mut |_| {}).unwrap();
    Model::load(checkpoint.config.clone(), weights, &Device::Cpu).unwrap()
}

/// Logits or rewards after each of [`TOKENS`].
fn answers(model: &Model) -> Vec<f32> {
    let states = packed(model, &[TOKENS.to_vec()]);
    model.head.apply(&states).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The numbers of a matrix, quantised or not.
fn numbers(matrix: &Parameter) -> Vec<f32> {
    let (rows, _) = matrix.dims2().unwrap();
    let ids = Tensor::arange(0, u32::try_from(rows).unwrap(), &Device::Cpu).unwrap();
    embed(&ids, matrix).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn rms(a: &[f32], b: &[f32]) -> f64 {
    let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    (squares / a.len() as f64).sqrt()
}

/// Every matrix of these files, which llama.cpp quantised from random normal numbers, quantised from the same numbers by us.
#[test]
fn numbers_come_out_at_least_as_near_as_from_llama_cpp() {
    let source = open(gguf::fixture("bf16.gguf").to_str().unwrap()).unwrap();
    for name in ["q8_0.gguf", "q4_0.gguf", "q4_k_m.gguf", "q5_k_m.gguf"] {
        let theirs = open(gguf::fixture(name).to_str().unwrap()).unwrap();
        let mut exact = source.load_weights(&Device::Cpu, &mut |_| {}).unwrap();
        let mut rounded = theirs.load_weights(&Device::Cpu, &mut |_| {}).unwrap();
        let mut sums: HashMap<String, [f64; 2]> = HashMap::new();
        for info in theirs.headers() {
            let (Storage::Quantized(format), &[rows, k]) = (info.storage, &*info.shape) else { continue };
            let exact = numbers(&exact.take_matrix(&info.name, &info.shape).unwrap());
            let theirs = numbers(&rounded.take_matrix(&info.name, &info.shape).unwrap());
            let ours =
                Parameter::quantized(Matrix { format, rows, k }, &quantize(format, &exact), &Device::Cpu).unwrap();
            let sums = sums.entry(format.name().to_owned()).or_default();
            sums[0] += rms(&numbers(&ours), &exact);
            sums[1] += rms(&theirs, &exact);
        }
        for (format, [ours, theirs]) in sums {
            eprintln!("{name} {format}: off by {ours:.3e}, llama.cpp by {theirs:.3e} ({:.3})", ours / theirs);
            // Theirs began with the numbers before they were rounded to bf16.
            let most = if format.ends_with("_K") { 1.0 } else { 1.002 };
            assert!(ours <= most * theirs, "{name} {format}: {ours} where llama.cpp has {theirs}");
        }
    }
}

/// All matrices of the built-in policy, cut into blocks of 256, and what `ggml_quantize_chunk` of llama-cpp-python 0.3.36 is off by on
/// the same blocks, relative to their root mean square.
#[test]
fn trained_weights_come_out_at_least_as_near_as_from_llama_cpp() {
    use eurus::model::weights::Format;
    let policy = open("eurus-mini/policy").unwrap();
    let tensors = super::take_all(&policy.config, policy.load_weights(&Device::Cpu, &mut |_| {}).unwrap());
    let matrices: Vec<Vec<f32>> = tensors
        .values()
        .filter(|tensor| tensor.rank() == 2)
        .map(|tensor| tensor.flatten_all().unwrap().to_vec1().unwrap())
        .collect();
    for (format, theirs) in [(Format::Q4K, 0.068_441_6), (Format::Q5K, 0.034_771_2), (Format::Q6K, 0.017_108_9)] {
        let (mut off, mut size) = (0.0, 0.0);
        for exact in &matrices {
            let matrix = Matrix { format, rows: exact.len() / 256, k: 256 };
            let ours = numbers(&Parameter::quantized(matrix, &quantize(format, exact), &Device::Cpu).unwrap());
            off += ours.iter().zip(exact).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
            size += exact.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        }
        let ours = (off / size).sqrt();
        eprintln!("{}: off by {ours:.6}, llama.cpp by {theirs:.6} ({:.3})", format.name(), ours / theirs);
        assert!(ours <= theirs, "{format:?}: {ours} where llama.cpp has {theirs}");
    }
}

#[test]
fn every_tensor_gets_the_format_that_llama_cpp_gives_it() {
    let source = open(gguf::fixture("bf16.gguf").to_str().unwrap()).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let kept = |checkpoint: &Checkpoint| -> Vec<(String, String)> {
        let mut kept: Vec<_> =
            checkpoint.headers().into_iter().map(|info| (info.name, info.storage.to_string())).collect();
        kept.sort();
        kept
    };
    for (rounding, name) in
        [(Rounding::Q8_0, "q8_0"), (Rounding::Q4_0, "q4_0"), (Rounding::Q4KM, "q4_k_m"), (Rounding::Q5KM, "q5_k_m")]
    {
        let theirs = open(gguf::fixture(&format!("{name}.gguf")).to_str().unwrap()).unwrap();
        let ours = round(&source, rounding, &scratch.path().join(format!("{name}.gguf"))).unwrap();
        assert_eq!(kept(&ours), kept(&theirs), "{name}");
        assert_eq!((&ours.config, &ours.tokenizer_config), (&theirs.config, &theirs.tokenizer_config), "{name}");
        assert_eq!(ours.tokenizer_json, theirs.tokenizer_json, "{name}");
    }
}

/// Folders, the built-in models, a window, tied embeddings, heads of other widths, a reward head, experts: all go through a file.
#[test]
fn a_written_file_is_what_loading_rounds_to_bit_for_bit() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| fixture(name).to_str().unwrap().to_owned();
    let folders = ["mistral-window", "llama-eos-list", "reward", "mixtral"].map(path);
    let sources = ["eurus-mini/policy", "eurus-mini/reward"].into_iter().chain(folders.iter().map(String::as_str));
    for (index, name) in sources.enumerate() {
        let source = open(name).unwrap();
        for rounding in [Rounding::Q8_0, Rounding::Q4_0, Rounding::Q4KM, Rounding::F16, Rounding::Bf16] {
            let file = scratch.path().join(format!("{index}-{rounding}.gguf"));
            let written = round(&source, rounding, &file).unwrap();
            let (found, expected) = (answers(&load(&written, None)), answers(&load(&source, Some(rounding))));
            let unequal = found.iter().zip(&expected).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
            assert_eq!((found.len(), unequal), (expected.len(), 0), "{name} {rounding}");
            check_same(&written, &source, name);
        }
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 5 * (index + 1), "something else was left");
    }
}

#[track_caller]
fn check_same(written: &Checkpoint, source: &Checkpoint, name: &str) {
    let (a, b) = (&written.config, &source.config);
    assert_eq!((a.window, a.bos, &a.eos, a.append_eos), (b.window, b.bos, &b.eos, b.append_eos), "{name}");
    assert_eq!(a.experts, b.experts, "{name}");
    assert_eq!((a.rms_eps, a.rope_theta, a.positions_max, a.head), (b.rms_eps, b.rope_theta, b.positions_max, b.head));
    assert_eq!(written.chat_template().unwrap().source(), source.chat_template().unwrap().source());
    let (a, b) = (written.tokenizer().unwrap(), source.tokenizer().unwrap());
    assert_eq!(
        (a.bos(), a.eos(), a.adds_bos(), a.unk_text()),
        (b.bos(), b.eos(), b.adds_bos(), b.unk_text()),
        "{name}"
    );
    let text = "Step 1: 3*8=24, left\n naïve </s>";
    let ids = |tokenizer: &eurus::text::Tokenizer| tokenizer.encode(text, Special::Parse, Bos::Add).unwrap();
    assert_eq!(ids(&a), ids(&b), "{name}");
}

/// llama.cpp does not read tokenizer.json: what it reads must give the same tokens.
#[test]
fn the_pieces_in_a_file_split_texts_as_the_tokenizer_of_the_source_does() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("x.gguf");
    for (name, with_model) in [("mistral-window", true), ("reward", true), ("reward", false)] {
        let folder = copy(name);
        if !with_model {
            // Scores must come out of the rules of tokenizer.json.
            let json = open(fixture(name).to_str().unwrap()).unwrap().tokenizer_json;
            fs::write(folder.path().join("tokenizer.json"), json).unwrap();
            fs::remove_file(folder.path().join("tokenizer.model")).unwrap();
        }
        let source = open(folder.path().to_str().unwrap()).unwrap();
        round(&source, Rounding::Q8_0, &path).unwrap();
        let bytes = gguf::edited(&fs::read(&path).unwrap(), |keys| {
            keys.retain(|(key, _)| key != "tokenizer.huggingface.json");
        });
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
        let pieces = open(path.to_str().unwrap()).unwrap().tokenizer().unwrap();
        let own = source.tokenizer().unwrap();
        let expected: serde_json::Value =
            serde_json::from_slice(&fs::read(fixture(name).join("expected.json")).unwrap()).unwrap();
        for case in expected["text"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let ids = |tokenizer: &eurus::text::Tokenizer| tokenizer.encode(text, Special::Parse, Bos::Add).unwrap();
            assert_eq!(ids(&pieces), ids(&own), "{name} {text:?}");
        }
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_folder_in_two_bytes_loads_like_the_file() {
    let scratch = tempfile::tempdir().unwrap();
    for name in ["mistral-window", "reward"] {
        let source = open(fixture(name).to_str().unwrap()).unwrap();
        for (rounding, dtype) in [(Rounding::Bf16, DType::BF16), (Rounding::F16, DType::F16)] {
            let folder = round(&source, rounding, &scratch.path().join(format!("{name}-{rounding}"))).unwrap();
            assert_eq!(folder.config.dtype, Some(dtype));
            assert!(folder.headers().iter().all(|info| info.storage == Storage::Float(dtype)));
            check_same(&folder, &source, name);
            let exact = answers(&load(&source, None));
            let off = rms(&answers(&load(&folder, None)), &exact);
            let size = rms(&exact, &vec![0.0; exact.len()]);
            assert!(off < 0.03 * size, "{name} {rounding}: {off} of {size}");
            assert!(
                folder
                    .file("config.json")
                    .unwrap()
                    .is_some_and(|json| !String::from_utf8(json).unwrap().contains("auto_map"))
            );
        }
    }
}

#[test]
fn a_reward_head_beside_a_policy_makes_a_reward_model_of_it() {
    let scratch = tempfile::tempdir().unwrap();
    let (path, out) = (scratch.path().join("head.safetensors"), scratch.path().join("with.gguf"));
    let write = |head: Tensor| safetensors::write(&path, &HashMap::from([("any.name".to_owned(), head)])).unwrap();
    let reward = open(fixture("reward").to_str().unwrap()).unwrap();
    let mut weights = reward.load_weights(&Device::Cpu, &mut |_| {}).unwrap();
    let head = weights.take("regression_head.weight", &[1, 64]).unwrap().to_dtype(DType::F32).unwrap();
    write((head * 2.0).unwrap());
    let expected: Vec<f32> = answers(&load(&reward, None)).iter().map(|reward| 2.0 * reward).collect();
    assert_eq!(answers(&load(&reward.with_reward_head(&path).unwrap(), None)), expected);

    // A policy with a head of its own, one with a tied one, and one whose file has none.
    for name in [fixture("mistral-window").to_str().unwrap(), "eurus-mini/policy"] {
        let policy = open(name).unwrap();
        let hidden = policy.config.hidden;
        write(Tensor::ones(hidden, DType::F32, &Device::Cpu).unwrap());
        let with = policy.clone().with_reward_head(&path).unwrap();
        assert_eq!((with.config.head, with.config.tied), (HeadKind::Reward, false));
        with.check_tensors().unwrap();
        let model = load(&with, None);
        let states = packed(&load(&policy, None), &[TOKENS.to_vec()]).sum(1).unwrap().to_vec1::<f32>().unwrap();
        let off = rms(&answers(&model), &states);
        assert!(off < 1e-4, "{name}: {off}");
        let written = round(&with, Rounding::F16, &out).unwrap();
        assert_eq!(written.config.head, HeadKind::Reward);
        assert_eq!(answers(&load(&written, None)), answers(&load(&with, Some(Rounding::F16))));
        fs::remove_file(&out).unwrap();
        let refused = policy.clone().with_reward_head(Path::new("/nonexistent")).unwrap_err().to_string();
        assert!(refused.contains("/nonexistent"), "{refused}");
    }
    let policy = open("eurus-mini/policy").unwrap();
    for (head, part) in [
        (
            Tensor::ones((1, 64), DType::F32, &Device::Cpu).unwrap(),
            "any.name is f32 of shape [1, 64]; a reward head is one row of 128",
        ),
        (Tensor::ones((2, 128), DType::F32, &Device::Cpu).unwrap(), "of shape [2, 128]"),
        (Tensor::ones(128, DType::I64, &Device::Cpu).unwrap(), "any.name is I64"),
    ] {
        write(head);
        let error = policy.clone().with_reward_head(&path).unwrap_err().to_string();
        assert!(error.contains("head.safetensors: ") && error.contains(part), "{error}");
    }
}

#[test]
fn what_cannot_be_written_is_refused_and_leaves_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let place = |name: &str| scratch.path().join(name);
    let policy = open("eurus-mini/policy").unwrap();
    let refused = |source: &Checkpoint, rounding, name: &str, part: &str| {
        let error = write_rounded(source, rounding, &place(name), &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    refused(&policy, Rounding::Q8_0, "folder", "q8_0 is written to files whose names end with .gguf");
    refused(&policy, Rounding::Q8_0, "x-00001-of-00002.gguf", "is named like one of several parts");
    refused(&policy, Rounding::F16, "no/such/folder", "No such file");
    refused(&policy, Rounding::F16, "no/such/x.gguf", "No such file");
    let quantized = open(gguf::fixture("q4_0.gguf").to_str().unwrap()).unwrap();
    refused(&quantized, Rounding::Q8_0, "x.gguf", "is Q6_K already; name the original");
    assert!(matches!(
        quantized.load_rounded(Some(Rounding::Q8_0), &Device::Cpu, &mut |_| {}),
        Err(Error::Unsupported(_))
    ));

    let folder = copy("mistral-window");
    let checkpoint = open(folder.path().to_str().unwrap()).unwrap();
    let mut tensors = super::take_all(&checkpoint.config, checkpoint.load_weights(&Device::Cpu, &mut |_| {}).unwrap());
    let bad = Tensor::full(f32::NAN, (64, 64), &Device::Cpu).unwrap();
    let name = "model.layers.1.self_attn.o_proj.weight".to_owned();
    assert_eq!(tensors[&name].dims(), [64, 64]);
    tensors.insert(name, bad);
    safetensors::write(&folder.path().join("model.safetensors"), &tensors).unwrap();
    let bad = open(folder.path().to_str().unwrap()).unwrap();
    refused(
        &bad,
        Rounding::Q8_0,
        "x.gguf",
        "model.layers.1.self_attn.o_proj.weight: holds NaN, which Q8_0 cannot keep",
    );
    refused(&bad, Rounding::F16, "x", "holds NaN");
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0, "something was left");

    round(&policy, Rounding::Q8_0, &place("x.gguf")).unwrap();
    let before = fs::read(place("x.gguf")).unwrap();
    refused(&policy, Rounding::Q4_0, "x.gguf", "x.gguf: is there already");
    assert_eq!(fs::read(place("x.gguf")).unwrap(), before);
    edit(&folder.path().join("config.json"), |text| text.replacen("\"vocab_size\": 512", "\"vocab_size\": 513", 1));
    let unfit = open(folder.path().to_str().unwrap()).unwrap();
    refused(&unfit, Rounding::Q8_0, "y.gguf", "the tensors do not fit config.json");
}
