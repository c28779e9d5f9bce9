//! Snapshots of a run: a folder for each saved step, with the hash of every file, found again after any crash.
//! Owns names, manifest, verification and how many are kept; what a snapshot holds is the trainer's.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::folder::{self, Hook, Moment};
use crate::error::{Error, Result};

const PREFIX: &str = "step-";
const MANIFEST: &str = "manifest.json";
/// Written into every manifest; another number is another layout.
const FORMAT: u32 = 2;
/// Largest manifest that is read.
const MANIFEST_BYTES_MAX: u64 = 16 << 20;

/// The snapshots of one run.
#[derive(Debug, Clone)]
pub struct Snapshots {
    folder: PathBuf,
    keep: usize,
}

/// A complete snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Steps that were done when it was taken.
    pub step: u64,
    /// Its folder.
    pub path: PathBuf,
}

/// What [`Snapshots::newest`] found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Newest {
    /// The newest snapshot that is complete and undamaged.
    pub snapshot: Option<Snapshot>,
    /// One line for each newer one that is not.
    pub damaged: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format: u32,
    step: u64,
    files: BTreeMap<String, FileFacts>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileFacts {
    bytes: u64,
    blake3: String,
}

impl Snapshots {
    /// Those in `folder`, which need not exist, of which the newest `keep` are kept.
    pub fn new(folder: impl Into<PathBuf>, keep: usize) -> Self {
        Self { folder: folder.into(), keep: keep.max(1) }
    }

    /// Saves the state after `step` steps: `write` fills an empty folder. A complete snapshot of that step stays as it is.
    /// Then removes all but the newest of this and earlier steps; later ones belong to a course that was given up.
    ///
    /// # Errors
    /// What `write` fails with. [`Error::Checkpoint`] if the disk is full or otherwise fails, naming the folder, the bytes
    /// that it takes and those that are free: the snapshots that were there are still there then, and nothing else is.
    pub fn save(&self, step: u64, write: &mut dyn FnMut(&Path) -> Result<()>) -> Result<()> {
        self.save_watched(step, write, &mut |_| Ok(()))
    }

    fn save_watched(&self, step: u64, write: &mut dyn FnMut(&Path) -> Result<()>, at: &mut Hook<'_>) -> Result<()> {
        let target = self.path(step);
        if verify(&target, step).is_err() {
            let mut whole = |temporary: &Path| {
                write(temporary)?;
                write_manifest(temporary, step)
            };
            folder::publish(&target, &mut whole, at).map_err(|error| self.with_need(error))?;
        }
        self.prune(step, at)
    }

    /// Finds what to resume from. Every file of it has been read and compared with its hash.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn newest(&self) -> Result<Newest> {
        let mut found = Newest::default();
        for step in self.steps()?.into_iter().rev() {
            let path = self.path(step);
            match verify(&path, step) {
                Ok(()) => {
                    found.snapshot = Some(Snapshot { step, path });
                    break;
                }
                Err(error) => found.damaged.push(format!("{} is passed over: {error}", path.display())),
            }
        }
        Ok(found)
    }

    /// Removes what a crash has left half written or half removed.
    ///
    /// # Errors
    /// If the folder cannot be read or changed.
    pub fn sweep(&self) -> Result<()> {
        folder::sweep(&self.folder)
    }

    /// Whether there is any snapshot, damaged ones included.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.steps()?.is_empty())
    }

    /// Removes all of them, to start over.
    ///
    /// # Errors
    /// If one cannot be removed.
    pub fn clear(&self) -> Result<()> {
        self.sweep()?;
        self.steps()?.into_iter().try_for_each(|step| folder::discard(&self.path(step)))
    }

    fn prune(&self, step: u64, at: &mut Hook<'_>) -> Result<()> {
        let (kept, later): (Vec<u64>, Vec<u64>) = self.steps()?.into_iter().partition(|other| *other <= step);
        let old = kept.iter().take(kept.len().saturating_sub(self.keep));
        for doomed in later.iter().chain(old) {
            at(Moment::Prune)?;
            folder::discard(&self.path(*doomed))?;
        }
        Ok(())
    }

    /// Steps of all folders with the name of a snapshot, in order.
    fn steps(&self) -> Result<Vec<u64>> {
        let names = folder::names(&self.folder)?;
        let mut steps: Vec<u64> = names.iter().filter_map(|name| name.strip_prefix(PREFIX)?.parse().ok()).collect();
        steps.retain(|step| self.path(*step).is_dir());
        steps.sort_unstable();
        Ok(steps)
    }

    fn path(&self, step: u64) -> PathBuf {
        self.folder.join(format!("{PREFIX}{step:08}"))
    }

    /// Adds how large the last snapshot was, which is what the next one takes.
    fn with_need(&self, error: Error) -> Error {
        let last = self.steps().unwrap_or_default().last().map(|step| folder::size(&self.path(*step)));
        match (error, last) {
            (Error::Checkpoint(what), Some(bytes)) => Error::Checkpoint(format!(
                "{what}; a snapshot of this run needs {bytes} bytes; the earlier ones are intact"
            )),
            (error, _) => error,
        }
    }
}

