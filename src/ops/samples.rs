//! Numbers for the tests of the operations, and comparisons that say where they fail.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::parallel::set_threads;
use candle_core::{DType, Device, Shape, Tensor};

/// `count` numbers in [-1, 1), the same for the same seed.
pub(super) fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    // The first few still look like the seed.
    (0..count + 16).map(|_| next()).skip(16).collect()
}

/// A CPU tensor of [`numbers`].
pub(super) fn tensor(seed: u64, shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    Tensor::from_vec(numbers(seed, shape.elem_count()), shape, &Device::Cpu).unwrap()
}

/// All elements as f32.
pub(super) fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// What `run` gives with `threads` threads. Then there are as many as processors again, whatever tests beside it did.
pub(super) fn with_threads<T>(threads: usize, run: impl FnOnce() -> T) -> T {
    set_threads(threads);
    let out = run();
    set_threads(std::thread::available_parallelism().map_or(1, usize::from));
    out
}

/// Every element has the same bits.
#[track_caller]
pub(super) fn check_bits(what: &str, left: &[f32], right: &[f32]) {
    assert_eq!(left.len(), right.len(), "{what}: lengths");
    if let Some(i) = left.iter().zip(right).position(|(l, r)| l.to_bits() != r.to_bits()) {
        panic!("{what}: element {i} is {:e} and {:e}", left[i], right[i]);
    }
}

/// Every element is within `tolerance` of the expected one.
#[track_caller]
pub(super) fn check_close(what: &str, got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}: lengths");
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let off = (f64::from(got) - expected).abs();
        assert!(off <= tolerance, "{what}: element {i} is {got:e}, expected {expected:e}");
    }
}

/// The gradient of sum(f(x) * dy) at `x` by central differences, for an `f` computed in f64.
pub(super) fn differences(x: &Tensor, f: impl Fn(&Tensor) -> Vec<f64>, dy: &[f32]) -> Vec<f64> {
    let values = floats(x);
    let at = |values: Vec<f32>| {
        let y = f(&Tensor::from_vec(values, x.shape(), &Device::Cpu).unwrap());
        y.iter().zip(dy).map(|(y, dy)| y * f64::from(*dy)).sum::<f64>()
    };
    let slope = |i: usize| {
        let (mut up, mut down) = (values.clone(), values.clone());
        up[i] += 1e-3;
        down[i] -= 1e-3;
        let width = f64::from(up[i]) - f64::from(down[i]);
        (at(up) - at(down)) / width
    };
    (0..values.len()).map(slope).collect()
}
