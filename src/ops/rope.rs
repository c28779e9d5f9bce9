//! Rotary position embedding in the "rotate half" pairing: element i turns with element i + head_dim / 2.

use super::lanes::{Body, Isa, Kernel};
use super::parallel::{filled, for_each_chunk};
use super::storage::{slice, slice_mut};
use crate::error::{Error, Result};
use candle_core::{CpuStorage, CustomOp3, Device, InplaceOp3, Layout, Shape, Tensor};
use std::ops::Range;

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

    /// `[positions, head_dim]` f32.
    pub(super) fn tensor(&self) -> &Tensor {
        &self.table
    }
}

/// How rows are turned.
#[derive(Debug, Clone, Copy)]
pub struct Turn<'a> {
    /// `[T]` u32: of each row in its sequence.
    pub positions: &'a Tensor,
    /// The angles of every position.
    pub table: &'a RopeTable,
    /// Query heads and key heads of a row.
    pub heads: [usize; 2],
}

/// Rows of queries, keys and values as one projection gives them, `qkv` `[T, (heads + 2 * kv_heads) * head_dim]` f32, to queries
/// `[T, heads, head_dim]`, keys and values `[T, kv_heads, head_dim]`; every head of the first two is rotated by its row's position.
/// A position outside of the table is an error.
pub fn split_rope(qkv: &Tensor, turn: &Turn<'_>) -> Result<[Tensor; 3]> {
    let [heads, kv_heads] = turn.heads;
    let keys = part(qkv, turn, heads..heads + kv_heads, true)?;
    let values = part(qkv, turn, heads + kv_heads..heads + 2 * kv_heads, false)?;
    Ok([turn_queries(qkv, turn)?, keys, values])
}

/// The queries of [`split_rope`] alone.
pub fn turn_queries(qkv: &Tensor, turn: &Turn<'_>) -> Result<Tensor> {
    part(qkv, turn, 0..turn.heads[0], true)
}

/// Some heads of every row, `[T, heads, head_dim]`.
fn part(qkv: &Tensor, turn: &Turn<'_>, heads: Range<usize>, is_turned: bool) -> Result<Tensor> {
    let op = Part { all: turn.heads, heads, is_turned, body: Body::best() };
    Ok(qkv.apply_op3_no_bwd(turn.positions, &turn.table.table, &op)?)
}

/// The gradient of the rows that [`split_rope`] took, from those of what it gave side by side, `d` `[T, (heads + 2 * kv_heads) *
/// head_dim]` f32 both: the rotation back, in place.
pub fn split_rope_backward(d: &Tensor, turn: &Turn<'_>) -> Result<()> {
    let Turn { positions, table: RopeTable { table }, heads: [heads, kv_heads] } = *turn;
    Ok(d.inplace_op3(positions, table, &TurnBack { heads, kv_heads })?)
}

/// Rows that a thread takes at a time.
const ROWS: usize = 8;

/// The angles of a step's rows.
pub(super) struct Angles<'a> {
    positions: &'a [u32],
    table: &'a [f32],
    pub(super) head_dim: usize,
}

impl<'a> Angles<'a> {
    /// Those of rows at `positions`; fails for one outside of the table.
    pub(super) fn new(positions: &'a [u32], table: &'a CpuStorage, layout: &Layout) -> candle_core::Result<Self> {
        let (positions_max, head_dim) = layout.shape().dims2()?;
        if let Some(position) = positions.iter().find(|&&position| position as usize >= positions_max) {
            candle_core::bail!("rope: position {position} is outside of the table of {positions_max} positions");
        }
        Ok(Self { positions, table: slice("rope", table, layout)?, head_dim })
    }

    /// Rows that have them.
    pub(super) fn rows(&self) -> usize {
        self.positions.len()
    }

    /// Cosines and sines of row `row`.
    pub(super) fn of(&self, row: usize) -> &'a [f32] {
        &self.table[self.positions[row] as usize * self.head_dim..][..self.head_dim]
    }
}

/// Queries, keys and values of rows, and how they are turned.
struct Rows<'a> {
    rows: usize,
    /// Numbers of a row.
    width: usize,
    angles: Angles<'a>,
}

