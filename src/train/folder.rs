//! Folders that appear whole or not at all: written under another name, flushed to the disk, then renamed.
//! Knows nothing of what is in them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Names of folders that are being written or removed begin with this; after a crash they are rubbish.
const TEMPORARY: &str = ".tmp-";
/// Name of what a new folder takes the place of, while it does.
const REPLACED: &str = ".old-";

/// What is about to be done. Tests interrupt a save at each of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    /// Nothing has been touched.
    Create,
    /// The temporary folder is there and empty.
    Write,
    /// All files are written and may be in memory only.
    Sync,
    /// All files are on the disk.
    Rename,
    /// The folder has its name, but maybe in memory only.
    SyncParent,
    /// Something old is to be removed.
    Prune,
}

/// Hears of every moment; its error stops the save there.
pub(super) type Hook<'a> = dyn FnMut(Moment) -> Result<()> + 'a;

/// Writes the folder `target` with `write`, which is given an empty folder and may fail: then nothing of it stays, and what
/// was at `target` before is untouched. Otherwise it takes the place of what was there.
///
/// # Errors
/// Those of `write`, and of the file system, naming `target`, the bytes written and those that are free.
pub(super) fn publish(target: &Path, write: &mut dyn FnMut(&Path) -> Result<()>, at: &mut Hook<'_>) -> Result<()> {
    let parent = parent(target);
    at(Moment::Create)?;
    fs::create_dir_all(parent).map_err(|error| Error::file(parent, error))?;
    let temporary = beside(target, TEMPORARY);
    remove(&temporary)?;
    fs::create_dir(&temporary).map_err(|error| Error::file(&temporary, error))?;
    let outcome = fill(&temporary, write, at).and_then(|()| {
        at(Moment::Rename)?;
        replace(&temporary, target)
    });
    if let Err(error) = outcome {
        let written = size(&temporary);
        // The first failure is the one to tell.
        let _ = remove(&temporary);
        return Err(no_room(target, written, &error));
    }
    at(Moment::SyncParent)?;
    sync(parent)?;
    sync(self::parent(parent))?;
    remove(&beside(target, REPLACED))
}

fn fill(temporary: &Path, write: &mut dyn FnMut(&Path) -> Result<()>, at: &mut Hook<'_>) -> Result<()> {
    at(Moment::Write)?;
    write(temporary)?;
    at(Moment::Sync)?;
    let (files, folders) = contents(temporary)?;
    files.iter().chain(&folders).try_for_each(|path| sync(path))?;
    sync(temporary)
}

/// A folder cannot be renamed onto one with files in it, so the old one steps aside first. A crash between the two leaves it
/// there, and [`sweep`] puts it back.
fn replace(temporary: &Path, target: &Path) -> Result<()> {
    let rename = |from: &Path, to: &Path| fs::rename(from, to).map_err(|error| Error::file(from, error));
    let replaced = beside(target, REPLACED);
    if !target.exists() {
        return rename(temporary, target);
    }
    remove(&replaced)?;
    rename(target, &replaced)?;
    rename(temporary, target).inspect_err(|_| {
        // The new one stays where it is and is removed by the caller; the old one returns.
        let _ = fs::rename(&replaced, target);
    })
}

/// Removes what a crash has left in `folder`, and gives back what was being replaced.
///
/// # Errors
/// If the folder cannot be read or changed.
pub(super) fn sweep(folder: &Path) -> Result<()> {
    for name in names(folder)? {
        let path = folder.join(&name);
        if name.starts_with(TEMPORARY) {
            remove(&path)?;
        } else if let Some(original) = name.strip_prefix(REPLACED) {
            let original = folder.join(original);
            if original.exists() {
                remove(&path)?;
            } else {
                fs::rename(&path, &original).map_err(|error| Error::file(&path, error))?;
            }
        }
    }
    Ok(())
}

/// Removes `path` and all that is in it; it loses its name at once, so that no half of it is ever found under it.
///
/// # Errors
/// If it cannot be removed.
pub(super) fn discard(path: &Path) -> Result<()> {
    let doomed = beside(path, TEMPORARY);
    remove(&doomed)?;
    fs::rename(path, &doomed).map_err(|error| Error::file(path, error))?;
    remove(&doomed)
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::file(path, error)),
    }
}

/// Names in `folder`, in order; none where there is no such folder.
///
/// # Errors
/// If it cannot be read.
pub(super) fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::file(folder, error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| Error::file(folder, error))?;
        names.extend(entry.file_name().into_string().ok());
    }
    names.sort();
    Ok(names)
}

/// All files below `folder`, in order, and all folders below it, deepest first.
///
/// # Errors
/// If one cannot be read.
pub(super) fn contents(folder: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let (mut files, mut folders, mut open) = (Vec::new(), Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).map_err(|error| Error::file(&folder, error))? {
            let path = entry.map_err(|error| Error::file(&folder, error))?.path();
            if path.is_dir() {
                open.push(path.clone());
                folders.push(path);
            } else {
                files.push(path);
            }
        }
    }
    files.sort();
    folders.sort_by(|a, b| b.cmp(a));
    Ok((files, folders))
}

/// Bytes of all files below `folder`, as far as they can be told.
pub(super) fn size(folder: &Path) -> u64 {
    let files = contents(folder).map_or_else(|_| Vec::new(), |(files, _)| files);
    files.iter().filter_map(|path| path.metadata().ok()).map(|metadata| metadata.len()).sum()
}

/// Waits until what was written to `path`, a file or a folder, is on the disk.
///
/// # Errors
/// If the disk says that it is not.
pub(super) fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|error| Error::file(path, error))
}

/// `error`, with what it takes to judge whether the disk is full.
fn no_room(target: &Path, written: u64, error: &Error) -> Error {
    let free = rustix::fs::statvfs(parent(target)).map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize));
    let free = free.map_or_else(|error| format!("unknown ({error})"), |bytes| format!("{bytes} bytes"));
    let what = format!("could not be written and was removed again: {error} (after {written} bytes; now free: {free})");
    match error {
        // An interruption and a mistake of the caller's are told as they are.
        Error::Checkpoint(_) => Error::file(target, what),
        other => other.clone(),
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn beside(path: &Path, prefix: &str) -> PathBuf {
    let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    path.with_file_name(format!("{prefix}{name}"))
}
