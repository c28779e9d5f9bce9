//! Reading a JSON body: type, size and time limits, then fields, all refused by name rather than ignored.
//! What a field means is not decided here.

use std::{collections::HashSet, fmt, time::Duration};

use axum::{
    body::{Body, Bytes},
    extract::{FromRequest, Request},
    http::{HeaderMap, StatusCode, header},
};
use serde::{
    de::{DeserializeOwned, Deserializer, IgnoredAny, MapAccess, Visitor},
    forward_to_deserialize_any,
};
use serde_json::Value;
use tokio_stream::StreamExt;

use super::{
    AppState,
    error::{ApiError, ApiResult},
    fields::{Rule, rule},
};

/// No request has nearly as many fields; names beyond are not remembered.
const FIELDS_MAX: usize = 256;

/// The bytes of a JSON request body, not parsed yet.
#[derive(Debug, Clone)]
pub struct JsonBody(Bytes);

impl FromRequest<AppState> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> ApiResult<Self> {
        let options = state.options();
        check_type(request.headers())?;
        if content_length(request.headers()).is_some_and(|length| length > options.body_bytes_max) {
            return Err(too_large(options.body_bytes_max));
        }
        read(request.into_body(), options.body_bytes_max, options.body_timeout).await.map(Self)
    }
}

impl JsonBody {
    /// The body as one struct of fields.
    ///
    /// # Errors
    /// 400 for a body that is no JSON object, for a field that is not known, and for a value of the wrong type.
    pub fn decode<A: DeserializeOwned>(&self) -> ApiResult<A> {
        check_fields(&self.0, fields_of::<A>())?;
        parse(&self.0)
    }

    /// The body as two structs that share its fields between them.
    ///
    /// # Errors
    /// As [`JsonBody::decode`].
    pub fn decode_pair<A: DeserializeOwned, B: DeserializeOwned>(&self) -> ApiResult<(A, B)> {
        check_fields(&self.0, fields_of::<A>().iter().chain(fields_of::<B>()))?;
        Ok((parse(&self.0)?, parse(&self.0)?))
    }

    /// A body from memory.
    #[cfg(test)]
    pub(super) fn from_text(text: impl Into<String>) -> Self {
        Self(Bytes::from(text.into()))
    }
}

fn check_type(headers: &HeaderMap) -> ApiResult<()> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let essence = kind.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    let json = essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"));
    if json { Ok(()) } else { Err(bad_request("send the header `Content-Type: application/json`")) }
}

fn content_length(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

async fn read(body: Body, bytes_max: usize, timeout: Duration) -> ApiResult<Bytes> {
    let collect = async {
        let mut chunks = body.into_data_stream();
        let mut bytes = Vec::new();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|_| bad_request("the body ended early"))?;
            if bytes.len() + chunk.len() > bytes_max {
                return Err(too_large(bytes_max));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes.into())
    };
    let late = || ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time");
    tokio::time::timeout(timeout, collect).await.unwrap_or_else(|_| Err(late()))
}

fn too_large(bytes_max: usize) -> ApiError {
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body is larger than {bytes_max} bytes"))
}

fn bad_request(message: impl Into<String>) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, message)
}

/// Refuses bodies that are no object, unknown fields, repeated fields, and known fields with a value we do not support.
fn check_fields<'a>(bytes: &[u8], known: impl IntoIterator<Item = &'a &'static str>) -> ApiResult<()> {
    let mut keys = Keys { known: known.into_iter().copied().collect(), refused: None };
    let mut json = serde_json::Deserializer::from_slice(bytes);
    json.deserialize_map(&mut keys).and_then(|()| json.end()).map_err(|error| match error.classify() {
        serde_json::error::Category::Data => bad_request("the body must be a JSON object"),
        _ => bad_request(format!("the body is not valid JSON: {error}")),
    })?;
    keys.refused.map_or(Ok(()), Err)
}

/// Walks over the top-level keys without keeping values.
struct Keys {
    known: HashSet<&'static str>,
    refused: Option<ApiError>,
}

impl<'de> Visitor<'de> for &mut Keys {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<(), M::Error> {
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if seen.len() >= FIELDS_MAX {
                map.next_value::<IgnoredAny>()?;
                self.refused.get_or_insert_with(|| bad_request(format!("the body has more than {FIELDS_MAX} fields")));
                continue;
            }
            let problem = match rule(&key) {
                _ if self.known.contains(key.as_str()) => {
                    map.next_value::<IgnoredAny>()?;
                    None
                }
                Some(Rule::Ignored) => {
                    map.next_value::<IgnoredAny>()?;
                    None
                }
                Some(Rule::Neutral(is_neutral)) => {
                    let value: Value = map.next_value()?;
                    (!value.is_null() && !is_neutral(&value)).then(|| ApiError::unsupported(&key))
                }
                None => {
                    map.next_value::<IgnoredAny>()?;
                    let name: String = key.chars().take(100).collect();
                    Some(ApiError::invalid(key.as_str(), format!("`{name}` is not a field of this request")))
                }
            };
            let repeated =
                (!seen.insert(key.clone())).then(|| ApiError::invalid(key.as_str(), "the field is given twice"));
            self.refused = self.refused.take().or(problem).or(repeated);
        }
        Ok(())
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> ApiResult<T> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let message = explain(&error.inner().to_string());
        if path == "." { missing(&message) } else { ApiError::invalid(path.as_str(), format!("`{path}`: {message}")) }
    })
}

