//! What a file says about one of its tensors, and whether a model can be made of them.

use std::collections::HashMap;
use std::fmt;

use candle_core::DType;

use crate::error::Result;
use crate::model::config::ModelConfig;
use crate::model::weights::{Format, Matrix, WeightProblems, is_harmless_extra};

/// How numbers are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Storage {
    /// F32, F16 or BF16.
    Float(DType),
    /// In blocks of few bits.
    Quantized(Format),
    /// In another way, which no model is read from.
    Other(String),
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Float(dtype) => f.write_str(dtype.as_str()),
            Self::Quantized(format) => f.write_str(format.name()),
            Self::Other(name) => f.write_str(name),
        }
    }
}

/// What a header says about one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its Hugging Face name, such as `model.norm.weight`.
    pub name: String,
    /// How its numbers are stored.
    pub storage: Storage,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Size of its data in bytes.
    pub bytes: u64,
}

/// What happens to a tensor that was read: to its data, in the order of its Hugging Face tensor.
pub(super) type Take<'a> = dyn FnMut(&TensorInfo, Vec<u8>) -> Result<()> + 'a;

/// Bytes of a tensor of this shape, whose rows are whole blocks.
pub(super) fn bytes(storage: &Storage, shape: &[usize]) -> u64 {
    let count: u64 = shape.iter().map(|dim| *dim as u64).product();
    match storage {
        Storage::Float(dtype) => count * dtype.size_in_bytes() as u64,
        Storage::Quantized(format) => count / format.block_len() as u64 * format.block_bytes() as u64,
        Storage::Other(_) => 0,
    }
}

/// Bytes that `info` occupies as `kept` once it is loaded for a CPU, which quantised matrices are laid out anew for.
pub(super) fn memory_bytes(info: &TensorInfo, kept: &Storage) -> u64 {
    match (kept, &*info.shape) {
        (Storage::Quantized(format), &[rows, k]) => Matrix { format: *format, rows, k }.tiles_bytes() as u64,
        // What is not converted has the size that the file was checked for; its shape may still be anything.
        _ if *kept == info.storage => info.bytes,
        _ => bytes(kept, &info.shape),
    }
}

/// Compares names, shapes and element types with what the model needs.
pub(super) fn check<'a>(infos: impl Iterator<Item = &'a TensorInfo>, config: &ModelConfig) -> Result<()> {
    let mut problems = WeightProblems::default();
    let mut found: HashMap<&str, &TensorInfo> = infos.map(|info| (info.name.as_str(), info)).collect();
    for (name, shape) in config.weight_shapes() {
        match found.remove(name.as_str()) {
            None => problems.missing(&name),
            Some(info) if info.shape != shape => problems.misshapen(&name, &info.shape, &shape),
            Some(TensorInfo { storage: Storage::Other(storage), .. }) => problems.wrong_dtype(&name, storage),
            // Norms are vectors, which are never quantised.
            Some(TensorInfo { storage: Storage::Quantized(format), .. }) if shape.len() == 1 => {
                problems.wrong_dtype(&name, format.name());
            }
            Some(_) => {}
        }
    }
    for name in found.into_keys().filter(|name| !is_harmless_extra(name)) {
        problems.unused(name);
    }
    problems.into_result()
}
