//! Reading what a user calls a model: a built-in name, a folder, or a repository on the hub. Touches no network.

use std::path::{Path, PathBuf};

use super::embedded::BuiltIn;
use crate::error::{Error, Result};

/// Where a checkpoint comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Part of this program.
    BuiltIn(BuiltIn),
    /// A folder on this machine.
    Folder(PathBuf),
    /// A file in GGUF, or the first of several.
    Gguf(PathBuf),
    /// A repository on the Hugging Face hub.
    Hub(Repository),
}

/// A repository on the hub, its names checked so that they can stand in paths and addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repository {
    /// `org/name`.
    pub id: String,
    /// Branch, tag or commit, where one was named.
    pub revision: Option<String>,
    /// A GGUF file in it, or what the name of the one that is meant ends with, such as `Q4_K_M`.
    pub file: Option<String>,
}

impl Source {
    /// Reads `text`: a built-in name (`eurus-mini/policy`), else a folder or .gguf file that exists, else
    /// `org/name[@revision][:file]`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a text that is none of these.
    pub fn parse(text: &str) -> Result<Self> {
        if let Some(built_in) = BuiltIn::named(text) {
            return Ok(Self::BuiltIn(built_in));
        }
        let path = Path::new(text);
        if !text.is_empty() && !text.contains('\0') && path.is_dir() {
            return Ok(Self::Folder(path.to_owned()));
        }
        if !text.contains('\0') && path.is_file() {
            if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
                return Ok(Self::Gguf(path.to_owned()));
            }
            let what =
                format!("{} is a file; name a .gguf file or the folder with config.json and the tensors", shown(text));
            return Err(Error::invalid("model", what));
        }
        if text.starts_with(['.', '/', '~']) {
            return Err(Error::invalid("model", format!("there is no folder {}", shown(text))));
        }
        Repository::parse(text).map(Self::Hub)
    }
}

impl Repository {
    /// Reads `org/name`, `org/name@revision`, and either followed by `:file`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for anything else.
    pub fn parse(text: &str) -> Result<Self> {
        let (repository, file) = match text.split_once(':') {
            Some((repository, file)) => (repository, Some(file)),
            None => (text, None),
        };
        let (id, revision) = match repository.split_once('@') {
            Some((id, revision)) => (id, Some(revision)),
            None => (repository, None),
        };
        let sound = |part: &str| is_plain(part) && !part.starts_with('.');
        let sound = id.split_once('/').is_some_and(|(org, name)| sound(org) && sound(name)) && !id.contains("..");
        if !sound {
            let names: Vec<&str> = BuiltIn::ALL.iter().map(BuiltIn::name).collect();
            let what = format!(
                "{} is no folder, no built-in model ({}) and no repository like org/name, org/name@revision or org/name:Q4_K_M",
                shown(text),
                names.join(", ")
            );
            return Err(Error::invalid("model", what));
        }
        if let Some(revision) = revision {
            check_revision(revision)?;
        }
        if file.is_some_and(|file| !is_path(file)) {
            let what = format!("{} names no file of a repository, and no quantisation such as Q4_K_M", shown(text));
            return Err(Error::invalid("model", what));
        }
        Ok(Self { id: id.to_owned(), revision: revision.map(str::to_owned), file: file.map(str::to_owned) })
    }
}

/// Whether `path` is that of a file below a repository, whatever its depth.
pub(super) fn is_path(path: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '+');
    let sound = |part: &str| !part.is_empty() && !part.starts_with('.') && part.chars().all(plain);
    path.len() <= 255 && path.split('/').all(sound)
}

/// A branch such as `main` or `refs/pr/5`, a tag, or a commit.
pub(super) fn check_revision(revision: &str) -> Result<()> {
    let parts_sound = revision.split('/').all(|part| is_plain(part) && !part.starts_with('.'));
    if parts_sound && !revision.contains("..") && revision.len() <= 128 {
        return Ok(());
    }
    Err(Error::invalid("revision", format!("{} is no branch, tag or commit", shown(revision))))
}

fn is_plain(part: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    (1..=96).contains(&part.len()) && part.chars().all(plain)
}

/// `text` as it may stand in a message: quoted, and never long.
fn shown(text: &str) -> String {
    match text.char_indices().nth(100) {
        Some((end, _)) => format!("{:?}...", &text[..end]),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn the_three_kinds_of_names() {
        assert_eq!(Source::parse("eurus-mini/policy").unwrap(), Source::BuiltIn(BuiltIn::MiniPolicy));
        assert_eq!(Source::parse("eurus-mini/reward").unwrap(), Source::BuiltIn(BuiltIn::MiniReward));
        let folder = std::env::temp_dir().display().to_string();
        assert_eq!(Source::parse(&folder).unwrap(), Source::Folder(std::env::temp_dir()));
        let hub = |id: &str, revision: Option<&str>| {
            Source::Hub(Repository { id: id.to_owned(), revision: revision.map(str::to_owned), file: None })
        };
        for (text, revision, file) in [
            ("org/name:Q4_K_M", None, "Q4_K_M"),
            ("org/name@v1:a/b-00001-of-00002.gguf", Some("v1"), "a/b-00001-of-00002.gguf"),
        ] {
            let Source::Hub(found) = Source::parse(text).unwrap() else { panic!("{text}") };
            assert_eq!((found.revision.as_deref(), found.file.as_deref()), (revision, Some(file)));
        }
        assert_eq!(Source::parse("openbmb/Eurus-7b-kto").unwrap(), hub("openbmb/Eurus-7b-kto", None));
        let pinned = hub("openbmb/Eurus-RM-7b", Some("refs/pr/5"));
        assert_eq!(Source::parse("openbmb/Eurus-RM-7b@refs/pr/5").unwrap(), pinned);
    }

    #[test]
    fn names_that_could_leave_the_cache_are_refused() {
        let long = "a".repeat(97);
        for text in [
            "",
            "a",
            "a/b/c",
            "../../etc/passwd",
            "...",
            "a/..",
            "a/.b",
            "a..b/c",
            "%2e%2e/x",
            "a/b\0",
            "\0",
            "/etc/nothing-here",
            "~/model",
            "./no-such-folder",
            "hf://org/name",
            "org\\name/x",
            "оrg/name",
            "org/na me",
            "a/",
            "/a",
            &format!("{long}/b"),
            &format!("a/{long}"),
            &"x/".repeat(2048),
            "org/name@",
            "org/name@../main",
            "org/name@a//b",
            "org/name@/main",
            "org/name@a@b",
            "org/name@.git",
            "org/name:",
            "org/name:../x.gguf",
            "org/name:/x.gguf",
            "org/name:a//x.gguf",
            "org/name:x.gguf@main",
            "org/name:a:b",
        ] {
            let error = Source::parse(text).unwrap_err();
            assert!(matches!(error, Error::Invalid { .. }), "{text:?}: {error:?}");
            assert!(error.to_string().len() < 400, "{text:?}");
        }
        let file = Source::parse("Cargo.toml").unwrap_err().to_string();
        assert!(file.contains("is a file; name a .gguf file or the folder"), "{file}");
    }
}
