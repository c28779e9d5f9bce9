//! How fast single operations are on a device, in the shapes of a Mistral of 7 billion parameters, beside what the device can do:
//! a copy of memory and the library's matrix product. kernels/torch_baseline.py times the same shapes with PyTorch.

use std::fmt;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use serde::Serialize;

use crate::device::{self, Choice};
use crate::error::Result;
use crate::ops::attention::PagedBatch;
use crate::ops::attention::inputs::{Inputs, Integers};
use crate::ops::attention::step::step_attention;
use crate::ops::linear::Linear;
use crate::ops::parameter::Precision;
use crate::ops::rope::{RopeTable, Turn};

/// What to time.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Device
    #[arg(long, value_enum, default_value = "auto")]
    pub device: Choice,
    /// Shapes of a few numbers each: shows that everything runs
    #[arg(long)]
    pub tiny: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What was timed.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Where.
    pub device: String,
    /// One row for each operation and shape.
    pub rows: Vec<Row>,
}

/// One operation.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The operation and its shape.
    pub name: String,
    /// Microseconds of one call.
    pub micros: f64,
    /// Bytes or operations a second, in units of 10^9 or 10^12.
    pub rate: f64,
    /// GB/s or TFLOP/s.
    pub unit: &'static str,
}

/// Sizes of a model, and what is run with it.
struct Sizes {
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    intermediate: usize,
    copy: usize,
    prefill: &'static [usize],
    decode: &'static [[usize; 2]],
    /// Bytes that pass between two uses of the same memory: more than caches hold.
    apart: usize,
    seconds: f64,
}

const BLOCK_SIZE: usize = 16;

const MISTRAL: Sizes = Sizes {
    hidden: 4096,
    heads: 32,
    kv_heads: 8,
    head_dim: 128,
    intermediate: 14_336,
    copy: 1 << 30,
    prefill: &[512, 2048, 8192],
    decode: &[[1, 1024], [1, 4096], [8, 1024], [8, 4096], [32, 1024], [32, 4096], [128, 1024], [128, 4096]],
    apart: 256 << 20,
    seconds: 0.1,
};

const TINY: Sizes = Sizes {
    hidden: 64,
    heads: 2,
    kv_heads: 1,
    head_dim: 64,
    intermediate: 32,
    copy: 1 << 10,
    prefill: &[20],
    decode: &[[1, 40], [2, 300]],
    apart: 0,
    seconds: 0.0,
};

/// Times everything on the chosen device.
///
/// # Errors
/// If there is no such device, or an operation fails.
pub fn run(options: &Options) -> Result<Report> {
    let device = device::open(options.device)?;
    let sizes = if options.tiny { TINY } else { MISTRAL };
    let mut bench = Bench { device, sizes, rows: Vec::new() };
    bench.copies()?;
    bench.products()?;
    bench.prefill()?;
    bench.decode()?;
    Ok(Report { device: device::describe(&bench.device), rows: bench.rows })
}

struct Bench {
    device: Device,
    sizes: Sizes,
    rows: Vec<Row>,
}

/// What a call moves or computes.
enum Work {
    Bytes(f64),
    Operations(f64),
}

