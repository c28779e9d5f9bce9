//! Files to examples as a whole: every schema in every form, errors with their places, mixtures and splits.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::text::tokenizer::{SpecialText as Shown, SpecialTokens};
use crate::text::{ChatTemplate, Tokenizer};
use crate::train::example::Text;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/train/data");

fn encoder() -> Encoder {
    let json = include_str!("../../../tests/fixtures/train/chat/tokenizer.json");
    let [bos, eos] = ["<s>", "</s>"].map(|text| Some(text.to_owned()));
    let tokenizer = Tokenizer::from_json(json, &SpecialTokens { bos, eos, ..SpecialTokens::default() }).unwrap();
    let template = "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}\
        {% elif m.role in ['user', 'system'] %}[{{ m.content }}]{% else %}{{ raise_exception('no such role') }}\
        {% endif %}{% endfor %}";
    Encoder::new(Arc::new(tokenizer), ChatTemplate::from_source("test", template).unwrap(), TextEnd::Turn).unwrap()
}

/// A folder with one file of `rows`.
struct Rows {
    folder: tempfile::TempDir,
    path: PathBuf,
}

fn lines(rows: &[Value]) -> Rows {
    file("rows.jsonl", rows.iter().map(|row| format!("{row}\n")).collect::<String>().as_bytes())
}

fn file(name: &str, bytes: &[u8]) -> Rows {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    Rows { folder, path }
}

fn recipe(path: &Path) -> DataRecipe {
    DataRecipe { source: vec![SourceRecipe::new(path)], ..DataRecipe::default() }
}

fn try_load(recipe: &DataRecipe, form: Form) -> Result<Dataset> {
    load(recipe, form, 17, &encoder(), &mut |_| {})
}

/// A text as `prompt>what counts`.
fn show(text: &Text) -> String {
    let tokenizer = encoder();
    let decode = |tokens: &[u32]| tokenizer.tokenizer().decode(tokens, Shown::Show).unwrap();
    let (prompt, counted) = text.tokens.split_at(text.prompt_len());
    assert!(text.targets[prompt.len()..].iter().all(|target| *target), "one run");
    format!("{}>{}", decode(prompt), decode(counted))
}

fn shown(examples: &[Example]) -> Vec<String> {
    let one = |example: &Example| match example {
        Example::Text(text) => show(text),
        Example::Answer { text, desirable } => format!("{desirable} {}", show(text)),
        Example::Pair { chosen, rejected, absolute, margin } => {
            format!("{absolute} {margin:?} {} {}", show(chosen), show(rejected))
        }
    };
    examples.iter().map(one).collect()
}

#[track_caller]
fn check(row: &Value, form: Form, expected: &[&str]) {
    let rows = lines(std::slice::from_ref(row));
    assert_eq!(shown(&try_load(&recipe(&rows.path), form).unwrap().train), expected, "{row}");
}

#[track_caller]
fn refused(rows: &Rows, form: Form, expected: &str) {
    let error = try_load(&recipe(&rows.path), form).unwrap_err().to_string();
    let name = rows.path.file_name().unwrap().to_str().unwrap();
    let relative = error.replace(&rows.folder.path().display().to_string(), "").replace(&format!("/{name}"), name);
    assert!(relative.contains(expected), "{relative}");
}

fn pair_row(parent: &str, trajectory: &[&str], chosen: &str, rejected: &str) -> Value {
    let roles = ["user", "assistant"].into_iter().cycle();
    let turns: Vec<Value> = roles.zip(trajectory).map(|(from, value)| json!({"from": from, "value": value})).collect();
    json!({"id": format!("{parent}_3_{}", turns.len() / 2), "parent_id": parent, "task": "Math_CoT", "dataset": "d",
        "trajectory": turns, "chosen": chosen, "rejected": rejected})
}

