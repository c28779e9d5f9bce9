//! What a snapshot holds: trained weights and moments in float32, where the run was, and hashes of its data. The order of the
//! data is not in it: it follows from the seed.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::data::DataFile;
use super::optimizer::Optimizer;
use super::step::Tally;
use crate::checkpoint::safetensors;
use crate::error::{Error, Result};
use crate::ops::accumulate::copy_to;

const WEIGHTS: &str = "weights.safetensors";
const MOMENTS: &str = "moments.safetensors";
const PLACE: &str = "state.json";

/// Where a run is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// Steps that are done, bad ones included.
    pub step: u64,
    /// Steps that the optimiser took.
    pub moves: u64,
    /// Tokens that went through the model in training.
    pub tokens: u64,
    /// Steps that were passed over.
    pub bad_steps: u64,
    /// What was measured since the last record.
    pub tally: Tally,
    /// Hashes of the files that the run reads, in their order.
    pub data: Vec<String>,
}

impl Place {
    /// Before the first step of a run that reads `files`.
    pub fn first(files: &[DataFile]) -> Self {
        Self { data: files.iter().map(|file| file.blake3.clone()).collect(), ..Self::default() }
    }

    /// That `files` are what the run began with: with others it would go on in another order, over rows it has seen.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the first file that is not.
    pub fn check_data(&self, files: &[DataFile]) -> Result<()> {
        let changed = files.iter().zip(&self.data).find(|(file, known)| file.blake3 != **known);
        let Some((file, _)) = changed else { return Ok(()) };
        let what = format!("{} has changed since this run began", file.path.display());
        Err(Error::invalid("data.source", format!("{what}; put it back, or begin anew with --fresh")))
    }
}

/// Writes the state of `optimizer` and its weights, and `place`, into `folder`.
///
/// # Errors
/// If a file cannot be written.
pub fn save(folder: &Path, optimizer: &Optimizer, place: &Place) -> Result<()> {
    let (mut weights, mut moments) = (HashMap::new(), HashMap::new());
    for slot in optimizer.slots() {
        weights.insert(slot.name().to_owned(), slot.named.parameter.value().clone());
        moments.insert(slot.name().to_owned(), slot.moments.clone());
    }
    safetensors::write(&folder.join(WEIGHTS), &weights)?;
    safetensors::write(&folder.join(MOMENTS), &moments)?;
    let path = folder.join(PLACE);
    let text = serde_json::to_string_pretty(place).map_err(Error::internal)?;
    std::fs::write(&path, text).map_err(|error| Error::file(&path, error))
}

/// Puts what [`save`] wrote to `folder` into `optimizer` and its weights.
///
/// # Errors
/// [`Error::Checkpoint`] if a file is damaged or of another model.
pub fn restore(folder: &Path, optimizer: &mut Optimizer) -> Result<Place> {
    let path = folder.join(PLACE);
    let text = std::fs::read_to_string(&path).map_err(|error| Error::file(&path, error))?;
    let place: Place = serde_json::from_str(&text).map_err(|error| Error::file(&path, error))?;
    for (name, of) in [(WEIGHTS, Of::Weights), (MOMENTS, Of::Moments)] {
        let path = folder.join(name);
        let mut tensors =
            candle_core::safetensors::load(&path, &Device::Cpu).map_err(|error| Error::file(&path, error))?;
        for slot in optimizer.slots() {
            let target = match of {
                Of::Weights => slot.named.parameter.value(),
                Of::Moments => &slot.moments,
            };
            let tensor = tensors.remove(slot.name()).ok_or_else(|| missing(&path, slot.name()))?;
            copy_to(target, &tensor.to_device(target.device())?).map_err(|error| Error::file(&path, error))?;
        }
        if let Some(name) = tensors.keys().next() {
            return Err(Error::file(&path, format!("{name} is not trained by this recipe")));
        }
    }
    optimizer.resume(place.moves);
    Ok(place)
}

#[derive(Clone, Copy)]
enum Of {
    Weights,
    Moments,
}

fn missing(path: &Path, name: &str) -> Error {
    Error::file(path, format!("{name} is missing"))
}

/// The trained tensors and all others of a model by their Hugging Face names, as views of its weights; corrections are left out.
///
/// # Errors
/// If a tensor operation fails.
pub fn tensors(model: &crate::model::Model) -> Result<HashMap<String, Tensor>> {
    let mut all = HashMap::new();
    for named in model.parameters() {
        for part in named.parts.iter().filter(|part| !part.name.contains(".lora_")) {
            let rows = named.parameter.value().narrow(0, part.rows.start, part.rows.len())?;
            all.insert(part.name.clone(), rows);
        }
    }
    Ok(all)
}

/// The matrices of all corrections, and a reward head that is trained beside them, by the names that PEFT gives them.
pub fn adapters(model: &crate::model::Model) -> HashMap<String, Tensor> {
    let trained = model.parameters().into_iter().filter(|named| named.parameter.gradient().is_some());
    let named = trained.filter_map(|named| {
        let name = &named.parts.first()?.name;
        Some((format!("base_model.model.{name}"), named.parameter.value().clone()))
    });
    named.collect()
}