impl Bench {
    /// Numbers near one: what they are changes no time, but zeros and infinities might.
    fn numbers(&self, shape: &[usize]) -> Result<Tensor> {
        let dtype = if self.device.is_cpu() { DType::F32 } else { DType::BF16 };
        let count: usize = shape.iter().product();
        let all: Vec<f32> = (0..count).map(|i| (i % 251) as f32 / 256.0 - 0.5).collect();
        Ok(Tensor::from_vec(all, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(&self.device)?)
    }

    /// Calls `call` with the numbers 0, 1, .. until enough time has passed, and adds a row.
    fn time(&mut self, name: String, work: Work, mut call: impl FnMut(usize) -> Result<()>) -> Result<()> {
        for index in 0..3 {
            call(index)?;
        }
        self.device.synchronize()?;
        let mut count = 4;
        let seconds = loop {
            let started = Instant::now();
            for index in 0..count {
                call(index)?;
            }
            self.device.synchronize()?;
            let all = started.elapsed().as_secs_f64();
            if all >= self.sizes.seconds {
                break all / count as f64;
            }
            count *= 2;
        };
        let (rate, unit) = match work {
            Work::Bytes(bytes) => (bytes / seconds / 1e9, "GB/s"),
            Work::Operations(operations) => (operations / seconds / 1e12, "TFLOP/s"),
        };
        self.rows.push(Row { name, micros: seconds * 1e6, rate, unit });
        Ok(())
    }

    fn copies(&mut self) -> Result<()> {
        let from = self.numbers(&[self.sizes.copy / 2])?;
        let bytes = 2.0 * (self.sizes.copy / 2 * from.dtype().size_in_bytes()) as f64;
        self.time("copy".to_owned(), Work::Bytes(bytes), |_| Ok(from.copy().map(drop)?))
    }

    /// Ours for few rows, the library's for the same and for many.
    fn products(&mut self) -> Result<()> {
        let Sizes { hidden, intermediate, .. } = self.sizes;
        let weight = self.numbers(&[2 * intermediate, hidden])?;
        let (turned, ours) = (weight.t()?, Linear::dense(weight.clone())?);
        let weight_bytes = (weight.elem_count() * weight.dtype().size_in_bytes()) as f64;
        for rows in [1, 2, 4, 8, 16, 128, 2048] {
            let x = self.numbers(&[if self.sizes.apart == 0 { rows.min(20) } else { rows }, hidden])?;
            let work = || match rows {
                0..=16 => Work::Bytes(weight_bytes),
                _ => Work::Operations(2.0 * (x.elem_count() * 2 * intermediate) as f64),
            };
            let shape = format!("{rows} x {hidden} by {hidden} x {}", 2 * intermediate);
            self.time(format!("linear, {shape}"), work(), |_| ours.forward(&x).map(drop))?;
            if rows <= 8 {
                self.time(format!("library, {shape}"), work(), |_| Ok(x.matmul(&turned).map(drop)?))?;
            }
        }
        Ok(())
    }

    fn prefill(&mut self) -> Result<()> {
        for &len in self.sizes.prefill {
            // Every token sees half of them on average: a product for scores and one for values, two operations each.
            let pairs = len as f64 * (len as f64 + 1.0) / 2.0;
            let operations = 4.0 * pairs * (self.sizes.heads * self.sizes.head_dim) as f64;
            self.attention(format!("prefill attention, {len} tokens"), Work::Operations(operations), [1, len], len)?;
        }
        Ok(())
    }

    fn decode(&mut self) -> Result<()> {
        for &[sequences, context] in self.sizes.decode {
            let values = 2 * sequences * context * self.sizes.kv_heads * self.sizes.head_dim;
            let bytes = (values * if self.device.is_cpu() { 4 } else { 2 }) as f64;
            let name = format!("decode attention, {sequences} x {context} positions");
            self.attention(name, Work::Bytes(bytes), [sequences, context], 1)?;
        }
        Ok(())
    }

    /// A layer's attention of `new` tokens of each sequence, the turn and the cache's writes included.
    fn attention(&mut self, name: String, work: Work, [sequences, context]: [usize; 2], new: usize) -> Result<()> {
        let Sizes { heads, kv_heads, head_dim, apart, .. } = self.sizes;
        let blocks = context.div_ceil(BLOCK_SIZE);
        let rows = sequences * new;
        let table = |sequence: usize| (0..blocks).map(|block| (block * sequences + sequence) as u32).collect();
        let paged = PagedBatch {
            q_starts: (0..=sequences).map(|sequence| sequence * new).collect(),
            contexts: vec![context; sequences],
            tables: (0..sequences).map(table).collect(),
            block_size: BLOCK_SIZE,
            window: None,
        };
        let positions: Vec<u32> = (0..rows).map(|row| (context - new + row % new) as u32).collect();
        let slot = |row: usize| {
            let (table, position) = (&paged.tables[row / new], positions[row] as usize);
            table[position / BLOCK_SIZE] * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32
        };
        let slots: Vec<u32> = (0..rows).map(slot).collect();
        let integers = Integers::unread(&positions, &slots, &paged);
        let inputs = Inputs::new(integers, [heads, kv_heads], &self.device)?;
        let angles = RopeTable::new(head_dim, 1e4, context, &self.device)?;
        let turn = Turn { positions: &inputs.positions, table: &angles, heads: [heads, kv_heads] };
        let cache_shape = [sequences * blocks, kv_heads, BLOCK_SIZE, head_dim];
        let bytes = 2 * 2 * cache_shape.iter().product::<usize>();
        let caches = (0..apart.div_ceil(bytes).max(1))
            .map(|_| Ok([self.numbers(&cache_shape)?, self.numbers(&cache_shape)?]))
            .collect::<Result<Vec<_>>>()?;
        let qkv = self.numbers(&[rows, (heads + 2 * kv_heads) * head_dim])?;
        self.time(name, work, |index| {
            let [keys, values] = &caches[index % caches.len()];
            let scale = 1.0 / (head_dim as f32).sqrt();
            step_attention(&qkv, &turn, [keys, values], &inputs, scale, Precision::F32).map(drop)
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.device)?;
        for Row { name, micros, rate, unit } in &self.rows {
            write!(f, "\n{name:<44} {micros:>12.1} us {rate:>10.1} {unit}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn everything_runs_in_small() {
        let report = run(&Options { device: Choice::Cpu, tiny: true, json: false }).unwrap();
        assert_eq!(report.rows.len(), 1 + 7 + 4 + 1 + 2);
        assert!(report.rows.iter().all(|row| row.micros > 0.0 && row.rate > 0.0), "{report}");
    }
}