#[test]
fn every_schema_becomes_every_form_it_can() {
    let sft =
        json!({"id": "i", "parent_id": "p", "task": "Coding", "dataset": "d", "instruction": "q", "response": "a"});
    check(&sft, Form::Text, &["<s>[q]>a</s>"]);
    let tree = pair_row("p", &["q", "w", "o"], "a", "b");
    check(&tree, Form::Text, &["<s>[q]>a</s>"]);
    check(&tree, Form::Pair, &["true None <s>[q]w</s>[o]>a</s> <s>[q]w</s>[o]>b</s>"]);
    check(&tree, Form::Answer, &["true <s>[q]w</s>[o]>a</s>", "false <s>[q]w</s>[o]>b</s>"]);
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let from = |from: &str, value: &str| json!({"from": from, "value": value});
    check(&json!({"messages": [turn("user", "q"), turn("assistant", "a")]}), Form::Text, &["<s>[q]>a</s>"]);
    check(
        &json!({"conversations": [from("system", "s"), from("human", "q"), from("gpt", "a")]}),
        Form::Text,
        &["<s>[s][q]>a</s>"],
    );
    check(&json!({"prompt": "q", "completion": "a"}), Form::Text, &["<s>[q]>a</s>"]);
    let messages = json!({"prompt": [turn("user", "q")], "completion": [turn("assistant", "w"), turn("user", "o"), turn("assistant", "a")]});
    check(&messages, Form::Text, &["<s>[q]w</s>[o]>a</s>"]);
    let margin = json!({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 0.5});
    check(&margin, Form::Pair, &["false Some(0.5) <s>[q]>a</s> <s>[q]>b</s>"]);
    check(&margin, Form::Text, &["<s>[q]>a</s>"]);
    check(&margin, Form::Answer, &["true <s>[q]>a</s>", "false <s>[q]>b</s>"]);
    let explicit = json!({"prompt": [turn("user", "q")], "chosen": [turn("assistant", "a")], "rejected": [turn("assistant", "b")]});
    check(&explicit, Form::Pair, &["false None <s>[q]>a</s> <s>[q]>b</s>"]);
    let whole =
        |answer: &str| json!([turn("user", "q"), turn("assistant", "w"), turn("user", "o"), turn("assistant", answer)]);
    let implicit = json!({"chosen": whole("a"), "rejected": whole("b"), "margin": null});
    check(&implicit, Form::Pair, &["false None <s>[q]w</s>[o]>a</s> <s>[q]w</s>[o]>b</s>"]);
    let feedback = json!({"prompt": "q", "prompt_id": "x", "chosen": whole("a"), "rejected": whole("b"), "messages": whole("a"), "score_chosen": 8.5});
    check(&feedback, Form::Pair, &["false None <s>[q]w</s>[o]>a</s> <s>[q]w</s>[o]>b</s>"]);
    check(&json!({"prompt": "q", "completion": "a", "label": true}), Form::Answer, &["true <s>[q]>a</s>"]);
    check(&json!({"prompt": "q", "completion": "a", "label": false}), Form::Answer, &["false <s>[q]>a</s>"]);
    check(&json!({"prompt": "q", "completion": "a", "label": true}), Form::Text, &["<s>[q]>a</s>"]);
}

#[test]
fn all_turns_of_a_conversation_count() {
    let turns = ["user", "assistant", "user", "assistant"].iter().zip(["1", "2", "3", "4"]);
    let turns: Vec<Value> = turns.map(|(role, content)| json!({"role": role, "content": content})).collect();
    let dataset = try_load(&recipe(&lines(&[json!({"messages": turns})]).path), Form::Text).unwrap();
    let Example::Text(text) = &dataset.train[0] else { panic!("a text") };
    let counted: Vec<u32> =
        (0..text.tokens.len()).filter(|place| text.targets[*place]).map(|place| text.tokens[place]).collect();
    assert_eq!(encoder().tokenizer().decode(&counted, Shown::Show).unwrap(), "2</s>4</s>");
}

