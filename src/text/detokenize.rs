//! How the strings of a vocabulary become text again: byte-level alphabets, SentencePiece pieces with byte fallback,
//! Metaspace, or words joined by spaces. Works one token at a time and agrees with the `tokenizers` crate exactly.

use std::collections::HashMap;
use std::sync::LazyLock;

use serde_json::Value;

use crate::error::{Error, Result};

/// The decoder of a tokenizer.json, reduced to what can be applied token by token.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Detokenizer {
    pieces: Pieces,
    /// Characters cut from the beginning of the whole text, and how many at most.
    strip: Vec<(char, usize)>,
}

#[derive(Debug, Clone, PartialEq)]
enum Pieces {
    /// Every character stands for one byte (GPT-2's alphabet).
    ByteLevel,
    /// Pieces of text after these replacements; `<0xNN>` is a byte where `byte_fallback` holds.
    Text { replace: Vec<(String, String)>, byte_fallback: bool },
    /// The character stands for a space, and for nothing in the first token where `drop_first` holds.
    Metaspace { space: char, drop_first: bool },
    /// Words with a space between them: a tokenizer.json without a decoder.
    Words,
}

impl Detokenizer {
    /// Reads the `decoder` entry of a tokenizer.json. Decoders that change earlier text are refused: they cannot stream.
    pub(super) fn parse(decoder: &Value) -> Result<Self> {
        if decoder.is_null() {
            return Ok(Self { pieces: Pieces::Words, strip: Vec::new() });
        }
        let mut steps = Vec::new();
        flatten(decoder, &mut steps);
        let mut pieces = None;
        let mut fused = false;
        let mut strip = Vec::new();
        for step in steps {
            match (kind(step), &mut pieces) {
                ("ByteLevel", None) => pieces = Some(Pieces::ByteLevel),
                ("Metaspace", None) => pieces = Some(metaspace(step)),
                ("Replace", None | Some(Pieces::Text { byte_fallback: false, .. })) if !fused => {
                    let (Some(from), Some(to)) = (step["pattern"]["String"].as_str(), step["content"].as_str()) else {
                        return Err(unsupported("Replace with a regular expression"));
                    };
                    let Pieces::Text { replace, .. } = pieces.get_or_insert_with(text) else { continue };
                    replace.push((from.to_owned(), to.to_owned()));
                }
                ("ByteFallback", None | Some(Pieces::Text { .. })) if !fused => {
                    let Pieces::Text { byte_fallback, .. } = pieces.get_or_insert_with(text) else { continue };
                    *byte_fallback = true;
                }
                ("Fuse", _) => fused = true,
                ("Strip", _) if fused && step["stop"].as_u64().unwrap_or(0) == 0 => {
                    let content = step["content"].as_str().and_then(|text| text.chars().next());
                    let start = step["start"].as_u64().and_then(|start| usize::try_from(start).ok());
                    strip.extend(content.zip(start));
                }
                (other, _) => return Err(unsupported(other)),
            }
        }
        Ok(Self { pieces: pieces.unwrap_or_else(text), strip })
    }

    /// The bytes that `token` stands for in the middle of a text.
    pub(super) fn bytes(&self, token: &str) -> Vec<u8> {
        match &self.pieces {
            Pieces::ByteLevel => byte_level(token),
            Pieces::Text { byte_fallback: true, .. } if fallback_byte(token).is_some() => {
                fallback_byte(token).into_iter().collect()
            }
            Pieces::Text { replace, .. } => replaced(token, replace).into_bytes(),
            Pieces::Metaspace { space, .. } => token.replace(*space, " ").into_bytes(),
            Pieces::Words => token.as_bytes().to_vec(),
        }
    }
}

fn flatten<'a>(decoder: &'a Value, steps: &mut Vec<&'a Value>) {
    match decoder["decoders"].as_array() {
        Some(inner) if kind(decoder) == "Sequence" => inner.iter().for_each(|step| flatten(step, steps)),
        _ => steps.push(decoder),
    }
}

fn kind(step: &Value) -> &str {
    step["type"].as_str().unwrap_or("")
}

fn text() -> Pieces {
    Pieces::Text { replace: Vec::new(), byte_fallback: false }
}

fn metaspace(step: &Value) -> Pieces {
    let space = step["replacement"].as_str().and_then(|text| text.chars().next()).unwrap_or('▁');
    let never = step["prepend_scheme"] == "never" || step["add_prefix_space"] == false;
    Pieces::Metaspace { space, drop_first: !never }
}

