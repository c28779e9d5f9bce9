//! Root mean square normalisation: x / sqrt(mean(x^2) + eps) * weight, alone and after a residual addition.

use super::lanes::{Body, Isa, Kernel, LANES, widen_part};
use super::parallel;
use super::parameter::Parameter;
use super::storage::{Shared, Weights, slice, slice_mut, written};
#[cfg(feature = "cuda")]
use super::{cuda, kernels};
use crate::error::Result;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, InplaceOp3, Layout, Shape, Tensor};
use std::borrow::Cow;

/// Rows a thread takes at a time: one row is too little work to hand out.
const ROWS: usize = 4;
/// Columns of the weight's gradient that a thread takes at a time.
const COLUMNS: usize = 64;

/// `x` `[T, d]` f32 and `weight` `[d]` f32, bf16 or f16 to `[T, d]` f32.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let op = RmsNorm { eps: eps as f32, body: Body::best() };
    Ok(x.apply_op2_no_bwd(weight, &op)?)
}

/// sum = x + residual and its normalisation: `x`, `residual` `[T, d]` f32 to (`[T, d]`, `[T, d]`).
pub fn add_rms_norm(x: &Tensor, residual: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let op = RmsNorm { eps: eps as f32, body: Body::best() };
    let both = x.apply_op3_no_bwd(residual, weight, &op)?;
    Ok((both.get(0)?, both.get(1)?))
}

/// Adds to `dx` `[T, d]` the gradient of the input `x` `[T, d]`, and to that of a trained weight its own, from the gradient `dy`
/// `[T, d]` of [`rms_norm`]'s result; all f32.
///
/// With r = 1 / sqrt(mean(x^2) + eps): dx_i = r (w_i dy_i - x_i r^2 mean(w x dy)), dw_i = sum over rows of dy_i x_i r.
pub fn rms_norm_backward(dx: &Tensor, x: &Tensor, weight: &Parameter, eps: f64, dy: &Tensor) -> Result<()> {
    let (eps, body) = (eps as f32, Body::best());
    if let Some(gradient) = weight.gradient() {
        gradient.inplace_op3(x, dy, &OfWeight { eps, body })?;
    }
    let weight = weight.value().to_dtype(DType::F32)?.to_vec1()?;
    Ok(dx.inplace_op3(x, dy, &OfInput { eps, weight, body })?)
}

struct RmsNorm {
    eps: f32,
    body: Body,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, width) = x_layout.shape().dims2()?;
        let weight = widened(weight, weight_layout, width)?;
        let x: &[f32] = slice("rms_norm", x, x_layout)?;
        let out = parallel::filled(rows * width, ROWS * width, |index, out: &mut [f32]| {
            let x = &x[index * ROWS * width..][..out.len()];
            self.body.run(Rows { x, weight: &weight, eps: self.eps, out });
        });
        Ok((CpuStorage::F32(out), Shape::from((rows, width))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let (rows, width) = x_layout.shape().dims2()?;
        check_weight(weight_layout, width)?;
        let (device, dtype) = (&x.device, cuda::dtype("rms_norm", x)?);
        let out = cuda::output(device, dtype, rows * width)?;
        let addresses = [
            cuda::base("rms_norm", &out)?,
            cuda::address("rms_norm", x, x_layout, dtype)?,
            cuda::address("rms_norm", weight, weight_layout, dtype)?,
        ];
        cuda::launch(device, &kernels::rms_norm(dtype, addresses, [rows, width], self.eps))?;
        Ok((out, Shape::from((rows, width))))
    }
}

