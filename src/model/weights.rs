//! The tensors of one checkpoint on their way into a model: each is taken once, by name and expected shape, and
//! whatever is missing, misshapen or left over is told together at the end. Reading files is `checkpoint`'s.

use std::collections::{BTreeSet, HashMap};

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};
use crate::ops::parameter::Parameter;

pub use crate::ops::quantized::{ABS_MAX, Format, Matrix, quantize};

/// At most this many names are spelt out for each kind of problem; the rest are counted.
const NAMES_MAX: usize = 8;

/// Named tensors waiting to be taken.
#[derive(Debug)]
pub struct Weights {
    tensors: HashMap<String, Tensor>,
    quantized: HashMap<String, Parameter>,
    problems: WeightProblems,
}

impl Weights {
    /// All tensors of a checkpoint, by their Hugging Face names.
    pub fn new(tensors: HashMap<String, Tensor>) -> Self {
        Self { tensors, quantized: HashMap::new(), problems: WeightProblems::default() }
    }

    /// Takes the tensor `name`, which must have the given shape and be f32, f16 or bf16.
    ///
    /// A tensor that is missing or wrong is recorded for [`Weights::finish`], and zeros of the right shape that
    /// occupy no memory stand in for it, so that one run over a model finds every problem.
    ///
    /// # Errors
    /// Only if the stand-in cannot be made.
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        match self.tensors.remove(name) {
            None => self.problems.missing(name),
            Some(tensor) if tensor.dims() != shape => self.problems.misshapen(name, tensor.dims(), shape),
            Some(tensor) if !matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16) => {
                self.problems.wrong_dtype(name, tensor.dtype().as_str());
            }
            Some(tensor) => return Ok(tensor),
        }
        stand_in(shape)
    }

    /// Takes the matrix `name` as [`Weights::take`] does; it may be quantised.
    ///
    /// # Errors
    /// Only if the stand-in cannot be made.
    pub fn take_matrix(&mut self, name: &str, shape: &[usize]) -> Result<Parameter> {
        match self.quantized.remove(name) {
            Some(matrix) => {
                let (rows, k) = matrix.dims2()?;
                if shape == [rows, k] {
                    return Ok(matrix);
                }
                self.problems.misshapen(name, &[rows, k], shape);
                Ok(stand_in(shape)?.into())
            }
            None => Ok(self.take(name, shape)?.into()),
        }
    }

    /// Adds the quantised `matrix` `name`, whose `blocks` lie row after row as in a GGUF file.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for rows that are not whole blocks, [`Error::Checkpoint`] for another number of bytes.
    pub fn put_quantized(
        &mut self,
        name: impl Into<String>,
        matrix: Matrix,
        blocks: &[u8],
        device: &Device,
    ) -> Result<()> {
        self.quantized.insert(name.into(), Parameter::quantized(matrix, blocks, device)?);
        Ok(())
    }

    /// Whether there are quantised matrices: a model of them computes, but cannot be trained.
    pub fn is_quantized(&self) -> bool {
        !self.quantized.is_empty()
    }

    /// Adds the tensor `name`, in the place of one that is there.
    pub fn put(&mut self, name: impl Into<String>, tensor: Tensor) {
        self.tensors.insert(name.into(), tensor);
    }

    /// Forgets the tensor `name`, if it is there.
    pub fn discard(&mut self, name: &str) {
        self.tensors.remove(name);
    }

    /// Whether a tensor of this name is still to be taken.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names and shapes of the tensors still to be taken, in no particular order.
    pub fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.dims()))
    }

    /// Ends the loading of a model.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming every tensor that was missing, had the wrong shape or type, or was never taken.
    /// Left-over tensors that carry nothing (see [`is_harmless_extra`]) are passed over.
    pub fn finish(mut self) -> Result<()> {
        for name in self.tensors.keys().chain(self.quantized.keys()).filter(|name| !is_harmless_extra(name)) {
            self.problems.unused(name);
        }
        self.problems.into_result()
    }
}

/// Zeros that occupy no memory.
fn stand_in(shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::zeros((), DType::F32, &Device::Cpu)?.broadcast_as(shape)?)
}

/// Tensors that old exports carry and no model needs: the rotary frequencies, which follow from `rope_theta`.
pub fn is_harmless_extra(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
}

