//! AdamW (Loshchilov and Hutter 2019) in place, in float32: the moments, then the weights. And the norm of gradients.

use super::parallel::{for_each, for_each_chunk};
use super::storage::{Shared, slice, slice_mut};
use crate::error::Result;
use candle_core::{CpuStorage, CustomOp1, InplaceOp2, Layout, Shape, Tensor};

/// Numbers a thread takes at a time; part of the definition of a norm, which is a sum of sums of this many.
const CHUNK: usize = 16 << 10;

/// Constants of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// How far a weight moves, at most about.
    pub learning_rate: f64,
    /// Decay of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decay of the weight, for each unit of learning rate.
    pub weight_decay: f64,
    /// Number of this step, from 1.
    pub step: u64,
    /// What gradients are multiplied by first: less than 1 where they are clipped.
    pub gradient_scale: f64,
}

impl AdamW {
    /// Moves `weight` by its `gradient`, of the same shape, and `moments` `[2, elements]`; all f32.
    ///
    /// m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2; w = w - lr decay w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn step(&self, weight: &Tensor, gradient: &Tensor, moments: &Tensor) -> Result<()> {
        moments.inplace_op2(gradient, &Moments(*self))?;
        Ok(weight.inplace_op2(moments, &Move(*self))?)
    }
}

struct Moments(AdamW);

impl InplaceOp2 for Moments {
    fn name(&self) -> &'static str {
        "adamw moments"
    }

    fn cpu_fwd(
        &self,
        moments: &mut CpuStorage,
        moments_layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> candle_core::Result<()> {
        let count = gradient_layout.shape().elem_count();
        if moments_layout.dims() != [2, count] {
            candle_core::bail!("{}: {:?} for {count} weights", self.name(), moments_layout.dims());
        }
        let gradient: &[f32] = slice(self.name(), gradient, gradient_layout)?;
        let (m, v) = slice_mut(self.name(), moments, moments_layout)?.split_at_mut(count);
        let v = &Shared::new(v);
        let [b1, b2] = self.0.betas.map(|beta| beta as f32);
        let [c1, c2] = self.0.betas.map(|beta| (1.0 - beta) as f32);
        let scale = self.0.gradient_scale as f32;
        for_each_chunk(m, CHUNK, |index, m| {
            // SAFETY: as many of the second half as `m` are of the first; no two chunks overlap.
            #[allow(unsafe_code)]
            let v = unsafe { v.part(index * CHUNK, m.len()) };
            for ((m, v), gradient) in m.iter_mut().zip(v).zip(&gradient[index * CHUNK..]) {
                let gradient = gradient * scale;
                *m = b1 * *m + c1 * gradient;
                *v = b2 * *v + c2 * gradient * gradient;
            }
        });
        Ok(())
    }
}

struct Move(AdamW);

impl InplaceOp2 for Move {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        weight: &mut CpuStorage,
        weight_layout: &Layout,
        moments: &CpuStorage,
        moments_layout: &Layout,
    ) -> candle_core::Result<()> {
        let count = weight_layout.shape().elem_count();
        let moments: &[f32] = slice(self.name(), moments, moments_layout)?;
        if moments.len() != 2 * count {
            candle_core::bail!("{}: {:?} for {count} weights", self.name(), moments_layout.dims());
        }
        let (m, v) = moments.split_at(count);
        let AdamW { learning_rate, betas: [b1, b2], eps, weight_decay, step, .. } = self.0;
        let step = i32::try_from(step).unwrap_or(i32::MAX);
        let pace = (learning_rate / (1.0 - b1.powi(step))) as f32;
        let inverse = (1.0 / (1.0 - b2.powi(step)).sqrt()) as f32;
        let (kept, eps) = ((1.0 - learning_rate * weight_decay) as f32, eps as f32);
        for_each_chunk(slice_mut(self.name(), weight, weight_layout)?, CHUNK, |index, weight| {
            let first = index * CHUNK;
            for ((weight, m), v) in weight.iter_mut().zip(&m[first..]).zip(&v[first..]) {
                *weight = *weight * kept - pace * (m / (v.sqrt() * inverse + eps));
            }
        });
        Ok(())
    }
}

