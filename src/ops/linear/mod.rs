//! y = x W^T: one linear layer, its storages, and the order in which every body adds up.
//! Sums over k run in 16 lanes (k mod 16), each a chain of fused multiply-adds in order of k, folded by one fixed tree.

use super::lanes::Body;
use super::parameter::{Parameter, Precision};
use super::quantized;
use super::storage::{Weights, slice};
use crate::error::{Error, Result};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Shape, Tensor};

pub mod adapter;
mod blocks;
mod brain;
#[cfg(feature = "cuda")]
mod device;
mod dot;
mod float;
mod gradient;
mod matrix;
mod packed;
#[cfg(target_arch = "x86_64")]
mod pairs;
#[cfg(not(target_arch = "x86_64"))]
#[path = "no_pairs.rs"]
mod pairs;
#[cfg(target_arch = "x86_64")]
mod parts;
pub(super) mod small;
mod split;

use adapter::Adapter;
use blocks::Sizes;
use brain::{Left, Right};

/// A linear layer without bias.
#[derive(Debug, Clone)]
pub enum Linear {
    /// The weight `[out, in]` as the checkpoint has it: f32, bf16, f16 or quantised.
    Dense(Parameter),
    /// A dense layer and low-rank corrections to some of its outputs.
    Adapted(Parameter, Vec<Adapter>),
}

impl Linear {
    /// A layer over `weight` `[out, in]`, quantised, f32, bf16 or f16, kept as it is and contiguous. Fails for other types and ranks.
    pub fn dense(weight: impl Into<Parameter>) -> Result<Self> {
        let weight = weight.into();
        weight.dims2()?;
        if weight.is_quantized() {
            return Ok(Self::Dense(weight));
        }
        match weight.value().dtype() {
            DType::F32 | DType::BF16 | DType::F16 if weight.value().is_contiguous() => Ok(Self::Dense(weight)),
            DType::F32 | DType::BF16 | DType::F16 => Ok(Self::Dense(weight.value().contiguous()?.into())),
            other => Err(Error::Unsupported(format!("linear weights of type {other:?}"))),
        }
    }

    /// `x` `[T, in]` f32 to `[T, out]` f32. The bits of a row depend on that row and the weights only.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => product(x, weight),
            Self::Adapted(weight, adapters) => {
                let y = product(x, weight)?;
                adapters.iter().try_fold(y, |y, adapter| adapter.add_to(y, x))
            }
        }
    }

    /// The gradient of the input, `[T, in]`, from the input `x` `[T, in]` and the gradient `dy` `[T, out]` of the output;
    /// the gradients of trained weights are added to theirs. dx = dy W, dW = dy^T x.
    pub fn backward(&self, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let (weight, adapters) = match self {
            Self::Dense(weight) => (weight, &[][..]),
            Self::Adapted(weight, adapters) => (weight, &adapters[..]),
        };
        let dx = gradient::backward(x, weight, dy)?;
        adapters.iter().try_fold(dx, |dx, adapter| adapter.backward(dx, x, dy))
    }

    /// The weight `[out, in]` without corrections.
    pub fn weight(&self) -> &Parameter {
        let (Self::Dense(weight) | Self::Adapted(weight, _)) = self;
        weight
    }

    /// Lays a bf16 weight out for products with activations rounded to bf16, two to four times as fast for prompts and batches where the
    /// processor has an instruction for it; other weights, and all on other processors, stay as they are. Not to be trained then.
    /// Returns whether it did.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn pack(&mut self) -> Result<bool> {
        let weight = self.weight_mut();
        if weight.is_quantized() || weight.packed_dims().is_some() || weight.gradient().is_some() {
            return Ok(false);
        }
        let Some(panels) = packed::pack(weight.value())? else { return Ok(false) };
        *weight = Parameter::packed(panels, weight.dims2()?);
        Ok(true)
    }

    /// The weight to be replaced.
    pub fn weight_mut(&mut self) -> &mut Parameter {
        let (Self::Dense(weight) | Self::Adapted(weight, _)) = self;
        weight
    }

    /// Outputs and inputs of the layer.
    pub fn dims(&self) -> Result<(usize, usize)> {
        self.weight().dims2()
    }
}

/// down(silu(gate(x)) * up(x)) at once, for `x` `[T, in]` f32, gate and up in one layer, `[2 * inter, in]`, and down `[out, inter]`, to
/// `[T, out]`: the bits of one after the other. None where there is nothing better than that.
///
/// # Errors
/// If a tensor operation fails.
pub fn gated(x: &Tensor, gate_up: &Linear, down: &Linear) -> Result<Option<Tensor>> {
    let (Linear::Dense(gate_up), Linear::Dense(down)) = (gate_up, down) else { return Ok(None) };
    let (Some((both, k)), Some((columns, _))) = (gate_up.packed_dims(), down.packed_dims()) else { return Ok(None) };
    let Some(gated) = packed::Gated::new(x.dim(0)?, k, both, columns) else { return Ok(None) };
    Ok(Some(x.apply_op3_no_bwd(gate_up.value(), down.value(), &gated)?))
}

/// `x` `[T, in]` f32 and `weight` `[out, in]` to `[T, out]`.
fn product(x: &Tensor, weight: &Parameter) -> Result<Tensor> {
    let body = Body::best();
    if weight.is_quantized() {
        return Ok(x.apply_op2_no_bwd(weight.value(), &quantized::Product { body, matrices: weight.matrices() })?);
    }
    if let Some((columns, _)) = weight.packed_dims() {
        return Ok(x.apply_op2_no_bwd(weight.value(), &packed::Product { columns })?);
    }
    let product = Product { body, precision: weight.precision() };
    Ok(x.apply_op2_no_bwd(weight.value(), &product)?)
}

/// `x` `[T, in]`, `weight` `[out, in]` to `[T, out]`.
struct Product {
    body: Body,
    precision: Precision,
}

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, k) = x_layout.shape().dims2()?;
        let (columns, weight_k) = weight_layout.shape().dims2()?;
        if k != weight_k {
            candle_core::bail!("linear: the input has {k} features, the weight takes {weight_k}");
        }
        let x = slice("linear", x, x_layout)?;
        let sizes = Sizes { rows, columns, k };
        let weight = Weights::new("linear", weight, weight_layout)?;
        let y = match (self.precision, weight) {
            (Precision::F32, Weights::F32(weight)) => dot::product(self.body, x, weight, sizes),
            (Precision::F32, Weights::Bf16(weight)) => dot::product(self.body, x, weight, sizes),
            (Precision::F32, Weights::F16(weight)) => dot::product(self.body, x, weight, sizes),
            (Precision::Bf16, weight) => {
                brain::product(self.body, Left::Rows(x), Right::Columns(&weight.widened()), sizes)
            }
        };
        Ok((CpuStorage::F32(y), Shape::from((rows, columns))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        device::product((x, x_layout), (weight, weight_layout))
    }
}

#[cfg(test)]
mod tests;
