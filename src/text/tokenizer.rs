//! Text to token ids and back. Owns the one decision on BOS: it is added here or by the chat template, never twice.
//! The post-processor, truncation and padding of a tokenizer.json are not used.

mod rendered;

use std::collections::HashSet;
use std::ops::{Range, RangeInclusive};
use std::panic::{AssertUnwindSafe, catch_unwind};

use regex::{Regex, RegexBuilder};
use serde_json::Value;
use tokenizers::{
    AddedToken, AddedVocabulary, DecoderWrapper, Encoding, Model, ModelWrapper, NormalizerWrapper, OffsetType,
    PostProcessorWrapper, PreTokenizer, PreTokenizerWrapper, TokenizerImpl,
};

use super::detokenize::{Detokenizer, Joiner, Start};
use crate::error::{Error, Result};

pub use rendered::Located;

type Inner = TokenizerImpl<ModelWrapper, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// Memory of the pattern that finds added tokens, in bytes; ten thousand tokens need some 10 MB.
const ADDED_MEMORY_MAX: usize = 64 << 20;

/// What tokenizer_config.json tells beyond tokenizer.json.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Text of the beginning-of-sequence token.
    pub bos: Option<String>,
    /// Text of the end-of-sequence token.
    pub eos: Option<String>,
    /// Text of the unknown token.
    pub unk: Option<String>,
    /// `add_bos_token`, where the file has it. Otherwise the post-processor decides: BOS is added if its single-sequence
    /// template begins with it. Without a post-processor it is added for byte-fallback BPE (converted SentencePiece models).
    pub add_bos: Option<bool>,
}

/// What becomes of special tokens that are written out in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// `</s>` is one token.
    Parse,
    /// `</s>` is four characters.
    AsText,
}

/// Whether a sequence gets the BOS token in front.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bos {
    /// Once, if this tokenizer adds BOS and the text does not begin with it already.
    Add,
    /// No.
    Omit,
}

/// Whether special tokens appear in decoded text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialText {
    /// They are left out.
    Hide,
    /// They are written out.
    Show,
}

