//! The commands that need no server, as users run them: score, best-of-n, chat, check, and a checkpoint made for a benchmark.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};

use super::black_box::eurus;

const QUESTION: &str = "Use the numbers 3, 5, 8 to make 29.";
const RIGHT: &str = "Step 1: 8*3=24, left 5 24\nStep 2: 24+5=29, left 29\nAnswer: \\boxed{8*3+5}";
/// What the built-in policy answers without chance.
const ANSWER: &str = "Step 1: 3*8=24, left 5 24\nStep 2: 24+5=29, left 29\nAnswer: \\boxed{3*8+5}";

/// Exit code, standard output and standard error.
fn run(arguments: &[&str], input: &str) -> (Option<i32>, String, String) {
    let mut command = eurus(arguments);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A command that refuses its arguments does not read.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[track_caller]
fn rows(arguments: &[&str], input: &[Value]) -> Vec<Value> {
    let input: String = input.iter().map(|row| format!("{row}\n")).collect();
    let (code, output, log) = run(arguments, &input);
    assert_eq!(code, Some(0), "{log}");
    output.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[track_caller]
fn check_close(found: &Value, expected: f64) {
    assert!((found.as_f64().unwrap() - expected).abs() < 1e-4, "{found} instead of {expected}");
}

#[test]
fn every_kind_of_row_is_scored_in_order_and_keeps_its_fields() {
    let conversation = json!([{"role": "user", "content": QUESTION}, {"role": "assistant", "content": RIGHT}]);
    let input = [
        json!({"id": 7, "prompt": QUESTION, "completion": RIGHT}),
        json!({"messages": conversation}),
        json!({"prompt": [conversation[0]], "completions": [RIGHT, "no"]}),
        json!({"text": format!("<s>[INST] {QUESTION} [/INST]{RIGHT}")}),
    ];
    let output = rows(&["score"], &input);
    assert_eq!(output.len(), 4);
    assert_eq!((&output[0]["id"], &output[0]["completion"]), (&json!(7), &json!(RIGHT)));
    // The value that the reward model gives over HTTP, too.
    for reward in [&output[0]["reward"], &output[1]["reward"], &output[2]["rewards"][0], &output[3]["reward"]] {
        assert_eq!(reward, &output[0]["reward"]);
    }
    check_close(&output[0]["reward"], 2.331_731_8);
    check_close(&output[2]["rewards"][1], -7.026_176_5);
}

#[test]
fn a_bad_row_is_named_by_file_and_line() {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bad_rows.jsonl");
    fs::write(&path, format!("{}\n\n{{\"prompt\": \"x\"}}\n", json!({"prompt": QUESTION, "completion": RIGHT})))
        .unwrap();
    let (code, output, log) = run(&["score", path.to_str().unwrap()], "");
    assert_eq!(code, Some(2));
    assert!(log.contains("bad_rows.jsonl:3") && log.contains("`completion`"), "{log}");
    assert_eq!(output.lines().count(), 1, "the row before it is written: {output}");
}

#[test]
fn the_best_of_n_is_the_candidate_with_the_highest_reward() {
    let arguments = ["best-of-n", "-n", "6", "--seed", "1"];
    let output = rows(&arguments, &[json!({"prompt": QUESTION, "nums": [3, 5, 8]})]);
    let candidates = output[0]["candidates"].as_array().unwrap();
    assert_eq!((candidates.len(), &output[0]["strategy"]), (6, &json!("reward")));
    assert_eq!(output[0]["nums"], json!([3, 5, 8]));
    let reward = |candidate: &Value| candidate["reward"].as_f64().unwrap();
    let best = candidates
        .iter()
        .max_by(|a, b| reward(a).total_cmp(&reward(b)).then(b["index"].as_u64().cmp(&a["index"].as_u64())));
    let best = best.unwrap();
    assert_eq!((&output[0]["choice"], &output[0]["completion"]), (&best["index"], &best["text"]));
    assert!(candidates.iter().any(|candidate| reward(candidate) < reward(best)));
    assert_eq!(output, rows(&arguments, &[json!({"prompt": QUESTION, "nums": [3, 5, 8]})]), "the seed repeats it");
}

#[test]
fn chat_says_what_the_server_says() {
    let (code, output, log) = run(&["chat", "--temperature", "0", QUESTION], "");
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(output, format!("{ANSWER}\n"));
    let (_, output, _) = run(&["chat", "--temperature", "0"], &format!("{QUESTION}\n\n{QUESTION}\n"));
    assert!(output.starts_with(&format!("{ANSWER}\n")) && output.len() > ANSWER.len() + 2, "{output}");
}

#[test]
fn check_tells_sizes_and_every_problem_at_once() {
    let (code, report, log) = run(&["check"], "");
    assert_eq!(code, Some(0), "{log}");
    for part in ["eurus-mini/policy", "eurus-mini/reward", "1.2 million", "vocabulary 320", "cache"] {
        assert!(report.contains(part), "no {part:?} in {report}");
    }
    let (code, _, log) = run(&["check", "--model", "/nonexistent/model", "--reward-model", "eurus-mini/policy"], "");
    assert_eq!(code, Some(2));
    assert!(log.contains("/nonexistent/model") && log.contains("no reward head"), "{log}");
}

#[test]
fn a_made_checkpoint_loads_and_is_timed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny");
    let path = path.to_str().unwrap();
    let shape = [
        "--hidden",
        "64",
        "--layers",
        "2",
        "--heads",
        "4",
        "--kv-heads",
        "2",
        "--intermediate",
        "96",
        "--vocab",
        "300",
    ];
    let (code, _, log) = run(&[&["bench", "make-model", path], &shape[..]].concat(), "");
    assert_eq!(code, Some(0), "{log}");
    let (code, report, log) = run(&["check", "--model", path, "--reward-model", "none"], "");
    assert_eq!(code, Some(0), "{log}");
    assert!(report.contains("2 layers, hidden 64"), "{report}");
    let times = [
        "bench",
        "model",
        "--model",
        path,
        "--prefill",
        "20",
        "--context",
        "4",
        "--steps",
        "3",
        "--batches",
        "1,3",
        "--json",
    ];
    let (code, report, log) = run(&times, "");
    assert_eq!(code, Some(0), "{log}");
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["decode"].as_array().unwrap().len(), 2);
    assert!(report["prefill_tokens_per_second"].as_f64().unwrap() > 0.0);
    let (code, _, log) = run(&[&["bench", "make-model", path], &shape[..]].concat(), "");
    assert_eq!(code, Some(2), "an existing folder is left alone: {log}");
}

