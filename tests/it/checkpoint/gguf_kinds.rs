//! What GGUF files in the wild do: padded vocabularies, several tokens that end an answer, windows of 0, folders that hold only them;
//! and metadata that lies.

use std::fs;
use std::path::Path;

use eurus::checkpoint::Checkpoint;
use eurus::error::Result;
use eurus::model::config::Architecture;
use eurus::text::tokenizer::{Bos, Special};

use super::gguf::{Key, edited, fixture, open, split, typed};

/// The fixture with other metadata.
fn with(change: impl FnOnce(&mut Vec<Key>)) -> Result<Checkpoint> {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("changed.gguf");
    fs::write(&path, edited(&fs::read(fixture("q4_0.gguf")).unwrap(), change)).unwrap();
    open(&path)
}

fn number(name: &str, value: u32) -> Key {
    (name.to_owned(), typed(4, value.to_le_bytes()))
}

/// The bytes of token `id`'s type in its list, after the types of key and list and the length.
fn kind_of(keys: &mut [Key], id: usize) -> &mut [u8] {
    let (_, value) = keys.iter_mut().find(|(name, _)| name == "tokenizer.ggml.token_type").unwrap();
    &mut value[16 + 4 * id..][..4]
}

#[track_caller]
fn check_refused(result: Result<Checkpoint>, part: &str) {
    let error = result.unwrap_err().to_string();
    assert!(error.contains(part), "{error}");
}

#[test]
fn a_window_of_nothing_is_none() {
    let checkpoint = with(|keys| keys.push(number("llama.attention.sliding_window", 0))).unwrap();
    assert_eq!((checkpoint.config.window, checkpoint.config.architecture), (None, Architecture::Llama));
    let checkpoint = with(|keys| keys.push(number("llama.attention.sliding_window", 9))).unwrap();
    assert_eq!((checkpoint.config.window, checkpoint.config.architecture), (Some(9), Architecture::Mistral));
}

#[test]
fn the_end_of_a_turn_ends_an_answer_too() {
    let eos = |keys: Vec<Key>| with(move |all| all.extend(keys)).map(|checkpoint| checkpoint.config.eos);
    assert_eq!(eos(vec![number("tokenizer.ggml.eot_token_id", 7)]).unwrap(), [2, 7]);
    assert_eq!(eos(vec![number("tokenizer.ggml.eot_token_id", 2)]).unwrap(), [2]);
    let several = [9_u32.to_le_bytes(), 4_u32.to_le_bytes(), 2_u32.to_le_bytes(), 0_u32.to_le_bytes()];
    // A list: its type, the type of its values, how many, and two of them.
    let list = [several[0], several[1], several[2], several[3], 5_u32.to_le_bytes(), 2_u32.to_le_bytes()].concat();
    assert_eq!(eos(vec![("eurus.eos_token_ids".to_owned(), list)]).unwrap(), [5, 2]);
    let error = eos(vec![number("tokenizer.ggml.eot_token_id", 512)]).unwrap_err().to_string();
    assert!(error.contains("eos_token_id must hold token ids below vocab_size"), "{error}");
}

#[test]
fn unused_pieces_fill_up_a_vocabulary() {
    let whole = open(&fixture("q4_0.gguf")).unwrap().tokenizer().unwrap();
    let padded = with(|keys| (500..512).for_each(|id| kind_of(keys, id)[0] = 5)).unwrap().tokenizer().unwrap();
    for text in ["Hello  world\nnaïve", " 12+3=15.", "apples are left </s>"] {
        let ids = |tokenizer: &eurus::text::Tokenizer| tokenizer.encode(text, Special::Parse, Bos::Add).unwrap();
        assert_eq!(ids(&padded), ids(&whole), "{text:?}");
    }
    // Token 260 is "re", which merging makes on the way to others.
    check_refused(with(|keys| kind_of(keys, 260)[0] = 5), "the unused piece \"re\" is made of two others");
}

#[test]
fn types_below_nothing_are_refused() {
    check_refused(
        with(|keys| kind_of(keys, 300).copy_from_slice(&(-1_i32).to_le_bytes())),
        "tokenizer.ggml.token_type must be numbers above 0, not Signed(-1)",
    );
    check_refused(with(|keys| kind_of(keys, 300)[0] = 0), "unknown type 0");
}

