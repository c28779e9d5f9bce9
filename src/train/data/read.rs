//! Files of rows: which files a path names, how they are unpacked, and each row as JSON with its place.
//! What the rows mean is the schema's.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;
use serde_json::Value;

use super::zstd::Zstd;
use super::{parallel, parquet};
use crate::error::{Error, Result};

/// Lines that are taken apart together.
const LINES: usize = 8192;
/// Longest line, in bytes: a row is a conversation, not a file.
const LINE_BYTES_MAX: u64 = 64 << 20;

/// A file that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFile {
    /// Where it is.
    pub path: PathBuf,
    /// Hash of its bytes as they are on disk, in hexadecimal.
    pub blake3: String,
    /// Rows it has.
    pub rows: usize,
}

/// What became of one row: its number, from 1, and itself or what is wrong with it.
pub(super) type Numbered<T> = (usize, Result<T, String>);

/// How rows are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packing {
    Lines,
    Array,
    Parquet,
}

/// How the file is compressed as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

/// The files that `path` names: itself, or those of a folder by name.
pub(super) fn files(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        kind(path)?;
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(|error| Error::file(path, error))? {
        let file = entry.map_err(|error| Error::file(path, error))?.path();
        if file.is_file() && kind(&file).is_ok() {
            files.push(file);
        }
    }
    files.sort_unstable();
    if files.is_empty() {
        return Err(Error::file(path, format!("the folder has no file that ends with {ENDINGS}")));
    }
    Ok(files)
}

const ENDINGS: &str = ".jsonl, .json, .parquet, or .jsonl.gz, .json.gz, .jsonl.zst, .json.zst";

fn kind(path: &Path) -> Result<(Packing, Compression)> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let endings = [(".gz", Compression::Gzip), (".zst", Compression::Zstd)];
    let found = endings.into_iter().find_map(|(ending, compression)| Some((name.strip_suffix(ending)?, compression)));
    let (name, compression) = found.unwrap_or((&name, Compression::None));
    if name.ends_with(".jsonl") || name.ends_with(".ndjson") {
        Ok((Packing::Lines, compression))
    } else if name.ends_with(".json") {
        Ok((Packing::Array, compression))
    } else if name.ends_with(".parquet") && compression == Compression::None {
        Ok((Packing::Parquet, compression))
    } else {
        Err(Error::file(path, format!("data files end with {ENDINGS}")))
    }
}

/// Reads all rows of the file `path`, each through `parse`; hashes the file on the way.
pub(super) fn read<T: Send>(
    path: &Path,
    parse: impl Fn(&Value) -> Result<T, String> + Sync,
) -> Result<(DataFile, Vec<Numbered<T>>)> {
    let (packing, compression) = kind(path)?;
    let blake3 = hash(path)?;
    let rows = match packing {
        Packing::Lines => lines(path, open(path, compression)?, &parse)?,
        Packing::Array => array(path, open(path, compression)?, &parse)?,
        Packing::Parquet => parquet::read(path, &parse)?,
    };
    Ok((DataFile { path: path.to_owned(), blake3, rows: rows.len() }, rows))
}

/// Where row `number` of the file `path` is, for people: editors jump to `file:line`.
pub(super) fn place(path: &Path, number: usize) -> String {
    match kind(path) {
        Ok((Packing::Lines, _)) => format!("{}:{number}", path.display()),
        _ => format!("{}: row {number}", path.display()),
    }
}

fn hash(path: &Path) -> Result<String> {
    let file = File::open(path).map_err(|error| Error::file(path, error))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file).map_err(|error| Error::file(path, error))?;
    Ok(hasher.finalize().to_hex().to_string())
}

fn open(path: &Path, compression: Compression) -> Result<Box<dyn BufRead>> {
    let file = BufReader::with_capacity(1 << 20, File::open(path).map_err(|error| Error::file(path, error))?);
    Ok(match compression {
        Compression::None => Box::new(file),
        Compression::Gzip => Box::new(BufReader::with_capacity(1 << 20, MultiGzDecoder::new(file))),
        Compression::Zstd => Box::new(BufReader::with_capacity(1 << 20, Zstd::new(file))),
    })
}

fn lines<T: Send>(
    path: &Path,
    mut reader: Box<dyn BufRead>,
    parse: &(impl Fn(&Value) -> Result<T, String> + Sync),
) -> Result<Vec<Numbered<T>>> {
    let (mut rows, mut number, mut ended) = (Vec::new(), 0, false);
    while !ended {
        let mut block: Vec<(usize, Vec<u8>)> = Vec::new();
        while block.len() < LINES {
            let mut line = Vec::new();
            let mut limited = reader.by_ref().take(LINE_BYTES_MAX);
            let len = limited
                .read_until(b'\n', &mut line)
                .map_err(|error| Error::file(path, format!("after line {number}: {error}")))?;
            ended = len == 0;
            if ended {
                break;
            }
            number += 1;
            if len as u64 == LINE_BYTES_MAX && !line.ends_with(b"\n") {
                let message =
                    format!("line {number} is longer than {} MiB; is this a JSON array?", LINE_BYTES_MAX >> 20);
                return Err(Error::file(path, message));
            }
            if !line.trim_ascii().is_empty() {
                block.push((number, line));
            }
        }
        rows.extend(parallel::map(&block, |(number, line)| {
            let line = line.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(line);
            let value = serde_json::from_slice(line).map_err(|error| {
                format!("expected one JSON object a line, but column {}: {}", error.column(), plain(&error))
            });
            (*number, value.and_then(|value| parse(&value)))
        }));
    }
    Ok(rows)
}

/// What serde_json says without its "at line 1 column 2".
fn plain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split_once(" at line ").map_or(text.clone(), |(what, _)| what.to_owned())
}

fn array<T: Send>(
    path: &Path,
    mut reader: Box<dyn BufRead>,
    parse: &(impl Fn(&Value) -> Result<T, String> + Sync),
) -> Result<Vec<Numbered<T>>> {
    let mut text = Vec::new();
    reader.read_to_end(&mut text).map_err(|error| Error::file(path, error))?;
    let damaged = |error: serde_json::Error| Error::file(path, format!("expected a JSON array of objects: {error}"));
    let values: Vec<Value> = serde_json::from_slice(&text).map_err(damaged)?;
    Ok((1..).zip(parallel::map(&values, parse)).collect())
}
