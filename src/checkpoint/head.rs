//! A reward head in a file of its own, which makes a reward model of a checkpoint that has a language head or none.

use std::path::Path;

use super::gguf::{LANGUAGE_HEAD, REWARD_HEAD};
use super::safetensors::TensorFile;
use super::tensor::{Storage, Take, TensorInfo};
use crate::error::{Error, Result};
use crate::model::config::{HeadKind, ModelConfig};

/// What a classifier with one label calls its head.
const SCORE: &str = "score.weight";

/// A file with the one tensor of a head.
#[derive(Debug, Clone)]
pub(super) struct RewardHead {
    file: TensorFile,
    info: TensorInfo,
}

impl RewardHead {
    /// Reads the header of the safetensors file at `path`: one tensor, whatever its name, `[1, hidden]` or `[hidden]`.
    pub(super) fn open(path: &Path, hidden: usize) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let wrong = |what: String| Error::file(path, format!("{what}; a reward head is one row of {hidden} numbers"));
        let [tensor] = file.tensors.as_slice() else {
            return Err(wrong(format!("has {} tensors", file.tensors.len())));
        };
        let is_row = matches!(*tensor.shape, [1, width] | [width] if width == hidden);
        if !is_row || !matches!(tensor.storage, Storage::Float(_)) {
            return Err(wrong(format!("{} is {} of shape {:?}", tensor.name, tensor.storage, tensor.shape)));
        }
        let info = TensorInfo { name: REWARD_HEAD.to_owned(), shape: vec![1, hidden], ..tensor.clone() };
        Ok(Self { file, info })
    }

    /// What is said about the tensor under its name in the model.
    pub(super) fn info(&self) -> TensorInfo {
        self.info.clone()
    }

    /// Whether the tensor `name` of a checkpoint is a head, in whose place this one is.
    pub(super) fn replaces(&self, name: &str) -> bool {
        [LANGUAGE_HEAD, REWARD_HEAD, SCORE].contains(&name)
    }

    /// Makes `config` that of a reward model with this head.
    pub(super) fn put_into(&self, config: &mut ModelConfig) {
        (config.head, config.head_tensor, config.tied) = (HeadKind::Reward, Some(REWARD_HEAD), false);
    }

    /// Reads the tensor; see [`TensorFile::visit`].
    pub(super) fn visit(&self, on_bytes: &mut dyn FnMut(u64), take: &mut Take<'_>) -> Result<()> {
        self.file.visit(&|_| true, on_bytes, &mut |_, data| take(&self.info, data))
    }
}
