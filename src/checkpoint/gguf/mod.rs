//! GGUF files, the form in which llama.cpp's users share models: one file, or several `NAME-00001-of-00003.gguf`, with sizes,
//! tokenizer, template and tensors. Becomes a checkpoint like any other; quantised matrices stay as they are.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};

use super::tensor::{Storage, TensorInfo};
use super::{Checkpoint, Files, OpenedTokenizer, Progress, Tensors, read_exactly};
use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::model::weights::{Matrix, Weights};

mod config;
mod header;
mod names;
mod tokenizer;

use config::{Head, Metadata};
use header::{Entry, Header};
use names::RowOrder;

/// Most parts that one model may have.
const PARTS_MAX: usize = 1000;

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
    let places: Vec<Place> = entries().map(|(path, entry)| Place::new(path, entry)).collect();
    let has = |name: &str| places.iter().any(|place| place.info.name == name);
    let head = Head { is_reward: has(names::REWARD_HEAD), is_tied: !has(names::LANGUAGE_HEAD) };
    let json = config::config_json(metadata, &head).map_err(named)?;
    let config = ModelConfig::parse(&json, None).map_err(named)?;
    let tokenizer = OpenedTokenizer {
        json: tokenizer::json(metadata).map_err(named)?,
        facts: tokenizer::facts(metadata).map_err(named)?,
    };
    let tensors = GgufTensors { places, heads: config.heads, kv_heads: config.kv_heads };
    Ok(Checkpoint::assemble(name, config, tokenizer, Tensors::Gguf(tensors), Files::Gguf { config: json }))
}

impl Place {
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

    /// Reads all tensors, the floating-point ones onto `device`.
    pub(super) fn load(&self, device: &Device, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Weights> {
        let total = self.infos().map(|info| info.bytes).sum();
        let mut done = 0;
        progress(Progress::Load { done, total });
        let mut weights = Weights::new(HashMap::new());
        for Place { info, order, path, start } in &self.places {
            let damaged = |error: std::io::Error| Error::file(path, format!("reading {}: {error}", info.name));
            let mut file = File::open(path).map_err(damaged)?;
            file.seek(SeekFrom::Start(*start)).map_err(damaged)?;
            let bytes = read_exactly(&mut file, info.bytes, &mut |bytes| {
                done += bytes;
                progress(Progress::Load { done, total });
            });
            let bytes = self.in_order(*order, bytes.map_err(damaged)?, info.shape[0]);
            match (&info.storage, &*info.shape) {
                (Storage::Float(dtype), shape) => {
                    weights.put(&info.name, Tensor::from_raw_buffer(&bytes, *dtype, shape, device)?);
                }
                (Storage::Quantized(format), &[rows, k]) => {
                    weights.put_quantized(&info.name, Matrix { format: *format, rows, k }, &bytes, device)?;
                }
                (storage, shape) => {
                    return Err(Error::Unsupported(format!("{}: {storage} of shape {shape:?}", info.name)));
                }
            }
        }
        Ok(weights)
    }

    /// `bytes` of `rows` rows in the order of the Hugging Face tensor.
    fn in_order(&self, order: RowOrder, bytes: Vec<u8>, rows: usize) -> Vec<u8> {
        let heads = match order {
            RowOrder::Same => return bytes,
            RowOrder::Queries => self.heads,
            RowOrder::Keys => self.kv_heads,
        };
        names::unpermuted(&bytes, rows, heads)
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
    }
    Ok(())
}
