//! Where model files come from and what they mean: a folder, the hub or the program itself becomes one `Checkpoint`,
//! checked file by file before a large allocation. Running the model is not its business.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::model::weights::{Matrix, Weights, is_harmless_extra};
use crate::text::tokenizer::SpecialTokens;
use crate::text::{ChatTemplate, Tokenizer};

mod convert;
mod draft;
pub mod embedded;
pub mod facts;
mod folder;
mod gguf;
mod head;
pub mod hub;
mod rounding;
pub mod safetensors;
pub mod sentencepiece;
mod shards;
mod source;
mod tensor;

pub use convert::{Rounded, write_rounded};
pub use facts::TokenizerFacts;
pub use hub::HubOptions;
pub use rounding::Rounding;
pub use shards::{INDEX, SINGLE};
pub use source::{Repository, Source};
pub use tensor::{Storage, TensorInfo};

use embedded::BuiltIn;
use folder::Folder;
use gguf::GgufTensors;
use head::RewardHead;
use shards::Shards;
use tensor::Take;

/// Sizes and kind of a model.
pub const CONFIG: &str = "config.json";
/// How a model generates by default.
pub const GENERATION_CONFIG: &str = "generation_config.json";
const TOKENIZER_JSON: &str = "tokenizer.json";
const TOKENIZER_MODEL: &str = "tokenizer.model";
/// Everything that tells how text becomes tokens; a checkpoint has some of these.
pub const TOKENIZER_FILES: [&str; 6] =
    [TOKENIZER_JSON, TOKENIZER_MODEL, facts::CONFIG, facts::SPECIAL_MAP, "added_tokens.json", facts::TEMPLATE];

/// Data is read in portions of this size, so that progress is seen and a lying size is noticed early.
const PORTION_BYTES: usize = 16 << 20;

/// How far a long operation has come. Sizes are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress<'a> {
    /// A file is being downloaded.
    Download {
        /// Its name in the repository.
        file: &'a str,
        /// Bytes on disk, those of an earlier attempt included.
        done: u64,
        /// Size of the whole file.
        total: u64,
    },
    /// Tensors are being read into memory.
    Load {
        /// Bytes read of all files.
        done: u64,
        /// Bytes of all tensors.
        total: u64,
    },
}

/// A model on disk, sound as far as can be known without reading its tensors.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// What to call it: the built-in name, `org/name`, or the folder's name (of a run's `model` folder, the run's).
    pub name: String,
    /// Sizes and kind of the model.
    pub config: ModelConfig,
    /// The tokenizer in the form of tokenizer.json, converted where the checkpoint has only tokenizer.model.
    pub tokenizer_json: String,
    /// What the files beside the tokenizer say.
    pub tokenizer_config: TokenizerFacts,
    tensors: Tensors,
    files: Files,
    /// Takes the place of the head that the files have.
    head: Option<RewardHead>,
}

/// Where the tensors of a checkpoint are.
#[derive(Debug, Clone)]
enum Tensors {
    Safetensors(Shards),
    Gguf(GgufTensors),
}

/// Where the small files of a checkpoint are.
#[derive(Debug, Clone)]
enum Files {
    Folder(Folder),
    BuiltIn(BuiltIn),
    Gguf {
        /// The file, or the first of several.
        path: PathBuf,
        /// What its metadata says, as config.json.
        config: String,
    },
}

struct OpenedTokenizer {
    json: String,
    facts: TokenizerFacts,
}

