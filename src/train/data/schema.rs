//! What a row means: its keys tell the schema, its values become messages, an answer or a pair. Says what it expected
//! where a row is not so.

use serde_json::{Map, Value};

use super::recipe::Schema;
use crate::text::chat::Message;

/// What a row says, whatever its schema.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Row {
    /// `parent_id`: rows of one instruction share it.
    pub(super) parent: Option<String>,
    /// What is to be learnt.
    pub(super) content: Content,
}

/// What is to be learnt from a row.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Content {
    /// All turns of the assistant.
    Conversation(Vec<Message>),
    /// One answer, perhaps with a label.
    Answer { prompt: Vec<Message>, answer: String, desirable: Option<bool> },
    /// The better and the worse of two answers.
    Pair { prompt: Vec<Message>, chosen: String, rejected: String, margin: Option<f32>, turn: Option<Turn> },
}

/// Which turn of a tree a pair of actions is; known for UltraInteract only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Turn(pub(super) u32);

impl Row {
    /// The conversation before the answer; all of it where there is no single answer.
    pub(super) fn prompt(&self) -> &[Message] {
        match &self.content {
            Content::Conversation(messages) => messages,
            Content::Answer { prompt, .. } | Content::Pair { prompt, .. } => prompt,
        }
    }

    /// What the user asks first.
    pub(super) fn instruction(&self) -> &str {
        let messages = self.prompt();
        let asked = messages.iter().find(|message| message.role == "user").or(messages.first());
        asked.map_or("", |message| message.content.as_str())
    }
}

/// The row that `value` spells, by `schema` or else by its keys.
pub(super) fn parse(value: &Value, schema: Option<Schema>) -> Result<Row, String> {
    let Value::Object(object) = value else {
        return Err(format!("expected a JSON object, found {}", kind(Some(value))));
    };
    let row = Keys(object);
    let schema = schema.map_or_else(|| detect(&row), Ok)?;
    let content = match schema {
        Schema::UltraInteractSft => ultra_interact_sft(&row),
        Schema::UltraInteractPair => ultra_interact_pair(&row),
        Schema::Messages => conversation(&row),
        Schema::PromptCompletion => answer(&row, None),
        Schema::Unpaired => row.bool("label").and_then(|label| answer(&row, Some(label))),
        Schema::Preference => preference(&row),
    };
    let content = content.map_err(|message| format!("{message} ({})", schema.name()))?;
    Ok(Row { parent: row.optional_text("parent_id")?, content })
}

/// Two schemas with the same keys do not exist; of keys that are there besides, the more telling ones win.
fn detect(row: &Keys<'_>) -> Result<Schema, String> {
    let rules: [(&[&str], Schema); 7] = [
        (&["trajectory", "chosen", "rejected"], Schema::UltraInteractPair),
        (&["chosen", "rejected"], Schema::Preference),
        (&["prompt", "completion", "label"], Schema::Unpaired),
        (&["prompt", "completion"], Schema::PromptCompletion),
        (&["instruction", "response"], Schema::UltraInteractSft),
        (&["messages"], Schema::Messages),
        (&["conversations"], Schema::Messages),
    ];
    let found = rules.iter().find(|(keys, _)| keys.iter().all(|key| row.get(key).is_some()));
    found.map(|(_, schema)| *schema).ok_or_else(|| {
        let keys: Vec<&str> = row.0.keys().map(String::as_str).collect();
        format!(
            "expected instruction and response, trajectory with chosen and rejected, messages, prompt and completion, \
             or chosen and rejected; found the keys {}",
            keys.join(", ")
        )
    })
}

fn ultra_interact_sft(row: &Keys<'_>) -> Result<Content, String> {
    let prompt = vec![Message::new("user", row.text("instruction")?)];
    Ok(Content::Answer { prompt, answer: row.text("response")?.to_owned(), desirable: None })
}

fn ultra_interact_pair(row: &Keys<'_>) -> Result<Content, String> {
    let prompt = messages("trajectory", row.get("trajectory"))?;
    let alternates = prompt.iter().enumerate().all(|(index, message)| message.role == ["user", "assistant"][index % 2]);
    if !alternates || prompt.len() % 2 == 0 {
        return Err("expected \"trajectory\" to alternate between user and assistant, user first and last".to_owned());
    }
    let (chosen, rejected) = (row.text("chosen")?.to_owned(), row.text("rejected")?.to_owned());
    // The id is <hash>_<depth of the tree>_<turn>; without one, the turn is how many actions come before.
    let id = row.optional_text("id")?;
    let turn = id.and_then(|id| id.rsplit_once('_')?.1.parse().ok()).unwrap_or((prompt.len() / 2) as u32);
    Ok(Content::Pair { prompt, chosen, rejected, margin: row.margin()?, turn: Some(Turn(turn)) })
}

fn conversation(row: &Keys<'_>) -> Result<Content, String> {
    let key = if row.get("messages").is_some() { "messages" } else { "conversations" };
    let messages = messages(key, row.get(key))?;
    if !messages.iter().any(|message| message.role == "assistant") {
        return Err(format!("expected a message of the assistant in {key:?}"));
    }
    Ok(Content::Conversation(messages))
}

fn answer(row: &Keys<'_>, desirable: Option<bool>) -> Result<Content, String> {
    let mut prompt = prompt(row)?;
    let answer = completion("completion", row.get("completion"), &mut prompt)?;
    Ok(Content::Answer { prompt, answer, desirable })
}

