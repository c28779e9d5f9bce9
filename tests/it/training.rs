//! Training against PyTorch, transformers, TRL and PEFT: losses, gradients and an optimiser's course on tiny random models
//! (`tests/fixtures/train`, or a folder of the same layout in `EURUS_TRAIN_FIXTURES`). And against serving, bit for bit.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{Device, Tensor};
use eurus::model::parameters::LowRank;
use eurus::model::tape::Keep;
use eurus::ops::parameter::Parameter;
use eurus::train::batch::Packed;
use eurus::train::example::{Example, Text};
use eurus::train::learner::{Learner, Slopes};
use eurus::train::optimizer::{AdamWOptions, Optimizer};
use eurus::train::step::{Batch, Objective, Pass, Tally, mismatched, read};
use serde_json::Value;

use crate::parity::{load, served};

/// Bounds on what another implementation in float32 may give.
const LOSS_DIFFERENCE_MAX: f64 = 1e-5;
const GRADIENT_DIFFERENCE_MAX: f64 = 1e-4;
const WEIGHT_DIFFERENCE_MAX: f64 = 1e-4;

const EVERYTHING: usize = 1 << 20;

fn folder() -> PathBuf {
    match std::env::var_os("EURUS_TRAIN_FIXTURES") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/train"),
    }
}

fn json(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(folder().join(name)).unwrap()).unwrap()
}

fn tensors(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(folder().join(name), &Device::Cpu).unwrap()
}

fn learner(name: &str, keep: Keep) -> Learner {
    Learner { model: load(&folder().join(name)).unwrap(), keep, device: Device::Cpu }
}