/// The sum of the squares of `x`, f32 and contiguous, in f64: chunks of fixed size in order, whatever the threads.
///
/// # Errors
/// If a tensor operation fails.
pub fn sum_of_squares(x: &Tensor) -> Result<f64> {
    let sums: Vec<f64> = x.apply_op1_no_bwd(&Squares)?.to_vec1()?;
    Ok(sums.iter().sum())
}

/// To the sums of the squares of each chunk, f64.
struct Squares;

impl CustomOp1 for Squares {
    fn name(&self) -> &'static str {
        "sum of squares"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x: &[f32] = slice(self.name(), x, layout)?;
        let mut sums = vec![0.0; x.len().div_ceil(CHUNK)];
        let shared = &Shared::new(&mut sums);
        for_each(x.len().div_ceil(CHUNK), |index| {
            let mut lanes = [0.0f64; 8];
            for part in x[index * CHUNK..x.len().min((index + 1) * CHUNK)].chunks(8) {
                lanes.iter_mut().zip(part).for_each(|(sum, x)| *sum += f64::from(*x) * f64::from(*x));
            }
            // SAFETY: every index is handed out once.
            #[allow(unsafe_code)]
            let out = unsafe { shared.part(index, 1) };
            out[0] = lanes.iter().sum();
        });
        let shape = Shape::from(sums.len());
        Ok((CpuStorage::F64(sums), shape))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use crate::ops::samples::{check_bits, check_close, floats, tensor};
    use candle_core::{DType, Device};

    #[test]
    fn weights_move_as_the_formula_says() {
        let constants = |step| AdamW {
            learning_rate: 1e-2,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.1,
            step,
            gradient_scale: 0.5,
        };
        let (weight, moments) = (tensor(1, (3, 5)), Tensor::zeros((2, 15), DType::F32, &Device::Cpu).unwrap());
        let mut expected: Vec<f64> = floats(&weight).into_iter().map(f64::from).collect();
        let (mut m, mut v) = ([0.0f64; 15], [0.0f64; 15]);
        for step in 1..=4 {
            let gradient = tensor(10 + step, (3, 5));
            constants(step).step(&weight, &gradient, &moments).unwrap();
            for (i, gradient) in floats(&gradient).into_iter().enumerate() {
                let gradient = 0.5 * f64::from(gradient);
                m[i] = 0.9 * m[i] + 0.1 * gradient;
                v[i] = 0.95 * v[i] + 0.05 * gradient * gradient;
                let (m, v) = (m[i] / (1.0 - 0.9f64.powi(step as i32)), v[i] / (1.0 - 0.95f64.powi(step as i32)));
                expected[i] -= 1e-2 * 0.1 * expected[i] + 1e-2 * m / (v.sqrt() + 1e-8);
            }
        }
        check_close("weights", &floats(&weight), &expected, 1e-6);
        assert!(constants(1).step(&weight, &tensor(1, 14), &moments).is_err());
        assert!(constants(1).step(&tensor(1, 14), &tensor(1, 15), &moments).is_err());
    }

    #[test]
    fn squares_add_up_the_same_with_any_number_of_threads() {
        let x = tensor(3, CHUNK * 3 + 77);
        let expected: f64 = floats(&x).iter().map(|x| f64::from(*x).powi(2)).sum();
        let got = sum_of_squares(&x).unwrap();
        assert!((got - expected).abs() < 1e-9 * expected);
        let before = crate::ops::parallel::threads();
        crate::ops::parallel::set_threads(1);
        check_bits("one thread", &[sum_of_squares(&x).unwrap() as f32], &[got as f32]);
        crate::ops::parallel::set_threads(before);
    }
}