fn preference(row: &Keys<'_>) -> Result<Content, String> {
    let margin = row.margin()?;
    // Where both are whole conversations they hold the prompt, whatever else the row has (as UltraFeedback's rows do).
    let whole = |key: &str| matches!(row.get(key), Some(Value::Array(turns)) if turns.len() > 1);
    if row.get("prompt").is_none() || (whole("chosen") && whole("rejected") && begins_with_prompt(row)) {
        let mut chosen = messages("chosen", row.get("chosen"))?;
        let mut rejected = messages("rejected", row.get("rejected"))?;
        let (better, worse) = (last_answer("chosen", &mut chosen)?, last_answer("rejected", &mut rejected)?);
        if chosen != rejected {
            return Err("expected \"chosen\" and \"rejected\" to be alike up to their last message".to_owned());
        }
        if chosen.is_empty() {
            return Err("expected a prompt before the last message of \"chosen\" and \"rejected\"".to_owned());
        }
        return Ok(Content::Pair { prompt: chosen, chosen: better, rejected: worse, margin, turn: None });
    }
    let (mut prompt, mut other) = (prompt(row)?, prompt(row)?);
    let chosen = completion("chosen", row.get("chosen"), &mut prompt)?;
    let rejected = completion("rejected", row.get("rejected"), &mut other)?;
    if prompt != other {
        return Err("expected \"chosen\" and \"rejected\" to be alike up to their last message".to_owned());
    }
    Ok(Content::Pair { prompt, chosen, rejected, margin, turn: None })
}

fn begins_with_prompt(row: &Keys<'_>) -> bool {
    let first = row.get("chosen").and_then(|turns| turns.get(0));
    let role = first.and_then(|turn| turn.get("role").or_else(|| turn.get("from"))).and_then(Value::as_str);
    role.is_some_and(|role| role_name(role) != "assistant")
}

/// `prompt`: messages, or a text that the user says.
fn prompt(row: &Keys<'_>) -> Result<Vec<Message>, String> {
    match row.get("prompt") {
        Some(Value::String(text)) => Ok(vec![Message::new("user", text.as_str())]),
        Some(turns @ Value::Array(_)) => messages("prompt", Some(turns)),
        other => Err(format!("expected \"prompt\" to be a text or messages, found {}", kind(other))),
    }
}

/// A text, or messages of which all but the last join the prompt.
fn completion(key: &str, value: Option<&Value>, prompt: &mut Vec<Message>) -> Result<String, String> {
    match value {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(turns @ Value::Array(_)) => {
            let mut turns = messages(key, Some(turns))?;
            let answer = last_answer(key, &mut turns)?;
            prompt.append(&mut turns);
            Ok(answer)
        }
        other => Err(format!("expected {key:?} to be a text or messages, found {}", kind(other))),
    }
}

fn last_answer(key: &str, messages: &mut Vec<Message>) -> Result<String, String> {
    match messages.pop() {
        Some(last) if last.role == "assistant" => Ok(last.content),
        _ => Err(format!("expected {key:?} to end with a message of the assistant")),
    }
}

fn messages(key: &str, value: Option<&Value>) -> Result<Vec<Message>, String> {
    let turns = match value {
        Some(Value::Array(turns)) if !turns.is_empty() => turns,
        other => return Err(format!("expected {key:?} to be a list of messages, found {}", kind(other))),
    };
    let mut messages = Vec::with_capacity(turns.len());
    for (index, turn) in turns.iter().enumerate() {
        let text = |name: &str, other: &str| match turn.get(name).or_else(|| turn.get(other)) {
            Some(Value::String(text)) => Ok(text.as_str()),
            found => {
                Err(format!("expected {key}[{index}] to have a text {name:?} (or {other:?}), found {}", kind(found)))
            }
        };
        messages.push(Message::new(role_name(text("role", "from")?), text("content", "value")?));
    }
    Ok(messages)
}

/// ShareGPT's names for roles are those of chat templates.
fn role_name(role: &str) -> &str {
    match role {
        "human" => "user",
        "gpt" => "assistant",
        other => other,
    }
}

/// The keys of a row; one with the value null is not there.
struct Keys<'a>(&'a Map<String, Value>);

impl<'a> Keys<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn text(&self, key: &str) -> Result<&'a str, String> {
        match self.get(key) {
            Some(Value::String(text)) => Ok(text),
            other => Err(format!("expected {key:?} to be a text, found {}", kind(other))),
        }
    }

    fn optional_text(&self, key: &str) -> Result<Option<String>, String> {
        match self.get(key) {
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(Value::Number(number)) => Ok(Some(number.to_string())),
            None => Ok(None),
            other => Err(format!("expected {key:?} to be a text, found {}", kind(other))),
        }
    }

    fn bool(&self, key: &str) -> Result<bool, String> {
        match self.get(key) {
            Some(Value::Bool(value)) => Ok(*value),
            other => Err(format!("expected {key:?} to be true or false, found {}", kind(other))),
        }
    }

    fn margin(&self) -> Result<Option<f32>, String> {
        match self.get("margin") {
            None => Ok(None),
            Some(value) => match value.as_f64().map(|number| number as f32).filter(|number| number.is_finite()) {
                Some(number) => Ok(Some(number)),
                None => Err(format!("expected \"margin\" to be a number, found {}", kind(Some(value)))),
            },
        }
    }
}

fn kind(value: Option<&Value>) -> &'static str {
    match value {
        None | Some(Value::Null) => "nothing",
        Some(Value::Bool(_)) => "true or false",
        Some(Value::Number(_)) => "a number",
        Some(Value::String(_)) => "a text",
        Some(Value::Array(items)) if items.is_empty() => "an empty list",
        Some(Value::Array(_)) => "a list",
        Some(Value::Object(_)) => "an object",
    }
}