#[test]
fn a_bad_row_names_its_place_and_what_was_expected() {
    let good = json!({"prompt": "q", "completion": "a"});
    let cases = [
        (
            json!({"instruction": "q", "response": 3}),
            "rows.jsonl:2: expected \"response\" to be a text, found a number (ultrainteract_sft)",
        ),
        (json!({"text": "q", "other": 1}), "rows.jsonl:2: expected instruction and response"),
        (json!({"text": "q", "other": 1}), "found the keys text, other"),
        (json!([1]), "rows.jsonl:2: expected a JSON object, found a list"),
        (json!({"messages": []}), "expected \"messages\" to be a list of messages, found an empty list"),
        (
            json!({"messages": [{"role": "user", "content": "q"}]}),
            "expected a message of the assistant in \"messages\"",
        ),
        (
            json!({"messages": [{"role": "user", "content": null}]}),
            "expected messages[0] to have a text \"content\" (or \"value\"), found nothing",
        ),
        (json!({"prompt": 1, "completion": "a"}), "expected \"prompt\" to be a text or messages, found a number"),
        (
            json!({"prompt": "q", "completion": [{"role": "user", "content": "a"}]}),
            "expected \"completion\" to end with a message of the assistant",
        ),
        (
            json!({"prompt": "q", "completion": "a", "label": "yes"}),
            "expected \"label\" to be true or false, found a text (unpaired)",
        ),
        (
            json!({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "x"}),
            "expected \"margin\" to be a number, found a text",
        ),
        (
            json!({"trajectory": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}], "chosen": "a", "rejected": "b"}),
            "expected \"trajectory\" to alternate between user and assistant, user first and last",
        ),
        (
            json!({"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}]}),
            "to be alike up to their last message",
        ),
        (
            json!({"messages": [{"role": "tool", "content": "q"}, {"role": "assistant", "content": "a"}]}),
            "rows.jsonl:2: no such role",
        ),
    ];
    for (bad, expected) in cases {
        refused(&lines(&[good.clone(), bad]), Form::Text, expected);
    }
    refused(&lines(std::slice::from_ref(&good)), Form::Pair, "rows.jsonl:1: this stage needs pairs");
    refused(&lines(&[good]), Form::Answer, "rows.jsonl:1: this stage needs answers with a label");
    refused(&file("x.jsonl", b"{}\n\n{\"a\" 1}\n"), Form::Text, "x.jsonl:1: expected instruction");
    let broken = file("x.jsonl", b"\xEF\xBB\xBF{\"prompt\":\"q\",\"completion\":\"a\"}\n\n{\"a\" 1}\n");
    refused(&broken, Form::Text, "x.jsonl:3: expected one JSON object a line, but column 6: expected `:`");
    refused(
        &file("x.json", b"[{\"prompt\":\"q\",\"completion\":\"a\"}, {}]"),
        Form::Text,
        "x.json: row 2: expected instruction",
    );
    refused(&file("x.json", b"{\"prompt\":1}"), Form::Text, "x.json: expected a JSON array of objects");
    refused(&file("x.csv", b""), Form::Text, "x.csv: data files end with .jsonl");
    refused(&file("x.parquet", b"no parquet"), Form::Text, "x.parquet: ");
    refused(&file("x.jsonl.zst", b"no zstd at all"), Form::Text, "x.jsonl.zst: after line 0: zstd: ");
}

#[test]
fn bad_rows_are_passed_over_as_often_as_allowed() {
    let good = json!({"prompt": "q", "completion": "a"});
    let rows = lines(&[json!({}), good.clone(), json!(1), good]);
    let with = |skip_bad| try_load(&DataRecipe { skip_bad, ..recipe(&rows.path) }, Form::Text);
    let error = with(1).unwrap_err().to_string();
    assert!(error.contains("rows.jsonl:3") && error.contains("after 1 bad rows"), "{error}");
    let dataset = with(2).unwrap();
    assert_eq!((dataset.train.len(), dataset.counts.rows, dataset.counts.dropped_for(Reason::Bad)), (2, 4, 2));
}

#[test]
fn a_named_schema_wins_over_the_keys() {
    let rows = lines(&[
        json!({"prompt": "q", "completion": "a", "label": true, "messages": [{"role": "assistant", "content": "m"}]}),
    ]);
    let mut recipe = recipe(&rows.path);
    recipe.source[0].schema = Some(Schema::Messages);
    assert_eq!(shown(&try_load(&recipe, Form::Text).unwrap().train), ["<s>>m</s>"]);
    recipe.source[0].schema = Some(Schema::Preference);
    let error = try_load(&recipe, Form::Text).unwrap_err().to_string();
    assert!(error.contains("expected \"chosen\" to be a text or messages, found nothing (preference)"), "{error}");
}