/// Collects what is wrong with a set of tensors and tells it in one error.
#[derive(Debug, Default)]
pub struct WeightProblems {
    missing: BTreeSet<String>,
    wrong: BTreeSet<String>,
    unused: BTreeSet<String>,
}

impl WeightProblems {
    /// The model needs `name` and the checkpoint lacks it.
    pub fn missing(&mut self, name: &str) {
        self.missing.insert(name.to_owned());
    }

    /// `name` is there with another shape.
    pub fn misshapen(&mut self, name: &str, found: &[usize], expected: &[usize]) {
        self.wrong.insert(format!("{name} is {found:?} instead of {expected:?}"));
    }

    /// `name` is there with an element type that is not read.
    pub fn wrong_dtype(&mut self, name: &str, found: &str) {
        self.wrong.insert(format!("{name} is {found} instead of f32, f16 or bf16"));
    }

    /// The checkpoint has `name` and the model has no place for it.
    pub fn unused(&mut self, name: &str) {
        self.unused.insert(name.to_owned());
    }

    /// Nothing if nothing was recorded.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] listing all that was recorded, the same text for the same problems.
    pub fn into_result(self) -> Result<()> {
        let kinds = [("missing", self.missing), ("wrong", self.wrong), ("not used by this model", self.unused)];
        let parts: Vec<String> = kinds
            .iter()
            .filter(|(_, names)| !names.is_empty())
            .map(|(kind, names)| format!("{} {kind} ({})", names.len(), listed(names)))
            .collect();
        if parts.is_empty() {
            return Ok(());
        }
        Err(Error::Checkpoint(format!("the tensors do not fit config.json: {}", parts.join("; "))))
    }
}

fn listed(names: &BTreeSet<String>) -> String {
    let shown: Vec<&str> = names.iter().take(NAMES_MAX).map(String::as_str).collect();
    let more = names.len().saturating_sub(NAMES_MAX);
    let tail = if more > 0 { format!(" and {more} more") } else { String::new() };
    shown.join(", ") + &tail
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn weights(tensors: &[(&str, &[usize], DType)]) -> Weights {
        let tensor = |shape: &[usize], dtype| Tensor::ones(shape, dtype, &Device::Cpu).unwrap();
        Weights::new(tensors.iter().map(|(name, shape, dtype)| ((*name).to_owned(), tensor(shape, *dtype))).collect())
    }

    #[test]
    fn a_tensor_is_taken_once_as_it_is() {
        let mut weights = weights(&[("a", &[2, 3], DType::BF16)]);
        assert!(weights.contains("a"));
        assert_eq!(weights.shapes().collect::<Vec<_>>(), [("a", &[2, 3][..])]);
        let tensor = weights.take("a", &[2, 3]).unwrap();
        assert_eq!((tensor.dims(), tensor.dtype()), (&[2, 3][..], DType::BF16));
        assert!(!weights.contains("a"));
        weights.finish().unwrap();
    }

    #[test]
    fn every_problem_is_told_at_once() {
        let mut weights = weights(&[
            ("b", &[2], DType::F32),
            ("c", &[4], DType::I64),
            ("extra", &[1], DType::F32),
            ("model.layers.0.self_attn.rotary_emb.inv_freq", &[4], DType::F32),
        ]);
        for (name, shape) in [("a", &[1usize << 20, 1 << 20][..]), ("b", &[3]), ("c", &[4])] {
            assert_eq!(weights.take(name, shape).unwrap().dims(), shape);
        }
        let expected = "the tensors do not fit config.json: 1 missing (a); \
                        2 wrong (b is [2] instead of [3], c is i64 instead of f32, f16 or bf16); \
                        1 not used by this model (extra)";
        assert_eq!(weights.finish(), Err(Error::Checkpoint(expected.to_owned())));
    }

    #[test]
    fn long_lists_are_cut() {
        let mut problems = WeightProblems::default();
        for i in 0..20 {
            problems.missing(&format!("t{i:02}"));
        }
        let message = problems.into_result().unwrap_err().to_string();
        assert!(message.ends_with("20 missing (t00, t01, t02, t03, t04, t05, t06, t07 and 12 more)"), "{message}");
    }
}