fn unsupported(what: &str) -> Error {
    Error::Unsupported(format!("tokenizer.json: decoder {what} in this place cannot be streamed"))
}

fn replaced(token: &str, replace: &[(String, String)]) -> String {
    replace.iter().fold(token.to_owned(), |text, (from, to)| text.replace(from.as_str(), to))
}

/// The byte of a token `<0xNN>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and on, in order.
static BYTE_OF_CHAR: LazyLock<HashMap<char, u8>> = LazyLock::new(|| {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let own = (0..=255u8).filter(|&byte| printable(byte)).map(|byte| (char::from(byte), byte));
    let others = ('\u{100}'..).zip((0..=255u8).filter(|&byte| !printable(byte)));
    own.chain(others).collect()
});

fn byte_level(token: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(|character| BYTE_OF_CHAR.get(&character).copied()).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

/// Whether the joined tokens begin a text or go on with one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    /// The first token opens the text: a leading space that the tokenizer made up is cut.
    Text,
    /// Text came before: a leading space is a space.
    Middle,
}

/// Text that one more token settled.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Joined {
    /// Text of earlier tokens that had waited for what follows.
    pub(super) earlier: String,
    /// Text of this token.
    pub(super) own: String,
}

/// Joins tokens to text, one at a time. `push` and `finish` together give what a decode of all tokens gives.
#[derive(Debug, Clone)]
pub(super) struct Joiner {
    first: bool,
    strip: Vec<(char, usize)>,
    /// Byte level: an incomplete character. Byte fallback: the run of byte tokens so far, which is valid or not as a whole.
    pending: Vec<u8>,
}

impl Joiner {
    /// A joiner for the text (or its continuation) that `detokenizer` makes.
    pub(super) fn new(detokenizer: &Detokenizer, start: Start) -> Self {
        let begins = start == Start::Text;
        let strip = if begins { detokenizer.strip.clone() } else { Vec::new() };
        Self { first: begins, strip, pending: Vec::new() }
    }

    /// Adds one token.
    pub(super) fn push(&mut self, detokenizer: &Detokenizer, token: &str) -> Joined {
        let first = std::mem::replace(&mut self.first, false);
        let mut joined = match &detokenizer.pieces {
            Pieces::ByteLevel => self.push_bytes(&byte_level(token)),
            Pieces::Text { replace, byte_fallback } => {
                if let Some(byte) = fallback_byte(token).filter(|_| *byte_fallback) {
                    self.pending.push(byte);
                    return Joined::default();
                }
                Joined { earlier: self.take_run(), own: replaced(token, replace) }
            }
            Pieces::Metaspace { space, drop_first } => {
                let gap = if first && *drop_first { "" } else { " " };
                Joined { earlier: String::new(), own: token.replace(*space, gap) }
            }
            Pieces::Words if first => Joined { earlier: String::new(), own: token.to_owned() },
            Pieces::Words => Joined { earlier: String::new(), own: format!(" {token}") },
        };
        self.strip_start(&mut joined.earlier);
        self.strip_start(&mut joined.own);
        joined
    }

    /// What still waited for its other half; invalid UTF-8 becomes U+FFFD.
    pub(super) fn finish(&mut self, detokenizer: &Detokenizer) -> String {
        let mut rest = match detokenizer.pieces {
            Pieces::ByteLevel => String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned(),
            _ => self.take_run(),
        };
        self.strip_start(&mut rest);
        rest
    }

    fn push_bytes(&mut self, bytes: &[u8]) -> Joined {
        let held = self.pending.len();
        self.pending.extend_from_slice(bytes);
        let mut joined = Joined::default();
        let mut at = 0;
        loop {
            match std::str::from_utf8(&self.pending[at..]) {
                Ok(text) => {
                    joined.own.push_str(text);
                    self.pending.clear();
                    return joined;
                }
                Err(error) => {
                    let valid = at + error.valid_up_to();
                    joined.own.push_str(&String::from_utf8_lossy(&self.pending[at..valid]));
                    let Some(invalid) = error.error_len() else {
                        self.pending.drain(..valid);
                        return joined;
                    };
                    at = valid + invalid;
                    // The bytes that had waited turned out to be no character: their mark belongs to the token before.
                    let mark = if at <= held { &mut joined.earlier } else { &mut joined.own };
                    mark.push(char::REPLACEMENT_CHARACTER);
                }
            }
        }
    }

