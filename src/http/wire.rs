//! Value shapes that several requests share: one-or-many, prompts of four kinds, messages and their parts.
//! Read by hand-written visitors: untagged enums would copy the input and explain nothing.

use std::{fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer, value::SeqAccessDeserializer},
};
use serde_json::Value;
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{RefOr, Schema, schema::OneOfBuilder},
};

use super::error::{ApiError, ApiResult};
use crate::service::{Message, TokenId};

/// A string, or a list of them.
#[derive(Debug, Clone, PartialEq)]
pub enum Strings {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl Strings {
    /// All of them.
    pub fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

/// Text, token ids, or a list of either.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompts {
    /// `"text"`
    Text(String),
    /// `["text", ..]`
    Texts(Vec<String>),
    /// `[1, 2, ..]`
    Ids(Vec<TokenId>),
    /// `[[1, 2], ..]`, texts among them where `input` allows both.
    Mixed(Vec<TextOrIds>),
}

/// Text or token ids.
#[derive(Debug, Clone, PartialEq)]
pub enum TextOrIds {
    /// Text.
    Text(String),
    /// Token ids.
    Ids(Vec<TokenId>),
}

impl Prompts {
    /// Each of them.
    pub fn into_vec(self) -> Vec<TextOrIds> {
        match self {
            Self::Text(text) => vec![TextOrIds::Text(text)],
            Self::Texts(texts) => texts.into_iter().map(TextOrIds::Text).collect(),
            Self::Ids(ids) => vec![TextOrIds::Ids(ids)],
            Self::Mixed(items) => items,
        }
    }
}

/// One element of a prompt list.
enum Element {
    Text(String),
    Id(TokenId),
    Ids(Vec<TokenId>),
}

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let one_or_many = OneOrMany::<String>::deserialize(deserializer, "a string or a list of strings")?;
        Ok(one_or_many.map_or_else(Self::One, Self::Many))
    }
}

/// `Err` holds a single string, `Ok` a list.
struct OneOrMany<T>(PhantomData<T>, &'static str);

impl<'de, T: Deserialize<'de>> OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D, expected: &'static str) -> Result<Either<T>, D::Error> {
        deserializer.deserialize_any(Self(PhantomData, expected))
    }
}

enum Either<T> {
    Text(String),
    List(Vec<T>),
}

impl<T> Either<T> {
    fn map_or_else<U>(self, text: impl FnOnce(String) -> U, list: impl FnOnce(Vec<T>) -> U) -> U {
        match self {
            Self::Text(one) => text(one),
            Self::List(many) => list(many),
        }
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for OneOrMany<T> {
    type Value = Either<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.1)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Either::Text(text.to_string()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
        Vec::deserialize(SeqAccessDeserializer::new(seq)).map(Either::List)
    }
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptsVisitor)
    }
}

struct PromptsVisitor;

impl<'de> Visitor<'de> for PromptsVisitor {
    type Value = Prompts;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a list of strings, a list of token ids or a list of such lists")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Prompts, E> {
        Ok(Prompts::Text(text.to_string()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Prompts, A::Error> {
        let mut ids = Vec::new();
        let mut items = Vec::new();
        while let Some(element) = seq.next_element::<Element>()? {
            match element {
                Element::Id(id) => ids.push(id),
                Element::Text(text) => items.push(TextOrIds::Text(text)),
                Element::Ids(list) => items.push(TextOrIds::Ids(list)),
            }
            if !ids.is_empty() && !items.is_empty() {
                return Err(de::Error::custom("token ids and prompts stand in one list"));
            }
        }
        Ok(if ids.is_empty() { Prompts::Mixed(items) } else { Prompts::Ids(ids) })
    }
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ElementVisitor)
    }
}

struct ElementVisitor;

impl<'de> Visitor<'de> for ElementVisitor {
    type Value = Element;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a token id or a list of token ids")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Element, E> {
        Ok(Element::Text(text.to_string()))
    }

    fn visit_u64<E: de::Error>(self, id: u64) -> Result<Element, E> {
        let outside = || de::Error::invalid_value(de::Unexpected::Unsigned(id), &self);
        TokenId::try_from(id).map(Element::Id).map_err(|_| outside())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Element, A::Error> {
        Vec::deserialize(SeqAccessDeserializer::new(seq)).map(Element::Ids)
    }
}