#[test]
fn a_reward_model_is_quantised_and_its_rewards_are_compared() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let wrong = RIGHT.replace("24+5=29, left 29", "24-5=19, left 19");
    let rows = [
        json!({"prompt": QUESTION, "chosen": RIGHT, "rejected": wrong}),
        json!({"prompt": QUESTION, "completions": [RIGHT, "no", wrong]}),
        json!({"trajectory": [{"from": "user", "value": QUESTION}], "chosen": RIGHT, "rejected": "no"}),
    ];
    fs::write(place("rows.jsonl"), rows.map(|row| format!("{row}\n")).concat()).unwrap();
    let arguments =
        ["quantize", "eurus-mini/reward", &place("r.gguf"), "--format", "q8_0", "--report", &place("rows.jsonl")];
    let (code, output, log) = run(&arguments, "");
    assert_eq!(code, Some(0), "{log}");
    for part in [
        "r.gguf: ",
        "43 in Q8_0",
        "14 in f32",
        "rewards of 7 texts: off by 0.",
        "of 5 pairs: 5 kept (100.00%)",
        "of 2: 2 before, 2 after",
    ] {
        assert!(output.contains(part), "no {part:?} in {output}");
    }
    let scored = |model: &[&str]| {
        let row = json!({"prompt": QUESTION, "completion": RIGHT});
        self::rows(&[&["score"][..], model].concat(), &[row])[0]["reward"].as_f64().unwrap()
    };
    let written = scored(&["--reward-model", &place("r.gguf")]);
    assert!((written - 2.331_731_8).abs() < 0.1, "{written}");
    // Rounded while it is loaded, the same.
    assert_eq!(written, scored(&["--reward-quantize", "q8_0"]));

    for (arguments, part) in [
        (["eurus-mini/policy", &place("p.gguf"), "--format", "q8_0"], "is no reward model: it has no rewards"),
        (["eurus-mini/reward", &place("r.gguf"), "--format", "q4_0"], "r.gguf: is there already"),
        ([&place("r.gguf"), &place("s.gguf"), "--format", "q4_0"], "already; name the original"),
    ] {
        let (code, _, log) = run(&[&["quantize", "--report", &place("rows.jsonl")], &arguments[..]].concat(), "");
        assert_eq!(code, Some(2), "{log}");
        assert!(log.contains(part), "{log}");
    }
    fs::write(place("rows.jsonl"), "{\"prompt\": \"x\", \"chosen\": \"y\"}\n").unwrap();
    let (code, _, log) = run(
        &["quantize", "eurus-mini/reward", &place("t.gguf"), "--format", "q8_0", "--report", &place("rows.jsonl")],
        "",
    );
    assert_eq!((code, fs::exists(place("t.gguf")).unwrap()), (Some(2), false));
    assert!(log.contains("rows.jsonl:1: `rejected` must be a string"), "{log}");
}

