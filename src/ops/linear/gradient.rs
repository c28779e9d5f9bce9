//! The gradients of a linear layer: dx = dy W and dW += dy^T x.

use super::blocks::Sizes;
use super::brain::{self, Left, Right};
use super::float;
use super::split::Split;
use crate::error::Result;
use crate::ops::lanes::{Body, Element};
use crate::ops::parameter::{Parameter, Precision};
use crate::ops::storage::{Weights, slice, slice_mut};
use candle_core::{CpuStorage, CustomOp2, InplaceOp3, Layout, Shape, Tensor};

/// dx `[T, in]` from `x` `[T, in]` and `dy` `[T, out]`, both contiguous; dW is added to the gradient of a trained weight.
pub(super) fn backward(x: &Tensor, weight: &Parameter, dy: &Tensor) -> Result<Tensor> {
    let (body, precision) = (Body::best(), weight.precision());
    if let Some(gradient) = weight.gradient() {
        gradient.inplace_op3(dy, x, &OfWeight { body, precision })?;
    }
    Ok(dy.apply_op2_no_bwd(weight.value(), &OfInput { body, precision })?)
}

/// `dy` `[T, out]`, `weight` `[out, in]` to dx `[T, in]`.
struct OfInput {
    body: Body,
    precision: Precision,
}

impl CustomOp2 for OfInput {
    fn name(&self) -> &'static str {
        "linear gradient of the input"
    }

    fn cpu_fwd(
        &self,
        dy: &CpuStorage,
        dy_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, k) = dy_layout.shape().dims2()?;
        let (weight_k, columns) = weight_layout.shape().dims2()?;
        if k != weight_k {
            candle_core::bail!("{}: {k} outputs, the weight gives {weight_k}", self.name());
        }
        let dy = slice(self.name(), dy, dy_layout)?;
        let sizes = Sizes { rows, columns, k };
        let weight = Weights::new(self.name(), weight, weight_layout)?;
        let dx = match (self.precision, weight) {
            (Precision::F32, Weights::F32(weight)) => product(self.body, dy, weight, sizes),
            (Precision::F32, Weights::Bf16(weight)) => product(self.body, dy, weight, sizes),
            (Precision::F32, Weights::F16(weight)) => product(self.body, dy, weight, sizes),
            (Precision::Bf16, weight) => {
                brain::product(self.body, Left::Rows(dy), Right::Rows(&weight.widened()), sizes)
            }
        };
        Ok((CpuStorage::F32(dx), Shape::from((rows, columns))))
    }
}

/// `dy` `[rows, k]` times `weight` `[k, columns]` in float32.
fn product<E: Element>(body: Body, dy: &[f32], weight: &[E], sizes: Sizes) -> Vec<f32> {
    match Split::detect() {
        Some(split) => split.product(Left::Rows(dy), weight, sizes),
        None => float::outer_product(body, dy, weight, sizes),
    }
}

/// dW `[out, in]` += dy^T x for `dy` `[T, out]` and `x` `[T, in]`.
struct OfWeight {
    body: Body,
    precision: Precision,
}

impl InplaceOp3 for OfWeight {
    fn name(&self) -> &'static str {
        "linear gradient of the weight"
    }

    fn cpu_fwd(
        &self,
        gradient: &mut CpuStorage,
        layout: &Layout,
        dy: &CpuStorage,
        dy_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> candle_core::Result<()> {
        let (k, rows) = dy_layout.shape().dims2()?;
        let (x_rows, columns) = x_layout.shape().dims2()?;
        if x_rows != k || layout.dims() != [rows, columns] {
            let (dy, x) = (dy_layout.dims(), x_layout.dims());
            candle_core::bail!("{}: {:?} from {dy:?} and {x:?}", self.name(), layout.dims());
        }
        let dy: &[f32] = slice(self.name(), dy, dy_layout)?;
        let x: &[f32] = slice(self.name(), x, x_layout)?;
        let gradient = slice_mut(self.name(), gradient, layout)?;
        let sizes = Sizes { rows, columns, k };
        match self.precision {
            Precision::F32 => match Split::detect() {
                Some(split) => split.add_product(gradient, Left::Columns(dy), x, sizes),
                None => float::add_outer_product(self.body, gradient, dy, x, sizes),
            },
            Precision::Bf16 => {
                brain::add_product(self.body, gradient, Left::Columns(dy), Right::Rows(x), sizes);
            }
        }
        Ok(())
    }
}