/// With a residual, to `[2, T, d]`: the sums, then their normalisation.
impl CustomOp3 for RmsNorm {
    fn name(&self) -> &'static str {
        "add_rms_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, width) = x_layout.shape().dims2()?;
        if residual_layout.dims() != [rows, width] {
            candle_core::bail!("add_rms_norm: {:?} added to {:?}", residual_layout.dims(), x_layout.dims());
        }
        let weight = widened(weight, weight_layout, width)?;
        let x: &[f32] = slice("add_rms_norm", x, x_layout)?;
        let residual: &[f32] = slice("add_rms_norm", residual, residual_layout)?;
        let piece = |index: usize, out: &Shared<'_, f32>| {
            let first = index * ROWS * width;
            let len = (ROWS * width).min(rows * width - first);
            // SAFETY: the same rows of both halves; those of different indices do not overlap.
            #[allow(unsafe_code)]
            let [sums, normed] = unsafe { [out.cleared(first, len), out.cleared(rows * width + first, len)] };
            self.body.run(Sums { x: &x[first..], residual: &residual[first..], out: sums });
            self.body.run(Rows { x: sums, weight: &weight, eps: self.eps, out: normed });
        };
        // SAFETY: the pieces of both halves are everything.
        #[allow(unsafe_code)]
        let out = unsafe {
            written(2 * rows * width, |out| parallel::for_each(rows.div_ceil(ROWS), |index| piece(index, out)))
        };
        Ok((CpuStorage::F32(out), Shape::from((2, rows, width))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        residual: &CudaStorage,
        residual_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let (rows, width) = x_layout.shape().dims2()?;
        check_weight(weight_layout, width)?;
        if residual_layout.dims() != [rows, width] {
            candle_core::bail!("add_rms_norm: {:?} added to {:?}", residual_layout.dims(), x_layout.dims());
        }
        let (device, dtype) = (&x.device, cuda::dtype("add_rms_norm", x)?);
        let out = cuda::output(device, dtype, 2 * rows * width)?;
        let sum = cuda::base("add_rms_norm", &out)?;
        let addresses = [
            sum + (rows * width * dtype.size_in_bytes()) as u64,
            sum,
            cuda::address("add_rms_norm", x, x_layout, dtype)?,
            cuda::address("add_rms_norm", residual, residual_layout, dtype)?,
            cuda::address("add_rms_norm", weight, weight_layout, dtype)?,
        ];
        cuda::launch(device, &kernels::add_rms_norm(dtype, addresses, [rows, width], self.eps))?;
        Ok((out, Shape::from((2, rows, width))))
    }
}

/// The weight as f32; fails where it does not fit rows of `width` numbers.
fn widened<'a>(weight: &'a CpuStorage, layout: &Layout, width: usize) -> candle_core::Result<Cow<'a, [f32]>> {
    check_weight(layout, width)?;
    Ok(Weights::new("rms_norm", weight, layout)?.widened())
}

fn check_weight(layout: &Layout, width: usize) -> candle_core::Result<()> {
    if layout.dims() != [width] {
        candle_core::bail!("rms_norm: the weight is {:?}, the rows have {width} numbers", layout.dims());
    }
    Ok(())
}

/// Sums of as many numbers as `out` has.
struct Sums<'a> {
    x: &'a [f32],
    residual: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Sums<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        // Compiled for the instruction set, so this is vectorised.
        for ((out, x), residual) in self.out.iter_mut().zip(self.x).zip(self.residual) {
            *out = x + residual;
        }
    }
}

/// Whole rows, one after the other.
struct Rows<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let width = self.weight.len().max(1);
        for (x, out) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)) {
            let inverse = inverse_rms(isa, x, self.eps);
            // In this order, as the reference implementations round. Compiled for `isa`, so this is vectorised too.
            for ((out, x), weight) in out.iter_mut().zip(x).zip(self.weight) {
                *out = x * inverse * weight;
            }
        }
    }
}

/// dx += the gradient of the input.
struct OfInput {
    eps: f32,
    weight: Vec<f32>,
    body: Body,
}

