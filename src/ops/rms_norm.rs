//! Root mean square normalisation: x / sqrt(mean(x^2) + eps) * weight, alone and after a residual addition.

use super::lanes::{Body, Isa, Kernel, LANES, widen_tail};
use super::parallel;
use super::storage::{Shared, Weights, slice};
use crate::error::Result;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape, Tensor};
use std::borrow::Cow;

/// Rows a thread takes at a time: one row is too little work to hand out.
const ROWS: usize = 4;

/// `x` `[T, d]` f32 and `weight` `[d]` f32, bf16 or f16 to `[T, d]` f32.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let op = RmsNorm { eps: eps as f32, body: Body::best() };
    Ok(x.apply_op2(weight, op)?)
}

/// sum = x + residual and its normalisation: `x`, `residual` `[T, d]` f32 to (`[T, d]`, `[T, d]`).
pub fn add_rms_norm(x: &Tensor, residual: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let op = RmsNorm { eps: eps as f32, body: Body::best() };
    let both = x.apply_op3(residual, weight, op)?;
    Ok((both.get(0)?, both.get(1)?))
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
        let mut out = vec![0.0; rows * width];
        parallel::for_each_chunk(&mut out, ROWS * width, |index, out| {
            let x = &x[index * ROWS * width..][..out.len()];
            self.body.run(Rows { x, weight: &weight, eps: self.eps, out });
        });
        Ok((CpuStorage::F32(out), Shape::from((rows, width))))
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
        let mut out = vec![0.0; 2 * rows * width];
        let (sums, normed) = out.split_at_mut(rows * width);
        let normed = Shared::new(normed);
        parallel::for_each_chunk(sums, ROWS * width, |index, sums| {
            let first = index * ROWS * width;
            for ((sum, x), residual) in sums.iter_mut().zip(&x[first..]).zip(&residual[first..]) {
                *sum = x + residual;
            }
            // SAFETY: the same rows of the second half as `sums` are of the first; no two chunks overlap.
            #[allow(unsafe_code)]
            let out = unsafe { normed.part(first, sums.len()) };
            self.body.run(Rows { x: sums, weight: &weight, eps: self.eps, out });
        });
        Ok((CpuStorage::F32(out), Shape::from((2, rows, width))))
    }
}

/// The weight as f32; fails where it does not fit rows of `width` numbers.
fn widened<'a>(weight: &'a CpuStorage, layout: &Layout, width: usize) -> candle_core::Result<Cow<'a, [f32]>> {
    if layout.dims() != [width] {
        candle_core::bail!("rms_norm: the weight is {:?}, the rows have {width} numbers", layout.dims());
    }
    let weight = Weights::new("rms_norm", weight, layout)?;
    if let Weights::F32(weight) = weight {
        return Ok(Cow::Borrowed(weight));
    }
    let mut wide = vec![0.0; width];
    weight.widen(0, &mut wide);
    Ok(Cow::Owned(wide))
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
        let v = widen_tail(isa, tail);
        sum = isa.fma(v, v, sum);
    }
    1.0 / (isa.sum(sum) / x.len() as f32 + eps).sqrt()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use crate::ops::samples::{check_bits, check_close, floats, tensor};
    use candle_core::DType;

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
                let one = x.narrow(0, row, 1).unwrap().apply_op2(&weight, RmsNorm { eps: 1e-5, body }).unwrap();
                check_bits(&format!("row {row}"), &floats(&one), &all[row * 100..][..100]);
            }
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
