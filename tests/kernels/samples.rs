//! Random shapes and numbers from a seed, memory as kernels see it, and comparisons.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc, dealloc};

use candle_core::{DType, Device, Shape, Tensor};
use eurus::ops::sample::uniform;
use half::{bf16, f16};

/// The types that kernels are compiled for.
pub(crate) const TYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// Memory of exactly `bytes`, aligned as a device aligns it.
pub(crate) struct Buffer {
    start: *mut u8,
    layout: Layout,
}

/// Numbers without padding of which every pattern of bits is one.
pub(crate) trait Plain: Copy {}
impl Plain for u32 {}
impl Plain for f32 {}
impl Plain for bf16 {}
impl Plain for f16 {}
impl Plain for [u32; 2] {}
impl Plain for eurus::ops::kernels::Draw {}

impl Buffer {
    /// Every byte is 255, so floats are no numbers.
    pub(crate) fn poisoned(bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes.max(1), 256).unwrap();
        // SAFETY: the layout has at least one byte, and all bytes are written at once.
        let start = unsafe {
            let start = alloc(layout);
            assert!(!start.is_null(), "no memory");
            start.write_bytes(255, layout.size());
            start
        };
        Self { start, layout }
    }

    /// A copy of `numbers`.
    pub(crate) fn of<T: Plain>(numbers: &[T]) -> Self {
        let buffer = Self::poisoned(size_of_val(numbers));
        // SAFETY: the buffer has as many bytes, and is nobody else's.
        unsafe { numbers.as_ptr().copy_to_nonoverlapping(buffer.start.cast(), numbers.len()) };
        buffer
    }

    pub(crate) fn address(&self) -> u64 {
        self.start as u64
    }

    /// The whole buffer as numbers.
    pub(crate) fn numbers<T: Plain>(&self) -> Vec<T> {
        // SAFETY: aligned, inside of the buffer, and any bits are numbers; no kernel runs while it is borrowed.
        unsafe { std::slice::from_raw_parts(self.start.cast::<T>(), self.layout.size() / size_of::<T>()) }.to_vec()
    }

    /// The whole buffer, widened from `dtype`.
    pub(crate) fn floats(&self, dtype: DType) -> Vec<f32> {
        match dtype {
            DType::F32 => self.numbers(),
            DType::BF16 => self.numbers::<bf16>().into_iter().map(bf16::to_f32).collect(),
            DType::F16 => self.numbers::<f16>().into_iter().map(f16::to_f32).collect(),
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start, self.layout) }
    }
}

/// Numbers in the type of the kernel, and what the CPU body gets: the same numbers, widened.
pub(crate) struct Numbers {
    pub(crate) buffer: Buffer,
    pub(crate) floats: Vec<f32>,
}

impl Numbers {
    pub(crate) fn new(dtype: DType, floats: &[f32]) -> Self {
        let buffer = match dtype {
            DType::F32 => Buffer::of(floats),
            DType::BF16 => Buffer::of(&floats.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>()),
            DType::F16 => Buffer::of(&floats.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>()),
            other => panic!("{other:?}"),
        };
        let floats = buffer.floats(dtype);
        Self { buffer, floats }
    }

    pub(crate) fn address(&self) -> u64 {
        self.buffer.address()
    }

    pub(crate) fn tensor(&self, shape: impl Into<Shape>) -> Tensor {
        tensor(&self.floats, shape)
    }
}

pub(crate) fn tensor(floats: &[f32], shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    Tensor::from_slice(&floats[..shape.elem_count()], shape, &Device::Cpu).unwrap()
}

pub(crate) fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Draws that depend on a seed and their order only.
pub(crate) struct Random {
    seed: u64,
    count: u64,
}

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, count: 0 }
    }

    pub(crate) fn uniform(&mut self) -> f64 {
        self.count += 1;
        uniform(self.seed, self.count)
    }

    /// In `least..=most`.
    pub(crate) fn between(&mut self, least: usize, most: usize) -> usize {
        least + (self.uniform() * (most - least + 1) as f64) as usize
    }

    pub(crate) fn choose<T: Copy>(&mut self, options: &[T]) -> T {
        options[self.between(0, options.len() - 1)]
    }

    pub(crate) fn seed(&mut self) -> u64 {
        self.between(0, u32::MAX as usize) as u64
    }

    /// `count` numbers in [-scale, scale) in the type of the kernel.
    pub(crate) fn numbers(&mut self, dtype: DType, count: usize, scale: f32) -> Numbers {
        let floats: Vec<f32> = (0..count).map(|_| (self.uniform() as f32 * 2.0 - 1.0) * scale).collect();
        Numbers::new(dtype, &floats)
    }
}

/// How far a result may be from the expected one: half a unit in the last place of the type it is rounded to, once, and what float32
/// sums in another order differ by, in units of the largest term.
pub(crate) fn rounding(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 0.0,
        DType::BF16 => 0.5f32.powi(8) * 1.02,
        DType::F16 => 0.5f32.powi(11) * 1.02,
        other => panic!("{other:?}"),
    }
}

/// Every element within `absolute` and `relative` of the expected one; the first that is not.
pub(crate) fn compare(got: &[f32], expected: &[f32], absolute: f32, relative: f32) -> Result<(), String> {
    if got.len() != expected.len() {
        return Err(format!("{} numbers instead of {}", got.len(), expected.len()));
    }
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let near = (got - expected).abs() <= absolute + relative * expected.abs();
        if !near && got != expected {
            return Err(format!("element {i} is {got:e} instead of {expected:e}"));
        }
    }
    Ok(())
}

/// Runs `check` on `count` random shapes of each type; the failure names the shape's seed.
#[track_caller]
pub(crate) fn check_shapes(types: &[DType], count: u64, check: impl Fn(&mut Random, DType) -> Result<(), String>) {
    for &dtype in types {
        for seed in 0..count {
            if let Err(error) = check(&mut Random::new(seed), dtype) {
                panic!("{dtype:?}, shape {seed}: {error}");
            }
        }
    }
}