/// A message of a conversation as it comes in.
#[derive(Debug, Clone, PartialEq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct WireMessage {
    /// `system` (or `developer`), `user` or `assistant`.
    pub role: String,
    /// Text, or a list of text parts.
    pub content: Content,
    /// Accepted and ignored: no template here shows it.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub name: Option<Value>,
    /// Accepted empty, as clients echo it back.
    #[serde(default)]
    #[schema(value_type = Option<Vec<Object>>)]
    pub tool_calls: Option<Value>,
    /// Accepted empty.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub function_call: Option<Value>,
    /// Accepted empty.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub refusal: Option<Value>,
    /// Accepted empty.
    #[serde(default)]
    #[schema(value_type = Option<Vec<Object>>)]
    pub annotations: Option<Value>,
    /// Accepted empty.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub audio: Option<Value>,
    /// Accepted empty.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub reasoning: Option<Value>,
    /// Accepted empty.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub reasoning_content: Option<Value>,
}

impl WireMessage {
    fn into_message(self, path: &str) -> ApiResult<Message> {
        let empty = [
            ("tool_calls", &self.tool_calls),
            ("function_call", &self.function_call),
            ("refusal", &self.refusal),
            ("annotations", &self.annotations),
            ("audio", &self.audio),
            ("reasoning", &self.reasoning),
            ("reasoning_content", &self.reasoning_content),
        ];
        if let Some((name, _)) = empty.iter().find(|(_, value)| value.as_ref().is_some_and(|value| !is_empty(value))) {
            return Err(ApiError::unsupported(&format!("{path}.{name}")));
        }
        let role = match self.role.as_str() {
            "developer" => "system".to_string(),
            "system" | "user" | "assistant" => self.role,
            _ => {
                let param = format!("{path}.role");
                return Err(ApiError::invalid(param, "the role must be `system`, `user` or `assistant`"));
            }
        };
        Ok(Message { role, content: self.content.0 })
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// The messages of the field `path`, checked.
///
/// # Errors
/// 400 for roles and message fields that are not supported.
pub fn messages(wire: Vec<WireMessage>, path: &str) -> ApiResult<Vec<Message>> {
    let numbered = wire.into_iter().enumerate();
    numbered.map(|(at, message)| message.into_message(&format!("{path}[{at}]"))).collect()
}

/// The text of a message; several text parts are joined by line breaks.
#[derive(Debug, Clone, PartialEq)]
pub struct Content(pub String);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Part {
    #[serde(rename = "type")]
    kind: PartKind,
    text: String,
}

#[derive(Deserialize)]
enum PartKind {
    #[serde(rename = "text")]
    Text,
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let content = OneOrMany::<Part>::deserialize(deserializer, "a string or a list of text parts")?;
        Ok(Self(content.map_or_else(|text| text, |parts| join(&parts))))
    }
}

fn join(parts: &[Part]) -> String {
    let texts: Vec<&str> = parts
        .iter()
        .map(|part| match part.kind {
            PartKind::Text => part.text.as_str(),
        })
        .collect();
    texts.join("\n")
}

/// A user's text, or a conversation.
#[derive(Debug, Clone, PartialEq)]
pub enum TextOrMessages {
    /// What the user said.
    Text(String),
    /// A conversation.
    Messages(Vec<WireMessage>),
}

/// One conversation, or a list of conversations.
#[derive(Debug, Clone, PartialEq)]
pub enum Conversations {
    /// `[{..}, ..]`
    One(Vec<WireMessage>),
    /// `[[{..}, ..], ..]`
    Many(Vec<Vec<WireMessage>>),
}

impl<'de> Deserialize<'de> for Conversations {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ConversationsVisitor)
    }
}

struct ConversationsVisitor;

impl<'de> Visitor<'de> for ConversationsVisitor {
    type Value = Conversations;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a conversation or a list of conversations")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Conversations, A::Error> {
        let (mut one, mut many) = (Vec::new(), Vec::new());
        while let Some(element) = seq.next_element::<MessageOrList>()? {
            match element {
                MessageOrList::Message(message) => one.push(*message),
                MessageOrList::List(list) => many.push(list),
            }
            if !one.is_empty() && !many.is_empty() {
                return Err(de::Error::custom("messages and conversations stand in one list"));
            }
        }
        Ok(if one.is_empty() { Conversations::Many(many) } else { Conversations::One(one) })
    }
}

