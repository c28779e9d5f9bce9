//! Order in the house: layers, file length, words that belong elsewhere, settings, documentation, fixtures.
//! Reads files only; what it compares is listed here and nowhere else.

mod documents;
mod layers;
mod recipes;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

const LINES_MAX: usize = 600;

/// The repository.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Text of a file of the repository.
fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Files under `folder` whose name ends with one of `endings`, relative to the repository, in order.
fn files(folder: &str, endings: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_string();
            let foreign = [".cargo", ".cuda", ".git", "target", "__pycache__"].contains(&name.as_str())
                || name.starts_with(".venv");
            if foreign || path.is_symlink() {
                continue;
            } else if path.is_dir() {
                folders.push(path);
            } else if endings.is_empty() || endings.iter().any(|ending| name.ends_with(ending)) {
                found.push(path.strip_prefix(root()).unwrap().to_str().unwrap().to_string());
            }
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<String> {
    ["src", "tests", "benches"].iter().flat_map(|folder| files(folder, &[".rs"])).collect()
}

/// Fails with all problems at once.
#[track_caller]
fn none(problems: Vec<String>) {
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
}

#[test]
fn no_file_is_too_long() {
    let files =
        ["src", "tests", "benches", "kernels"].iter().flat_map(|folder| files(folder, &[".rs", ".cu", ".cuh", ".py"]));
    let lengths = files.map(|path| (read(&path).lines().count(), path));
    none(
        lengths.filter(|(count, _)| *count > LINES_MAX).map(|(count, path)| format!("{path}: {count} lines")).collect(),
    );
}

#[test]
fn every_source_says_what_it_owns() {
    let opening = |path: &String| read(path).lines().take_while(|line| line.starts_with("//!")).count();
    let problems = sources().into_iter().filter(|path| !(1..=8).contains(&opening(path)));
    none(problems.map(|path| format!("{path} does not open with a few lines of //!")).collect());
}

#[test]
fn every_test_runs() {
    let attribute = concat!("#[", "ignore");
    let hits = sources().into_iter().filter(|path| read(path).contains(attribute));
    none(hits.map(|path| format!("{path} has a test that does not run")).collect());
}

#[test]
fn tests_do_not_wait_for_time_to_pass() {
    let calls = [concat!("thread::", "sleep("), concat!("time::", "sleep(")];
    let hits = files("tests", &[".rs"]).into_iter().filter(|path| calls.iter().any(|call| read(path).contains(call)));
    none(hits.map(|path| format!("{path} sleeps")).collect());
}

#[test]
fn devices_are_named_in_their_places_only() {
    let word = concat!("cu", "da");
    let allowed = |path: &str| path.starts_with("src/ops/") || path == "src/device.rs";
    let hits =
        files("src", &[".rs"]).into_iter().filter(|path| !allowed(path) && read(path).to_lowercase().contains(word));
    none(hits.map(|path| format!("{path} names a device")).collect());
}

#[test]
fn nothing_points_out_of_the_repository() {
    let words = [concat!("/wo", "rk/"), concat!("../sha", "red")];
    let mut problems = Vec::new();
    for path in files(".", &[]) {
        let Ok(text) = fs::read_to_string(root().join(&path)) else { continue };
        problems
            .extend(words.iter().filter(|word| text.contains(**word)).map(|word| format!("{path} mentions {word}")));
    }
    none(problems);
}

/// `BLAKE3SUMS` lists the hash of every fixture and of the embedded models, so that no test can rewrite what it is compared with.
/// After a wanted change run `EURUS_UPDATE_FIXTURES=1 cargo test --test it tidy`.
#[test]
fn fixtures_are_the_committed_ones() {
    let manifest = "tests/fixtures/BLAKE3SUMS";
    let mut found = BTreeMap::new();
    for path in [files("tests/fixtures", &[]), files("models", &[])].concat() {
        if path != manifest {
            let hash = blake3::hash(&fs::read(root().join(&path)).unwrap());
            found.insert(path, hash.to_hex().to_string());
        }
    }
    if std::env::var_os("EURUS_UPDATE_FIXTURES").is_some() {
        let text: String = found.iter().map(|(path, hash)| format!("{hash}  {path}\n")).collect();
        fs::write(root().join(manifest), text).unwrap();
    }
    let text = read(manifest);
    let listed: BTreeMap<String, String> =
        text.lines().filter_map(|line| line.split_once("  ")).map(|(hash, path)| (path.into(), hash.into())).collect();
    let changed = listed.iter().filter(|(path, hash)| found.get(*path) != Some(*hash));
    let mut problems: Vec<String> = changed.map(|(path, _)| format!("{path} is missing or has changed")).collect();
    problems
        .extend(found.keys().filter(|path| !listed.contains_key(*path)).map(|path| format!("{path} is not listed")));
    none(problems);
}

#[test]
fn every_settings_file_loads_and_the_default_one_is_the_default() {
    use eurus::config::{Config, Overrides};
    let load = |path: &str| Config::from_sources(Some(&root().join(path)), [], &Overrides::default());
    let files = files("config", &[".toml"]);
    assert!(files.len() >= 2, "{files:?}");
    for path in files {
        load(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    }
    assert_eq!(load("config/default.toml").unwrap(), Config::default());
}

#[test]
fn the_default_settings_file_shows_every_key_in_its_section() {
    let defaults = serde_json::to_value(eurus::config::Config::default()).unwrap();
    let mut wanted = Vec::new();
    for (key, value) in defaults.as_object().unwrap() {
        match value.as_object() {
            Some(section) => wanted.extend(section.keys().map(|name| format!("{key}.{name}"))),
            None => wanted.push(key.clone()),
        }
    }
    let (mut section, mut shown) = (String::new(), Vec::new());
    for line in read("config/default.toml").lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = format!("{}.", name.trim_end_matches(']'));
        } else if let Some((key, _)) = line.trim_start_matches("# ").split_once(" = ")
            && key.chars().all(|c| c.is_ascii_lowercase() || c == '_')
        {
            shown.push(format!("{section}{key}"));
        }
    }
    wanted.sort();
    shown.sort();
    assert_eq!(shown, wanted);
}

#[test]
fn scripts_can_be_run() {
    use std::os::unix::fs::PermissionsExt;
    let scripts: Vec<PathBuf> =
        files("examples", &[".sh"]).into_iter().chain(files(".ci", &[])).map(|path| root().join(path)).collect();
    assert!(scripts.len() >= 5, "{scripts:?}");
    for path in scripts {
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains("\nset -euo pipefail\n"), "{} goes on after a failure", path.display());
        assert_ne!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o111,
            0,
            "{} is not executable",
            path.display()
        );
    }
}