/// A tokenizer.json with its facts. `Send + Sync`; share it by `Arc`.
pub struct Tokenizer {
    inner: Inner,
    /// The added tokens with the special ones switched off.
    as_text: AddedVocabulary,
    detokenizer: Detokenizer,
    /// The added tokens that the tokenizer looks for before it normalises, longest first.
    added: Option<Regex>,
    special_ids: HashSet<u32>,
    bos: Option<(u32, String)>,
    eos: Option<(u32, String)>,
    unk: Option<String>,
    adds_bos: bool,
    vocab_size: usize,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size)
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .field("adds_bos", &self.adds_bos)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Builds the tokenizer from the text of a tokenizer.json.
    ///
    /// # Errors
    /// The text is no tokenizer.json, names a BOS or EOS that it does not have, draws random merges (dropout), or has a decoder
    /// that cannot stream.
    pub fn from_json(json: &str, special: &SpecialTokens) -> Result<Self> {
        let value: Value = serde_json::from_str(json).map_err(damaged)?;
        if value["model"]["dropout"].as_f64().is_some_and(|dropout| dropout != 0.0) {
            return Err(Error::Unsupported("tokenizer.json: dropout draws random tokens".to_owned()));
        }
        let detokenizer = Detokenizer::parse(&value["decoder"])?;
        let mut inner: Inner = guarded(|| json.parse::<tokenizers::Tokenizer>())
            .map_err(|_| damaged("it cannot be built"))?
            .map_err(damaged)?
            .into_inner();
        let bos = find(&inner, special.bos.as_deref(), "bos_token")?;
        let eos = find(&inner, special.eos.as_deref(), "eos_token")?;
        let unk = special.unk.clone().filter(|text| inner.token_to_id(text).is_some());
        register(&mut inner, [bos.as_ref().map(|bos| &bos.1), eos.as_ref().map(|eos| &eos.1), unk.as_ref()])?;
        let mut as_text = inner.get_added_vocabulary().clone();
        as_text.set_encode_special_tokens(true);
        let adds_bos = bos.as_ref().is_some_and(|bos| special.add_bos.unwrap_or_else(|| infers_bos(&value, &bos.1)));
        let added = added_pattern(&inner)?;
        let special_ids = special_ids(&inner);
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        Ok(Self { inner, as_text, detokenizer, added, special_ids, bos, eos, unk, adds_bos, vocab_size })
    }

    /// Token ids of `text`. With [`Bos::Add`], empty text is BOS alone where this tokenizer adds BOS, else nothing.
    ///
    /// # Errors
    /// The tokenizer gives up on this text (a pattern that backtracks too much).
    pub fn encode(&self, text: &str, special: Special, bos: Bos) -> Result<Vec<u32>> {
        let (added, begins) = match special {
            Special::Parse => (self.inner.get_added_vocabulary(), self.starts_with_bos(text)),
            Special::AsText => (&self.as_text, false),
        };
        let mut ids = self.leading(bos, begins);
        ids.extend_from_slice(self.tokenise(text, added, OffsetType::None)?.get_ids());
        Ok(ids)
    }

    /// Whether `text` spells out the BOS token at its beginning.
    pub fn starts_with_bos(&self, text: &str) -> bool {
        self.bos.as_ref().is_some_and(|(_, bos)| text.starts_with(bos.as_str()))
    }

    /// The text of `ids`, as the `tokenizers` crate and `transformers` decode it.
    ///
    /// # Errors
    /// An id is outside the vocabulary.
    pub fn decode(&self, ids: &[u32], special: SpecialText) -> Result<String> {
        let mut joiner = self.joiner(Start::Text);
        let mut text = String::new();
        for &id in ids {
            let token = self.token(id)?;
            if special == SpecialText::Hide && self.is_special(id) {
                continue;
            }
            let joined = joiner.push(&self.detokenizer, &token);
            text.push_str(&joined.earlier);
            text.push_str(&joined.own);
        }
        text.push_str(&joiner.finish(&self.detokenizer));
        Ok(text)
    }

    /// The exact bytes a token stands for; part of a character for byte tokens.
    ///
    /// # Errors
    /// The id is outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> Result<Vec<u8>> {
        Ok(self.detokenizer.bytes(&self.token(id)?))
    }

    /// The text of one token; bytes that are no character become U+FFFD.
    ///
    /// # Errors
    /// The id is outside the vocabulary.
    pub fn token_text(&self, id: u32) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.token_bytes(id)?).into_owned())
    }

    /// The id of a token by its spelling in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Highest id plus one: an embedding must have at least so many rows.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Id of the BOS token.
    pub fn bos(&self) -> Option<u32> {
        self.bos.as_ref().map(|bos| bos.0)
    }

    /// Id of the EOS token.
    pub fn eos(&self) -> Option<u32> {
        self.eos.as_ref().map(|eos| eos.0)
    }

    /// Text of the BOS token.
    pub fn bos_text(&self) -> Option<&str> {
        self.bos.as_ref().map(|bos| bos.1.as_str())
    }

    /// Text of the EOS token.
    pub fn eos_text(&self) -> Option<&str> {
        self.eos.as_ref().map(|eos| eos.1.as_str())
    }

    /// Text of the unknown token.
    pub fn unk_text(&self) -> Option<&str> {
        self.unk.as_deref()
    }

    /// Whether [`Bos::Add`] adds anything.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// Whether `id` is a special token.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// Special tokens that `text` spells out, in order: byte ranges, never overlapping.
    pub(super) fn specials_in(&self, text: &str) -> Vec<(Range<usize>, u32)> {
        let Some(pattern) = &self.added else { return Vec::new() };
        let found = pattern.find_iter(text).filter_map(|found| {
            let id = self.inner.token_to_id(found.as_str()).filter(|id| self.is_special(*id))?;
            Some((found.range(), id))
        });
        found.collect()
    }

    pub(super) fn joiner(&self, start: Start) -> Joiner {
        Joiner::new(&self.detokenizer, start)
    }

    pub(super) fn detokenizer(&self) -> &Detokenizer {
        &self.detokenizer
    }

    /// The vocabulary's spelling of `id`.
    pub(super) fn token(&self, id: u32) -> Result<String> {
        self.inner
            .id_to_token(id)
            .ok_or_else(|| Error::Invalid { message: format!("token id {id} is not in the vocabulary"), field: None })
    }

    fn leading(&self, bos: Bos, begins: bool) -> Vec<u32> {
        match (&self.bos, bos) {
            (Some((id, _)), Bos::Add) if self.adds_bos && !begins => vec![*id],
            _ => Vec::new(),
        }
    }

    fn tokenise(&self, text: &str, added: &AddedVocabulary, offsets: OffsetType) -> Result<Encoding> {
        if text.is_empty() {
            return Ok(Encoding::default());
        }
        let run = || {
            let mut pieces = added.extract_and_normalize(self.inner.get_normalizer(), text);
            if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
                pre_tokenizer.pre_tokenize(&mut pieces)?;
            }
            self.inner.get_model().tokenize_in_pretokenized(&mut pieces, None)?;
            pieces.into_encoding(None, 0, offsets)
        };
        let gave_up = |_| Error::Invalid { message: "the tokenizer gave up on this text".to_owned(), field: None };
        guarded(run).map_err(gave_up)?.map_err(|error| Error::Invalid { message: error.to_string(), field: None })
    }
}