/// A missing field is named in serde's message only.
fn missing(message: &str) -> ApiError {
    match message.strip_prefix("missing field `").and_then(|rest| rest.split('`').next()) {
        Some(field) => ApiError::invalid(field, format!("`{field}` is required")),
        None => bad_request(message),
    }
}

/// serde's message without the value it quotes (which may be somebody's prompt) and without the position.
fn explain(message: &str) -> String {
    let message = message.rsplit_once(" at line ").map_or(message, |(before, _)| before);
    match (message.find("invalid type: ").or(message.find("invalid value: ")), message.rfind(", expected ")) {
        (Some(0), Some(at)) => {
            let found = message[..at].split_once(": ").map_or("", |(_, found)| found);
            let kind = found.split(['"', '`']).next().unwrap_or("").trim();
            format!("found {kind}, expected {}", &message[at + ", expected ".len()..])
        }
        _ => message.to_string(),
    }
}

/// The field names of a struct that derives `Deserialize`.
fn fields_of<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut fields: &'static [&'static str] = &[];
    let told: Result<T, serde::de::value::Error> = T::deserialize(Fields(&mut fields));
    debug_assert!(told.is_err() && !fields.is_empty());
    fields
}

/// A deserializer that only listens to which fields are asked for.
struct Fields<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Fields<'_> {
    type Error = serde::de::value::Error;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, Self::Error> {
        *self.0 = fields;
        Err(serde::de::Error::custom("fields told"))
    }

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Self::Error> {
        Err(serde::de::Error::custom("not a struct"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[allow(dead_code)]
    struct Probe {
        n: Option<i64>,
        text: String,
        options: Option<Inner>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Inner {
        list: Vec<f64>,
    }

    #[track_caller]
    fn check(body: &str, param: Option<&str>, message: &str) {
        let error = JsonBody::from_text(body).decode::<Probe>().unwrap_err();
        assert_eq!(error.status, StatusCode::BAD_REQUEST, "{error:?}");
        assert_eq!(error.body.param.as_deref(), param, "{error:?}");
        assert!(error.body.message.contains(message), "{error:?}");
    }

    #[test]
    fn what_is_wrong_is_named() {
        check(r#"{"text":"a","nn":1}"#, Some("nn"), "not a field");
        check(r#"{"text":"a","n":1,"n":2}"#, Some("n"), "twice");
        check(r#"{"n":1}"#, Some("text"), "required");
        check(r#"{"text":"a","n":1.5}"#, Some("n"), "expected i64");
        check(r#"{"text":"a","n":9223372036854775808}"#, Some("n"), "expected i64");
        check(r#"{"text":"a","options":{"list":[1,"x"]}}"#, Some("options.list[1]"), "found string, expected f64");
        check(r#"{"text":"a","options":{"list":[],"more":1}}"#, Some("options.more"), "unknown field");
        check(r#"{"text":"a","tools":[{"type":"function"}]}"#, Some("tools"), "not supported yet");
        check(r#"{"text":"\ud800"}"#, Some("text"), "hex escape");
        check(r#"{"text":null}"#, Some("text"), "found null, expected a string");
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for body in ["", "[]", "3", "null", "\"x\"", "{", "{\"a\":}", "\u{feff}{}", "{} {}"] {
            check(body, None, "JSON");
        }
    }

    #[test]
    fn values_are_not_quoted() {
        let error = JsonBody::from_text(r#"{"text":"a","n":"my secret, expected \"nobody\" at line 3"}"#);
        assert!(!error.decode::<Probe>().unwrap_err().to_json().contains("secret"));
    }

    #[test]
    fn harmless_fields_and_nulls_pass() {
        let body = r#"{"text":"a","n":null,"options":null,"user":"x","tools":null,"response_format":{"type":"text"}}"#;
        assert!(JsonBody::from_text(body).decode::<Probe>().unwrap().n.is_none());
    }

    #[test]
    fn floods_of_fields_are_refused() {
        let fields: Vec<String> = (0..10_000).map(|at| format!("\"user{at}\":1")).collect();
        check(&format!("{{{}}}", fields.join(",")), Some("user0"), "not a field");
    }

    #[test]
    fn deep_nesting_is_refused() {
        for depth in [127, 128, 100_000] {
            let body = format!(r#"{{"text":{}{}}}"#, "[".repeat(depth), "]".repeat(depth));
            assert_eq!(JsonBody::from_text(body).decode::<Probe>().unwrap_err().status, StatusCode::BAD_REQUEST);
        }
    }
}
