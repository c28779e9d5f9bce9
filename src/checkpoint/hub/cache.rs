//! The layout of Hugging Face's cache: `models--org--name/` holds `blobs/ETAG` (contents), `snapshots/COMMIT/FILE`
//! (links to blobs) and `refs/REVISION` (the commit that a branch or tag was seen at).

use std::path::{Path, PathBuf};

use super::super::folder::Folder;
use super::super::{CONFIG, TOKENIZER_JSON, TOKENIZER_MODEL, gguf, shards};
use crate::error::{Error, Result};

/// One repository's part of the cache.
pub(super) struct Snapshots {
    root: PathBuf,
}

/// Whether `revision` is a full commit hash.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl Snapshots {
    /// `id` is a checked `org/name`.
    pub(super) fn of(cache: &Path, id: &str) -> Self {
        Self { root: cache.join(format!("models--{}", id.replace('/', "--"))) }
    }

    /// Where the files of `commit` are, or would be.
    pub(super) fn folder(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// Where the content with this tag is, or would be; `None` for a tag that could lead elsewhere.
    pub(super) fn blob(&self, etag: &str) -> Option<PathBuf> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
        let parts_plain = etag.split('/').all(|part| !part.is_empty() && part.chars().all(plain));
        (parts_plain && etag.len() <= 200).then(|| self.root.join("blobs").join(etag))
    }

    /// Where the model is that is meant by `revision` and `file`, if it is there as a whole: its folder, or its first GGUF file.
    /// Otherwise what is missing.
    pub(super) fn complete(&self, revision: &str, file: Option<&str>) -> Result<PathBuf, String> {
        let commit = self.commit(revision)?;
        let path = self.folder(&commit);
        let folder = Folder::open(&path).map_err(|_| format!("commit {commit} has never been fetched"))?;
        let names = files_below(&path);
        if file.is_some() || (names.iter().any(|name| name.ends_with(".gguf")) && !has_safetensors(&folder)) {
            let parts = gguf::choose(&names, file, &format!("commit {commit}")).map_err(|error| error.to_string())?;
            return parts.first().map(|first| path.join(first)).ok_or_else(|| "no file".to_owned());
        }
        match missing(&folder) {
            Ok(missing) if missing.is_empty() => Ok(path),
            Ok(missing) => Err(format!("commit {commit} lacks {}", missing.join(", "))),
            Err(error) => Err(error.to_string()),
        }
    }

    /// The commit that `revision` was seen at.
    fn commit(&self, revision: &str) -> Result<String, String> {
        let commit = if is_commit(revision) {
            revision.to_owned()
        } else {
            let seen = std::fs::read_to_string(self.root.join("refs").join(revision)).unwrap_or_default();
            let commit = seen.trim();
            if !is_commit(commit) {
                return Err(format!("revision {revision} has never been fetched"));
            }
            commit.to_owned()
        };
        Ok(commit)
    }

    /// Notes that `revision` was seen at `commit`.
    pub(super) fn set_revision(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        let failed = |error: std::io::Error| Error::file(&path, error);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        // Renaming keeps a reader from seeing half a hash.
        let draft = path.with_extension(format!("{}.tmp", std::process::id()));
        std::fs::write(&draft, commit).map_err(failed)?;
        std::fs::rename(&draft, &path).map_err(failed)
    }

    /// Makes `file` of `commit` a link to a blob that is already there.
    pub(super) fn link(&self, blob: &Path, commit: &str, file: &str) -> Result<()> {
        let link = self.folder(commit).join(file);
        let failed = |error: std::io::Error| Error::file(&link, error);
        let parent = link.parent().unwrap_or(&link);
        std::fs::create_dir_all(parent).map_err(failed)?;
        let _ = std::fs::remove_file(&link);
        let below_root = blob.strip_prefix(&self.root).map_err(Error::internal)?;
        let target = Path::new(&"../".repeat(2 + file.matches('/').count())).join(below_root);
        #[cfg(unix)]
        let linked = std::os::unix::fs::symlink(target, &link);
        #[cfg(not(unix))]
        let linked = std::fs::copy(parent.join(target), &link).map(|_| ());
        linked.map_err(failed)
    }
}