#[test]
fn rewards_computed_in_bf16_are_near_the_exact_ones() {
    let scored = |compute: &str| {
        let row = json!({"prompt": QUESTION, "completion": RIGHT});
        let arguments = ["score", "--reward-model", "eurus-mini/reward", "--reward-compute-dtype", compute];
        rows(&arguments, &[row])[0]["reward"].as_f64().unwrap()
    };
    let (exact, rounded) = (scored("f32"), scored("bf16"));
    assert!((exact - rounded).abs() < 0.1, "{exact} and {rounded}");
    let (code, _, log) = run(&["check", "--set", "compute_dtype=f16"], "");
    assert!(code == Some(2) && log.contains("compute_dtype"), "{log}");
}

#[test]
fn a_reward_head_from_a_file_gives_rewards() {
    use candle_core::{DType, Device, Tensor};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("head.safetensors");
    let head = Tensor::zeros((1, 128), DType::F32, &Device::Cpu).unwrap();
    eurus::checkpoint::safetensors::write(&path, &[("w".to_owned(), head)].into()).unwrap();
    let row = [json!({"prompt": QUESTION, "completion": RIGHT})];
    let arguments = ["score", "--reward-model", "eurus-mini/policy", "--reward-head", path.to_str().unwrap()];
    assert_eq!(rows(&arguments, &row)[0]["reward"], json!(0.0));
    let (code, _, log) = run(&arguments[..3], "");
    assert!(code == Some(2) && log.contains("has no reward head"), "{log}");
}

#[test]
fn check_plans_for_what_is_rounded_while_it_is_loaded() {
    let (code, report, log) = run(&["check", "--quantize", "q8_0", "--reward-model", "none"], "");
    assert_eq!(code, Some(0), "{log}");
    assert!(
        report.contains("quantised   to q8_0 while loading, from 4.7 MiB") && report.contains("weights 1.2 MiB"),
        "{report}"
    );
    let quantized = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/gguf/q4_0.gguf");
    let (code, _, log) = run(&["check", "--quantize", "q8_0", "--model", quantized, "--reward-model", "none"], "");
    assert_eq!(code, Some(2));
    assert!(log.contains("is Q6_K already; name the original"), "{log}");
    let (code, _, log) = run(&["check", "--set", "quantize=q3"], "");
    assert_eq!(code, Some(2));
    assert!(log.contains("quantize") && log.contains("q4_k_m"), "{log}");
}

#[test]
fn reading_memory_is_timed() {
    let (code, report, log) = run(&["bench", "memory", "--mib", "4", "--passes", "2", "--json"], "");
    assert_eq!(code, Some(0), "{log}");
    let report: Value = serde_json::from_str(&report).unwrap();
    assert!(report["median_gb_per_second"].as_f64().unwrap() > 0.0 && report["mib"] == 4, "{report}");
}

#[test]
fn the_key_of_a_client_is_read_by_the_client_and_is_no_setting() {
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", server.local_addr().unwrap());
    let mut client = eurus(&["bench", "serve", "--url", &url, "--requests", "1", "--concurrency", "1"]);
    let mut client = client.env("EURUS_API_KEY", "sesame").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let (mut connection, _) = server.accept().unwrap();
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") && connection.read(&mut byte).unwrap() == 1 {
        head.push(byte[0]);
    }
    drop((connection, server));
    assert!(String::from_utf8(head).unwrap().to_lowercase().contains("authorization: bearer sesame"));
    client.wait().unwrap();
    let checked = eurus(&["check"]).env("EURUS_API_KEY", "sesame").output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}

#[test]
fn a_recipe_is_shown_resolved_and_a_wrong_one_is_refused_by_key() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/training/recipes/mini-dpo.toml");
    let shown = |config: &str, more: &[&str]| {
        let arguments = ["train", "dpo", "--config", config, "--print-config"];
        let (code, output, log) = run(&[&arguments[..], more].concat(), "");
        assert_eq!(code, Some(0), "{log}");
        output
    };
    let first = shown(recipe, &["--set", "objective.beta=0.25"]);
    assert!(first.contains("beta = 0.25\n") && first.contains("[[data.source]]\n"), "{first}");
    // What is shown is a recipe, too, and shows itself.
    let path = folder.path().join("resolved.toml");
    fs::write(&path, &first).unwrap();
    assert_eq!(shown(path.to_str().unwrap(), &[]), first);
    for (arguments, part) in [
        (["dpo", "--set", "objective.bta=1"], "did you mean `objective.beta`?"),
        (["dpo", "--set", "objective.centre=1"], "is a key of reward"),
        (["sft", "--set", "run.seed=1"], "the command is `eurus train sft`"),
    ] {
        let (code, output, log) = run(&[&["train", "--config", recipe][..], &arguments].concat(), "");
        assert_eq!((code, output.as_str()), (Some(2), ""), "{log}");
        assert!(log.contains(part), "{log}");
    }
}