    /// The pending run of byte tokens as text. One bad byte spoils the whole run, as in `tokenizers`.
    fn take_run(&mut self) -> String {
        let run = std::mem::take(&mut self.pending);
        let length = run.len();
        String::from_utf8(run).unwrap_or_else(|_| String::from(char::REPLACEMENT_CHARACTER).repeat(length))
    }

    fn strip_start(&mut self, text: &mut String) {
        while let Some((character, left)) = self.strip.first_mut() {
            if text.is_empty() {
                return;
            }
            if *left > 0 && text.starts_with(*character) {
                text.remove(0);
                *left -= 1;
            } else {
                self.strip.remove(0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn joined(decoder: &Value, start: Start, tokens: &[&str], expected: &[&str]) {
        let detokenizer = Detokenizer::parse(decoder).unwrap();
        let mut joiner = Joiner::new(&detokenizer, start);
        let mut texts = Vec::new();
        for token in tokens {
            let joined = joiner.push(&detokenizer, token);
            texts.push(joined.earlier + &joined.own);
        }
        texts.push(joiner.finish(&detokenizer));
        assert_eq!(texts, expected);
    }

    fn llama() -> Value {
        json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})
    }

    #[test]
    fn pieces_and_byte_tokens_become_text() {
        joined(&llama(), Start::Text, &["▁", "▁a", "b", "▁c"], &["", " a", "b", " c", ""]);
        joined(&llama(), Start::Middle, &["▁", "▁a", "b"], &[" ", " a", "b", ""]);
        joined(&llama(), Start::Text, &["<0x20>", "<0x61>", "▁b"], &["", "", "a b", ""]);
        joined(&llama(), Start::Text, &["<0xE6>", "<0x95>", "<0xB0>", "x"], &["", "", "", "数x", ""]);
        joined(
            &llama(),
            Start::Text,
            &["<0x61>", "<0xE6>", "x", "<0xE6>"],
            &["", "", "\u{FFFD}\u{FFFD}x", "", "\u{FFFD}"],
        );
        joined(&llama(), Start::Text, &["<0x6>", "<0xGG>"], &["<0x6>", "<0xGG>", ""]);
    }

    #[test]
    fn byte_level_tokens_become_text() {
        let decoder = json!({"type": "ByteLevel"});
        joined(
            &decoder,
            Start::Text,
            &["Ġa", "Ċ", "é", "x", "æ", "ķ", "°"],
            &[" a", "\n", "", "\u{FFFD}x", "", "", "数", ""],
        );
        joined(&decoder, Start::Text, &["æ", "ķ"], &["", "", "\u{FFFD}"]);
        joined(&decoder, Start::Text, &["▁数", "ð", "ð"], &["▁数", "", "\u{FFFD}", "\u{FFFD}"]);
        let all: Vec<u8> = (0..=255).collect();
        let mut alphabet: Vec<(u8, char)> = BYTE_OF_CHAR.iter().map(|(character, byte)| (*byte, *character)).collect();
        alphabet.sort_unstable();
        assert_eq!(alphabet.iter().map(|(byte, _)| *byte).collect::<Vec<_>>(), all);
        assert_eq!((alphabet[0x20].1, alphabet[0x0A].1, alphabet[0xAD].1), ('Ġ', 'Ċ', '\u{143}'));
    }

    #[test]
    fn text_that_waited_belongs_to_the_tokens_before() {
        for (decoder, half) in [(json!({"type": "ByteLevel"}), "æ"), (llama(), "<0xE6>")] {
            let detokenizer = Detokenizer::parse(&decoder).unwrap();
            let mut joiner = Joiner::new(&detokenizer, Start::Text);
            assert_eq!(joiner.push(&detokenizer, half), Joined::default());
            let wanted = Joined { earlier: "\u{FFFD}".to_owned(), own: "x".to_owned() };
            assert_eq!(joiner.push(&detokenizer, "x"), wanted);
        }
    }

    #[test]
    fn other_decoders_work_or_are_refused() {
        joined(&Value::Null, Start::Text, &["a", "b"], &["a", " b", ""]);
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
        joined(&metaspace, Start::Text, &["▁a▁", "▁b"], &["a", " b", ""]);
        let never = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": false});
        joined(&never, Start::Text, &["▁a▁", "▁b"], &[" a ", " b", ""]);
        for refused in [
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
            json!({"type": "CTC"}),
            json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}),
            json!({"type": "Replace", "pattern": {"Regex": "a"}, "content": ""}),
            json!({"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "ByteFallback"}]}),
            json!({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}]}),
        ] {
            assert!(matches!(Detokenizer::parse(&refused), Err(Error::Unsupported(_))), "{refused}");
        }
    }
}