fn trained(name: &str, keep: Keep) -> Learner {
    let mut learner = learner(name, keep);
    learner.model.train().unwrap();
    learner
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

/// A prompt and its answer, which counts.
fn text(prompt: &Value, answer: &Value) -> Text {
    let (prompt, answer) = (ids(prompt), ids(answer));
    let targets = [vec![false; prompt.len()], vec![true; answer.len()]].concat();
    Text { tokens: [prompt, answer].concat(), targets }
}

fn sft() -> Vec<Example> {
    let batch = &json("batches.json")["sft"];
    let rows = batch["input_ids"].as_array().unwrap().iter().zip(batch["completion_mask"].as_array().unwrap());
    rows.map(|(tokens, mask)| {
        let targets = ids(mask).into_iter().map(|target| target == 1).collect();
        Example::Text(Text { tokens: ids(tokens), targets })
    })
    .collect()
}

fn pairs(absolute: &[bool]) -> Vec<Example> {
    let batches = json("batches.json");
    let margins = numbers(&batches["rm"]["margin"]);
    let rows = batches["pairs"].as_array().unwrap().iter().zip(margins).zip(absolute.iter().cycle());
    rows.map(|((row, margin), absolute)| Example::Pair {
        chosen: text(&row["prompt_ids"], &row["chosen_ids"]),
        rejected: text(&row["prompt_ids"], &row["rejected_ids"]),
        absolute: *absolute,
        margin: Some(margin as f32),
    })
    .collect()
}

fn answers() -> Vec<Example> {
    let batches = json("batches.json");
    let rows = batches["kto"].as_array().unwrap().iter();
    rows.map(|row| Example::Answer {
        text: text(&row["prompt_ids"], &row["completion_ids"]),
        desirable: row["label"].as_bool().unwrap(),
    })
    .collect()
}

fn beta() -> f64 {
    json("expected.json")["beta"].as_f64().unwrap()
}

/// One step of `objective` on `examples`; the reference is read where there is one.
#[track_caller]
fn step(
    objective: Objective,
    learner: &Learner,
    reference: Option<&Learner>,
    examples: &[Example],
    tokens: usize,
) -> Tally {
    let values = |texts: &[&Text]| -> Vec<f64> {
        reference.map_or(vec![0.0; texts.len()], |reference| {
            read(reference, texts, tokens).unwrap().iter().map(|reading| reading.value).collect()
        })
    };
    let references: Vec<Vec<f64>> =
        examples.iter().map(|example| values(&example.texts().collect::<Vec<_>>())).collect();
    let answers: Vec<&Text> = examples.iter().flat_map(|example| example.texts()).collect();
    let others = mismatched(&answers);
    let other_values = values(&others.iter().collect::<Vec<_>>());
    let batch = Batch {
        examples: examples.iter().collect(),
        references: references.iter().map(Vec::as_slice).collect(),
        mismatched: others.iter().zip(other_values).collect(),
    };
    objective.step(learner, &batch, tokens, Pass::Learn).unwrap()
}

/// Every gradient of `learner` against the file `name`, whose names carry `prefix` and `suffix`.
#[track_caller]
fn check_gradients(what: &str, learner: &Learner, name: &str) {
    let mut expected: HashMap<String, Tensor> = tensors(name)
        .into_iter()
        .map(|(name, tensor)| (name.replace("base_model.model.", "").replace(".default.", "."), tensor))
        .collect();
    for named in learner.model.parameters() {
        let Some(gradient) = named.parameter.gradient() else { continue };
        for part in named.parts {
            let expected =
                expected.remove(&part.name).unwrap_or_else(|| panic!("{what}: no gradient of {}", part.name));
            let got = gradient.narrow(0, part.rows.start, part.rows.len()).unwrap();
            let off = norm(&(got - &expected).unwrap()) / norm(&expected);
            assert!(off < GRADIENT_DIFFERENCE_MAX, "{what}: the gradient of {} is off by {off:e}", part.name);
        }
    }
    assert!(expected.is_empty(), "{what}: gradients of {:?} are missing", expected.keys());
}

fn norm(x: &Tensor) -> f64 {
    let values: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

#[track_caller]
fn check_number(what: &str, got: f64, expected: &Value, bound: f64) {
    let expected = expected.as_f64().unwrap_or_else(|| panic!("{what} is not in expected.json"));
    assert!((got - expected).abs() <= bound, "{what} is {got}, expected {expected}");
}

/// Loss and gradients of one objective, with and without recomputation, in one micro-batch and in several.
#[track_caller]
fn check_objective(name: &str, objective: Objective, [policy, reference]: [&str; 2], examples: &[Example]) {
    let expected = &json("expected.json")[name];
    let reference = (!reference.is_empty()).then(|| learner(reference, Keep::Inputs));
    for (keep, tokens) in [(Keep::Everything, EVERYTHING), (Keep::Inputs, EVERYTHING), (Keep::Inputs, 40)] {
        let learner = trained(policy, keep);
        let tally = step(objective, &learner, reference.as_ref(), examples, tokens);
        let what = format!("{name} ({keep:?}, {tokens} tokens)");
        check_number(&what, tally.get("loss").unwrap(), &expected["loss"], LOSS_DIFFERENCE_MAX);
        if let Some(z0) = expected.get("z0") {
            check_number("z0", tally.get("kl").unwrap() / beta(), z0, 1e-4);
        }
        for (metric, key) in [("rewards/chosen", "rewards_chosen"), ("rewards/rejected", "rewards_rejected")] {
            if let Some(values) = expected.get(key) {
                let mean = numbers(values).iter().sum::<f64>() / numbers(values).len() as f64;
                assert!((tally.get(metric).unwrap() - mean).abs() < 1e-5, "{what}: {metric}");
            }
        }
        check_gradients(&what, &learner, &format!("grads_{name}.safetensors"));
        let norm = Optimizer::new(&learner.model, ADAMW).unwrap().gradient_norm().unwrap();
        let most = GRADIENT_DIFFERENCE_MAX * expected["grad_norm"].as_f64().unwrap();
        check_number(&what, norm, &expected["grad_norm"], most);
    }
}

const ADAMW: AdamWOptions = AdamWOptions { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, clip_norm: Some(1.0) };

#[test]
fn sft_is_that_of_transformers() {
    check_objective("sft", Objective::Sft, ["policy", ""], &sft());
}

#[test]
fn dpo_is_that_of_trl() {
    let dpo = |label_smoothing| Objective::Dpo { beta: beta(), label_smoothing };
    check_objective("dpo", dpo(0.0), ["policy", "ref"], &pairs(&[false]));
    check_objective("cdpo_0.1", dpo(0.1), ["policy", "ref"], &pairs(&[false]));
}

#[test]
fn nca_is_that_of_trl() {
    check_objective("nca_pair", Objective::Nca { beta: beta() }, ["policy", "ref"], &pairs(&[false]));
}

#[test]
fn kto_is_that_of_trl() {
    let expected = json("expected.json");
    let weight = |name: &str| expected[name].as_f64().unwrap();
    let kto = Objective::Kto {
        beta: beta(),
        desirable: weight("kto_desirable_weight"),
        undesirable: weight("kto_undesirable_weight"),
    };
    check_objective("kto", kto, ["policy", "ref"], &answers());
    check_objective("kto_swapped", kto, ["ref", "policy"], &answers());
}

#[test]
fn rewards_are_learnt_as_the_paper_says() {
    let terms = |bradley_terry, margin, centre| Objective::Reward { bradley_terry, margin, centre };
    let flags: Vec<bool> =
        numbers(&json("batches.json")["rm"]["ultrainteract_flag"]).iter().map(|flag| *flag == 1.0).collect();
    let none = pairs(&[false]);
    check_objective("rm_bt", terms(true, false, 0.0), ["rm", ""], &none);
    check_objective("rm_bt_margin_center", terms(true, true, 0.01), ["rm", ""], &none);
    check_objective("rm_dr_only", terms(false, false, 0.0), ["rm", ""], &pairs(&[true]));
    check_objective("rm_eurus", terms(true, false, 0.0), ["rm", ""], &pairs(&[true]));
    check_objective("rm_eurus_mixed", terms(true, false, 0.0), ["rm", ""], &pairs(&flags));
}

#[test]
fn log_probabilities_and_rewards_are_those_of_transformers_packed_or_alone() {
    let expected = json("expected.json");
    let (policy, examples) = (learner("policy", Keep::Inputs), sft());
    let texts: Vec<&Text> = examples.iter().flat_map(|example| example.texts()).collect();
    let sums = numbers(&expected["sft"]["seq_logps"]);
    for tokens in [1, 50, EVERYTHING] {
        for (reading, sum) in read(&policy, &texts, tokens).unwrap().iter().zip(&sums) {
            assert!((reading.value - sum).abs() < 1e-4, "{} and {sum}", reading.value);
        }
    }
    let rows: Vec<Text> = expected["rm_forward"]["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| Text { tokens: ids(row), targets: vec![false; ids(row).len()] })
        .collect();
    let rewards = numbers(&expected["rm_forward"]["rewards_unpadded"]);
    let rm = learner("rm", Keep::Inputs);
    for tokens in [1, EVERYTHING] {
        let readings = read(&rm, &rows.iter().collect::<Vec<_>>(), tokens).unwrap();
        for (reading, reward) in readings.iter().zip(&rewards) {
            assert!((reading.value - reward).abs() < 1e-5, "{} and {reward}", reading.value);
        }
    }
}

#[test]
fn the_course_of_adamw_is_that_of_transformers() {
    let expected = &json("expected.json")["adamw"];
    let policy = trained("policy", Keep::Everything);
    let mut optimizer = Optimizer::new(&policy.model, ADAMW).unwrap();
    let examples = sft();
    for step_expected in expected["trajectory"].as_array().unwrap() {
        // Two micro-batches a step, as there.
        let tally = step(Objective::Sft, &policy, None, &examples, 60);
        check_number("loss", tally.get("loss").unwrap(), &step_expected["loss"], 2e-5);
        let norm = optimizer.gradient_norm().unwrap();
        check_number("norm", norm, &step_expected["grad_norm_before_clip"], 1e-3);
        optimizer.check_gradients().unwrap();
        optimizer.step(step_expected["lr"].as_f64().unwrap(), norm).unwrap();
    }
    check_weights(&policy, "adamw_final.safetensors");
}

#[track_caller]
fn check_weights(learner: &Learner, name: &str) {
    let expected = tensors(name);
    for named in learner.model.parameters() {
        for part in named.parts {
            let got = named.parameter.value().narrow(0, part.rows.start, part.rows.len()).unwrap();
            let off = (got - &expected[&part.name]).unwrap().abs().unwrap().flatten_all().unwrap();
            let off = f64::from(off.max(0).unwrap().to_scalar::<f32>().unwrap());
            assert!(off < WEIGHT_DIFFERENCE_MAX, "{} is off by {off:e}", part.name);
        }
    }
}

#[test]
fn adapters_are_those_of_peft() {
    let expected = &json("expected.json")["lora"];
    let config = json("lora/adapter_config.json");
    let scale = config["lora_alpha"].as_f64().unwrap() / config["r"].as_f64().unwrap();
    let matrices = tensors("lora/adapter_model.safetensors");
    let mut policy = learner("policy", Keep::Everything);
    policy
        .model
        .adapt(|name, _| {
            let base = format!("base_model.model.{}", name.trim_end_matches(".weight"));
            let matrix = |which: &str| Parameter::trained(&matrices[&format!("{base}.{which}.weight")]);
            Ok(Some(LowRank { a: matrix("lora_A")?, b: matrix("lora_B")?, scale: scale as f32 }))
        })
        .unwrap();
    let tally = step(Objective::Sft, &policy, None, &sft(), EVERYTHING);
    check_number("loss", tally.get("loss").unwrap(), &expected["loss"], LOSS_DIFFERENCE_MAX);
    check_gradients("lora", &policy, "grads_lora.safetensors");
    policy.model.merge().unwrap();
    let merged = read_loss(&policy, &sft());
    check_number("merged", merged, &expected["loss"], LOSS_DIFFERENCE_MAX);
}

fn read_loss(learner: &Learner, examples: &[Example]) -> f64 {
    let batch = Batch { examples: examples.iter().collect(), ..Batch::default() };
    Objective::Sft.step(learner, &batch, EVERYTHING, Pass::Read).unwrap().get("loss").unwrap()
}

/// What a text is packed with changes no bit of its reading, and a server would give the same.
#[test]
fn readings_have_the_bits_of_serving_in_every_pack() {
    for (name, folder) in [("policy", folder()), ("rm", folder()), ("mistral-window", served_fixtures())] {
        let model = load(&folder.join(name)).unwrap();
        let vocab = model.config.vocab as u32;
        let text = |number: u32| {
            let len = 3 + 7 * number;
            let tokens = (0..len).map(|place| (place * 7919 + number * 104_729 + 3) % vocab).collect();
            Text { tokens, targets: (0..len).map(|place| place > 0).collect() }
        };
        let texts: Vec<Text> = (0..9).map(text).collect();
        let served = served(model, &texts.iter().map(|text| text.tokens.clone()).collect::<Vec<_>>());
        let model = load(&folder.join(name)).unwrap();
        let mut learner = Learner { model, keep: Keep::Inputs, device: Device::Cpu };
        learner.model.train().unwrap();
        let together = learner.read(&Packed::new(&texts.iter().collect::<Vec<_>>())).unwrap();
        for ((text, served), reading) in texts.iter().zip(&served).zip(&together) {
            let expected: f64 = served.iter().map(|number| f64::from(*number)).sum();
            let what = format!("{name}, {} tokens", text.tokens.len());
            assert_eq!(reading.value.to_bits(), expected.to_bits(), "{what}: {} and {expected}", reading.value);
            for slopes in [Slopes::Same(1.0), Slopes::Of(&mut |_| vec![1.0])] {
                let alone = learner.learn(&Packed::new(&[text]), slopes).unwrap();
                assert_eq!(alone[0].value.to_bits(), expected.to_bits(), "{what} alone");
            }
        }
    }
}

fn served_fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/serve")
}