#[test]
fn all_packings_hold_the_same_rows() {
    let folder = tempfile::tempdir().unwrap();
    let plain = std::fs::read(format!("{FIXTURES}/pairs.jsonl")).unwrap();
    let gz = folder.path().join("pairs.jsonl.gz");
    // Two members, as `cat a.gz b.gz` makes them.
    let (first, second) = plain.split_at(700);
    let mut bytes = Vec::new();
    for part in [first, second] {
        let mut encoder = flate2::write::GzEncoder::new(&mut bytes, flate2::Compression::default());
        encoder.write_all(part).unwrap();
        encoder.finish().unwrap();
    }
    std::fs::write(&gz, bytes).unwrap();
    let array = folder.path().join("pairs.json");
    let rows: Vec<Value> =
        plain.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
    std::fs::write(&array, serde_json::to_vec_pretty(&rows).unwrap()).unwrap();
    let [jsonl, zst, parquet] =
        ["pairs.jsonl", "pairs.jsonl.zst", "pairs.parquet"].map(|name| Path::new(FIXTURES).join(name));
    for form in [Form::Text, Form::Pair, Form::Answer] {
        let expected = try_load(&recipe(&jsonl), form).unwrap();
        assert_eq!(expected.files[0].rows, 9);
        for path in [&gz, &array, &zst, &parquet] {
            let dataset = try_load(&recipe(path), form).unwrap();
            assert!(dataset.train == expected.train && dataset.counts == expected.counts, "{}", path.display());
            let hash = blake3::hash(&std::fs::read(path).unwrap()).to_hex().to_string();
            assert_eq!(dataset.files, [DataFile { path: path.clone(), blake3: hash, rows: 9 }]);
        }
    }
    let mut damaged = std::fs::read(&zst).unwrap();
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    refused(&file("x.jsonl.zst", &damaged), Form::Text, "the checksum does not match");
}

#[test]
fn a_bad_row_of_a_parquet_file_is_named_by_its_number() {
    let mut recipe = recipe(&Path::new(FIXTURES).join("pairs.parquet"));
    recipe.source[0].schema = Some(Schema::UltraInteractSft);
    let error = try_load(&recipe, Form::Text).unwrap_err().to_string();
    assert!(error.contains("pairs.parquet: row 1: expected \"instruction\" to be a text, found nothing"), "{error}");
}

