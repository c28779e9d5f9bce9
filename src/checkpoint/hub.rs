//! Models from the Hugging Face hub, kept in the cache that all its tools share: which files are needed, fetching them
//! over HTTP (`hf-hub` does the requests), and doing without when offline. The cache's layout is `cache`'s.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::RepoInfo;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

mod cache;

use super::folder::Folder;
use super::source::{check_revision, is_path};
use super::{CONFIG, GENERATION_CONFIG, Progress, Repository, TOKENIZER_JSON, TOKENIZER_MODEL};
use super::{facts, gguf, shards};
use crate::error::{Error, Result};
use cache::{Snapshots, is_commit};

/// Small files that are fetched where the repository has them.
const SMALL_FILES: [&str; 7] =
    [CONFIG, GENERATION_CONFIG, TOKENIZER_JSON, facts::CONFIG, facts::SPECIAL_MAP, facts::TEMPLATE, shards::INDEX];
/// A broken download is taken up again this often.
const RETRIES_MAX: u32 = 3;

/// How to reach the hub and where its cache is.
#[derive(Clone, PartialEq, Eq)]
pub struct HubOptions {
    /// Branch, tag or commit, unless the repository was named with one. `main` if neither says.
    pub revision: Option<String>,
    /// Only the cache is read, no connection is made.
    pub offline: bool,
    /// Sent to the hub, for repositories that need it.
    pub token: Option<String>,
    /// The hub's address.
    pub endpoint: String,
    /// The cache: a folder with `models--org--name` folders.
    pub cache: PathBuf,
}

impl HubOptions {
    /// Reads the variables that Hugging Face's tools read: `HF_HUB_OFFLINE`, `HF_TOKEN`, `HF_TOKEN_PATH`,
    /// `HF_ENDPOINT`, `HF_HUB_CACHE`, `HF_HOME` and `XDG_CACHE_HOME`; without a token variable, the token that a login
    /// left behind.
    pub fn from_env() -> Self {
        Self::from_variables(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn from_variables(variable: &dyn Fn(&str) -> Option<String>) -> Self {
        let path = |name: &str| variable(name).map(PathBuf::from);
        let caches = path("XDG_CACHE_HOME").unwrap_or_else(|| path("HOME").unwrap_or_default().join(".cache"));
        let home = path("HF_HOME").unwrap_or_else(|| caches.join("huggingface"));
        let token_path = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let left_behind = || std::fs::read_to_string(token_path).ok();
        let token = variable("HF_TOKEN").or_else(left_behind).map(|token| token.trim().to_owned());
        let is_set = |value: String| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str());
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Self {
            revision: None,
            offline: variable("HF_HUB_OFFLINE").is_some_and(is_set),
            token: token.filter(|token| !token.is_empty()),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache: path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
        }
    }
}

impl Default for HubOptions {
    /// As [`HubOptions::from_env`].
    fn default() -> Self {
        Self::from_env()
    }
}

impl fmt::Debug for HubOptions {
    /// Never the token itself.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubOptions")
            .field("revision", &self.revision)
            .field("offline", &self.offline)
            .field("token", &self.token.as_ref().map(|_| "(set)"))
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .finish()
    }
}

/// The folder with the files of `repository`, or the first GGUF file of the model in it, fetching what the cache lacks.
pub(super) fn fetch(
    repository: &Repository,
    options: &HubOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf> {
    let revision = repository.revision.as_ref().or(options.revision.as_ref()).map_or("main", String::as_str);
    check_revision(revision)?;
    let snapshots = Snapshots::of(&options.cache, &repository.id);
    let complete = || snapshots.complete(revision, repository.file.as_deref());
    if options.offline {
        return complete().map_err(|missing| offline_error(repository, revision, options, &missing));
    }
    // A commit never changes, so a complete one needs no question.
    if is_commit(revision)
        && let Ok(folder) = complete()
    {
        return Ok(folder);
    }
    let api = api(options).map_err(|error| hub_error(repository, revision, &error))?;
    let named = api.repo(Repo::with_revision(repository.id.clone(), RepoType::Model, revision.to_owned()));
    match named.info() {
        Ok(info) => {
            let mut download = Download::new(repository, &snapshots, &api, &info, progress)?;
            let path = download.run()?;
            snapshots.set_revision(revision, &info.sha)?;
            Ok(path)
        }
        Err(error) => match complete() {
            Ok(folder) if status(&error).is_none() => {
                tracing::warn!("{}: the hub cannot be reached ({error}); using the cache", repository.id);
                Ok(folder)
            }
            _ => Err(hub_error(repository, revision, &error)),
        },
    }
}

fn api(options: &HubOptions) -> Result<Api, ApiError> {
    ApiBuilder::from_cache(Cache::new(options.cache.clone()))
        .with_endpoint(options.endpoint.clone())
        .with_token(options.token.clone())
        .with_user_agent("eurus", env!("CARGO_PKG_VERSION"))
        .with_progress(false)
        .build()
}

/// Fetching the files of one commit.
struct Download<'a> {
    repository: &'a Repository,
    snapshots: &'a Snapshots,
    api: &'a Api,
    commit: ApiRepo,
    info: &'a RepoInfo,
    folder: PathBuf,
    progress: &'a mut dyn FnMut(Progress<'_>),
}

