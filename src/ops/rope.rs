//! Rotary position embedding in the "rotate half" pairing: element i turns with element i + head_dim / 2.

use super::parallel::for_each_chunk;
use super::storage::slice;
use crate::error::{Error, Result};
use candle_core::{CpuStorage, CustomOp3, Device, Layout, Shape, Tensor};

/// Cosines and sines of every position.
#[derive(Debug, Clone)]
pub struct RopeTable {
    /// `[positions, head_dim]` f32: head_dim / 2 cosines, then as many sines.
    table: Tensor,
}

impl RopeTable {
    /// The table for positions below `positions_max`; `head_dim` must be even.
    ///
    /// Frequency i is 1 / theta^(2i / head_dim); it and its product with the position are rounded to f32, as the reference
    /// implementation of these checkpoints does, so that large positions turn by the same angle.
    pub fn new(head_dim: usize, theta: f64, positions_max: usize, device: &Device) -> Result<Self> {
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(Error::Unsupported(format!("rotary embedding with head_dim {head_dim}, which is not even")));
        }
        let frequency = |i: usize| 1.0 / (theta as f32).powf(2.0 * i as f32 / head_dim as f32);
        let frequencies: Vec<f32> = (0..head_dim / 2).map(frequency).collect();
        Self::with_frequencies(&frequencies, positions_max, device)
    }

    /// The table for other frequencies, `[head_dim / 2]` in radians for each position.
    pub fn with_frequencies(frequencies: &[f32], positions_max: usize, device: &Device) -> Result<Self> {
        let half = frequencies.len();
        let head_dim = 2 * half;
        let mut table = vec![0.0; positions_max * head_dim];
        for_each_chunk(&mut table, head_dim, |position, row| {
            let (cos, sin) = row.split_at_mut(half);
            for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(frequencies) {
                let angle = f64::from(position as f32 * frequency);
                *cos = angle.cos() as f32;
                *sin = angle.sin() as f32;
            }
        });
        Ok(Self { table: Tensor::from_vec(table, (positions_max, head_dim), device)? })
    }
}

/// Rotates every head of `x` `[T, heads, head_dim]` f32 by its row's position, `positions` `[T]` u32; same shape.
/// A position outside of the table is an error.
pub fn rope(x: &Tensor, positions: &Tensor, table: &RopeTable) -> Result<Tensor> {
    Ok(x.apply_op3_no_bwd(positions, &table.table, &Rope::Forth)?)
}

/// The gradient of `x` from that of [`rope`]'s result, `dy` `[T, heads, head_dim]` f32: the rotation back.
pub fn rope_backward(dy: &Tensor, positions: &Tensor, table: &RopeTable) -> Result<Tensor> {
    Ok(dy.apply_op3_no_bwd(positions, &table.table, &Rope::Back)?)
}

/// Which way to turn.
enum Rope {
    Forth,
    Back,
}

impl CustomOp3 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        positions: &CpuStorage,
        positions_layout: &Layout,
        table: &CpuStorage,
        table_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, heads, head_dim) = x_layout.shape().dims3()?;
        let (positions_max, table_dim) = table_layout.shape().dims2()?;
        if table_dim != head_dim || positions_layout.dims() != [rows] {
            candle_core::bail!(
                "rope: x is {:?}, the positions are {:?}, the table has head_dim {table_dim}",
                x_layout.dims(),
                positions_layout.dims()
            );
        }
        let x: &[f32] = slice("rope", x, x_layout)?;
        let positions: &[u32] = slice("rope", positions, positions_layout)?;
        let table: &[f32] = slice("rope", table, table_layout)?;
        if let Some(position) = positions.iter().find(|&&position| position as usize >= positions_max) {
            candle_core::bail!("rope: position {position} is outside of the table of {positions_max} positions");
        }
        let mut out = vec![0.0; x.len()];
        for_each_chunk(&mut out, heads * head_dim, |row, out| {
            let turn = &table[positions[row] as usize * head_dim..][..head_dim];
            let x = &x[row * heads * head_dim..][..heads * head_dim];
            for (x, out) in x.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)) {
                match self {
                    Self::Forth => rotate(x, turn, out),
                    Self::Back => rotate_back(x, turn, out),
                }
            }
        });
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }
}

