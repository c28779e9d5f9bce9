//! GGUF files, the form in which llama.cpp's users share models: one file, or several `NAME-00001-of-00003.gguf`, with sizes,
//! tokenizer, template and tensors. Becomes a checkpoint like any other; quantised matrices stay as they are.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::DType;

use super::tensor::{Storage, Take, TensorInfo};
use super::{Checkpoint, Files, OpenedTokenizer, Tensors, read_exactly};
use crate::error::{Error, Result};
use crate::model::config::{EXPERTS_MAX, ModelConfig};

mod choose;
mod config;
mod export;
mod header;
mod names;
mod tokenizer;
mod vocabulary;
mod write;

pub(super) use choose::choose;
pub(super) use export::write;
pub(super) use names::{LANGUAGE_HEAD, REWARD_HEAD};

use config::{Head, Metadata};
use header::{Entry, Header};
use names::RowOrder;

/// Most parts that one model may have.
const PARTS_MAX: usize = 1000;
/// Most tensors that one model may have, each expert's by itself: ten times those of the largest that are known.
const PLACES_MAX: usize = 100_000;

/// The tensors of a model in one file or several.
#[derive(Debug, Clone)]
pub(super) struct GgufTensors {
    places: Vec<Place>,
    heads: usize,
    kv_heads: usize,
}

/// A tensor and where it lies.
#[derive(Debug, Clone)]
struct Place {
    info: TensorInfo,
    order: RowOrder,
    path: PathBuf,
    start: u64,
}

/// Opens the model in the file at `path`, and in those that belong to it.
pub(super) fn open(path: &Path) -> Result<Checkpoint> {
    let (name, parts) = parts(path)?;
    let headers = parts.iter().map(|part| Header::open(part)).collect::<Result<Vec<_>>>()?;
    let Some(first) = headers.first() else { return Err(Error::file(path, "is no part of a model")) };
    let named = |error: Error| match error {
        Error::Checkpoint(what) => Error::file(&first.path, what),
        Error::Unsupported(what) => Error::Unsupported(format!("{}: {what}", first.path.display())),
        other => other,
    };
    check_parts(&headers)?;
    let metadata = Metadata(&first.metadata);
    let entries = || headers.iter().flat_map(|header| header.tensors.iter().map(|entry| (&header.path, entry)));
    let experts = config::expert_count(metadata).map_err(named)?;
    let places = entries().flat_map(|(path, entry)| Place::all(path, entry, experts));
    let places: Vec<Place> = places.take(PLACES_MAX + 1).collect();
    check_places(&places)?;
    let has = |name: &str| places.iter().any(|place| place.info.name == name);
    let is_reward = has(names::REWARD_HEAD);
    let head = Head { is_reward, is_tied: !has(names::LANGUAGE_HEAD), dtype: dtype(&places) };
    let json = config::config_json(metadata, &head).map_err(named)?;
    let config = ModelConfig::parse(&json, None).map_err(named)?;
    let tokenizer = OpenedTokenizer {
        json: tokenizer::json(metadata).map_err(named)?,
        facts: tokenizer::facts(metadata).map_err(named)?,
    };
    let tensors = GgufTensors { places, heads: config.heads, kv_heads: config.kv_heads };
    let files = Files::Gguf { path: first.path.clone(), config: json };
    Ok(Checkpoint::assemble(name, config, tokenizer, Tensors::Gguf(tensors), files))
}

/// There may not be too many, and no two tensors of files may stand for one, as alone and among all experts.
fn check_places(places: &[Place]) -> Result<()> {
    let mut names = HashSet::new();
    if let Some(last) = places.get(PLACES_MAX) {
        return Err(Error::file(&last.path, format!("has more than {PLACES_MAX} matrices and vectors")));
    }
    match places.iter().find(|place| !names.insert(&place.info.name)) {
        None => Ok(()),
        Some(place) => Err(Error::file(&place.path, format!("has {} twice", place.info.name))),
    }
}

/// What config.json calls the type of the matrices in `places`, where they have one.
fn dtype(places: &[Place]) -> Option<&'static str> {
    let mut storages = places.iter().filter(|place| place.info.shape.len() == 2).map(|place| &place.info.storage);
    let first = storages.next()?;
    match first {
        _ if storages.any(|other| other != first) => None,
        Storage::Float(DType::F32) => Some("float32"),
        Storage::Float(DType::F16) => Some("float16"),
        Storage::Float(DType::BF16) => Some("bfloat16"),
        _ => None,
    }
}

impl Place {
    /// That of `entry`, or those of the experts in it, which are as many as the file says that a layer has.
    fn all(path: &Path, entry: &Entry, experts: Option<u64>) -> Vec<Self> {
        let experts = match *entry.shape {
            [count, rows, k] if count <= EXPERTS_MAX && experts == Some(count as u64) => {
                names::experts(&entry.name, count).map(|names| (names, entry.bytes / count as u64, vec![rows, k]))
            }
            _ => None,
        };
        let Some((names, bytes, shape)) = experts else { return vec![Self::new(path, entry)] };
        let place = |(index, name): (usize, String)| Self {
            info: TensorInfo { name, storage: entry.storage.clone(), shape: shape.clone(), bytes },
            order: RowOrder::Same,
            path: path.to_owned(),
            start: entry.start + index as u64 * bytes,
        };
        names.into_iter().enumerate().map(place).collect()
    }