/// Characters without a meaning of their own: the private-use characters of plane 15.
pub(super) const PRIVATE: RangeInclusive<char> = '\u{F0000}'..='\u{FFFFD}';

/// Private-use characters that none of `texts` contains.
pub(super) fn unused_characters<'a>(texts: impl IntoIterator<Item = &'a str>) -> impl Iterator<Item = char> + 'static {
    let used: HashSet<char> =
        texts.into_iter().flat_map(str::chars).filter(|character| PRIVATE.contains(character)).collect();
    PRIVATE.filter(move |character| !used.contains(character))
}

pub(super) fn no_character_left() -> Error {
    Error::Invalid { message: "the text uses every private-use character of plane 15".to_owned(), field: None }
}

/// Oniguruma panics where a pattern backtracks too much; a request must not take its thread along.
fn guarded<T>(run: impl FnOnce() -> T) -> std::thread::Result<T> {
    catch_unwind(AssertUnwindSafe(run))
}

fn damaged(error: impl std::fmt::Display) -> Error {
    Error::Checkpoint(format!("tokenizer.json: {error}"))
}

fn find(inner: &Inner, text: Option<&str>, what: &str) -> Result<Option<(u32, String)>> {
    let Some(text) = text else { return Ok(None) };
    match inner.token_to_id(text) {
        Some(id) => Ok(Some((id, text.to_owned()))),
        None => {
            Err(Error::Checkpoint(format!("tokenizer_config.json names {what} {text:?}, which tokenizer.json lacks")))
        }
    }
}

/// Makes BOS, EOS and unknown special, and lets no special token depend on the normaliser: where an old conversion says
/// `normalized`, `</s>` would only be found with a made-up space before it. `transformers` corrects this in the same way.
fn register(inner: &mut Inner, named: [Option<&String>; 3]) -> Result<()> {
    let known = inner.get_added_tokens_decoder();
    let named = named.into_iter().flatten().filter(|text| !known.values().any(|token| token.content == **text));
    let named = named.map(|text| AddedToken::from(text.as_str(), true));
    let known = known.values().filter(|token| token.special && token.normalized);
    let tokens: Vec<AddedToken> = named.chain(known.map(|token| token.clone().normalized(false))).collect();
    inner.add_special_tokens(tokens).map_err(damaged)?;
    Ok(())
}

fn special_ids(inner: &Inner) -> HashSet<u32> {
    let added = inner.get_added_tokens_decoder();
    added.into_iter().filter(|(_, token)| token.special).map(|(id, _)| id).collect()
}

fn added_pattern(inner: &Inner) -> Result<Option<Regex>> {
    let added = inner.get_added_tokens_decoder().into_values().filter(|token| !token.normalized);
    let mut texts: Vec<String> = added.map(|token| token.content).collect();
    texts.sort_by(|left, right| right.len().cmp(&left.len()).then_with(|| left.cmp(right)));
    if texts.is_empty() {
        return Ok(None);
    }
    let pattern = texts.iter().map(|text| regex::escape(text)).collect::<Vec<_>>().join("|");
    RegexBuilder::new(&pattern).size_limit(ADDED_MEMORY_MAX).build().map(Some).map_err(damaged)
}

/// Whether sequences begin with `bos` by the file alone; see [`SpecialTokens::add_bos`].
fn infers_bos(json: &Value, bos: &str) -> bool {
    match &json["post_processor"] {
        Value::Null => json["model"]["type"] == "BPE" && json["model"]["byte_fallback"] == true,
        processor => begins_with(processor, bos),
    }
}