/// One head; every product is rounded on its own, as in the reference.
fn rotate(x: &[f32], turn: &[f32], out: &mut [f32]) {
    let half = x.len() / 2;
    let (low, high) = x.split_at(half);
    let (cos, sin) = turn.split_at(half);
    let (out_low, out_high) = out.split_at_mut(half);
    for i in 0..half {
        out_low[i] = low[i] * cos[i] - high[i] * sin[i];
        out_high[i] = high[i] * cos[i] + low[i] * sin[i];
    }
}

/// The inverse of [`rotate`], which is its transpose.
fn rotate_back(x: &[f32], turn: &[f32], out: &mut [f32]) {
    let half = x.len() / 2;
    let (low, high) = x.split_at(half);
    let (cos, sin) = turn.split_at(half);
    let (out_low, out_high) = out.split_at_mut(half);
    for i in 0..half {
        out_low[i] = low[i] * cos[i] + high[i] * sin[i];
        out_high[i] = high[i] * cos[i] - low[i] * sin[i];
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use crate::ops::samples::{check_bits, check_close, floats, tensor};

    #[test]
    fn the_gradient_turns_back() {
        let (x, table) = (tensor(1, (5, 3, 16)), RopeTable::new(16, 1e4, 100, &Device::Cpu).unwrap());
        let positions = Tensor::new(&[0u32, 7, 99, 3, 50], &Device::Cpu).unwrap();
        let there = rope(&x, &positions, &table).unwrap();
        let back = rope_backward(&there, &positions, &table).unwrap();
        let expected: Vec<f64> = floats(&x).into_iter().map(f64::from).collect();
        check_close("there and back", &floats(&back), &expected, 1e-6);
    }

    #[test]
    fn values_are_those_of_the_formula() {
        let (heads, head_dim, theta) = (3, 20, 10_000.0);
        let positions = [0u32, 1, 99, 7];
        let x = tensor(1, (4, heads, head_dim));
        let table = RopeTable::new(head_dim, theta, 100, &Device::Cpu).unwrap();
        let ids = Tensor::new(&positions, &Device::Cpu).unwrap();
        let got = floats(&rope(&x, &ids, &table).unwrap());
        let x = floats(&x);
        let turned = |index: usize| {
            let (row, i) = (index / (heads * head_dim), index % head_dim);
            let half = head_dim / 2;
            let angle = f64::from(positions[row]) * theta.powf(-2.0 * (i % half) as f64 / head_dim as f64);
            let other = if i < half { -x[index + half] } else { x[index - half] };
            f64::from(x[index]) * angle.cos() + f64::from(other) * angle.sin()
        };
        check_close("rope", &got, &(0..x.len()).map(turned).collect::<Vec<_>>(), 1e-5);
        check_bits("position 0", &got[..heads * head_dim], &x[..heads * head_dim]);
    }

    #[test]
    fn rotation_keeps_scores_of_equal_distance() {
        let table = RopeTable::new(8, 100.0, 50, &Device::Cpu).unwrap();
        let at = |seed, position: u32| {
            let position = Tensor::new(&[position], &Device::Cpu).unwrap();
            floats(&rope(&tensor(seed, (1, 1, 8)), &position, &table).unwrap())
        };
        let score = |q, k| at(1, q).iter().zip(at(2, k)).map(|(q, k)| f64::from(q * k)).sum::<f64>();
        assert!((score(5, 2) - score(43, 40)).abs() < 1e-5);
        assert!((score(5, 2) - score(43, 41)).abs() > 1e-3);
    }

    #[test]
    fn wrong_inputs_are_errors() {
        assert!(RopeTable::new(7, 10_000.0, 4, &Device::Cpu).is_err());
        let table = RopeTable::new(8, 10_000.0, 4, &Device::Cpu).unwrap();
        let x = tensor(1, (1, 2, 8));
        let at = |positions: &[u32]| Tensor::new(positions, &Device::Cpu).unwrap();
        assert!(rope(&x, &at(&[3]), &table).is_ok());
        assert!(rope(&x, &at(&[4]), &table).unwrap_err().to_string().contains("position 4"));
        assert!(rope(&x, &at(&[1, 2]), &table).is_err());
        assert!(rope(&tensor(1, (1, 2, 6)), &at(&[1]), &table).is_err());
        assert!(rope(&x.transpose(1, 2).unwrap(), &at(&[1]), &table).is_err());
    }
}