fn has_safetensors(folder: &Folder) -> bool {
    [shards::SINGLE, shards::INDEX].iter().any(|name| folder.find(name).is_ok_and(|path| path.is_some()))
}

/// Paths of the files in a snapshot and one folder deeper, where repositories keep models in parts.
fn files_below(snapshot: &Path) -> Vec<String> {
    let names = |folder: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    };
    let mut files = Vec::new();
    for name in names(snapshot) {
        let path = snapshot.join(&name);
        if path.is_dir() {
            files.extend(names(&path).into_iter().map(|inner| format!("{name}/{inner}")));
        } else if path.is_file() {
            files.push(name);
        }
    }
    files
}

/// Files without which the folder is no model.
fn missing(folder: &Folder) -> Result<Vec<String>> {
    let mut missing = Vec::new();
    if folder.find(CONFIG)?.is_none() {
        missing.push(CONFIG.to_owned());
    }
    if folder.find(TOKENIZER_JSON)?.is_none() && folder.find(TOKENIZER_MODEL)?.is_none() {
        missing.push(format!("{TOKENIZER_JSON} or {TOKENIZER_MODEL}"));
    }
    if folder.find(shards::SINGLE)?.is_some() {
        return Ok(missing);
    }
    match folder.text(shards::INDEX)? {
        None => missing.push(shards::SINGLE.to_owned()),
        Some(index) => {
            for name in shards::shard_names(&index)? {
                if folder.find(&name)?.is_none() {
                    missing.push(name);
                }
            }
        }
    }
    Ok(missing)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    #[test]
    fn tags_that_could_leave_the_cache_are_no_blobs() {
        let snapshots = Snapshots::of(Path::new("/c"), "org/name");
        let blob = |etag: &str| snapshots.blob(etag);
        assert_eq!(blob("abc-1"), Some("/c/models--org--name/blobs/abc-1".into()));
        assert_eq!(blob("W/abc"), Some("/c/models--org--name/blobs/W/abc".into()));
        for etag in ["", "../x", "/etc/x", "a//b", "a\\b", "a.lock", "a\0"] {
            assert_eq!(blob(etag), None, "{etag:?}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let cache = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::of(cache.path(), "org/name");
        assert_eq!(snapshots.complete("main", None).unwrap_err(), "revision main has never been fetched");
        snapshots.set_revision("main", COMMIT).unwrap();
        assert_eq!(snapshots.complete("main", None).unwrap_err(), format!("commit {COMMIT} has never been fetched"));
        let folder = snapshots.folder(COMMIT);
        std::fs::create_dir_all(&folder).unwrap();
        let lacks = |what: &str| {
            assert_eq!(snapshots.complete(COMMIT, None).unwrap_err(), format!("commit {COMMIT} lacks {what}"))
        };
        lacks("config.json, tokenizer.json or tokenizer.model, model.safetensors");
        std::fs::write(folder.join("config.json"), "{}").unwrap();
        std::fs::write(folder.join("tokenizer.model"), "").unwrap();
        lacks("model.safetensors");
        std::fs::write(folder.join(shards::INDEX), r#"{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}"#)
            .unwrap();
        std::fs::write(folder.join("x.safetensors"), "").unwrap();
        lacks("y.safetensors");
        std::fs::write(folder.join("y.safetensors"), "").unwrap();
        assert_eq!(snapshots.complete("main", None).unwrap(), folder);
    }

    #[test]
    fn a_link_shows_the_blob() {
        let cache = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::of(cache.path(), "org/name");
        let blob = snapshots.blob("tag").unwrap();
        std::fs::create_dir_all(blob.parent().unwrap()).unwrap();
        std::fs::write(&blob, "content").unwrap();
        snapshots.link(&blob, COMMIT, "file").unwrap();
        assert_eq!(std::fs::read_to_string(snapshots.folder(COMMIT).join("file")).unwrap(), "content");
        let folder = Folder::open(&snapshots.folder(COMMIT)).unwrap();
        assert_eq!(folder.text("file").unwrap().as_deref(), Some("content"));
    }
}