#[test]
fn parts_must_have_as_many_tensors_as_they_say() {
    let scratch = tempfile::tempdir().unwrap();
    let parts = split(&fixture("q4_0.gguf"), scratch.path());
    open(&parts[0]).unwrap();
    let sound = fs::read(&parts[1]).unwrap();
    let lie = edited(&sound, |keys| {
        let count = keys.iter_mut().find(|(name, _)| name == "split.tensors.count").unwrap();
        count.1[4] += 1;
    });
    fs::write(&parts[1], lie).unwrap();
    check_refused(open(&parts[0]), "says that all parts have 13 tensors, they have 12");
}

#[test]
fn a_folder_with_one_model_is_opened_like_its_file() {
    let scratch = tempfile::tempdir().unwrap();
    let place = |name: &str| scratch.path().join(name);
    let copy = |name: &str, to: &Path| fs::copy(fixture(name), to).map(drop).unwrap();
    copy("q4_0.gguf", &place("m.Q4_0.gguf"));
    copy("q4_0.gguf", &place("mmproj-f16.gguf"));
    fs::write(place("config.json"), "{}").unwrap();
    assert_eq!(open(scratch.path()).unwrap().name, "m.Q4_0");
    copy("q8_0.gguf", &place("m.Q8_0.gguf"));
    check_refused(open(scratch.path()), "has several GGUF models; name one of its files: m.Q4_0.gguf, m.Q8_0.gguf");
    fs::remove_file(place("m.Q4_0.gguf")).unwrap();
    fs::remove_file(place("m.Q8_0.gguf")).unwrap();
    let parts = split(&fixture("q4_0.gguf"), scratch.path());
    assert_eq!(open(scratch.path()).unwrap().name, "tiny");
    fs::remove_file(&parts[1]).unwrap();
    check_refused(open(scratch.path()), "tiny-00002-of-00002.gguf is missing");
    // Safetensors are preferred where a folder has both.
    fs::write(place("model.safetensors"), "").unwrap();
    check_refused(open(scratch.path()), "config.json");
}

#[cfg(unix)]
#[test]
fn a_link_out_of_the_folder_is_not_followed() {
    let (scratch, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let target = outside.path().join("m.gguf");
    fs::copy(fixture("q4_0.gguf"), &target).unwrap();
    std::os::unix::fs::symlink(&target, scratch.path().join("m.gguf")).unwrap();
    check_refused(open(scratch.path()), "is a link that leaves the checkpoint's folder");
}

/// The fixture with experts, with other metadata: it opens, and has the tensors it asks for.
fn with_experts(change: impl FnOnce(&mut Vec<Key>)) -> Result<()> {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("changed.gguf");
    fs::write(&path, edited(&fs::read(fixture("experts_q4_k_m.gguf")).unwrap(), change)).unwrap();
    open(&path)?.check_tensors()
}

#[test]
fn experts_that_are_not_there_are_refused_by_name() {
    let put = |name: &'static str, value: Option<u32>| {
        with_experts(move |keys| {
            keys.retain(|(key, _)| key != name);
            keys.extend(value.map(|value| number(name, value)));
        })
    };
    let used = "llama.expert_used_count must be a number from 1 to 8";
    let of = |count: &'static str, part: &str| format!("{count} {part}");
    for (name, value, part) in [
        ("llama.expert_used_count", None, used.to_owned()),
        ("llama.expert_used_count", Some(0), used.to_owned()),
        ("llama.expert_used_count", Some(9), used.to_owned()),
        ("llama.expert_count", Some(4), of("12 missing", "(model.layers.0.block_sparse_moe.experts.0.w1.weight")),
        ("llama.expert_count", Some(257), "num_local_experts must be a whole number from 1 to 256".to_owned()),
        ("llama.expert_count", None, of("4 not used by this model", "(blk.0.ffn_down_exps.weight")),
    ] {
        let error = put(name, value).unwrap_err().to_string();
        assert!(error.contains(&part), "{name} {value:?}: {error}");
    }
    assert!(put("llama.expert_used_count", Some(8)).is_ok());
}