fn begins_with(processor: &Value, bos: &str) -> bool {
    match processor["type"].as_str() {
        Some("Sequence") => {
            processor["processors"].as_array().is_some_and(|inner| inner.iter().any(|inner| begins_with(inner, bos)))
        }
        Some("TemplateProcessing") => processor["single"][0]["SpecialToken"]["id"] == bos,
        Some("BertProcessing" | "RobertaProcessing") => processor["cls"][0] == bos,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const MINI: &str = include_str!("../../models/eurus-mini/policy/tokenizer.json");
    const PREPEND: &str = include_str!("../../tests/fixtures/chat/prepend.tokenizer.json");
    const METASPACE: &str = include_str!("../../tests/fixtures/chat/metaspace-first.tokenizer.json");

    fn named() -> SpecialTokens {
        SpecialTokens { bos: Some("<s>".to_owned()), eos: Some("</s>".to_owned()), ..SpecialTokens::default() }
    }

    fn changed(json: &str, change: impl FnOnce(&mut Value)) -> String {
        let mut value = serde_json::from_str(json).unwrap();
        change(&mut value);
        value.to_string()
    }

    #[track_caller]
    fn adds_bos(json: &str, add_bos: Option<bool>, expected: bool) {
        let tokenizer = Tokenizer::from_json(json, &SpecialTokens { add_bos, ..named() }).unwrap();
        assert_eq!(tokenizer.adds_bos(), expected);
        let bos = if expected { vec![1] } else { Vec::new() };
        assert_eq!(tokenizer.encode("", Special::Parse, Bos::Add).unwrap(), bos);
        assert_eq!(tokenizer.encode("", Special::Parse, Bos::Omit).unwrap(), Vec::<u32>::new());
        let a = tokenizer.encode("a", Special::AsText, Bos::Omit).unwrap();
        assert_eq!(tokenizer.encode("a", Special::Parse, Bos::Add).unwrap(), [bos, a].concat());
    }

    #[test]
    fn bos_is_added_where_the_files_say_so() {
        adds_bos(MINI, None, false);
        adds_bos(MINI, Some(true), true);
        adds_bos(PREPEND, None, true);
        adds_bos(PREPEND, Some(false), false);
        adds_bos(&changed(PREPEND, |json| json["post_processor"] = Value::Null), None, true);
        adds_bos(&changed(MINI, |json| json["post_processor"] = Value::Null), None, false);
        let sequence = json!({"type": "Sequence", "processors": [{"type": "ByteLevel", "add_prefix_space": true,
            "trim_offsets": false, "use_regex": true}, {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}]});
        adds_bos(&changed(MINI, |json| json["post_processor"] = sequence), None, true);
        let none =
            Tokenizer::from_json(PREPEND, &SpecialTokens { add_bos: Some(true), ..SpecialTokens::default() }).unwrap();
        assert_eq!((none.adds_bos(), none.bos(), none.starts_with_bos("<s>")), (false, None, false));
    }

    #[test]
    fn bos_is_never_added_twice() {
        let tokenizer = Tokenizer::from_json(PREPEND, &named()).unwrap();
        let encode = |special, bos| tokenizer.encode("<s>a", special, bos).unwrap();
        let a = tokenizer.encode("a", Special::Parse, Bos::Omit).unwrap();
        assert_eq!(encode(Special::Parse, Bos::Add), [vec![1], a.clone()].concat());
        assert_eq!(encode(Special::Parse, Bos::Omit), [vec![1], a].concat());
        let text = encode(Special::AsText, Bos::Omit);
        assert!(text.len() > 3 && !text.contains(&1));
        assert_eq!(encode(Special::AsText, Bos::Add), [vec![1], text].concat());
    }

    #[test]
    fn truncation_and_padding_of_the_file_are_not_used() {
        let json = changed(MINI, |json| {
            json["truncation"] =
                json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
            json["padding"] = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "<unk>"});
        });
        let tokenizer = Tokenizer::from_json(&json, &named()).unwrap();
        assert_eq!(tokenizer.encode("123456", Special::Parse, Bos::Add).unwrap().len(), 6);
    }

    #[test]
    fn special_tokens_do_not_depend_on_the_normaliser() {
        let json = changed(PREPEND, |json| {
            let added = json["added_tokens"].as_array_mut().unwrap();
            added.iter_mut().for_each(|token| token["normalized"] = true.into());
        });
        let tokenizer = Tokenizer::from_json(&json, &named()).unwrap();
        let plain = Tokenizer::from_json(PREPEND, &named()).unwrap();
        for text in ["<s>a</s>b", "a</s>", "</s></s> <unk>"] {
            let wanted = plain.encode(text, Special::Parse, Bos::Omit).unwrap();
            assert_eq!(tokenizer.encode(text, Special::Parse, Bos::Omit).unwrap(), wanted);
        }
    }

    #[test]
    fn a_token_has_bytes_and_text() {
        let tokenizer = Tokenizer::from_json(PREPEND, &named()).unwrap();
        let id = |token: &str| tokenizer.token_id(token).unwrap();
        assert_eq!(tokenizer.token_bytes(id("<0xE6>")), Ok(vec![0xE6]));
        assert_eq!(tokenizer.token_text(id("<0xE6>")), Ok("\u{FFFD}".to_owned()));
        assert_eq!(tokenizer.token_text(id("▁the")), Ok(" the".to_owned()));
        assert_eq!(tokenizer.token_text(2), Ok("</s>".to_owned()));
        assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.eos_text()), (Some(1), Some(2), Some("</s>")));
        let end = u32::try_from(tokenizer.vocab_size()).unwrap();
        assert!(tokenizer.token_text(end - 1).is_ok());
        for refused in [tokenizer.token_text(end), tokenizer.decode(&[1, end, 2], SpecialText::Hide)] {
            let message = format!("token id {end} is not in the vocabulary");
            assert_eq!(refused, Err(Error::Invalid { message, field: None }));
        }
        let mini = Tokenizer::from_json(MINI, &named()).unwrap();
        assert_eq!(mini.vocab_size(), 320);
        let ids = mini.encode("é\n ", Special::AsText, Bos::Omit).unwrap();
        let bytes: Vec<Vec<u8>> = ids.iter().map(|id| mini.token_bytes(*id).unwrap()).collect();
        assert_eq!(bytes, [vec![0xC3], vec![0xA9], vec![b'\n'], vec![b' ']]);
    }

    #[test]
    fn damaged_files_are_refused() {
        let lacking = SpecialTokens { eos: Some("<|eot|>".to_owned()), ..named() };
        let message = "tokenizer_config.json names eos_token \"<|eot|>\", which tokenizer.json lacks";
        assert_eq!(Tokenizer::from_json(MINI, &lacking).unwrap_err(), Error::Checkpoint(message.to_owned()));
        for json in ["", "{}", "[1]", &MINI[..MINI.len() / 2], "{\"decoder\": {\"type\": \"ByteLevel\"}, \"model\": 3}"]
        {
            assert!(matches!(Tokenizer::from_json(json, &named()), Err(Error::Checkpoint(_))), "{}", json.len());
        }
        let dropout = changed(MINI, |json| json["model"]["dropout"] = 0.1.into());
        assert!(matches!(Tokenizer::from_json(&dropout, &named()), Err(Error::Unsupported(_))));
    }

    #[test]
    fn thousands_of_added_tokens_are_found() {
        let json = changed(MINI, |json| {
            let token = |index: u32| {
                json!({"id": 320 + index, "content": format!("<|reserved_special_{index}|>"),
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
            };
            json["added_tokens"].as_array_mut().unwrap().extend((0..10_000).map(token));
        });
        let tokenizer = Tokenizer::from_json(&json, &named()).unwrap();
        assert_eq!(tokenizer.vocab_size(), 10_320);
        let found = tokenizer.specials_in("a<|reserved_special_1|><|reserved_special_9999|></s>");
        assert_eq!(found, [(1..23, 321), (23..48, 10_319), (48..52, 2)]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn encoding_is_that_of_the_crate(
            parts in prop::collection::vec(prop_oneof![
                Just("<s>".to_owned()), Just("</s>".to_owned()), Just("<think>".to_owned()), Just(" ".to_owned()),
                Just("the \n".to_owned()), Just("数".to_owned()), "[a-e0-9 ]{0,6}", "\\PC{0,4}",
            ], 0..8),
            which in 0..3usize,
        ) {
            let json = [MINI, PREPEND, METASPACE][which];
            let ours = Tokenizer::from_json(json, &named()).unwrap();
            let mut crates: tokenizers::Tokenizer = json.parse().unwrap();
            let text = parts.concat();
            let parsed = ours.encode(&text, Special::Parse, Bos::Omit).unwrap();
            let wanted = crates.encode(text.as_str(), false).unwrap();
            prop_assert_eq!(&parsed[..], wanted.get_ids());
            crates.set_encode_special_tokens(true);
            let as_text = ours.encode(&text, Special::AsText, Bos::Omit).unwrap();
            let wanted = crates.encode(text.as_str(), false).unwrap();
            prop_assert_eq!(&as_text[..], wanted.get_ids());
        }
    }
}