impl<'a> Download<'a> {
    fn new(
        repository: &'a Repository,
        snapshots: &'a Snapshots,
        api: &'a Api,
        info: &'a RepoInfo,
        progress: &'a mut dyn FnMut(Progress<'_>),
    ) -> Result<Self> {
        if !is_commit(&info.sha) {
            return Err(Error::Unavailable(format!("{}: the hub names no commit", repository.id)));
        }
        // All files come from one commit, even if the branch moves on meanwhile.
        let commit = api.repo(Repo::with_revision(repository.id.clone(), RepoType::Model, info.sha.clone()));
        let folder = snapshots.folder(&info.sha);
        Ok(Self { repository, snapshots, api, commit, info, folder, progress })
    }

    /// Small files first: a model that cannot be run is refused before its tensors are fetched.
    fn run(&mut self) -> Result<PathBuf> {
        let names: Vec<String> = self.info.siblings.iter().map(|sibling| sibling.rfilename.clone()).collect();
        let has_safetensors = self.has(shards::SINGLE) || self.has(shards::INDEX);
        if self.repository.file.is_some() || (!has_safetensors && names.iter().any(|name| name.ends_with(".gguf"))) {
            return self.run_gguf(&names);
        }
        if !self.has(CONFIG) {
            return Err(Error::Checkpoint(format!("{}: the repository has no {CONFIG}", self.repository.id)));
        }
        for file in SMALL_FILES.into_iter().filter(|file| self.has(file)).collect::<Vec<_>>() {
            self.file(file)?;
        }
        if !self.has(TOKENIZER_JSON) && self.has(TOKENIZER_MODEL) {
            self.file(TOKENIZER_MODEL)?;
        }
        let folder = Folder::open(&self.folder)?;
        super::read_config(&folder)?;
        if self.has(shards::SINGLE) {
            self.file(shards::SINGLE)?;
            return Ok(self.folder.clone());
        }
        let Some(index) = folder.text(shards::INDEX)? else {
            let what = "the repository has no safetensors files; convert its weights to safetensors";
            return Err(Error::Unsupported(format!("{}: {what}", self.repository.id)));
        };
        for file in shards::shard_names(&index)? {
            self.file(&file)?;
        }
        Ok(self.folder.clone())
    }

    /// The files of the one GGUF model that is meant.
    fn run_gguf(&mut self, names: &[String]) -> Result<PathBuf> {
        let sound: Vec<String> = names.iter().filter(|name| is_path(name)).cloned().collect();
        let parts = gguf::choose(&sound, self.repository.file.as_deref(), &self.repository.id)?;
        for part in &parts {
            self.file(part)?;
        }
        let Some(first) = parts.first() else { return Err(Error::Internal("a model without files".to_owned())) };
        Ok(self.folder.join(first))
    }

    fn has(&self, file: &str) -> bool {
        self.info.siblings.iter().any(|sibling| sibling.rfilename == file)
    }

    /// Makes sure that `file` is in the snapshot.
    fn file(&mut self, file: &str) -> Result<()> {
        if self.folder.join(file).exists() {
            return Ok(());
        }
        let mut attempt = 0;
        loop {
            let failure = match self.attempt(file) {
                Ok(result) => return result,
                Err(failure) => failure,
            };
            attempt += 1;
            if attempt > RETRIES_MAX || status(&failure).is_some() {
                return Err(hub_error(self.repository, &format!("{} {file}", self.info.sha), &failure));
            }
            tracing::warn!("{} {file}: {failure}; trying again", self.repository.id);
            // The first time at once, then after 1 and 2 seconds.
            std::thread::sleep(Duration::from_secs(u64::from(attempt - 1)));
        }
    }

    /// The outer error is the connection's and may pass; the inner one will not.
    fn attempt(&mut self, file: &str) -> Result<Result<()>, ApiError> {
        let metadata = self.api.metadata(&self.commit.url(file))?;
        let Some(blob) = self.snapshots.blob(metadata.etag()).filter(|_| metadata.commit_hash() == self.info.sha)
        else {
            let what = format!("{} {file}: the hub's answer is of another commit or malformed", self.repository.id);
            return Ok(Err(Error::Unavailable(what)));
        };
        let size = metadata.size() as u64;
        if len(&blob) == Some(size) {
            return Ok(self.snapshots.link(&blob, &self.info.sha, file));
        }
        let part = blob.with_extension("part");
        if len(&part).is_some_and(|len| len >= size) {
            std::fs::remove_file(&part)?;
        }
        let bar = Bar { report: &mut *self.progress, file: file.to_owned(), done: 0, total: 0 };
        let path = self.commit.download_with_progress(file, bar)?;
        if len(&path) != Some(size) {
            let _ = std::fs::remove_file(&blob);
            let _ = std::fs::remove_file(&path);
            return Ok(Err(Error::Unavailable(format!("{} {file}: the download is incomplete", self.repository.id))));
        }
        Ok(Ok(()))
    }
}

