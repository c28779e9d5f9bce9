//! Which safetensors files make up one checkpoint: a single file, or the shards that an index names.
//! Shards are plain names inside the checkpoint's folder, each tensor is in one of them, and index and headers agree.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::Deserialize;

use super::folder::Folder;
use super::safetensors::TensorFile;
use super::tensor::{Take, TensorInfo};
use crate::error::{Error, Result};

/// The file of a checkpoint that has only one.
pub const SINGLE: &str = "model.safetensors";
/// Tells which shard holds which tensor.
pub const INDEX: &str = "model.safetensors.index.json";

/// Files of tensors with checked headers.
#[derive(Debug, Clone)]
pub(super) struct Shards {
    files: Vec<TensorFile>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Shards {
    /// Finds the files in `folder` and reads their headers. As transformers does, the single file is preferred.
    pub(super) fn open(folder: &Folder) -> Result<Self> {
        if let Some(path) = folder.find(SINGLE)? {
            return Self::of(vec![TensorFile::open(&path)?]);
        }
        let Some(index) = folder.text(INDEX)? else {
            return Err(Error::Checkpoint(format!("{folder}: no {SINGLE} and no {INDEX}{}", folder.pickle_hint())));
        };
        let names = shard_names(&index)?;
        let mut files = Vec::new();
        let mut missing = Vec::new();
        for name in &names {
            match folder.find(name)? {
                Some(path) => files.push(TensorFile::open(&path)?),
                None => missing.push(name.as_str()),
            }
        }
        if !missing.is_empty() {
            return Err(Error::Checkpoint(format!("{folder}: {INDEX} names missing files: {}", missing.join(", "))));
        }
        let shards = Self::of(files)?;
        shards.agree_with(&parse_index(&index)?)?;
        Ok(shards)
    }

    /// The given files, whose tensors must not repeat.
    pub(super) fn of(files: Vec<TensorFile>) -> Result<Self> {
        let mut homes: HashMap<&str, &str> = HashMap::new();
        for file in &files {
            for info in &file.tensors {
                if let Some(other) = homes.insert(&info.name, &file.label) {
                    let what = format!("tensor {} is in {other} and in {}", info.name, file.label);
                    return Err(Error::Checkpoint(what));
                }
            }
        }
        Ok(Self { files })
    }

    fn agree_with(&self, index: &Index) -> Result<()> {
        let mut listed = index.weight_map.clone();
        for file in &self.files {
            for info in &file.tensors {
                let problem = match listed.remove(&info.name) {
                    Some(home) if home == file.label => continue,
                    Some(home) => format!("{INDEX} puts tensor {} into {home}, it is in {}", info.name, file.label),
                    None => format!("{INDEX} does not list tensor {} of {}", info.name, file.label),
                };
                return Err(Error::Checkpoint(problem));
            }
        }
        match listed.first_key_value() {
            Some((name, home)) => Err(Error::Checkpoint(format!("{INDEX} lists tensor {name}, which {home} lacks"))),
            None => Ok(()),
        }
    }

    /// All tensors, file by file.
    pub(super) fn infos(&self) -> impl Iterator<Item = &TensorInfo> {
        self.files.iter().flat_map(|file| &file.tensors)
    }

    /// Reads one tensor after the other, those whose names `wanted` accepts, and gives `take` its data. `on_bytes` hears of every
    /// portion read, in bytes.
    pub(super) fn visit(
        &self,
        wanted: &dyn Fn(&str) -> bool,
        on_bytes: &mut dyn FnMut(u64),
        take: &mut Take<'_>,
    ) -> Result<()> {
        self.files.iter().try_for_each(|file| file.visit(wanted, on_bytes, take))
    }
}

fn parse_index(text: &str) -> Result<Index> {
    serde_json::from_str(text).map_err(|error| Error::Checkpoint(format!("{INDEX}: {error}")))
}

/// The shards that an index names, each once and each a plain file name.
pub(super) fn shard_names(index: &str) -> Result<BTreeSet<String>> {
    let index = parse_index(index)?;
    for name in index.weight_map.values() {
        if !is_plain_name(name) {
            let what = format!("{INDEX} names the file {name:?}; a shard is a .safetensors file beside the index");
            return Err(Error::Checkpoint(what));
        }
    }
    Ok(index.weight_map.into_values().collect())
}

fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    name.len() <= 255 && name.ends_with(".safetensors") && !name.starts_with('.') && name.chars().all(plain)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn only_plain_names_are_shards() {
        let index = |name: &str| serde_json::json!({ "weight_map": { "a": name } }).to_string();
        let names = shard_names(&index("model-00001-of-00002.safetensors")).unwrap();
        assert_eq!(names.into_iter().collect::<Vec<_>>(), ["model-00001-of-00002.safetensors"]);
        for name in [
            "../../etc/passwd",
            "../x.safetensors",
            "/x.safetensors",
            "a/x.safetensors",
            "a\\x.safetensors",
            ".x.safetensors",
            "x\0.safetensors",
            "x.bin",
            "",
        ] {
            let message = shard_names(&index(name)).unwrap_err().to_string();
            assert!(message.contains("a shard is a .safetensors file beside the index"), "{message}");
        }
        assert!(shard_names("{}").is_err() && shard_names("[").is_err());
        assert!(shard_names(r#"{"weight_map": {"a": 3}}"#).is_err());
    }
}
