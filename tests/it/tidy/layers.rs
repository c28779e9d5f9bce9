//! Who may use whom: the table of ARCHITECTURE.md, enforced on the paths that the sources name.
//! Test modules are exempt: they may set up more than they test.

use std::collections::BTreeSet;

use regex::Regex;

use super::{files, none, read};

/// A module, the modules it may use besides itself, and the crates it must not use.
struct Layer {
    name: &'static str,
    uses: &'static [&'static str],
    without: &'static [&'static str],
}

const fn layer(name: &'static str, uses: &'static [&'static str], without: &'static [&'static str]) -> Layer {
    Layer { name, uses, without }
}

const WEB: &[&str] = &["axum", "hyper", "tower", "tower_http", "reqwest", "utoipa"];
const CANDLE: &[&str] = &["candle_core", "candle_nn", "candle_transformers"];
const NO_TENSORS: &[&str] = &["candle_core", "candle_nn", "candle_transformers", "safetensors", "half", "hf_hub"];
const NO_TENSORS_NO_WEB: &[&str] =
    &["candle_core", "candle_nn", "safetensors", "half", "hf_hub", "axum", "hyper", "tower", "reqwest", "utoipa"];
const PURE: &[&str] = &[
    "candle_core",
    "candle_nn",
    "safetensors",
    "half",
    "hf_hub",
    "axum",
    "hyper",
    "tower",
    "reqwest",
    "tokenizers",
    "minijinja",
];
const NO_TENSORS_NO_TEXT: &[&str] =
    &["candle_core", "candle_nn", "safetensors", "half", "hf_hub", "tokenizers", "minijinja"];
const NO_WEB_NO_TEXT: &[&str] = &["axum", "hyper", "tower", "reqwest", "utoipa", "tokenizers", "minijinja"];

/// Modules that may use everything: they compose.
const TOP: &[&str] = &["cli", "serve", "bench", "main", "lib"];

const LAYERS: &[Layer] = &[
    layer("error", &[], PURE),
    layer("config", &["device", "error"], PURE),
    layer("metrics", &["error"], PURE),
    layer("device", &["ops", "error"], WEB),
    layer("ops", &["error"], NO_WEB_NO_TEXT),
    layer("model", &["ops", "error"], NO_WEB_NO_TEXT),
    layer("checkpoint", &["model", "text", "error"], NO_WEB_NO_TEXT),
    layer("engine", &["error", "metrics"], PURE),
    layer("runner", &["engine", "model", "ops", "error"], NO_WEB_NO_TEXT),
    layer("text", &["error"], NO_TENSORS_NO_WEB),
    layer("service", &["engine", "text", "error", "metrics"], NO_TENSORS_NO_WEB),
    layer("train", &["model", "ops", "text", "checkpoint", "device", "error", "config"], WEB),
    layer("http", &["service", "error", "metrics", "config"], NO_TENSORS_NO_TEXT),
];

/// The module that a source belongs to, and whether `super` means the crate in it.
fn module(path: &str) -> (String, bool) {
    let inner = path.strip_prefix("src/").unwrap();
    match inner.split_once('/') {
        Some((folder, rest)) => (folder.to_string(), rest == "mod.rs"),
        None => (inner.trim_end_matches(".rs").to_string(), true),
    }
}

/// `text` without comments and without what follows `#[cfg(test)] mod`: test modules stand at the end of a file.
fn code(text: &str) -> String {
    let body = match Regex::new(r"(?m)^#\[cfg\(test\)\]\n(#\[.*\]\n)*mod \w+ \{").unwrap().find(text) {
        Some(tests) => &text[..tests.start()],
        None => text,
    };
    body.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

/// Modules that are compiled for tests only: `#[cfg(test)] mod name;` in the file of their parent.
fn test_files() -> BTreeSet<String> {
    let declaration = Regex::new(r"(?m)^#\[cfg\(test\)\]\n(?:#\[.*\]\n)*(?:pub(?:\(\w+\))? )?mod (\w+);").unwrap();
    let mut found = BTreeSet::new();
    for path in files("src", &[".rs"]) {
        let folder = match path.strip_suffix("/mod.rs") {
            Some(folder) => folder.to_string(),
            None => path.trim_end_matches(".rs").to_string(),
        };
        let folder = if folder == "src/lib" { "src".to_string() } else { folder };
        for name in declaration.captures_iter(&read(&path)) {
            found.insert(format!("{folder}/{}.rs", &name[1]));
            found.insert(format!("{folder}/{}/mod.rs", &name[1]));
        }
    }
    found
}

/// First parts of the paths that begin with `start::`, groups in braces included.
fn used(code: &str, start: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let opening = Regex::new(&format!(r"\b{start}::(\w+|\{{)")).unwrap();
    for hit in opening.captures_iter(code) {
        if &hit[1] != "{" {
            found.insert(hit[1].to_string());
            continue;
        }
        let (mut depth, mut word) = (1, String::new());
        let mut fresh = true;
        for c in code[hit.get(0).unwrap().end()..].chars() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 1 && fresh && (c.is_alphanumeric() || c == '_') {
                word.push(c);
            } else if !word.is_empty() {
                found.insert(std::mem::take(&mut word));
                fresh = false;
            }
            if depth == 1 && c == ',' {
                fresh = true;
            }
            if depth == 0 {
                break;
            }
        }
    }
    found
}

#[test]
fn nobody_uses_a_layer_above() {
    let (mut problems, tests) = (Vec::new(), test_files());
    let known: BTreeSet<&str> = LAYERS.iter().map(|layer| layer.name).chain(TOP.iter().copied()).collect();
    for path in files("src", &[".rs"]) {
        let (name, at_top) = module(&path);
        if !known.contains(name.as_str()) {
            problems.push(format!("{path}: module {name} has no line in the table of layers"));
        }
        let Some(layer) = LAYERS.iter().find(|layer| layer.name == name) else { continue };
        if tests.contains(&path) {
            continue;
        }
        let code = code(&read(&path));
        let mut uses = used(&code, "crate");
        if at_top {
            uses.extend(used(&code, "super"));
        }
        uses.extend(used(&code, "eurus"));
        for other in uses.iter().filter(|other| known.contains(other.as_str()) && **other != name) {
            if !layer.uses.contains(&other.as_str()) {
                problems.push(format!("{path}: {name} must not use {other}"));
            }
        }
        for library in layer.without {
            if Regex::new(&format!(r"\b{library}(::|\b;| as )")).unwrap().is_match(&code) {
                problems.push(format!("{path}: {name} must not use the crate {library}"));
            }
        }
    }
    none(problems);
}

#[test]
fn the_table_of_the_architecture_names_every_layer() {
    let text = read("ARCHITECTURE.md");
    let rows: String = text.lines().filter(|line| line.starts_with("| ")).collect();
    for name in LAYERS.iter().map(|layer| layer.name).chain(["cli", "serve", "bench", "main"]) {
        assert!(Regex::new(&format!(r"\b{name}\b")).unwrap().is_match(&rows), "{name} is missing");
    }
}

#[test]
fn paths_are_found_however_they_are_written() {
    let code = "use crate::{a::{b, c}, d, e::f as g};\nlet x = crate::h::i();\nuse crate::j::{k};";
    let found: Vec<String> = used(code, "crate").into_iter().collect();
    assert_eq!(found, ["a", "d", "e", "h", "j"]);
    assert!(CANDLE.iter().all(|name| NO_TENSORS.contains(name)));
}
