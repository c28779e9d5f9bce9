//! Merges defaults, file, environment and flags, and words what is wrong with them.

use std::path::Path;

use figment::{
    Figment, Metadata, Profile, Provider,
    error::Kind,
    providers::{Format, Toml},
    value::{Dict, Map, Value},
};
use serde::de::DeserializeOwned;

use super::Config;
use crate::error::{Error, Result};

const PREFIX: &str = "EURUS_";
const COMMAND_LINE: &str = "the command line";
/// Read elsewhere: the settings file itself, log filters, what clients and examples need, switches of tests.
const OTHER_VARIABLES: &[&str] = &[
    "API_KEY",
    "CI_CLIENTS",
    "CLIENTS_VENV",
    "CONFIG",
    "LOG",
    "SERVE_FIXTURES",
    "SIMULATION_SEEDS",
    "UPDATE_DOCS",
    "UPDATE_FIXTURES",
    "URL",
];

/// Settings given on the command line, by dotted key.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    values: Dict,
}

impl Overrides {
    /// Sets `key` (such as `server.port`) where there is a value.
    pub fn set(&mut self, key: &str, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            insert(&mut self.values, key, value.into());
        }
    }

    /// Sets from text of the form `key=value`.
    ///
    /// # Errors
    /// [`Error::Invalid`] without an equals sign.
    pub fn set_text(&mut self, assignment: &str) -> Result<()> {
        let (key, value) = assignment
            .split_once('=')
            .ok_or_else(|| Error::invalid("--set", format!("`{assignment}` is not of the form key=value")))?;
        insert(&mut self.values, key.trim(), Value::from(value.trim()));
        Ok(())
    }
}

/// Defaults <- `file` <- `environment` <- `overrides`.
pub(super) fn merge(
    file: Option<&Path>,
    environment: impl IntoIterator<Item = (String, String)>,
    overrides: &Overrides,
) -> Result<Config> {
    let mut figment = Figment::new();
    if let Some(path) = file {
        figment = figment.merge(Layer::read(path)?);
    }
    let environment = Layer { name: "the environment".into(), values: variables(environment) };
    let flags = Layer { name: COMMAND_LINE.into(), values: overrides.values.clone() };
    // Lossy: the environment has only strings, so "8000" must do for a number.
    figment.merge(environment).merge(flags).extract_lossy().map_err(explain)
}

/// What the last of `layers` that says so says, for each key.
///
/// # Errors
/// [`Error::Invalid`] naming every unknown key and wrong type, and the layer it stands in.
pub(crate) fn extract<T: DeserializeOwned>(layers: impl IntoIterator<Item = Layer>) -> Result<T> {
    layers.into_iter().fold(Figment::new(), |figment, layer| figment.merge(layer)).extract().map_err(explain)
}

/// One source of settings under the name that error messages use.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    name: String,
    values: Dict,
}

impl Layer {
    /// What the file at `path` says, in TOML.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it cannot be read or is no TOML.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::invalid("--config", format!("{}: {error}", path.display())))?;
        Ok(Self { name: path.display().to_string(), values: parse_toml(path, &text)? })
    }

    /// A layer called `name` with these values by dotted key.
    pub(crate) fn of<V: Into<Value>>(name: &str, pairs: impl IntoIterator<Item = (&'static str, V)>) -> Self {
        let mut values = Dict::new();
        for (key, value) in pairs {
            insert(&mut values, key, value.into());
        }
        Self { name: name.to_owned(), values }
    }

    /// The command line's assignments `key=value` on top of `below`. A value is TOML; a bare word is a string. A number in a
    /// key counts the entries of a list of `below`: `data.source.0.path=x`.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the assignment that is not of this form.
    pub(crate) fn command_line(assignments: &[String], below: &Self) -> Result<Self> {
        let mut layer = Self { name: COMMAND_LINE.into(), values: Dict::new() };
        for assignment in assignments {
            let wrong = |what: &str| Error::invalid("--set", format!("--set {assignment}: {what}"));
            let (key, text) = assignment.split_once('=').ok_or_else(|| wrong("is not of the form key=value"))?;
            let value = toml_value(text.trim()).ok_or_else(|| wrong("the value is not TOML"))?;
            layer.assign(key.trim(), value, below).map_err(|what| wrong(&what))?;
        }
        Ok(layer)
    }

    /// What messages call it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The value at the dotted `key`.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        let (first, rest) = key.split_once('.').map_or((key, None), |(first, rest)| (first, Some(rest)));
        let value = self.values.get(first)?;
        rest.map_or(Some(value), |rest| value.find_ref(rest))
    }

    /// The keys of the table at `section`, in order; none where there is no table.
    pub(crate) fn keys(&self, section: &str) -> Vec<String> {
        self.get(section).and_then(Value::as_dict).into_iter().flatten().map(|(key, _)| key.clone()).collect()
    }

    /// Takes `key` out of the table at `section`.
    pub(crate) fn remove(&mut self, section: &str, key: &str) {
        if let Some(Value::Dict(_, table)) = self.values.get_mut(section) {
            table.remove(key);
        }
    }

    fn assign(&mut self, key: &str, value: Value, below: &Self) -> std::result::Result<(), String> {
        let parts: Vec<&str> = key.split('.').collect();
        let Some(place) = parts.iter().position(|part| part.parse::<usize>().is_ok()) else {
            insert(&mut self.values, key, value);
            return Ok(());
        };
        let list = parts[..place].join(".");
        let known = self.get(&list).or_else(|| below.get(&list)).cloned();
        let Some(Value::Array(tag, mut entries)) = known else { return Err(format!("`{list}` is not a list")) };
        let count = entries.len();
        let entry = parts[place].parse().ok().and_then(|index: usize| entries.get_mut(index));
        let Some(entry) = entry else { return Err(format!("`{list}` has {count} entries, counted from 0")) };
        match (entry, parts.get(place + 1..).unwrap_or_default()) {
            (entry, []) => *entry = value,
            (Value::Dict(_, table), rest) => insert(table, &rest.join("."), value),
            _ => return Err(format!("the entries of `{list}` have no keys")),
        }
        insert(&mut self.values, &list, Value::Array(tag, entries));
        Ok(())
    }
}