impl<'a> Rows<'a> {
    fn new(
        [heads, kv_heads]: [usize; 2],
        layout: &Layout,
        (positions, positions_layout): (&'a CpuStorage, &Layout),
        (table, table_layout): (&'a CpuStorage, &Layout),
    ) -> candle_core::Result<Self> {
        let (rows, width) = layout.shape().dims2()?;
        let angles = Angles::new(slice("rope", positions, positions_layout)?, table, table_layout)?;
        if width != (heads + 2 * kv_heads) * angles.head_dim || positions_layout.dims() != [rows] {
            let (x, positions, head_dim) = (layout.dims(), positions_layout.dims(), angles.head_dim);
            candle_core::bail!("rope: rows of {x:?}, positions {positions:?}, the table has head_dim {head_dim}");
        }
        Ok(Self { rows, width, angles })
    }
}

/// Some of the heads of every row.
struct Part {
    /// Query heads and key heads of a row.
    all: [usize; 2],
    heads: Range<usize>,
    is_turned: bool,
    body: Body,
}

impl CustomOp3 for Part {
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
        let all = Rows::new(self.all, x_layout, (positions, positions_layout), (table, table_layout))?;
        let x: &[f32] = slice("rope", x, x_layout)?;
        let (heads, head_dim) = (self.heads.len(), all.angles.head_dim);
        let (first, width) = (self.heads.start * head_dim, heads * head_dim);
        let out = filled(all.rows * width, ROWS * width, |index, out| {
            for (row, out) in (index * ROWS..).zip(out.chunks_exact_mut(width)) {
                let x = &x[row * all.width + first..][..width];
                match self.is_turned {
                    true => self.body.run(Turned { x, angles: all.angles.of(row), out }),
                    false => out.copy_from_slice(x),
                }
            }
        });
        Ok((CpuStorage::F32(out), Shape::from((all.rows, heads, head_dim))))
    }
}

/// The rotation back, of queries and keys that lie side by side.
struct TurnBack {
    heads: usize,
    kv_heads: usize,
}

impl InplaceOp3 for TurnBack {
    fn name(&self) -> &'static str {
        "rope gradient"
    }

    fn cpu_fwd(
        &self,
        d: &mut CpuStorage,
        layout: &Layout,
        positions: &CpuStorage,
        positions_layout: &Layout,
        table: &CpuStorage,
        table_layout: &Layout,
    ) -> candle_core::Result<()> {
        let Self { heads, kv_heads } = *self;
        let all = Rows::new([heads, kv_heads], layout, (positions, positions_layout), (table, table_layout))?;
        for_each_chunk(slice_mut("rope gradient", d, layout)?, ROWS * all.width, |index, d| {
            for (r, d) in d.chunks_exact_mut(all.width).enumerate() {
                let (angles, head_dim) = (all.angles.of(index * ROWS + r), all.angles.head_dim);
                let turned = &mut d[..(heads + kv_heads) * head_dim];
                turned.chunks_exact_mut(head_dim).for_each(|d| rotate_back(d, angles));
            }
        });
        Ok(())
    }
}

/// Neighbouring heads of one row, turned.
pub(super) struct Turned<'a> {
    pub(super) x: &'a [f32],
    /// Of the row.
    pub(super) angles: &'a [f32],
    pub(super) out: &'a mut [f32],
}

impl Kernel for Turned<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let head_dim = self.angles.len().max(1);
        for (x, out) in self.x.chunks_exact(head_dim).zip(self.out.chunks_exact_mut(head_dim)) {
            rotate(x, self.angles, out);
        }
    }
}

/// One head; every product is rounded on its own, as in the reference.
#[inline(always)]
fn rotate(x: &[f32], turn: &[f32], out: &mut [f32]) {
    let half = x.len() / 2;
    let (low, high) = (&x[..half], &x[half..][..half]);
    let (cos, sin) = (&turn[..half], &turn[half..][..half]);
    let (out_low, out_high) = out.split_at_mut(half);
    let (out_low, out_high) = (&mut out_low[..half], &mut out_high[..half]);
    for i in 0..half {
        out_low[i] = low[i] * cos[i] - high[i] * sin[i];
        out_high[i] = high[i] * cos[i] + low[i] * sin[i];
    }
}