fn write_manifest(snapshot: &Path, step: u64) -> Result<()> {
    let (paths, _) = folder::contents(snapshot)?;
    let mut files = BTreeMap::new();
    for path in paths {
        let name = path.strip_prefix(snapshot).ok().and_then(Path::to_str).map(str::to_owned);
        let name = name.ok_or_else(|| Error::file(&path, "has a name that is no text"))?;
        files.insert(name, facts(&path)?);
    }
    let text = serde_json::to_string_pretty(&Manifest { format: FORMAT, step, files }).map_err(Error::internal)?;
    let path = snapshot.join(MANIFEST);
    fs::write(&path, text + "\n").map_err(|error| Error::file(&path, error))
}

fn facts(path: &Path) -> Result<FileFacts> {
    let damaged = |error: std::io::Error| Error::file(path, error);
    let file = File::open(path).map_err(damaged)?;
    let bytes = file.metadata().map_err(damaged)?.len();
    let hash = blake3::Hasher::new().update_reader(file).map_err(damaged)?.finalize();
    Ok(FileFacts { bytes, blake3: hash.to_hex().to_string() })
}

/// Every file that the manifest lists is there, as long and with the hash that it says.
fn verify(snapshot: &Path, step: u64) -> Result<()> {
    let path = snapshot.join(MANIFEST);
    let damaged = |what: String| Error::file(&path, what);
    let bytes = path.metadata().map_err(|error| damaged(error.to_string()))?.len();
    if bytes > MANIFEST_BYTES_MAX {
        return Err(damaged(format!("has {bytes} bytes; at most {MANIFEST_BYTES_MAX} are read")));
    }
    let text = fs::read_to_string(&path).map_err(|error| damaged(error.to_string()))?;
    let manifest: Manifest = serde_json::from_str(&text).map_err(|error| damaged(error.to_string()))?;
    if (manifest.format, manifest.step) != (FORMAT, step) {
        let found = format!("says format {}, step {}", manifest.format, manifest.step);
        return Err(damaged(format!("{found}; expected format {FORMAT}, step {step}")));
    }
    for (name, expected) in &manifest.files {
        if !Path::new(name).components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(damaged(format!("names a file outside its folder: {name:?}")));
        }
        let file = snapshot.join(name);
        // The size first, because it costs nothing.
        let bytes = file.metadata().map_err(|error| Error::file(&file, error))?.len();
        if bytes != expected.bytes {
            return Err(Error::file(&file, format!("has {bytes} bytes instead of {}", expected.bytes)));
        }
        if facts(&file)?.blake3 != expected.blake3 {
            return Err(Error::file(&file, "is not what was written: its hash is another"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
