//! Low-rank corrections of a linear layer (LoRA, Hu et al. 2021): y += scale * (x A^T) B^T.

use super::{gradient, product};
use crate::error::{Error, Result};
use crate::ops::accumulate::{add_to, add_to_columns};
use crate::ops::parameter::Parameter;
use candle_core::{DType, Tensor};
use std::ops::Range;

/// A correction to consecutive outputs of a layer.
#[derive(Debug, Clone)]
pub struct Adapter {
    pub(super) outputs: Range<usize>,
    /// `[rank, in]`
    a: Parameter,
    /// `[outputs, rank]`
    b: Parameter,
    pub(super) scale: f32,
}

impl Adapter {
    /// A correction to `outputs` by `a` `[rank, in]` and `b` `[outputs, rank]`.
    ///
    /// # Errors
    /// If the shapes do not fit each other.
    pub fn new(outputs: Range<usize>, a: Parameter, b: Parameter, scale: f32) -> Result<Self> {
        let ((rank, _), (rows, b_rank)) = (a.value().dims2()?, b.value().dims2()?);
        if rank != b_rank || rows != outputs.len() {
            return Err(Error::internal(format!("an adapter of {:?} and {:?}", a.value().dims(), b.value().dims())));
        }
        Ok(Self { outputs, a, b, scale })
    }

    /// The outputs that it corrects.
    pub fn outputs(&self) -> &Range<usize> {
        &self.outputs
    }

    /// The matrices A `[rank, in]` and B `[outputs, rank]`.
    pub fn matrices(&self) -> [&Parameter; 2] {
        [&self.a, &self.b]
    }

    /// Adds scale * B A to the rows of `weight` `[out, in]` that give these outputs. In float32 whatever `weight` is: a correction is
    /// often smaller than a step of bf16.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn merged(&self, weight: &Tensor) -> Result<Tensor> {
        let delta = product(self.b.value(), &self.a.value().t()?.contiguous()?.into())?;
        let weight = weight.to_dtype(DType::F32)?;
        let rows = weight.narrow(0, self.outputs.start, self.outputs.len())?;
        let rows = (rows + (delta * f64::from(self.scale))?)?;
        Ok(weight.slice_assign(&[self.outputs.clone(), 0..weight.dim(1)?], &rows)?)
    }

    /// The outputs `y` `[T, out]` with the correction for `x` `[T, in]`; `y` itself is changed.
    pub(super) fn add_to(&self, y: Tensor, x: &Tensor) -> Result<Tensor> {
        let correction = product(&product(x, &self.a)?, &self.b)?;
        add_to_columns(&y, &correction, self.outputs.start, self.scale)?;
        Ok(y)
    }

    /// `dx` `[T, in]` with this correction's part of the gradient of the input; `dx` itself is changed.
    pub(super) fn backward(&self, dx: Tensor, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let dy = (dy.narrow(1, self.outputs.start, self.outputs.len())? * f64::from(self.scale))?.contiguous()?;
        let low = product(x, &self.a)?;
        let d_low = gradient::backward(&low, &self.b, &dy)?;
        add_to(&dx, &gradient::backward(x, &self.a, &d_low)?)?;
        Ok(dx)
    }
}