/// Opens the checkpoint that `source` names, downloading what is missing unless `options` forbid it.
///
/// # Errors
/// [`Error::Checkpoint`] for files that are missing or damaged or do not fit each other, [`Error::Unsupported`] for
/// models of another kind, [`Error::NotFound`] and [`Error::Unavailable`] for what the hub does not have or give.
pub fn open(source: &Source, options: &HubOptions, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Checkpoint> {
    match source {
        Source::BuiltIn(built_in) => built_in.open(),
        Source::Folder(path) => {
            let folder = Folder::open(path)?;
            match gguf_in(&folder)? {
                Some(file) => gguf::open(&file),
                None => Checkpoint::from_folder(folder.name(), &folder),
            }
        }
        Source::Gguf(path) => gguf::open(path),
        Source::Hub(repository) => {
            let path = hub::fetch(repository, options, progress)?;
            if path.is_dir() {
                return Checkpoint::from_folder(repository.id.clone(), &Folder::open(&path)?);
            }
            gguf::open(&path).map(|checkpoint| Checkpoint { name: repository.id.clone(), ..checkpoint })
        }
    }
}

/// The GGUF file, or the first part, of a folder that has no safetensors and one model in that form.
fn gguf_in(folder: &Folder) -> Result<Option<PathBuf>> {
    if folder.find(SINGLE)?.is_some() || folder.find(INDEX)?.is_some() {
        return Ok(None);
    }
    let names: Vec<String> = folder.names()?.into_iter().filter(|name| name.ends_with(".gguf")).collect();
    if names.is_empty() {
        return Ok(None);
    }
    match gguf::choose(&names, None, &folder.to_string())?.first() {
        Some(first) => folder.find(first),
        None => Ok(None),
    }
}

impl Checkpoint {
    /// The same checkpoint with the reward head in the safetensors file at `path` in place of its own, if it has one.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the file is damaged or is not one row as wide as the model.
    pub fn with_reward_head(mut self, path: &Path) -> Result<Self> {
        let head = RewardHead::open(path, self.config.hidden)?;
        head.put_into(&mut self.config);
        self.head = Some(head);
        Ok(self)
    }

    fn from_folder(name: String, folder: &Folder) -> Result<Self> {
        let config = read_config(folder)?;
        let shards = Shards::open(folder)?;
        let tokenizer = OpenedTokenizer { json: tokenizer_json(folder)?, facts: TokenizerFacts::read(folder)? };
        Ok(Self::assemble(name, config, tokenizer, Tensors::Safetensors(shards), Files::Folder(folder.clone())))
    }

    fn assemble(name: String, config: ModelConfig, tokenizer: OpenedTokenizer, tensors: Tensors, files: Files) -> Self {
        Self {
            name,
            config,
            tokenizer_json: tokenizer.json,
            tokenizer_config: tokenizer.facts,
            tensors,
            files,
            head: None,
        }
    }

    /// The bytes of the small file `name`, such as [`CONFIG`], as the checkpoint has it; None where it has none.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it cannot be read.
    pub fn file(&self, name: &str) -> Result<Option<Vec<u8>>> {
        match &self.files {
            Files::Folder(folder) => folder.bytes(name),
            Files::Gguf { config, .. } => Ok(match name {
                CONFIG => Some(config.as_bytes().to_vec()),
                TOKENIZER_JSON => Some(self.tokenizer_json.as_bytes().to_vec()),
                facts::CONFIG => Some(self.tokenizer_config.to_json().into_bytes()),
                facts::TEMPLATE => self.tokenizer_config.chat_template.as_ref().map(|text| text.as_bytes().to_vec()),
                _ => None,
            }),
            Files::BuiltIn(built_in) => Ok(built_in.file(name).map(|text| text.as_bytes().to_vec())),
        }
    }

    /// Every tensor the files hold, without reading any.
    pub fn headers(&self) -> Vec<TensorInfo> {
        let infos: Vec<TensorInfo> = match &self.tensors {
            Tensors::Safetensors(shards) => shards.infos().cloned().collect(),
            Tensors::Gguf(tensors) => tensors.infos().cloned().collect(),
        };
        match &self.head {
            None => infos,
            Some(head) => infos.into_iter().filter(|info| !head.replaces(&info.name)).chain([head.info()]).collect(),
        }
    }

    /// Whether the files hold the tensors that config.json asks for.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming all that are missing, of another shape or type, or not used.
    pub fn check_tensors(&self) -> Result<()> {
        tensor::check(self.headers().iter(), &self.config)
    }

    /// Whether its tensors can be rounded: none is quantised already.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming one that is.
    pub fn check_roundable(&self) -> Result<()> {
        match self.headers().iter().find(|info| matches!(info.storage, Storage::Quantized(_))) {
            None => Ok(()),
            Some(info) => {
                let (name, storage) = (&info.name, &info.storage);
                let what = format!("{}: {name} is {storage} already; name the original in bf16, f16 or f32", self.name);
                Err(Error::Unsupported(what))
            }
        }
    }

    /// Bytes of the tensors in the files.
    pub fn weight_bytes(&self) -> u64 {
        self.headers().iter().map(|info| info.bytes).sum()
    }

    /// Bytes of the tensors in a CPU's memory, once they are rounded.
    pub fn memory_bytes(&self, rounding: Option<Rounding>) -> u64 {
        self.headers().iter().map(|info| tensor::memory_bytes(info, &self.kept(info, rounding))).sum()
    }

    /// Whether the layers' matrices are bf16 in a CPU's memory, once they are rounded.
    pub fn is_bf16(&self, rounding: Option<Rounding>) -> bool {
        let first = self.headers().into_iter().find(|info| info.name == "model.layers.0.self_attn.q_proj.weight");
        first.is_some_and(|info| self.kept(&info, rounding) == Storage::Float(DType::BF16))
    }

    /// How a tensor is kept in a CPU's memory.
    fn kept(&self, info: &TensorInfo, rounding: Option<Rounding>) -> Storage {
        rounding.map_or_else(|| info.storage.clone(), |rounding| rounding.storage(info, &self.config))
    }

    /// Reads the tensors onto `device`, after [`Checkpoint::check_tensors`].
    ///
    /// # Errors
    /// As [`Checkpoint::check_tensors`], and [`Error::Checkpoint`] if a file cannot be read.
    pub fn load_weights(&self, device: &Device, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Weights> {
        self.load_rounded(None, device, progress)
    }

    /// As [`Checkpoint::load_weights`], the matrices rounded on the way where that is asked for: only one is in memory as it was.
    ///
    /// # Errors
    /// Those, those of [`Checkpoint::check_roundable`], and [`Error::Checkpoint`] for numbers that cannot be rounded.
    pub fn load_rounded(
        &self,
        rounding: Option<Rounding>,
        device: &Device,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Weights> {
        self.check_tensors()?;
        if rounding.is_some() {
            self.check_roundable()?;
        }
        let mut weights = Weights::new(HashMap::new());
        self.visit(progress, &mut |info, bytes| {
            let kept = rounding.map(|rounding| rounding.storage(info, &self.config));
            let (storage, bytes) = match kept {
                Some(kept) if kept != info.storage => {
                    let mut rounded = Vec::new();
                    rounding::converted(info, &bytes, &kept, &mut |part| {
                        rounded.extend_from_slice(part);
                        Ok(())
                    })?;
                    (kept, rounded)
                }
                _ => (info.storage.clone(), bytes),
            };
            put(&mut weights, info, &storage, &bytes, device)
        })?;
        Ok(weights)
    }

    /// Reads one tensor after the other, in the order of [`Checkpoint::headers`], and gives `take` its data in the order of its
    /// Hugging Face tensor. Tensors that carry nothing are left out.
    fn visit(&self, progress: &mut dyn FnMut(Progress<'_>), take: &mut Take<'_>) -> Result<()> {
        let replaced = |name: &str| self.head.as_ref().is_some_and(|head| head.replaces(name));
        let wanted = |name: &str| !is_harmless_extra(name) && !replaced(name);
        let total = self.headers().iter().filter(|info| !is_harmless_extra(&info.name)).map(|info| info.bytes).sum();
        let mut done = 0;
        progress(Progress::Load { done, total });
        let mut on_bytes = |bytes| {
            done += bytes;
            progress(Progress::Load { done, total });
        };
        match &self.tensors {
            Tensors::Safetensors(shards) => shards.visit(&wanted, &mut on_bytes, take)?,
            Tensors::Gguf(tensors) => tensors.visit(&wanted, &mut on_bytes, take)?,
        }
        self.head.as_ref().map_or(Ok(()), |head| head.visit(&mut on_bytes, take))
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if its files are damaged, or if it has more tokens than the embedding has rows.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let facts = &self.tokenizer_config;
        let special = SpecialTokens {
            bos: facts.bos_token.clone().or_else(|| self.special_token(self.config.bos)),
            eos: facts.eos_token.clone().or_else(|| self.special_token(self.config.eos.first().copied())),
            unk: facts.unk_token.clone(),
            add_bos: facts.add_bos_token,
        };
        let tokenizer = Tokenizer::from_json(&self.tokenizer_json, &special)?;
        let (count, rows) = (tokenizer.vocab_size(), self.config.vocab);
        if count <= rows {
            return Ok(tokenizer);
        }
        Err(Error::Checkpoint(format!(
            "{}: the tokenizer has token {}, the embedding only {rows} rows: they belong to different models",
            self.name,
            count - 1
        )))
    }

    /// The text of the special token `id` of config.json, for a tokenizer whose own files do not say which tokens open and end a
    /// text: SentencePiece's file alone, for one.
    fn special_token(&self, id: Option<u32>) -> Option<String> {
        let tokenizer: serde_json::Value = serde_json::from_str(&self.tokenizer_json).ok()?;
        let added = tokenizer["added_tokens"].as_array()?;
        let token = added.iter().find(|token| token["special"] == true && token["id"].as_u64() == id.map(u64::from))?;
        token["content"].as_str().map(str::to_owned)
    }

    /// The chat template: the checkpoint's, or the built-in one where it has none.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is not a template.
    pub fn chat_template(&self) -> Result<ChatTemplate> {
        match &self.tokenizer_config.chat_template {
            Some(source) => ChatTemplate::from_source(self.name.clone(), source),
            None => ChatTemplate::built_in(),
        }
    }
}

/// Adds the tensor `info`, whose `bytes` are of `storage`, to `weights`.
fn put(weights: &mut Weights, info: &TensorInfo, storage: &Storage, bytes: &[u8], device: &Device) -> Result<()> {
    match (storage, &*info.shape) {
        (Storage::Float(dtype), shape) => {
            weights.put(&info.name, Tensor::from_raw_buffer(bytes, *dtype, shape, device)?);
            Ok(())
        }
        (Storage::Quantized(format), &[rows, k]) => {
            weights.put_quantized(&info.name, Matrix { format: *format, rows, k }, bytes, device)
        }
        (storage, shape) => Err(Error::Unsupported(format!("{}: {storage} of shape {shape:?}", info.name))),
    }
}

fn read_config(folder: &Folder) -> Result<ModelConfig> {
    let Some(config) = folder.text(CONFIG)? else {
        return Err(Error::Checkpoint(format!("{folder}: no {CONFIG}; is this the folder of a model?")));
    };
    ModelConfig::parse(&config, folder.text(GENERATION_CONFIG)?.as_deref())
}

fn tokenizer_json(folder: &Folder) -> Result<String> {
    if let Some(json) = folder.text(TOKENIZER_JSON)? {
        return Ok(json);
    }
    match folder.bytes(TOKENIZER_MODEL)? {
        Some(model) => sentencepiece::to_tokenizer_json(&model),
        None => Err(Error::Checkpoint(format!("{folder}: no {TOKENIZER_JSON} and no {TOKENIZER_MODEL}"))),
    }
}

/// Memory grows with what was really read: a file that is shorter than it said cannot make us ask for more.
fn read_exactly(reader: &mut impl Read, bytes: u64, on_bytes: &mut dyn FnMut(u64)) -> std::io::Result<Vec<u8>> {
    let mut data = Vec::new();
    let mut left = usize::try_from(bytes).map_err(std::io::Error::other)?;
    data.try_reserve_exact(left).map_err(std::io::Error::other)?;
    while left > 0 {
        let (portion, start) = (left.min(PORTION_BYTES), data.len());
        data.resize(start + portion, 0);
        reader.read_exact(&mut data[start..])?;
        left -= portion;
        on_bytes(portion as u64);
    }
    Ok(data)
}