/// The inverse of [`rotate`], which is its transpose, in place.
fn rotate_back(x: &mut [f32], turn: &[f32]) {
    let half = x.len() / 2;
    let (low, high) = x.split_at_mut(half);
    let (cos, sin) = turn.split_at(half);
    for i in 0..half {
        let (a, b) = (low[i], high[i]);
        low[i] = a * cos[i] + b * sin[i];
        high[i] = b * cos[i] - a * sin[i];
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use crate::ops::samples::{check_bits, check_close, floats, tensor};

    /// Queries and keys of one head each, and values.
    fn rotated(x: &Tensor, positions: &[u32], table: &RopeTable) -> Result<[Tensor; 3]> {
        split_rope(x, &Turn { positions: &Tensor::new(positions, &Device::Cpu).unwrap(), table, heads: [1, 1] })
    }

    #[test]
    fn the_gradient_turns_back() {
        let (x, table) = (tensor(1, (9, 5 * 16)), RopeTable::new(16, 1e4, 100, &Device::Cpu).unwrap());
        let positions = Tensor::new(&[0u32, 7, 99, 3, 50, 1, 2, 3, 98], &Device::Cpu).unwrap();
        let turn = Turn { positions: &positions, table: &table, heads: [3, 1] };
        let parts = split_rope(&x, &turn).unwrap();
        let parts: Vec<Tensor> = parts.iter().map(|part| part.flatten_from(1).unwrap()).collect();
        let there = Tensor::cat(&parts, 1).unwrap();
        split_rope_backward(&there, &turn).unwrap();
        let expected: Vec<f64> = floats(&x).into_iter().map(f64::from).collect();
        check_close("there and back", &floats(&there), &expected, 1e-6);
    }

    #[test]
    fn values_are_those_of_the_formula() {
        let (heads, kv_heads, head_dim, theta) = (3, 2, 20, 10_000.0);
        let width = (heads + 2 * kv_heads) * head_dim;
        let positions: Vec<u32> = (0..11).map(|i| [0, 1, 99, 7][i % 4]).collect();
        let x = tensor(1, (positions.len(), width));
        let table = RopeTable::new(head_dim, theta, 100, &Device::Cpu).unwrap();
        let ids = Tensor::new(&positions[..], &Device::Cpu).unwrap();
        let [q, k, v] = split_rope(&x, &Turn { positions: &ids, table: &table, heads: [heads, kv_heads] }).unwrap();
        assert_eq!((q.dims(), k.dims(), v.dims()), (&[11, 3, 20][..], &[11, 2, 20][..], &[11, 2, 20][..]));
        let x = floats(&x);
        let turned = |row: usize, column: usize| {
            let (index, i, half) = (row * width + column, column % head_dim, head_dim / 2);
            let angle = f64::from(positions[row]) * theta.powf(-2.0 * (i % half) as f64 / head_dim as f64);
            let other = if i < half { -x[index + half] } else { x[index - half] };
            f64::from(x[index]) * angle.cos() + f64::from(other) * angle.sin()
        };
        let columns = |range: Range<usize>| (0..11).flat_map(move |row| range.clone().map(move |i| (row, i)));
        let expected = |range| columns(range).map(|(row, i)| turned(row, i)).collect::<Vec<_>>();
        check_close("queries", &floats(&q), &expected(0..60), 1e-5);
        check_close("keys", &floats(&k), &expected(60..100), 1e-5);
        let as_they_are: Vec<f32> = columns(100..140).map(|(row, i)| x[row * width + i]).collect();
        check_bits("values", &floats(&v), &as_they_are);
        check_bits("position 0", &floats(&q)[..60], &x[..60]);
    }

    #[test]
    fn rotation_keeps_scores_of_equal_distance() {
        let table = RopeTable::new(8, 100.0, 50, &Device::Cpu).unwrap();
        let at = |seed, position: u32| floats(&rotated(&tensor(seed, (1, 24)), &[position], &table).unwrap()[0]);
        let score = |q, k| at(1, q).iter().zip(at(2, k)).map(|(q, k)| f64::from(q * k)).sum::<f64>();
        assert!((score(5, 2) - score(43, 40)).abs() < 1e-5);
        assert!((score(5, 2) - score(43, 41)).abs() > 1e-3);
    }

    #[test]
    fn wrong_inputs_are_errors() {
        assert!(RopeTable::new(7, 10_000.0, 4, &Device::Cpu).is_err());
        let table = RopeTable::new(8, 10_000.0, 4, &Device::Cpu).unwrap();
        let x = tensor(1, (1, 24));
        assert!(rotated(&x, &[3], &table).is_ok());
        assert!(rotated(&x, &[4], &table).unwrap_err().to_string().contains("position 4"));
        assert!(rotated(&x, &[1, 2], &table).is_err());
        assert!(rotated(&tensor(1, (1, 18)), &[1], &table).is_err());
        assert!(rotated(&tensor(1, (24, 2)).t().unwrap(), &[1, 1], &table).is_err());
        let positions = Tensor::new(&[4u32], &Device::Cpu).unwrap();
        assert!(split_rope_backward(&x, &Turn { positions: &positions, table: &table, heads: [1, 1] }).is_err());
    }
}
