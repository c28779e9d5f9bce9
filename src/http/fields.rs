//! Fields of other servers' requests that we know but do not act on, in one list.
//! Fields that we act on are the wire types' own; every other field is refused by name.

use serde_json::{Value, json};

/// What to do with a field that is no field of the request's own type.
#[derive(Debug, Clone, Copy)]
pub enum Rule {
    /// It does not change the result: any value is accepted and ignored.
    Ignored,
    /// It would change the result: only values that leave the result alone are accepted.
    Neutral(IsNeutral),
}

/// Accepted and ignored: they address, bill, trace, schedule or tune, and leave the answer as it is.
pub const IGNORED: &[&str] = &[
    "user",
    "priority",
    "service_tier",
    "store",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "cache_salt",
    "request_id",
    "rid",
    "session_id",
    "parallel_tool_calls",
    "spaces_between_special_tokens",
    "padding",
    "prompts",
    "labels",
];

type IsNeutral = fn(&Value) -> bool;

/// Accepted with a neutral value only. `null` is always neutral.
const NEUTRAL: &[(&str, IsNeutral)] = &[
    ("tools", empty),
    ("functions", empty),
    ("tool_choice", |value| value == "none" || value == "auto"),
    ("function_call", |value| value == "none" || value == "auto"),
    ("response_format", |value| *value == json!({"type": "text"})),
    ("modalities", |value| *value == json!(["text"])),
    ("suffix", |value| value == ""),
    ("echo", is_false),
    ("use_beam_search", is_false),
    ("return_tokens_as_token_ids", is_false),
    ("return_hidden_states", is_false),
    ("add_special_tokens", is_false),
    ("skip_special_tokens", is_true),
    ("detokenize", is_true),
    ("allowed_token_ids", empty),
    ("bad_words", empty),
    ("length_penalty", is_one),
    ("typical_p", is_one),
    ("truncate_prompt_tokens", |value| *value == json!(-1)),
    ("softmax", is_false),
    ("normalize", is_false),
    ("raw_scores", is_true),
    ("encoding_format", |value| value == "float"),
];

/// The rule for a field that the request's own type does not have.
pub fn rule(field: &str) -> Option<Rule> {
    if IGNORED.contains(&field) {
        return Some(Rule::Ignored);
    }
    NEUTRAL.iter().find(|(name, _)| *name == field).map(|(_, is_neutral)| Rule::Neutral(*is_neutral))
}

fn empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}

fn is_false(value: &Value) -> bool {
    *value == Value::Bool(false)
}

fn is_true(value: &Value) -> bool {
    *value == Value::Bool(true)
}

fn is_one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn no_field_has_two_rules() {
        let mut names: Vec<&str> = IGNORED.iter().copied().chain(NEUTRAL.iter().map(|(name, _)| *name)).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn only_neutral_values_pass() {
        let neutral = |field, value: Value| match rule(field) {
            Some(Rule::Neutral(is_neutral)) => is_neutral(&value),
            other => panic!("{other:?}"),
        };
        assert!(neutral("tools", json!([])) && !neutral("tools", json!([1])) && !neutral("tools", json!({})));
        assert!(neutral("response_format", json!({"type": "text"})));
        assert!(!neutral("response_format", json!({"type": "json_object"})));
        assert!(neutral("echo", json!(false)) && !neutral("echo", json!(true)));
        assert!(rule("nonsense").is_none());
    }
}
