//! The conversion of tokenizer.model against what SentencePiece itself says (tests/reference/sentencepiece_reference.py
//! and the fixtures that were written with the slow tokenizer).

use std::fs;
use std::path::Path;

use eurus::checkpoint::sentencepiece::to_tokenizer_json;
use serde_json::Value;
use tokenizers::Tokenizer;

use super::{check_refused, fixture};

fn converted(path: &Path) -> Tokenizer {
    let json = to_tokenizer_json(&fs::read(path).unwrap()).unwrap();
    let mut tokenizer: Tokenizer = json.parse().unwrap();
    // SentencePiece knows no special tokens in texts.
    tokenizer.set_encode_special_tokens(true);
    tokenizer
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
}

#[track_caller]
fn check_against_sentencepiece(name: &str, cases_min: usize) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sentencepiece");
    let tokenizer = converted(&folder.join(format!("{name}.model")));
    let cases = fs::read_to_string(folder.join(format!("{name}.json"))).unwrap();
    let cases: Vec<(String, Value, String)> = serde_json::from_str(&cases).unwrap();
    assert!(cases.len() >= cases_min, "{} cases", cases.len());
    for (text, expected, decoded) in cases {
        let expected = ids(&expected);
        assert_eq!(tokenizer.encode(text.as_str(), false).unwrap().get_ids(), expected, "{text:?}");
        // SentencePiece writes unknown pieces as U+2047, the crate leaves special tokens out.
        let unknown = expected.contains(&tokenizer.token_to_id("<unk>").unwrap());
        if !unknown {
            assert_eq!(tokenizer.decode(&expected, true).unwrap(), decoded, "{text:?}");
        }
    }
}

#[test]
fn a_model_like_mistral_s_gives_sentencepiece_s_ids_and_texts() {
    check_against_sentencepiece("plain", 250);
}

#[test]
fn symbols_and_pieces_across_words_give_sentencepiece_s_ids() {
    check_against_sentencepiece("symbols", 250);
}

#[test]
fn a_character_map_gives_sentencepiece_s_ids_and_texts() {
    check_against_sentencepiece("rules", 250);
}

#[test]
fn the_models_of_the_serving_fixtures_give_the_slow_tokenizer_s_ids() {
    for name in ["mistral-window", "mistral-bf16", "llama-eos-list", "reward"] {
        let tokenizer = converted(&fixture(name).join("tokenizer.model"));
        let expected: Value = serde_json::from_slice(&fs::read(fixture(name).join("expected.json")).unwrap()).unwrap();
        let cases = expected["text"].as_array().unwrap();
        assert_eq!(cases.len(), 8, "{name}");
        for case in cases {
            let text = case["text"].as_str().unwrap();
            let encoding = tokenizer.encode(text, false).unwrap();
            assert_eq!(encoding.get_ids(), ids(&case["ids"]), "{name} {text:?}");
            assert_eq!(tokenizer.decode(encoding.get_ids(), true).unwrap(), text);
        }
    }
}

#[test]
fn control_symbols_are_special_and_user_defined_ones_are_not() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sentencepiece");
    let mut tokenizer = converted(&folder.join("symbols.model"));
    let added = tokenizer.get_added_tokens_decoder();
    let special: Vec<(&str, bool)> = added.values().map(|token| (token.content.as_str(), token.special)).collect();
    let mut special = special;
    special.sort_unstable();
    let expected = [
        ("1", false),
        ("</s>", true),
        ("<ctl>", true),
        ("<pad>", true),
        ("<s>", true),
        ("<sep>", false),
        ("<unk>", true),
        ("[INST]", false),
        ("aab", false),
    ];
    assert_eq!(special, expected);
    let id = |text: &str| tokenizer.token_to_id(text).unwrap();
    let expected = [id("<s>"), id("<sep>"), id("<ctl>"), id("1"), id("</s>")];
    tokenizer.set_encode_special_tokens(false);
    assert_eq!(tokenizer.encode("<s><sep><ctl>1</s>", false).unwrap().get_ids(), expected);
}

#[test]
fn unigram_models_are_unsupported_and_other_files_damaged() {
    let mut model = fs::read(fixture("reward").join("tokenizer.model")).unwrap();
    // A later trainer_spec wins: model_type 1 is unigram.
    model.extend([0x12, 0x02, 0x18, 0x01]);
    let message = to_tokenizer_json(&model).unwrap_err().to_string();
    assert!(message.contains("a SentencePiece unigram model"), "{message}");
    check_refused(to_tokenizer_json(b"{\"not\": \"a model\"}"), "tokenizer.model");
    check_refused(to_tokenizer_json(b""), "tokenizer.model has no pieces");
}