    fn new(path: &Path, entry: &Entry) -> Self {
        let (name, order) = names::hugging_face(&entry.name);
        // A head may be a vector.
        let shape = match (&*name, &*entry.shape) {
            (names::REWARD_HEAD, [width]) => vec![1, *width],
            (_, shape) => shape.to_vec(),
        };
        let info = TensorInfo { name, storage: entry.storage.clone(), shape, bytes: entry.bytes };
        Self { info, order, path: path.to_owned(), start: entry.start }
    }
}

impl GgufTensors {
    pub(super) fn infos(&self) -> impl Iterator<Item = &TensorInfo> {
        self.places.iter().map(|place| &place.info)
    }

    /// Reads one tensor after the other, those whose names `wanted` accepts, and gives `take` its data. `on_bytes` hears of every
    /// portion read, in bytes.
    pub(super) fn visit(
        &self,
        wanted: &dyn Fn(&str) -> bool,
        on_bytes: &mut dyn FnMut(u64),
        take: &mut Take<'_>,
    ) -> Result<()> {
        for Place { info, order, path, start } in self.places.iter().filter(|place| wanted(&place.info.name)) {
            let damaged = |error: std::io::Error| Error::file(path, format!("reading {}: {error}", info.name));
            let mut file = File::open(path).map_err(damaged)?;
            file.seek(SeekFrom::Start(*start)).map_err(damaged)?;
            let bytes = read_exactly(&mut file, info.bytes, on_bytes).map_err(damaged)?;
            take(info, self.in_order(*order, bytes, info.shape[0]))?;
        }
        Ok(())
    }

    /// `bytes` of `rows` rows in the order of the Hugging Face tensor.
    fn in_order(&self, order: RowOrder, bytes: Vec<u8>, rows: usize) -> Vec<u8> {
        let heads = match order {
            RowOrder::Same => return bytes,
            RowOrder::Queries => self.heads,
            RowOrder::Keys => self.kv_heads,
        };
        names::unpermuted(bytes, rows, heads)
    }
}

/// What to call the model whose part or only file is `path`, and all of its files.
fn parts(path: &Path) -> Result<(String, Vec<PathBuf>)> {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let Some((name, count)) = split_name(stem) else {
        return Ok((stem.to_owned(), vec![path.to_owned()]));
    };
    if !(1..=PARTS_MAX).contains(&count) {
        return Err(Error::file(path, format!("is one of {count} parts; 1 to {PARTS_MAX} are read")));
    }
    let part = |index: usize| path.with_file_name(format!("{name}-{index:05}-of-{count:05}.gguf"));
    let parts: Vec<PathBuf> = (1..=count).map(part).collect();
    match parts.iter().find(|part| !part.is_file()) {
        Some(missing) => Err(Error::file(missing, format!("is missing: the model has {count} parts"))),
        None => Ok((name.to_owned(), parts)),
    }
}

/// Whether `path` is named like one of several parts.
pub(super) fn is_part(path: &Path) -> bool {
    path.file_stem().and_then(|stem| stem.to_str()).is_some_and(|stem| split_name(stem).is_some())
}

/// `("NAME", 3)` of `NAME-00001-of-00003`.
fn split_name(stem: &str) -> Option<(&str, usize)> {
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (name, index) = rest.rsplit_once('-')?;
    let number = |digits: &str| digits.len() == 5 && digits.bytes().all(|byte| byte.is_ascii_digit());
    if number(count) && number(index) { Some((name, count.parse().ok()?)) } else { None }
}

/// Every part must say that it is the one its name says, of as many as there are, and no tensor may be in two.
fn check_parts(headers: &[Header]) -> Result<()> {
    let mut homes: HashMap<&str, &Path> = HashMap::new();
    for (index, header) in headers.iter().enumerate() {
        let metadata = Metadata(&header.metadata);
        let number = |key: &str| metadata.number(key).map_err(|error| Error::file(&header.path, error));
        let (no, count) = (number("split.no")?.unwrap_or(0), number("split.count")?.unwrap_or(1).max(1));
        if (no, count) != (index as u64, headers.len() as u64) {
            let what =
                format!("says that it is part {} of {count}, its name {} of {}", no + 1, index + 1, headers.len());
            return Err(Error::file(&header.path, what));
        }
        for entry in &header.tensors {
            if let Some(other) = homes.insert(&entry.name, &header.path) {
                return Err(Error::file(other, format!("and {} have both {}", header.path.display(), entry.name)));
            }
        }
        let (said, found) = (number("split.tensors.count")?, homes.len());
        if let Some(said) = said.filter(|said| index + 1 == headers.len() && *said != found as u64) {
            return Err(Error::file(
                &header.path,
                format!("says that all parts have {said} tensors, they have {found}"),
            ));
        }
    }
    Ok(())
}
