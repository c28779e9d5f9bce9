//! The host's side of GPUs: operations, models and the server on a device against the same on the CPU. With the feature `emulator` the
//! device is the emulator, unless EURUS_TEST_DEVICE says `cuda`; without it, the first GPU. Where there is none, every test says so
//! and passes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[cfg(feature = "emulator")]
mod launches;
mod models;
mod ops;
mod replays;
mod service;

use candle_core::{DType, Device, Tensor};
use clap::ValueEnum;
use eurus::device::{self, Choice};
use eurus::ops::host;

/// Which device is tested.
pub(crate) fn choice() -> Choice {
    match std::env::var("EURUS_TEST_DEVICE") {
        Ok(name) => Choice::from_str(&name, true).unwrap(),
        #[cfg(feature = "emulator")]
        Err(_) => Choice::Emulator,
        #[cfg(not(feature = "emulator"))]
        Err(_) => Choice::Cuda,
    }
}

/// The device, or None and a line that says why there is none.
pub(crate) fn device() -> Option<Device> {
    match device::open(choice()) {
        Ok(device) => Some(device),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// Numbers in [-scale, scale) that depend on the seed only, rounded to `dtype`.
pub(crate) fn numbers(seed: u64, shape: &[usize], scale: f32, dtype: DType) -> Tensor {
    let number = |index: usize| (eurus::ops::sample::uniform(seed, index as u64) as f32 * 2.0 - 1.0) * scale;
    let all = (0..shape.iter().product()).map(number).collect();
    Tensor::from_vec(all, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// Units in the last place of a type at 1.
pub(crate) fn epsilon(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 0.5f32.powi(23),
        DType::BF16 => 0.5f32.powi(7),
        DType::F16 => 0.5f32.powi(10),
        other => panic!("{other:?}"),
    }
}

/// Every number within `absolute` and `relative` of the expected one.
#[track_caller]
pub(crate) fn check_close(what: &str, got: &Tensor, expected: &Tensor, absolute: f32, relative: f32) {
    assert_eq!(got.dims(), expected.dims(), "{what}");
    let (got, expected) = (host::floats(got).unwrap(), host::floats(expected).unwrap());
    for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
        let near = (got - expected).abs() <= absolute + relative * expected.abs();
        assert!(near, "{what}: element {index} is {got:e} instead of {expected:e}");
    }
}

#[test]
fn a_device_says_what_it_is() {
    let Some(device) = device() else { return };
    let text = device::describe(&device);
    println!("{text}");
    #[cfg(feature = "emulator")]
    assert_eq!(choice() == Choice::Emulator, text.starts_with("emulator on the CPU, no GPU"), "{text}");
    assert!(device::memory_available(&device).unwrap() > 0);
    // What was opened first stays: a process has one source of devices.
    #[cfg(feature = "emulator")]
    if choice() == Choice::Emulator {
        let error = device::open(Choice::Cuda).unwrap_err().to_string();
        assert!(error.contains("Emulator"), "{error}");
    }
}
