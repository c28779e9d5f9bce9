//! Log-probabilities under the reference model: computed once, before training, and kept in a file whose name is a hash of the
//! reference's weights and of every text.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::example::{Example, Text};
use super::learner::Learner;
use super::step::read;
use crate::checkpoint::safetensors;
use crate::error::{Error, Result};
use crate::model::Model;

/// Tokens between two reports of progress, at least.
const WINDOW_TOKENS: usize = 1 << 16;
const VALUES: &str = "logps";

/// The reference's log-probability of each text of a list.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct References {
    values: Vec<f64>,
    /// `[examples + 1]`: where the texts of an example begin.
    starts: Vec<usize>,
}

impl References {
    /// Those of the texts of example `index`; none where there is no reference.
    pub fn of(&self, index: usize) -> &[f64] {
        match self.starts.get(index..index + 2) {
            Some(bounds) => &self.values[bounds[0]..bounds[1]],
            None => &[],
        }
    }

    /// For the texts of `examples` from the first of `values` on, which are shortened by them.
    fn take(examples: &[Example], values: &mut &[f64]) -> Self {
        let mut starts = vec![0];
        let mut end = 0;
        for example in examples {
            end += example.texts().count();
            starts.push(end);
        }
        let (mine, rest) = values.split_at(end);
        *values = rest;
        Self { values: mine.to_vec(), starts }
    }
}

/// All log-probabilities that a run needs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Cache {
    /// Of the examples to learn from.
    pub train: References,
    /// Of those held out.
    pub test: References,
    /// Of the further texts, in their order.
    pub further: Vec<f64>,
}

/// What the reference is asked about.
pub struct Question<'a> {
    /// Examples to learn from.
    pub train: &'a [Example],
    /// Examples held out.
    pub test: &'a [Example],
    /// Further texts: mismatched answers.
    pub further: &'a [Text],
    /// Most tokens of a micro-batch.
    pub tokens_max: usize,
}

/// Answers `question` from the file in `folder`, or asks `model` and writes the file. `progress` is told texts done and in all.
///
/// # Errors
/// As [`Learner::read`], or if the file cannot be written.
pub fn ask(folder: &Path, model: Model, question: &Question<'_>, progress: &mut dyn FnMut(u64, u64)) -> Result<Cache> {
    let texts: Vec<&Text> = [question.train, question.test]
        .into_iter()
        .flatten()
        .flat_map(Example::texts)
        .chain(question.further)
        .collect();
    let path = path(folder, &model, &texts)?;
    let values = match stored(&path, texts.len()) {
        Some(values) => values,
        None => {
            let values = compute(model, &texts, question.tokens_max, progress)?;
            store(&path, &values)?;
            values
        }
    };
    let mut rest = &values[..];
    let (train, test) = (References::take(question.train, &mut rest), References::take(question.test, &mut rest));
    Ok(Cache { train, test, further: rest.to_vec() })
}

/// The file for `texts` under `model`.
fn path(folder: &Path, model: &Model, texts: &[&Text]) -> Result<PathBuf> {
    let mut hash = blake3::Hasher::new();
    for named in model.parameters() {
        for part in &named.parts {
            hash.update(part.name.as_bytes());
        }
        let values: Vec<f32> = named.parameter.value().to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        for value in values {
            hash.update(&value.to_le_bytes());
        }
    }
    for text in texts {
        hash.update(&(text.tokens.len() as u64).to_le_bytes());
        for (token, target) in text.tokens.iter().zip(&text.targets) {
            hash.update(&token.to_le_bytes());
            hash.update(&[u8::from(*target)]);
        }
    }
    Ok(folder.join(format!("reference-{}.safetensors", &hash.finalize().to_hex()[..16])))
}

/// The values in the file, if it is there and whole.
fn stored(path: &Path, count: usize) -> Option<Vec<f64>> {
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).ok()?;
    let values: Vec<f64> = tensors.get(VALUES)?.to_vec1().ok()?;
    (values.len() == count).then_some(values)
}

fn store(path: &Path, values: &[f64]) -> Result<()> {
    let tensors = HashMap::from([(VALUES.to_owned(), Tensor::new(values, &Device::Cpu)?)]);
    let temporary = path.with_extension("tmp");
    safetensors::write(&temporary, &tensors)?;
    std::fs::rename(&temporary, path).map_err(|error| Error::file(path, error))
}

fn compute(model: Model, texts: &[&Text], tokens_max: usize, progress: &mut dyn FnMut(u64, u64)) -> Result<Vec<f64>> {
    let device = model.decoder.embedding().value().device().clone();
    let learner = Learner { model, keep: crate::model::tape::Keep::Inputs, device };
    let mut values = Vec::with_capacity(texts.len());
    while values.len() < texts.len() {
        let rest = &texts[values.len()..];
        let mut tokens = 0;
        let enough = |text: &&Text| {
            tokens += text.tokens.len();
            tokens >= WINDOW_TOKENS
        };
        let count = rest.iter().position(enough).map_or(rest.len(), |last| last + 1);
        values.extend(read(&learner, &rest[..count], tokens_max)?.iter().map(|reading| reading.value));
        progress(values.len() as u64, texts.len() as u64);
    }
    Ok(values)
}