#[test]
fn a_folder_is_read_by_name() {
    let folder = tempfile::tempdir().unwrap();
    for (name, answer) in [("b.jsonl", "2"), ("a.jsonl", "1"), ("c.json", "3"), ("notes.txt", "no")] {
        let row = json!({"prompt": "q", "completion": answer});
        let text = if name.ends_with(".json") { json!([row]).to_string() } else { row.to_string() };
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let dataset = try_load(&recipe(folder.path()), Form::Text).unwrap();
    assert_eq!(shown(&dataset.train), ["<s>[q]>1</s>", "<s>[q]>2</s>", "<s>[q]>3</s>"]);
    assert_eq!(dataset.files.len(), 3);
    let empty = tempfile::tempdir().unwrap();
    assert!(
        try_load(&recipe(empty.path()), Form::Text).unwrap_err().to_string().contains("has no file that ends with")
    );
}

#[test]
fn what_cannot_be_learnt_from_is_counted_under_its_reason() {
    let pair = |chosen: &str, rejected: &str| json!({"prompt": "q", "chosen": chosen, "rejected": rejected});
    let long = "7".repeat(50);
    let rows = lines(&[pair("a", "b"), pair("", "b"), pair("a", " \n"), pair("a", "a"), pair("a", &long)]);
    let dataset = try_load(&DataRecipe { max_length: 20, ..recipe(&rows.path) }, Form::Pair).unwrap();
    let dropped = [(Reason::TooLong, 1), (Reason::EmptyAnswer, 2), (Reason::SameAnswers, 1)].into_iter().collect();
    assert_eq!(dataset.counts.dropped, dropped);
    let tokens = dataset.train.iter().map(Example::token_count).sum::<usize>();
    let text = format!(
        "5 rows: 1 examples to learn from ({tokens} tokens), 0 held out; dropped: 1 too long, 2 empty answer, 1 chosen equals rejected"
    );
    assert_eq!(dataset.counts.to_string(), text);
    let cut = DataRecipe { max_length: 20, overlong: Overlong::TruncateEnd, ..recipe(&rows.path) };
    let dataset = try_load(&cut, Form::Pair).unwrap();
    assert_eq!((dataset.counts.truncated, dataset.train.len()), (1, 2));
    assert!(dataset.train.iter().flat_map(Example::texts).all(|text| text.tokens.len() <= 20));
    let label = json!({"prompt": "q", "completion": "a", "label": false});
    refused(&lines(&[label]), Form::Text, "no example is left to learn from: 1 rows");
}

#[test]
fn leaves_are_learnt_once_and_augmented_pairs_have_no_history() {
    let rows = lines(&[
        pair_row("p", &["q"], "a", "w"),
        pair_row("p", &["q", "w", "o"], "a2", "w2"),
        pair_row("p", &["q", "w", "o", "w2", "o2"], "a", "w3"),
    ]);
    let dataset = try_load(&recipe(&rows.path), Form::Text).unwrap();
    assert_eq!(shown(&dataset.train), ["<s>[q]>a</s>", "<s>[q]>a2</s>"]);
    assert_eq!(dataset.counts.dropped_for(Reason::Repeated), 1);
    let mut augmented = recipe(&rows.path);
    augmented.source[0].augment = true;
    let dataset = try_load(&augmented, Form::Pair).unwrap();
    let mut added = shown(&dataset.train).split_off(3);
    added.sort();
    // `a` stands at turns 0 and 2, so that only w2 is of another turn.
    let expected =
        ["a2</s> <s>[q]>w3", "a2</s> <s>[q]>w", "a</s> <s>[q]>w2"].map(|pair| format!("true None <s>[q]>{pair}</s>"));
    let mut expected = expected.to_vec();
    expected.sort();
    assert_eq!((added, dataset.counts.augmented), (expected, 3));
    let error = try_load(&augmented, Form::Answer).unwrap_err();
    assert!(matches!(error, Error::Invalid { field: Some(field), .. } if field == "data.source[0].augment"));
}

#[test]
fn weights_take_a_fraction_or_repeat() {
    let rows = lines(&(0..40).map(|n| json!({"prompt": format!("q{n}"), "completion": "a"})).collect::<Vec<_>>());
    let with = |weight, seed| {
        let mut recipe = recipe(&rows.path);
        recipe.source[0].weight = weight;
        let dataset = load(&recipe, Form::Text, seed, &encoder(), &mut |_| {}).unwrap();
        (shown(&dataset.train), dataset.counts)
    };
    let (all, _) = with(1.0, 1);
    let (quarter, counts) = with(0.25, 1);
    assert_eq!((quarter.len(), counts.dropped_for(Reason::NotDrawn)), (10, 30));
    assert!(quarter.iter().all(|text| all.contains(text)) && quarter != all[..10]);
    assert!(quarter == with(0.25, 1).0 && quarter != with(0.25, 2).0);
    let (more, counts) = with(2.25, 1);
    assert_eq!((more.len(), counts.train), (90, 90));
    assert!(all.iter().all(|text| [2, 3].contains(&more.iter().filter(|other| *other == text).count())));
}

#[test]
fn no_instruction_is_on_both_sides() {
    let rows: Vec<Value> =
        (0..60).map(|n| pair_row(&format!("p{}", n / 3), &[&format!("q{}", n / 3)], &format!("a{n}"), "w")).collect();
    let (first, again) = (
        lines(&rows),
        lines(&(0..20).map(|n| json!({"prompt": format!("q{n}"), "chosen": "x", "rejected": "y"})).collect::<Vec<_>>()),
    );
    let mut recipe = DataRecipe { test_fraction: 0.2, ..recipe(&first.path) };
    recipe.source.push(SourceRecipe { weight: 3.0, ..SourceRecipe::new(&again.path) });
    let dataset = try_load(&recipe, Form::Pair).unwrap();
    let asked = |examples: &[Example]| -> std::collections::BTreeSet<String> {
        shown(examples)
            .iter()
            .map(|text| text.split_once("[q").unwrap().1.split_once(']').unwrap().0.to_owned())
            .collect()
    };
    let (train, test) = (asked(&dataset.train), asked(&dataset.test));
    assert_eq!((train.len(), test.len(), train.intersection(&test).count()), (16, 4, 0));
    // Three rows of the tree and one of the other file, once; repetitions are for learning.
    assert_eq!((dataset.test.len(), dataset.train.len()), (16, 16 * 6));
    assert_eq!((dataset.counts.test, dataset.counts.train), (16, 96));
}

#[test]
fn nothing_depends_on_the_number_of_threads() {
    let rows =
        lines(&(0..300).map(|n| json!({"prompt": format!("q{n}"), "completion": format!("a{n}")})).collect::<Vec<_>>());
    let mut told = Vec::new();
    let mut recipe = recipe(&rows.path);
    (recipe.test_fraction, recipe.source[0].weight) = (0.1, 1.5);
    let dataset = load(&recipe, Form::Text, 5, &encoder(), &mut |done| told.push(done)).unwrap();
    assert_eq!(told, [300]);
    let one: Vec<usize> = (0..1000).collect();
    assert_eq!(parallel::map(&one, |n| n * 2), one.iter().map(|n| n * 2).collect::<Vec<_>>());
    assert_eq!(parallel::map_each(&one[..7], |n| n + 1), (1..8).collect::<Vec<_>>());
    assert_eq!(load(&recipe, Form::Text, 5, &encoder(), &mut |_| {}).unwrap(), dataset);
}

#[test]
fn recipes_refuse_what_they_cannot_mean() {
    let base = recipe(Path::new("x.jsonl"));
    let source = |change: &dyn Fn(&mut SourceRecipe)| {
        let mut recipe = base.clone();
        change(&mut recipe.source[0]);
        recipe
    };
    let cases = [
        (DataRecipe { max_length: 1, ..base.clone() }, "data.max_length"),
        (DataRecipe { test_fraction: 1.0, ..base.clone() }, "data.test_fraction"),
        (DataRecipe::default(), "data.source"),
        (source(&|source| source.weight = 0.0), "data.source[0].weight"),
        (source(&|source| source.weight = f64::NAN), "data.source[0].weight"),
        (source(&|source| (source.augment, source.schema) = (true, Some(Schema::Messages))), "data.source[0].augment"),
    ];
    for (recipe, key) in cases {
        let error = try_load(&recipe, Form::Pair).unwrap_err();
        assert!(
            matches!(&error, Error::Invalid { field: Some(field), message } if field == key && message.starts_with(key)),
            "{error}"
        );
    }
    let parsed: DataRecipe = serde_json::from_value(json!({"overlong": "truncate_start", "special_text": "parse",
        "source": [{"path": "a", "schema": "ultrainteract_pair", "augment": true, "absolute": false}]}))
    .unwrap();
    assert_eq!(
        (parsed.overlong, parsed.special_text, parsed.max_length),
        (Overlong::TruncateStart, SpecialText::Parse, 4096)
    );
    assert_eq!(parsed.source[0].schema, Some(Schema::UltraInteractPair));
    assert_eq!(serde_json::from_value::<DataRecipe>(serde_json::to_value(&parsed).unwrap()).unwrap(), parsed);
    assert!(serde_json::from_value::<DataRecipe>(json!({"max_len": 3})).is_err());
    assert!(serde_json::from_value::<DataRecipe>(json!({"source": [{"path": "a", "wieght": 1}]})).is_err());
    let schemas =
        ["ultrainteract_sft", "ultrainteract_pair", "messages", "prompt_completion", "preference", "unpaired"];
    for name in schemas {
        assert_eq!(serde_json::from_value::<Schema>(json!(name)).unwrap().name(), name);
    }
}