impl InplaceOp3 for OfInput {
    fn name(&self) -> &'static str {
        "rms_norm gradient of the input"
    }

    fn cpu_fwd(
        &self,
        dx: &mut CpuStorage,
        dx_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
        dy: &CpuStorage,
        dy_layout: &Layout,
    ) -> candle_core::Result<()> {
        let width = self.weight.len();
        let (dims, x_dims) = (dx_layout.dims(), x_layout.dims());
        if dims != x_dims || dims != dy_layout.dims() || dx_layout.shape().dims2()?.1 != width {
            candle_core::bail!("{}: {dims:?} from {x_dims:?} and {:?}", self.name(), dy_layout.dims());
        }
        let x: &[f32] = slice(self.name(), x, x_layout)?;
        let dy: &[f32] = slice(self.name(), dy, dy_layout)?;
        parallel::for_each_chunk(slice_mut(self.name(), dx, dx_layout)?, ROWS * width, |index, dx| {
            let first = index * ROWS * width;
            let (x, dy) = (&x[first..][..dx.len()], &dy[first..][..dx.len()]);
            self.body.run(InputRows { x, dy, weight: &self.weight, eps: self.eps, dx });
        });
        Ok(())
    }
}

struct InputRows<'a> {
    x: &'a [f32],
    dy: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    dx: &'a mut [f32],
}

impl Kernel for InputRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let width = self.weight.len().max(1);
        let rows = self.x.chunks_exact(width).zip(self.dy.chunks_exact(width));
        for ((x, dy), dx) in rows.zip(self.dx.chunks_exact_mut(width)) {
            let inverse = inverse_rms(isa, x, self.eps);
            let mut sum = isa.splat(0.0);
            let parts = x.chunks(LANES).zip(dy.chunks(LANES)).zip(self.weight.chunks(LANES));
            for ((x, dy), weight) in parts {
                let product = isa.mul(widen_part(isa, x), widen_part(isa, weight));
                sum = isa.fma(product, widen_part(isa, dy), sum);
            }
            let shared = isa.sum(sum) / width as f32 * inverse * inverse;
            for (((dx, x), dy), weight) in dx.iter_mut().zip(x).zip(dy).zip(self.weight) {
                *dx += inverse * (dy * weight - x * shared);
            }
        }
    }
}

/// dw += the gradient of the weight.
struct OfWeight {
    eps: f32,
    body: Body,
}

impl InplaceOp3 for OfWeight {
    fn name(&self) -> &'static str {
        "rms_norm gradient of the weight"
    }

    fn cpu_fwd(
        &self,
        gradient: &mut CpuStorage,
        layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
        dy: &CpuStorage,
        dy_layout: &Layout,
    ) -> candle_core::Result<()> {
        let (rows, width) = x_layout.shape().dims2()?;
        if layout.dims() != [width] || dy_layout.dims() != [rows, width] {
            let (gradient, dy) = (layout.dims(), dy_layout.dims());
            candle_core::bail!("{}: {gradient:?} from {:?} and {dy:?}", self.name(), x_layout.dims());
        }
        let x: &[f32] = slice(self.name(), x, x_layout)?;
        let dy: &[f32] = slice(self.name(), dy, dy_layout)?;
        let inverses = parallel::filled(rows, ROWS, |index, out: &mut [f32]| {
            let x = &x[index * ROWS * width..][..out.len() * width];
            self.body.run(Inverses { x, width, eps: self.eps, out });
        });
        // A thread has some columns of all rows, so the sum over rows has one order.
        parallel::for_each_chunk(slice_mut(self.name(), gradient, layout)?, COLUMNS, |index, gradient| {
            let first = index * COLUMNS;
            for (row, inverse) in inverses.iter().enumerate() {
                let (x, dy) = (&x[row * width + first..], &dy[row * width + first..]);
                gradient.iter_mut().zip(x).zip(dy).for_each(|((sum, x), dy)| *sum += dy * (x * inverse));
            }
        });
        Ok(())
    }
}

/// One over the root mean square of each row.
struct Inverses<'a> {
    x: &'a [f32],
    width: usize,
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for Inverses<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for (x, out) in self.x.chunks_exact(self.width).zip(self.out) {
            *out = inverse_rms(isa, x, self.eps);
        }
    }
}

