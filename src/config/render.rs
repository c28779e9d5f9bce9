//! Settings and recipes as a TOML text: what `eurus check` and `--print-config` show and what can be read again.

use serde::Serialize;
use serde_json::{Map, Value};

/// Keys without a value are shown as comments, API keys as `(hidden)`.
pub(crate) fn to_toml(settings: &impl Serialize) -> String {
    match serde_json::to_value(settings) {
        Ok(Value::Object(root)) => value_to_toml(&root),
        _ => String::new(),
    }
}

/// [`to_toml`] of a value that has been read already.
pub(crate) fn value_to_toml(root: &Map<String, Value>) -> String {
    let mut text = String::new();
    table(&mut text, "", root);
    text
}

/// Scalars before tables, because a TOML key belongs to the last table above it.
fn table(text: &mut String, path: &str, values: &Map<String, Value>) {
    let (tables, keys): (Vec<_>, Vec<_>) = values.iter().partition(|(_, value)| is_table(value));
    text.extend(keys.into_iter().map(|(key, value)| line(key, value)));
    for (name, value) in tables {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        match value {
            Value::Array(entries) => {
                for entry in entries.iter().filter_map(Value::as_object) {
                    text.push_str(&format!("\n[[{path}]]\n"));
                    table(text, &path, entry);
                }
            }
            value => {
                text.push_str(&format!("\n[{path}]\n"));
                table(text, &path, value.as_object().unwrap_or(&Map::new()));
            }
        }
    }
}

fn is_table(value: &Value) -> bool {
    match value {
        Value::Object(_) => true,
        Value::Array(entries) => !entries.is_empty() && entries.iter().all(Value::is_object),
        _ => false,
    }
}

fn line(key: &str, value: &Value) -> String {
    // A JSON string, number, boolean or flat array of these is the same text in TOML, but for the character DEL.
    match value {
        Value::Null => format!("# {key} is not set\n"),
        value => format!("{key} = {}\n", value.to_string().replace('\u{7f}', "\\u007f")),
    }
}