fn len(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().map(|metadata| metadata.len())
}

/// Tells `hf-hub`'s counting of one file as `Progress`.
struct Bar<'a> {
    report: &'a mut dyn FnMut(Progress<'_>),
    file: String,
    done: u64,
    total: u64,
}

impl hf_hub::api::Progress for Bar<'_> {
    fn init(&mut self, size: usize, _filename: &str) {
        (self.done, self.total) = (0, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        (self.report)(Progress::Download { file: &self.file, done: self.done, total: self.total });
    }

    fn finish(&mut self) {}
}

fn offline_error(repository: &Repository, revision: &str, options: &HubOptions, missing: &str) -> Error {
    Error::NotFound(format!(
        "{} ({revision}) is not complete in {}: {missing}. Offline mode is on; fetch the model once without it, \
         or with `hf download {}`",
        repository.id,
        options.cache.display(),
        repository.id
    ))
}

/// The HTTP status that `error` is about.
fn status(error: &ApiError) -> Option<u16> {
    let text = error.to_string();
    text.rsplit_once("http status: ").and_then(|(_, status)| status.trim().parse().ok())
}

fn hub_error(repository: &Repository, what: &str, error: &ApiError) -> Error {
    let id = &repository.id;
    match status(error) {
        Some(401 | 403) => Error::NotFound(format!(
            "{id} ({what}): the hub refuses it: it is private, gated or does not exist. Set HF_TOKEN to a token that \
             may read it"
        )),
        Some(404) => Error::NotFound(format!("{id} ({what}): the hub has no such repository, revision or file")),
        Some(429) => Error::Unavailable(format!("{id} ({what}): the hub asks to slow down; try later or set HF_TOKEN")),
        _ => Error::Unavailable(format!("{id} ({what}): {error}")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn options(variables: &[(&str, &str)]) -> HubOptions {
        let find = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
        HubOptions::from_variables(&find)
    }

    #[test]
    fn the_variables_of_the_hub_s_own_tools_are_read() {
        let bare = options(&[("HOME", "/home/u")]);
        assert_eq!(bare.cache, Path::new("/home/u/.cache/huggingface/hub"));
        assert_eq!((bare.endpoint.as_str(), bare.offline, &bare.token), ("https://huggingface.co", false, &None));
        assert_eq!(options(&[("XDG_CACHE_HOME", "/c")]).cache, Path::new("/c/huggingface/hub"));
        assert_eq!(options(&[("XDG_CACHE_HOME", "/c"), ("HF_HOME", "/h")]).cache, Path::new("/h/hub"));
        assert_eq!(options(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/x")]).cache, Path::new("/x"));
        assert_eq!(options(&[("HF_ENDPOINT", "http://mirror/")]).endpoint, "http://mirror");
        for (value, offline) in [("1", true), ("true", true), ("Yes", true), ("0", false), ("no", false)] {
            assert_eq!(options(&[("HF_HUB_OFFLINE", value)]).offline, offline, "{value}");
        }
    }

    #[test]
    fn the_token_is_found_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("token"), "hf_file\n").unwrap();
        let home = folder.path().to_str().unwrap();
        let file = folder.path().join("token");
        assert_eq!(options(&[("HF_HOME", home)]).token.as_deref(), Some("hf_file"));
        assert_eq!(options(&[("HF_TOKEN_PATH", file.to_str().unwrap())]).token.as_deref(), Some("hf_file"));
        let named = options(&[("HF_HOME", home), ("HF_TOKEN", " hf_named ")]);
        assert_eq!(named.token.as_deref(), Some("hf_named"));
        assert!(!format!("{named:?}").contains("hf_named"));
    }
}
