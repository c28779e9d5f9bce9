//! A weight as the model holds it and, where it is trained, the running sum of its gradients.

use super::quantized::{self, Matrix};
use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// How the products of a weight are computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Precision {
    /// In float32: the same bits on every processor, in training and in serving. Gradients are as exact, but have bits of their own where
    /// the processor's matrix unit computes them.
    #[default]
    F32,
    /// Both operands rounded to bf16, sums in float32: at least twice as fast where the processor has it.
    Bf16,
}

/// Clones share the weight and its gradient: a tied embedding and head are one parameter.
#[derive(Debug, Clone)]
pub struct Parameter {
    value: Tensor,
    /// What `value` stands for where it is bytes: matrices whose rows follow each other.
    matrices: Vec<Matrix>,
    /// Rows and columns of what `value` stands for where it is panels of bf16.
    packed: Option<(usize, usize)>,
    gradient: Option<Tensor>,
    precision: Precision,
}

impl Parameter {
    /// A weight that no step changes.
    pub fn frozen(value: Tensor) -> Self {
        Self { value, matrices: Vec::new(), packed: None, gradient: None, precision: Precision::F32 }
    }

    /// The quantised weight `matrix`, whose `blocks` lie row after row as in a GGUF file. No step changes it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for rows that are not whole blocks, [`Error::Checkpoint`] for another number of bytes.
    pub fn quantized(matrix: Matrix, blocks: &[u8], device: &Device) -> Result<Self> {
        Ok(Self { matrices: vec![matrix], ..Self::frozen(matrix.pack(blocks)?.to_device(device)?) })
    }

    /// The bf16 weight of shape `dims` that `panels` hold, as `linear::packed` lays them out. No step changes it.
    pub(super) fn packed(panels: Tensor, dims: (usize, usize)) -> Self {
        Self { packed: Some(dims), precision: Precision::Bf16, ..Self::frozen(panels) }
    }

    /// Rows and columns of a weight that lies in panels of bf16.
    pub(super) fn packed_dims(&self) -> Option<(usize, usize)> {
        self.packed
    }

    /// One weight out of several `[out, in]` that read the same input: their rows follow each other.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if only some are quantised, otherwise if a tensor operation fails.
    pub fn stack(parts: &[Self]) -> Result<Self> {
        let quantized = parts.iter().filter(|part| part.is_quantized()).count();
        if quantized > 0 && quantized < parts.len() {
            let what = "a layer whose q, k and v, or gate and up, are partly quantised and partly not";
            return Err(Error::Unsupported(what.to_owned()));
        }
        let matrices: Vec<Matrix> = parts.iter().flat_map(|part| part.matrices.iter().copied()).collect();
        if !matrices.is_empty() {
            let tiles: Vec<&Tensor> = parts.iter().map(|part| &part.value).collect();
            return Ok(Self { matrices, ..Self::frozen(quantized::side_by_side(&tiles)?) });
        }
        let same = parts.windows(2).all(|pair| pair[0].value.dtype() == pair[1].value.dtype());
        let wide = |part: &Self| if same { Ok(part.value.clone()) } else { part.value.to_dtype(DType::F32) };
        let values = parts.iter().map(wide).collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Self::frozen(Tensor::cat(&values, 0)?))
    }

    /// Whether its value is quantised: then it can be multiplied by and read, but not trained.
    pub fn is_quantized(&self) -> bool {
        !self.matrices.is_empty()
    }

    /// What a quantised weight stands for, `[out, in]` f32; another weight as it is.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub(super) fn dequantized(&self) -> Result<Tensor> {
        if !self.is_quantized() {
            return Ok(self.value.clone());
        }
        let (rows, k) = self.dims2()?;
        let (tiles, mut numbers, mut first) = (self.value.to_vec1::<u8>()?, Vec::with_capacity(rows * k), 0);
        for matrix in &self.matrices {
            let end = first + matrix.tiles_bytes();
            numbers.extend(matrix.widened(&tiles[first..end]));
            first = end;
        }
        Ok(Tensor::from_vec(numbers, (rows, k), self.value.device())?)
    }

    /// Of a quantised weight, the matrices whose rows follow each other; none of another.
    pub(super) fn matrices(&self) -> &[Matrix] {
        &self.matrices
    }

    /// Rows and columns of a matrix: the outputs and inputs of a layer, tokens and width of an embedding.
    ///
    /// # Errors
    /// If it is a vector.
    pub fn dims2(&self) -> Result<(usize, usize)> {
        match (self.matrices.first(), self.packed) {
            (Some(first), _) => Ok((self.matrices.iter().map(|matrix| matrix.rows).sum(), first.k)),
            (None, Some(dims)) => Ok(dims),
            (None, None) => Ok(self.value.dims2()?),
        }
    }

    /// A weight to be trained: its float32 copy, and a gradient of zeros.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn trained(value: &Tensor) -> Result<Self> {
        // A copy: the weights of a checkpoint may be shared with another model, the reference of preference learning.
        let value = value.to_dtype(DType::F32)?.copy()?;
        let gradient = Some(value.zeros_like()?);
        Ok(Self { gradient, ..Self::frozen(value) })
    }

    /// The same parameter with its products computed in `precision`.
    #[must_use]
    pub fn computed_in(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// How its products are computed.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The weight; bytes where it is quantised, panels where it is packed.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// The sum of the gradients since it was cleared, float32, in the shape of the weight. None for a frozen one.
    pub fn gradient(&self) -> Option<&Tensor> {
        self.gradient.as_ref()
    }
}

impl From<Tensor> for Parameter {
    fn from(value: Tensor) -> Self {
        Self::frozen(value)
    }
}