/// 1 / sqrt(mean(x^2) + eps), the squares summed in 16 lanes and folded by the fixed tree.
#[inline(always)]
fn inverse_rms<I: Isa>(isa: I, x: &[f32], eps: f32) -> f32 {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut sum = isa.splat(0.0);
    for chunk in chunks {
        let v = isa.load(chunk);
        sum = isa.fma(v, v, sum);
    }
    if !tail.is_empty() {
        let v = widen_part(isa, tail);
        sum = isa.fma(v, v, sum);
    }
    1.0 / (isa.sum(sum) / x.len() as f32 + eps).sqrt()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use crate::ops::samples::{check_bits, check_close, differences, floats, tensor};

    fn naive(x: &Tensor, weight: &Tensor, eps: f64) -> Vec<f64> {
        let weight = floats(weight);
        let row = |row: &[f32]| {
            let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / row.len() as f64;
            let scale = |(x, w): (&f32, &f32)| f64::from(*x) / (mean + eps).sqrt() * f64::from(*w);
            row.iter().zip(&weight).map(scale).collect::<Vec<_>>()
        };
        floats(x).chunks(weight.len()).flat_map(row).collect()
    }

    #[test]
    fn values_are_those_of_the_formula() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            for width in [1, 7, 16, 17, 768] {
                let (x, residual) = (tensor(1, (9, width)), tensor(2, (9, width)));
                let weight = tensor(3, width).to_dtype(dtype).unwrap();
                let got = floats(&rms_norm(&x, &weight, 1e-2).unwrap());
                check_close("alone", &got, &naive(&x, &weight, 1e-2), 3e-6);
                let (sum, normed) = add_rms_norm(&x, &residual, &weight, 1e-2).unwrap();
                check_bits("sum", &floats(&sum), &floats(&(x + residual).unwrap()));
                check_bits("after a sum", &floats(&normed), &floats(&rms_norm(&sum, &weight, 1e-2).unwrap()));
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_every_batch_and_on_every_body() {
        let (x, weight) = (tensor(1, (11, 100)), tensor(2, 100));
        let all = floats(&rms_norm(&x, &weight, 1e-5).unwrap());
        for body in Body::all() {
            for row in 0..11 {
                let one = x.narrow(0, row, 1).unwrap().apply_op2_no_bwd(&weight, &RmsNorm { eps: 1e-5, body }).unwrap();
                check_bits(&format!("row {row}"), &floats(&one), &all[row * 100..][..100]);
            }
        }
    }

    #[test]
    fn gradients_are_those_of_differences() {
        for width in [1, 7, 16, 100] {
            let (x, dy) = (tensor(1, (9, width)), tensor(2, (9, width)));
            let weight = Parameter::trained(&tensor(3, width)).unwrap();
            let dx = tensor(4, (9, width));
            let before: Vec<f64> = floats(&dx).into_iter().map(f64::from).collect();
            rms_norm_backward(&dx, &x, &weight, 1e-2, &dy).unwrap();
            let of_x = differences(&x, |x| naive(x, weight.value(), 1e-2), &floats(&dy));
            let expected: Vec<f64> = before.iter().zip(&of_x).map(|(before, d)| before + d).collect();
            check_close("dx", &floats(&dx), &expected, 2e-4);
            let of_weight = differences(weight.value(), |weight| naive(&x, weight, 1e-2), &floats(&dy));
            check_close("dw", &floats(weight.gradient().unwrap()), &of_weight, 2e-4);
        }
    }

    #[test]
    fn wrong_inputs_are_errors() {
        let x = tensor(1, (3, 4));
        assert!(rms_norm(&x, &tensor(1, 5), 1e-5).is_err());
        assert!(rms_norm(&x.t().unwrap(), &tensor(1, 3), 1e-5).is_err());
        assert!(add_rms_norm(&x, &tensor(1, (2, 4)), &tensor(1, 4), 1e-5).is_err());
    }
}