enum MessageOrList {
    Message(Box<WireMessage>),
    List(Vec<WireMessage>),
}

impl<'de> Deserialize<'de> for MessageOrList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(MessageOrListVisitor)
    }
}

struct MessageOrListVisitor;

impl<'de> Visitor<'de> for MessageOrListVisitor {
    type Value = MessageOrList;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message or a conversation")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<MessageOrList, A::Error> {
        let message = WireMessage::deserialize(MapAccessDeserializer::new(map))?;
        Ok(MessageOrList::Message(Box::new(message)))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<MessageOrList, A::Error> {
        Vec::deserialize(SeqAccessDeserializer::new(seq)).map(MessageOrList::List)
    }
}

impl<'de> Deserialize<'de> for TextOrMessages {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let either = OneOrMany::<WireMessage>::deserialize(deserializer, "a string or a list of messages")?;
        Ok(either.map_or_else(Self::Text, Self::Messages))
    }
}

macro_rules! one_of {
    ($name:ident: $($item:ty),+) => {
        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                OneOfBuilder::new()$(.item(<$item>::schema()))+.into()
            }
        }
        impl ToSchema for $name {}
    };
}

one_of!(Strings: String, Vec<String>);
one_of!(Prompts: String, Vec<String>, Vec<u32>, Vec<Vec<u32>>);
one_of!(Content: String, Vec<TextPart>);
one_of!(TextOrMessages: String, Vec<SimpleMessage>);
one_of!(Conversations: Vec<SimpleMessage>, Vec<Vec<SimpleMessage>>);

/// A text part, for the schema.
#[derive(Debug, Clone, PartialEq, ToSchema)]
pub struct TextPart {
    /// Always `text`.
    pub r#type: String,
    /// The text.
    pub text: String,
}

/// A message, for schemas that hold it inline.
#[derive(Debug, Clone, PartialEq, ToSchema)]
pub struct SimpleMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said; text parts are taken too.
    pub content: String,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn prompts(json: &str) -> Result<Vec<TextOrIds>, String> {
        serde_json::from_str::<Prompts>(json).map(Prompts::into_vec).map_err(|error| error.to_string())
    }

    #[test]
    fn prompts_come_in_four_kinds() {
        let text = |text: &str| TextOrIds::Text(text.into());
        let ids = |ids: &[u32]| TextOrIds::Ids(ids.to_vec());
        assert_eq!(prompts(r#""a""#).unwrap(), [text("a")]);
        assert_eq!(prompts(r#"["a","b"]"#).unwrap(), [text("a"), text("b")]);
        assert_eq!(prompts("[1,2]").unwrap(), [ids(&[1, 2])]);
        assert_eq!(prompts("[[1],[2,3]]").unwrap(), [ids(&[1]), ids(&[2, 3])]);
        for bad in
            ["[1,\"a\"]", "[\"a\",1]", "3", "null", "{}", "[-1]", "[4294967296]", "[1.5]", "[[[1]]]", "[[\"a\"]]"]
        {
            assert!(prompts(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn content_is_text_or_parts() {
        let content = |json: &str| serde_json::from_str::<Content>(json).map(|content| content.0);
        assert_eq!(content(r#""a""#).unwrap(), "a");
        assert_eq!(content(r#"[{"type":"text","text":"a"},{"type":"text","text":"b"}]"#).unwrap(), "a\nb");
        assert_eq!(content("[]").unwrap(), "");
        assert!(content(r#"[{"type":"image_url","image_url":{"url":"http://x"}}]"#).is_err());
    }

    #[track_caller]
    fn check_message(json: &str, refused: Option<&str>) {
        let wire: WireMessage = serde_json::from_str(json).unwrap();
        let refusal = messages(vec![wire], "messages").err().and_then(|error| error.body.param);
        assert_eq!(refusal.as_deref(), refused, "{json}");
    }

    #[test]
    fn messages_may_carry_empty_leftovers() {
        check_message(r#"{"role":"assistant","content":"a","tool_calls":[],"refusal":null,"annotations":[]}"#, None);
        check_message(r#"{"role":"user","content":"a","tool_calls":[{}]}"#, Some("messages[0].tool_calls"));
        check_message(r#"{"role":"tool","content":"a"}"#, Some("messages[0].role"));
    }
}
