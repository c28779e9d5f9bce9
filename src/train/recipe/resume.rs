//! Whether a run may go on from what another recipe began: the keys in which the two differ.

use std::collections::BTreeMap;

use serde_json::Value;

use super::Recipe;

/// Keys that leave weights, order and losses as they are, so that a run may go on with other values.
const FREE: &[&str] = &[
    "run.output",
    "run.eval_every",
    "run.save_every",
    "run.keep",
    "run.log_every",
    "run.recompute",
    "run.threads",
    "run.save_dtype",
    "run.max_shard_bytes",
    "run.bad_steps_max",
];

/// A key that has another value than before. A key that is absent has none.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// Dotted; entries of lists are counted from 0.
    pub key: String,
    /// As JSON.
    pub before: Option<String>,
    /// As JSON.
    pub now: Option<String>,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = |value: &Option<String>| value.clone().unwrap_or_else(|| "not set".into());
        write!(f, "{}: {} before, {} now", self.key, shown(&self.before), shown(&self.now))
    }
}

impl Recipe {
    /// Every key whose value would change the weights that come out, in order.
    pub fn differences(&self, before: &Self) -> Vec<Difference> {
        let (mut now, mut old) = (BTreeMap::new(), BTreeMap::new());
        flatten("", &serde_json::to_value(self).unwrap_or_default(), &mut now);
        flatten("", &serde_json::to_value(before).unwrap_or_default(), &mut old);
        let keys: std::collections::BTreeSet<&String> = now.keys().chain(old.keys()).collect();
        let changed = keys.into_iter().filter(|key| now.get(*key) != old.get(*key));
        let told = changed.filter(|key| !FREE.contains(&key.as_str()));
        told.map(|key| Difference { key: key.clone(), before: old.get(key).cloned(), now: now.get(key).cloned() })
            .collect()
    }
}

/// Every scalar of `value` by its dotted key. What is null is absent.
fn flatten(key: &str, value: &Value, into: &mut BTreeMap<String, String>) {
    let inner = |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
    match value {
        Value::Null => {}
        Value::Object(table) => table.iter().for_each(|(name, value)| flatten(&inner(name), value, into)),
        Value::Array(entries) => {
            entries.iter().enumerate().for_each(|(index, value)| flatten(&inner(&index.to_string()), value, into));
        }
        scalar => {
            into.insert(key.to_owned(), scalar.to_string());
        }
    }
}