/// `text` as a TOML value, or as a string where it is a bare word.
fn toml_value(text: &str) -> Option<Value> {
    let parsed = Toml::from_str::<Dict>(&format!("value = {text}")).ok().filter(|values| values.len() == 1);
    match parsed.and_then(|mut values| values.remove("value")) {
        Some(value) => Some(value),
        // What begins like a list, a table or a quotation was meant as one.
        None if text.starts_with(['[', '{', '"', '\'']) => None,
        None => Some(Value::from(text)),
    }
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.name.clone())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Profile::Default.collect(self.values.clone()))
    }
}

fn parse_toml(path: &Path, text: &str) -> Result<Dict> {
    Toml::from_str(text)
        .map_err(|error| Error::Invalid { message: format!("{}: {}", path.display(), error), field: None })
}

/// `EURUS_SERVER__PORT` becomes `server.port`.
fn variables(environment: impl IntoIterator<Item = (String, String)>) -> Dict {
    let mut values = Dict::new();
    for (name, value) in environment {
        let Some(name) = name.strip_prefix(PREFIX) else { continue };
        // Kubernetes sets the second group for a service called "eurus"; they are not meant for us.
        let foreign = name == "PORT" || name.starts_with("PORT_") || name.starts_with("SERVICE_");
        if !OTHER_VARIABLES.contains(&name) && !foreign && !value.is_empty() {
            insert(&mut values, &name.to_lowercase().replace("__", "."), Value::from(value));
        }
    }
    values
}

fn insert(values: &mut Dict, key: &str, value: Value) {
    match key.split_once('.') {
        None => {
            values.insert(key.to_string(), value);
        }
        Some((section, rest)) => {
            let entry = values.entry(section.to_string()).or_insert_with(|| Value::from(Dict::new()));
            if let Value::Dict(_, inner) = entry {
                insert(inner, rest, value);
            }
        }
    }
}

/// figment's problems as one message; an unknown key comes with the nearest known one.
fn explain(error: figment::Error) -> Error {
    let problems: Vec<String> = error.into_iter().map(|problem| explain_one(&problem)).collect();
    Error::Invalid { message: problems.join("; "), field: None }
}

fn explain_one(problem: &figment::Error) -> String {
    let place = problem.metadata.as_ref().map_or_else(String::new, |metadata| format!(" in {}", metadata.name));
    let key = problem.path.join(".");
    match &problem.kind {
        Kind::UnknownField(name, known) => {
            let section = match key.rsplit_once('.') {
                Some((section, last)) if last == name => format!("{section}."),
                None if &key == name => String::new(),
                _ if key.is_empty() => String::new(),
                _ => format!("{key}."),
            };
            let hint = match nearest(name, known) {
                Some(near) => format!("; did you mean `{section}{near}`?"),
                None => format!("; known are {}", known.join(", ")),
            };
            format!("unknown key `{section}{name}`{place}{hint}")
        }
        kind if key.is_empty() => format!("{kind}{place}"),
        kind => format!("`{key}`{place}: {kind}"),
    }
}

/// The known name with the smallest edit distance, if it is near enough to be a slip of the pen.
pub(crate) fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let distances = known.iter().map(|candidate| (edit_distance(name, candidate), *candidate));
    let (distance, candidate) = distances.min_by_key(|(distance, _)| *distance)?;
    (distance <= name.len().max(candidate.len()).div_ceil(2)).then_some(candidate)
}

/// Levenshtein's: insertions, deletions and replacements that turn `a` into `b`.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.chars().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.chars().count()]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn edit_distance_counts_edits() {
        for (a, b, distance) in [("", "", 0), ("", "abc", 3), ("port", "prot", 2), ("kitten", "sitting", 3)] {
            assert_eq!(edit_distance(a, b), distance, "{a} {b}");
            assert_eq!(edit_distance(b, a), distance, "{b} {a}");
        }
    }

    #[test]
    fn variables_nest_and_leave_foreign_ones_alone() {
        let given = [
            ("EURUS_SERVER__PORT", "1"),
            ("EURUS_MODEL", "m"),
            ("EURUS_PORT", "tcp://10.0.0.1:8000"),
            ("EURUS_PORT_8000_TCP_ADDR", "10.0.0.1"),
            ("EURUS_SERVICE_HOST", "10.0.0.1"),
            ("EURUS_LOG", "debug"),
            ("EURUS_REWARD_MODEL", ""),
            ("PATH", "/bin"),
        ];
        let values = variables(given.map(|(name, value)| (name.to_string(), value.to_string())));
        assert_eq!(values.keys().collect::<Vec<_>>(), ["model", "server"]);
        let server = values["server"].as_dict().unwrap();
        assert_eq!(server["port"].as_str(), Some("1"));
    }
}
