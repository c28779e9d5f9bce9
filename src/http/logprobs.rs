//! Log-probabilities as clients read them: OpenAI's chat shape, its older completions shape, and vLLM's prompt shape.

use serde::Serialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::service::updates::{TokenInfo, TokenText};

/// Log-probabilities of a chat choice.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChatLogProbs {
    /// One for each token.
    pub content: Vec<ChatToken>,
}

/// One token of a chat choice.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChatToken {
    /// Its text.
    pub token: String,
    /// Natural logarithm of its probability; -9999 stands for minus infinity.
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The most probable tokens in its place.
    pub top_logprobs: Vec<Alternative>,
}

/// A token that could have stood in the place.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Alternative {
    /// Its text.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// The chat shape.
pub fn chat(tokens: Vec<TokenInfo>) -> ChatLogProbs {
    let alternative = |(token, logprob): (TokenText, f32)| Alternative {
        token: token.text,
        logprob: finite(logprob),
        bytes: token.bytes,
    };
    let token = |info: TokenInfo| ChatToken {
        token: info.token.text,
        logprob: finite(info.logprob.unwrap_or(0.0)),
        bytes: info.token.bytes,
        top_logprobs: info.top.into_iter().map(alternative).collect(),
    };
    ChatLogProbs { content: tokens.into_iter().map(token).collect() }
}

/// Log-probabilities of a completions choice: four lists of one length.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct CompletionLogProbs {
    /// Texts of the tokens.
    pub tokens: Vec<String>,
    /// Natural logarithms of their probabilities; null for the first token of a prompt.
    pub token_logprobs: Vec<Option<f32>>,
    /// The most probable tokens in each place and the token itself; null for the first token of a prompt.
    #[schema(value_type = Vec<Option<Object>>)]
    pub top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Where in the choice's text each token begins, in characters.
    pub text_offset: Vec<usize>,
}

impl CompletionLogProbs {
    /// Appends tokens with their `top` best alternatives. `offset` is where the first begins, and is moved on.
    pub fn extend<'a>(&mut self, tokens: impl IntoIterator<Item = &'a TokenInfo>, top: usize, offset: &mut usize) {
        for info in tokens {
            self.tokens.push(info.token.text.clone());
            self.token_logprobs.push(info.logprob.map(finite));
            self.top_logprobs.push(info.logprob.map(|logprob| alternatives(info, logprob, top)));
            self.text_offset.push(*offset);
            *offset += chars_begun(&info.token.bytes);
        }
    }
}

fn alternatives(info: &TokenInfo, logprob: f32, top: usize) -> Map<String, Value> {
    let mut map = Map::new();
    for (token, logprob) in info.top.iter().take(top) {
        map.entry(token.text.clone()).or_insert_with(|| short(*logprob));
    }
    map.entry(info.token.text.clone()).or_insert_with(|| short(logprob));
    map
}

/// Characters whose first byte is among `bytes`: a character spread over tokens counts once.
fn chars_begun(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte & 0b1100_0000 != 0b1000_0000).count()
}

/// vLLM's shape: for each prompt token null (the first) or `{id: {logprob, rank, decoded_token}}`.
pub fn prompt(tokens: &[TokenInfo], top: usize) -> Vec<Value> {
    tokens.iter().map(|info| info.logprob.map_or(Value::Null, |logprob| prompt_token(info, logprob, top))).collect()
}

fn prompt_token(info: &TokenInfo, logprob: f32, top: usize) -> Value {
    let entry = |token: &TokenText, logprob: f32, rank: Option<usize>| {
        (token.id.to_string(), json!({"logprob": short(logprob), "rank": rank, "decoded_token": token.text}))
    };
    let rank = info.top.iter().position(|(token, _)| token.id == info.token.id).map(|at| at + 1);
    let mut map = Map::from_iter([entry(&info.token, logprob, rank)]);
    let best = info.top.iter().take(top).enumerate();
    map.extend(best.map(|(at, (token, logprob))| entry(token, *logprob, Some(at + 1))));
    Value::Object(map)
}

/// As JSON with the digits of single precision: `Value` would show those of the same number in double precision.
fn short(logprob: f32) -> Value {
    finite(logprob).to_string().parse::<f64>().map_or(Value::Null, |number| json!(number))
}

/// JSON has no infinity: minus infinity is -9999, as in OpenAI's answers.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn text(id: u32, bytes: &[u8]) -> TokenText {
        TokenText { id, text: String::from_utf8_lossy(bytes).into_owned(), bytes: bytes.to_vec() }
    }

    fn info(id: u32, bytes: &[u8], logprob: Option<f32>) -> TokenInfo {
        let top = vec![(text(7, b"x"), -0.5), (text(id, bytes), logprob.unwrap_or(0.0))];
        TokenInfo { token: text(id, bytes), logprob, top }
    }

    #[test]
    fn completions_shape_keeps_four_equal_lists() {
        let tokens = [info(1, b"<s>", None), info(2, &[0xc3], Some(-1.0)), info(3, &[0xa9], Some(f32::NEG_INFINITY))];
        let mut lists = CompletionLogProbs::default();
        let mut offset = 0;
        lists.extend(&tokens, 1, &mut offset);
        assert_eq!(lists.token_logprobs, [None, Some(-1.0), Some(-9999.0)]);
        assert_eq!(lists.text_offset, [0, 3, 4]);
        assert_eq!(offset, 4);
        assert_eq!(lists.top_logprobs[0], None);
        assert_eq!(json!(lists.top_logprobs[1]), json!({"x": -0.5, "\u{fffd}": -1.0}));
    }

    #[test]
    fn prompt_shape_ranks_what_it_knows() {
        let lists = prompt(&[info(1, b"<s>", None), info(2, b"a", Some(-1.0))], 2);
        assert_eq!(lists[0], Value::Null);
        assert_eq!(lists[1]["2"], json!({"logprob": -1.0, "rank": 2, "decoded_token": "a"}));
        assert_eq!(lists[1]["7"]["rank"], 1);
    }

    #[test]
    fn numbers_have_the_digits_of_single_precision() {
        assert_eq!(short(-0.1).to_string(), "-0.1");
        assert_eq!(short(-1.5).to_string(), "-1.5");
    }

    #[test]
    fn chat_shape_has_bytes() {
        let lists = chat(vec![info(2, b"ab", Some(-1.0))]);
        assert_eq!(lists.content[0].bytes, b"ab");
        assert_eq!(lists.content[0].top_logprobs.len(), 2);
    }
}
