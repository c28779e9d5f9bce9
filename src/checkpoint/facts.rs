//! What the files beside the tokenizer say about it: tokenizer_config.json, special_tokens_map.json and
//! chat_template.jinja. Texts only; which ids they are is the tokenizer's to know.

use serde_json::{Map, Value};

use super::folder::Folder;
use crate::error::{Error, Result};

pub(super) const CONFIG: &str = "tokenizer_config.json";
pub(super) const SPECIAL_MAP: &str = "special_tokens_map.json";
pub(super) const TEMPLATE: &str = "chat_template.jinja";

/// Facts about a tokenizer that its own file does not carry. What no file says is `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenizerFacts {
    /// Text of the token that opens a sequence.
    pub bos_token: Option<String>,
    /// Text of the token that ends one.
    pub eos_token: Option<String>,
    /// Text of the token for what cannot be expressed.
    pub unk_token: Option<String>,
    /// Text of the token that fills up batches.
    pub pad_token: Option<String>,
    /// Whether text is to begin with `bos_token`.
    pub add_bos_token: Option<bool>,
    /// Whether text is to end with `eos_token`.
    pub add_eos_token: Option<bool>,
    /// The chat template, in Jinja.
    pub chat_template: Option<String>,
}

impl TokenizerFacts {
    /// Reads the files of `folder`; each may be absent.
    pub(super) fn read(folder: &Folder) -> Result<Self> {
        let config = folder.text(CONFIG)?;
        let special = folder.text(SPECIAL_MAP)?;
        Self::parse(config.as_deref(), special.as_deref(), folder.text(TEMPLATE)?)
    }

    /// `config` is tokenizer_config.json and wins over `special`, special_tokens_map.json; `template` is
    /// chat_template.jinja and wins over the template in `config`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming the file and the key that is not of the expected kind.
    pub fn parse(config: Option<&str>, special: Option<&str>, template: Option<String>) -> Result<Self> {
        let config = object(CONFIG, config)?;
        let special = object(SPECIAL_MAP, special)?;
        let token = |key: &str| match token_text(CONFIG, &config, key)? {
            Some(text) => Ok(Some(text)),
            None => token_text(SPECIAL_MAP, &special, key),
        };
        let chat_template = match template {
            Some(template) => Some(template),
            None => chat_template(&config)?,
        };
        Ok(Self {
            bos_token: token("bos_token")?,
            eos_token: token("eos_token")?,
            unk_token: token("unk_token")?,
            pad_token: token("pad_token")?,
            add_bos_token: flag(&config, "add_bos_token")?,
            add_eos_token: flag(&config, "add_eos_token")?,
            chat_template,
        })
    }
}

impl TokenizerFacts {
    /// What these say, without the template, as tokenizer_config.json.
    pub(super) fn to_json(&self) -> String {
        let mut config = Map::from_iter([("tokenizer_class".to_owned(), "PreTrainedTokenizerFast".into())]);
        let tokens = [
            ("bos_token", &self.bos_token),
            ("eos_token", &self.eos_token),
            ("unk_token", &self.unk_token),
            ("pad_token", &self.pad_token),
        ];
        for (key, text) in tokens {
            config.extend(text.as_ref().map(|text| (key.to_owned(), Value::from(text.as_str()))));
        }
        for (key, flag) in [("add_bos_token", self.add_bos_token), ("add_eos_token", self.add_eos_token)] {
            config.extend(flag.map(|flag| (key.to_owned(), Value::from(flag))));
        }
        Value::Object(config).to_string()
    }
}

fn object(file: &str, text: Option<&str>) -> Result<Map<String, Value>> {
    serde_json::from_str(text.unwrap_or("{}")).map_err(|error| Error::Checkpoint(format!("{file}: {error}")))
}

fn wrong(file: &str, key: &str, expected: &str) -> Error {
    Error::Checkpoint(format!("{file}: {key} must be {expected}"))
}

