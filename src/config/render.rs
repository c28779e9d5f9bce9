//! Settings as a TOML text: what `eurus check` shows and what can be saved as `eurus.toml`.

use serde_json::Value;

use super::Config;

/// Keys without a value are shown as comments, API keys as `(hidden)`.
pub(super) fn to_toml(config: &Config) -> String {
    let Ok(Value::Object(root)) = serde_json::to_value(config) else { return String::new() };
    let (sections, keys): (Vec<_>, Vec<_>) = root.iter().partition(|(_, value)| value.is_object());
    let mut text: String = keys.into_iter().map(|(key, value)| line(key, value)).collect();
    for (name, section) in sections {
        text.push_str(&format!("\n[{name}]\n"));
        let keys = section.as_object().into_iter().flatten();
        text.extend(keys.map(|(key, value)| line(key, value)));
    }
    text
}

fn line(key: &str, value: &Value) -> String {
    // A JSON string, number, boolean or flat array of these is the same text in TOML.
    match value {
        Value::Null => format!("# {key} is not set\n"),
        value => format!("{key} = {value}\n"),
    }
}
