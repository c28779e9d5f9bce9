//! Reading the keys of one JSON object: every getter checks its value and records what is wrong under the key's name.
//! After a problem a getter answers with a harmless stand-in, so that reading goes on and all problems are found.

use std::ops::RangeInclusive;

use candle_core::DType;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The keys of one file, or of one object inside it.
pub(super) struct Keys {
    /// Told before the key in messages: empty, or the file or the object the keys belong to.
    place: String,
    values: Map<String, Value>,
    wrong: Vec<String>,
    unsupported: Vec<String>,
}

impl Keys {
    /// Parses `text`, which must be one JSON object.
    pub(super) fn parse(file: &str, text: &str) -> Result<Self> {
        let place = if file == "config.json" { String::new() } else { format!("{file} ") };
        match serde_json::from_str(text) {
            Ok(Value::Object(values)) => Ok(Self::of(place, values)),
            Ok(_) => Err(Error::Checkpoint(format!("{file} is not a JSON object"))),
            Err(error) => Err(Error::Checkpoint(format!("{file} is not valid JSON: {error}"))),
        }
    }

    fn of(place: String, values: Map<String, Value>) -> Self {
        Self { place, values, wrong: Vec::new(), unsupported: Vec::new() }
    }

    /// Records that the value of `key` cannot be right.
    pub(super) fn wrong(&mut self, key: &str, what: impl AsRef<str>) {
        self.wrong.push(format!("{}{key} {}", self.place, what.as_ref()));
    }

    /// Records a sound description of something this program does not run.
    pub(super) fn unsupported(&mut self, what: String) {
        self.unsupported.push(what);
    }

    /// Takes over the problems of another object.
    pub(super) fn join(&mut self, other: Self) {
        self.wrong.extend(other.wrong);
        self.unsupported.extend(other.unsupported);
    }

    /// All problems in one error, if there are any.
    pub(super) fn finish(&self) -> Result<()> {
        let all = [&self.wrong[..], &self.unsupported[..]].concat().join("; ");
        match (self.wrong.is_empty(), self.unsupported.is_empty()) {
            (true, true) => Ok(()),
            (true, false) => Err(Error::Unsupported(all)),
            (false, _) => Err(Error::Checkpoint(format!("config.json: {all}"))),
        }
    }

    /// Whether `key` is there with a value other than null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    /// A count from 1 to `most` that must be there; 0 stands in for what is not.
    pub(super) fn size(&mut self, key: &str, most: usize) -> usize {
        let Some(value) = self.get(key) else {
            self.wrong(key, "is missing");
            return 0;
        };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (1..=most).contains(&n) => n,
            _ => {
                let what = match most {
                    usize::MAX => format!("must be a whole number above 0, not {}", shown(value)),
                    _ => format!("must be a whole number from 1 to {most}, not {}", shown(value)),
                };
                self.wrong(key, what);
                0
            }
        }
    }

    /// As [`Keys::size`], but `default` if the key is absent or null.
    pub(super) fn size_or(&mut self, key: &str, most: usize, default: usize) -> usize {
        if self.has(key) { self.size(key, most) } else { default }
    }

    /// A finite number within `range`; nothing if it is absent, null or wrong.
    pub(super) fn real(&mut self, key: &str, range: RangeInclusive<f64>) -> Option<f64> {
        let value = self.get(key)?;
        let number = value.as_f64().filter(|number| range.contains(number));
        if number.is_none() {
            let (least, most) = (range.start(), range.end());
            self.wrong(key, format!("must be a number from {least:e} to {most:e}, not {}", shown(value)));
        }
        number
    }

    /// true, false or `default`.
    pub(super) fn flag(&mut self, key: &str, default: bool) -> bool {
        match self.get(key) {
            None => default,
            Some(Value::Bool(flag)) => *flag,
            Some(value) => {
                let what = format!("must be true or false, not {}", shown(value));
                self.wrong(key, what);
                default
            }
        }
    }

    /// A string; nothing if it is absent, null or wrong.
    pub(super) fn text(&mut self, key: &str) -> Option<String> {
        match self.get(key)? {
            Value::String(text) => Some(text.clone()),
            value => {
                let what = format!("must be a string, not {}", shown(value));
                self.wrong(key, what);
                None
            }
        }
    }

    /// An object inside this one; nothing if it is absent, null or wrong.
    pub(super) fn nested(&mut self, key: &str) -> Option<Self> {
        match self.get(key)? {
            Value::Object(values) => Some(Self::of(format!("{}{key}.", self.place), values.clone())),
            value => {
                let what = format!("must be an object, not {}", shown(value));
                self.wrong(key, what);
                None
            }
        }
    }

    /// One token id, a list of them, or none. Ids must be below `vocab`, unless that is 0 for unknown.
    pub(super) fn token_ids(&mut self, key: &str, vocab: usize, most: usize) -> Vec<u32> {
        let values = match self.get(key) {
            None => return Vec::new(),
            Some(Value::Array(values)) => values.clone(),
            Some(value) => vec![value.clone()],
        };
        let vocab = if vocab == 0 { usize::MAX } else { vocab };
        let id =
            |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|&id| (id as usize) < vocab);
        let ids: Option<Vec<u32>> = values.iter().map(id).collect();
        match ids {
            Some(ids) if ids.len() <= most => ids,
            Some(ids) => {
                self.wrong(key, format!("lists {} ids, at most {most} are accepted", ids.len()));
                Vec::new()
            }
            None => {
                let what = format!("must hold token ids below vocab_size, not {}", shown(&Value::Array(values)));
                self.wrong(key, what);
                Vec::new()
            }
        }
    }

    /// First entry of `architectures`.
    pub(super) fn architecture_class(&self) -> Option<String> {
        Some(self.get("architectures")?.as_array()?.first()?.as_str()?.to_owned())
    }

    /// Outputs of a classifier; transformers writes neither key for its default of two.
    pub(super) fn label_count(&mut self) -> usize {
        let listed = self.get("id2label").and_then(Value::as_object).map_or(2, Map::len);
        self.size_or("num_labels", usize::MAX, listed)
    }

    /// `dtype` or, in older files, `torch_dtype`.
    pub(super) fn dtype(&mut self) -> Option<DType> {
        let key = if self.has("dtype") { "dtype" } else { "torch_dtype" };
        match self.text(key)?.as_str() {
            "float32" => Some(DType::F32),
            "float16" => Some(DType::F16),
            "bfloat16" => Some(DType::BF16),
            "auto" => None,
            other => {
                let what = format!("{key} {} is not supported (supported: float32, float16, bfloat16)", cut(other));
                self.unsupported(what);
                None
            }
        }
    }
}

/// A value as it may stand in a message: never long.
fn shown(value: &Value) -> String {
    cut(&value.to_string())
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}
