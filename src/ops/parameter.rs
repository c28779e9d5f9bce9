//! A weight as the model holds it and, where it is trained, the running sum of its gradients.

use crate::error::Result;
use candle_core::{DType, Tensor};

/// How the products of a weight are computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Precision {
    /// In float32, with the bits of serving.
    #[default]
    F32,
    /// Both operands rounded to bf16, sums in float32: for training, about twice as fast where the processor has it.
    Bf16,
}

/// Clones share the weight and its gradient: a tied embedding and head are one parameter.
#[derive(Debug, Clone)]
pub struct Parameter {
    value: Tensor,
    gradient: Option<Tensor>,
    precision: Precision,
}

impl Parameter {
    /// A weight that no step changes.
    pub fn frozen(value: Tensor) -> Self {
        Self { value, gradient: None, precision: Precision::F32 }
    }

    /// A weight to be trained: its float32 copy, and a gradient of zeros.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn trained(value: &Tensor) -> Result<Self> {
        // A copy: the weights of a checkpoint may be shared with another model, the reference of preference learning.
        let value = value.to_dtype(DType::F32)?.copy()?;
        let gradient = Some(value.zeros_like()?);
        Ok(Self { value, gradient, precision: Precision::F32 })
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

    /// The weight.
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