/// `"<s>"`, `{"content": "<s>", ..}`, null or absent.
fn token_text(file: &str, values: &Map<String, Value>, key: &str) -> Result<Option<String>> {
    match values.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(Value::Object(token)) => match token.get("content") {
            Some(Value::String(text)) => Ok(Some(text.clone())),
            _ => Err(wrong(file, key, "a string or an object with a string \"content\"")),
        },
        Some(_) => Err(wrong(file, key, "a string or an object with a string \"content\"")),
    }
}

fn flag(values: &Map<String, Value>, key: &str) -> Result<Option<bool>> {
    match values.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(_) => Err(wrong(CONFIG, key, "true or false")),
    }
}

/// One template, or the one named "default" of several.
fn chat_template(values: &Map<String, Value>) -> Result<Option<String>> {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
    match values.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(template)) => Ok(Some(template.clone())),
        Some(Value::Array(templates)) => {
            let default = templates.iter().find(|template| text(template.get("name")).as_deref() == Some("default"));
            match default.map(|template| text(template.get("template"))) {
                Some(Some(template)) => Ok(Some(template)),
                Some(None) => Err(wrong(CONFIG, "chat_template", "a list of {name, template} texts")),
                None => Ok(None),
            }
        }
        Some(_) => Err(wrong(CONFIG, "chat_template", "a string or a list of {name, template}")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn facts(config: &str) -> TokenizerFacts {
        TokenizerFacts::parse(Some(config), None, None).unwrap()
    }

    #[test]
    fn tokens_are_strings_or_objects() {
        let facts =
            facts(r#"{"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "pad_token": null}"#);
        assert_eq!(facts.bos_token.as_deref(), Some("<s>"));
        assert_eq!(facts.eos_token.as_deref(), Some("</s>"));
        assert_eq!((facts.pad_token, facts.unk_token, facts.add_bos_token), (None, None, None));
    }

    #[test]
    fn the_special_map_fills_what_the_config_leaves_out() {
        let special = r#"{"bos_token": "<b>", "unk_token": {"content": "<unk>"}}"#;
        let config = r#"{"bos_token": "<s>", "add_bos_token": true, "add_eos_token": false}"#;
        let facts = TokenizerFacts::parse(Some(config), Some(special), None).unwrap();
        assert_eq!(facts.bos_token.as_deref(), Some("<s>"));
        assert_eq!(facts.unk_token.as_deref(), Some("<unk>"));
        assert_eq!((facts.add_bos_token, facts.add_eos_token), (Some(true), Some(false)));
    }

    #[test]
    fn the_template_file_wins_over_the_default_of_a_list() {
        let list = r#"{"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}"#;
        assert_eq!(facts(list).chat_template.as_deref(), Some("d"));
        assert_eq!(facts(r#"{"chat_template": "t"}"#).chat_template.as_deref(), Some("t"));
        assert_eq!(facts(r#"{"chat_template": [{"name": "rag", "template": "r"}]}"#).chat_template, None);
        let file = TokenizerFacts::parse(Some(list), None, Some("f".to_owned())).unwrap();
        assert_eq!(file.chat_template.as_deref(), Some("f"));
    }

    #[test]
    fn wrong_kinds_are_named() {
        for (config, key) in [
            (r#"{"bos_token": 1}"#, "bos_token"),
            (r#"{"eos_token": {"text": "x"}}"#, "eos_token"),
            (r#"{"add_bos_token": "yes"}"#, "add_bos_token"),
            (r#"{"chat_template": 7}"#, "chat_template"),
            (r#"{"chat_template": [{"name": "default"}]}"#, "chat_template"),
        ] {
            let message = TokenizerFacts::parse(Some(config), None, None).unwrap_err().to_string();
            assert!(message.starts_with(&format!("tokenizer_config.json: {key} must be")), "{message}");
        }
        assert!(TokenizerFacts::parse(Some("[]"), None, None).is_err());
        assert!(TokenizerFacts::parse(None, Some("nonsense"), None).is_err());
    }
}
