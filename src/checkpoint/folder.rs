//! Reading the small files of a checkpoint's folder: with limits on size, and never outside the folder.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Largest small file that is read; tokenizer.json of the largest vocabularies has some 35 MB.
const SMALL_BYTES_MAX: u64 = 128 << 20;

/// A folder with the files of one checkpoint.
#[derive(Debug, Clone)]
pub(super) struct Folder {
    path: PathBuf,
    /// Files must lie below this once links are resolved.
    bounds: PathBuf,
}

impl Folder {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let full = path.canonicalize().map_err(|error| Error::file(path, error))?;
        // In the hub's cache a snapshot holds links to ../../blobs, so there the repository is the boundary.
        let bounds = match repository_of_snapshot(&full) {
            Some(repository) => repository.to_owned(),
            None => full,
        };
        Ok(Self { path: path.to_owned(), bounds })
    }

    /// Last part of the path; of a folder called `model`, as training writes them, the last part that is not.
    pub(super) fn name(&self) -> String {
        let mut parts = self.bounds.iter().rev().filter(|&part| part != "model");
        let name = parts.next().filter(|&part| part != "/").or(self.path.file_name());
        name.map_or_else(|| self.path.display().to_string(), |name| name.display().to_string())
    }

    /// The path of `name` if it is there.
    pub(super) fn find(&self, name: &str) -> Result<Option<PathBuf>> {
        let path = self.path.join(name);
        match path.canonicalize() {
            Ok(full) if full.starts_with(&self.bounds) && full.is_file() => Ok(Some(path)),
            Ok(full) if full.is_file() => Err(Error::file(&path, "is a link that leaves the checkpoint's folder")),
            Ok(_) => Err(Error::file(&path, "is not a file")),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::file(&path, error)),
        }
    }

    /// Names of the files in it.
    pub(super) fn names(&self) -> Result<Vec<String>> {
        let failed = |error: std::io::Error| Error::file(&self.path, error);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if let Some(name) = entry.file_name().to_str().filter(|_| entry.path().is_file()) {
                names.push(name.to_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// The bytes of the small file `name` if it is there.
    pub(super) fn bytes(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let Some(path) = self.find(name)? else { return Ok(None) };
        let file = File::open(&path).map_err(|error| Error::file(&path, error))?;
        let mut bytes = Vec::new();
        file.take(SMALL_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|error| Error::file(&path, error))?;
        if bytes.len() as u64 > SMALL_BYTES_MAX {
            return Err(Error::file(&path, format!("is larger than {SMALL_BYTES_MAX} bytes")));
        }
        Ok(Some(bytes))
    }

    /// The text of the small file `name` if it is there.
    pub(super) fn text(&self, name: &str) -> Result<Option<String>> {
        let Some(bytes) = self.bytes(name)? else { return Ok(None) };
        let text = String::from_utf8(bytes).map_err(|_| Error::file(&self.path.join(name), "is not UTF-8 text"))?;
        Ok(Some(text))
    }

    /// What to add to "no safetensors here" where weights lie in another format.
    pub(super) fn pickle_hint(&self) -> &'static str {
        let has = |name| self.path.join(name).exists();
        if has("pytorch_model.bin") || has("pytorch_model.bin.index.json") {
            "; pytorch_model.bin is not read, because a pickle can run code: convert it to safetensors"
        } else {
            ""
        }
    }
}

impl fmt::Display for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

/// `…/models--org--name` for `…/models--org--name/snapshots/COMMIT`.
fn repository_of_snapshot(path: &Path) -> Option<&Path> {
    let snapshots = path.parent()?;
    let repository = snapshots.parent()?;
    let is_cache = snapshots.file_name()? == "snapshots"
        && repository.file_name()?.to_str().is_some_and(|name| name.starts_with("models--"));
    is_cache.then_some(repository)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_folder_called_model_goes_by_the_run_around_it() {
        let scratch = tempfile::tempdir().unwrap();
        let name = |path: &str| {
            let path = scratch.path().join(path);
            std::fs::create_dir_all(&path).unwrap();
            Folder::open(&path).unwrap().name()
        };
        assert_eq!(name("runs/mini-sft"), "mini-sft");
        assert_eq!(name("runs/mini-sft/model"), "mini-sft");
        assert_eq!(name("runs/model/mini-sft"), "mini-sft");
    }
}
