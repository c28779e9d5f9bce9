//! Files and folders that appear under their name when they are complete: written beside it, flushed to the disk, then renamed.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Where something is written until it is complete; removed where that never happens.
#[derive(Debug)]
pub(super) struct Draft {
    target: PathBuf,
    temporary: PathBuf,
}

impl Draft {
    /// A draft of `target`, which must not exist; the folder around it must.
    pub(super) fn new(target: &Path) -> Result<Self> {
        if target.exists() {
            return Err(Error::file(target, "is there already: remove it, or name another"));
        }
        let Some(name) = target.file_name() else { return Err(Error::file(target, "is no name for a file")) };
        // Two processes that write the same do not write into each other's files.
        let temporary = target.with_file_name(format!(".{}.{}.tmp", name.display(), std::process::id()));
        Ok(Self { target: target.to_owned(), temporary })
    }

    /// The name under which it is written.
    pub(super) fn path(&self) -> &Path {
        &self.temporary
    }

    /// Gives what was written and flushed its name.
    pub(super) fn publish(self) -> Result<()> {
        // Renaming would replace a file that has come to be meanwhile.
        if self.target.exists() {
            return Err(Error::file(&self.target, "is there already: remove it, or name another"));
        }
        if self.temporary.is_dir() {
            sync(&self.temporary)?;
        }
        fs::rename(&self.temporary, &self.target).map_err(|error| Error::file(&self.target, error))?;
        let parent = match self.target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        sync(parent)
    }
}

/// Flushes the names in a folder to the disk.
fn sync(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|open| open.sync_all()).map_err(|error| Error::file(folder, error))
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Nothing is there after a success, and after a failure that is the one to tell.
        let _ = if self.temporary.is_dir() {
            fs::remove_dir_all(&self.temporary)
        } else {
            fs::remove_file(&self.temporary)
        };
    }
}

/// A new file, its length known while it grows.
pub(super) struct Output {
    writer: BufWriter<File>,
    path: PathBuf,
    /// Bytes so far.
    pub(super) at: u64,
}

impl Output {
    pub(super) fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(|error| Error::file(path, error))?;
        Ok(Self { writer: BufWriter::with_capacity(1 << 20, file), path: path.to_owned(), at: 0 })
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.at += bytes.len() as u64;
        self.writer.write_all(bytes).map_err(|error| self.failed(&error))
    }

    /// Zeros up to a multiple of `alignment`.
    pub(super) fn pad(&mut self, alignment: u64) -> Result<()> {
        let zeros = self.at.next_multiple_of(alignment) - self.at;
        io::copy(&mut io::Read::take(io::repeat(0), zeros), &mut self.writer).map_err(|error| self.failed(&error))?;
        self.at += zeros;
        Ok(())
    }

    /// Goes on at `at`, which may be before or after what was written; what is left out is zeros.
    pub(super) fn go_to(&mut self, at: u64) -> Result<()> {
        self.at = at;
        self.writer.seek(io::SeekFrom::Start(at)).map_err(|error| self.failed(&error))?;
        Ok(())
    }

    /// Flushes the file to the disk.
    pub(super) fn finish(mut self) -> Result<()> {
        let flushed = self.writer.flush().and_then(|()| self.writer.get_ref().sync_all());
        flushed.map_err(|error| self.failed(&error))
    }

    /// As [`Output::finish`], the file filled up with zeros to `len` bytes.
    pub(super) fn finish_at(mut self, len: u64) -> Result<()> {
        let sized = self.writer.flush().and_then(|()| self.writer.get_ref().set_len(len));
        sized.map_err(|error| self.failed(&error))?;
        self.finish()
    }

    fn failed(&self, error: &io::Error) -> Error {
        Error::file(&self.path, format!("{error}, after {} bytes", self.at))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_draft_is_seen_when_it_is_complete_or_never() {
        let scratch = tempfile::tempdir().unwrap();
        let target = scratch.path().join("x.bin");
        let names = || fs::read_dir(scratch.path()).unwrap().count();
        let draft = Draft::new(&target).unwrap();
        let mut output = Output::create(draft.path()).unwrap();
        output.write(b"abc").unwrap();
        output.pad(32).unwrap();
        assert_eq!((output.at, target.exists()), (32, false));
        drop((output, draft));
        assert_eq!(names(), 0, "a draft that is given up stays");
        let draft = Draft::new(&target).unwrap();
        let mut output = Output::create(draft.path()).unwrap();
        output.write(b"abc").unwrap();
        output.finish().unwrap();
        draft.publish().unwrap();
        assert_eq!((fs::read(&target).unwrap(), names()), (b"abc".to_vec(), 1));
        let error = Draft::new(&target).unwrap_err().to_string();
        assert!(error.contains("x.bin: is there already"), "{error}");
    }
}
