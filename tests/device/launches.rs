//! The one place that launches kernels, and what it refuses. On the emulator only: on a GPU some of it would end the context.

use candle_core::backend::BackendDevice;
use candle_core::{CudaDevice, DType, Layout};
use eurus::device::Choice;
use eurus::error::Error;
use eurus::ops::cuda::graph::Graph;
use eurus::ops::kernels::Launch;
use eurus::ops::{cuda, kernels};

use crate::{choice, device};

/// None where a GPU is tested.
fn emulator() -> Option<CudaDevice> {
    let device = (choice() == Choice::Emulator).then(|| device().unwrap())?;
    Some(device.as_cuda_device().unwrap().clone())
}

#[track_caller]
fn check_refused(device: &CudaDevice, wrong: &Launch, part: &str) {
    let error = cuda::launch(device, wrong).unwrap_err().to_string();
    assert!(error.contains(part), "{error}");
}

#[test]
fn launches_that_fit_no_kernel_or_device_are_errors() {
    let Some(device) = emulator() else { return };
    let x = device.storage_from_slice(&[1.0f32; 64]).unwrap();
    let out = cuda::output(&device, DType::F32, 64).unwrap();
    let [out_address, address] = [&out, &x].map(|storage| cuda::base("test", storage).unwrap());
    let right = kernels::rms_norm(DType::F32, [out_address, address, address], [1, 64], 1e-5);
    cuda::launch(&device, &right).unwrap();
    let none = Launch { grid: [0, 1, 1], ..right.clone() };
    cuda::launch(&device, &none).unwrap();
    check_refused(&device, &Launch { kernel: "rms_norm_f64".into(), ..right.clone() }, "no kernel rms_norm_f64");
    check_refused(&device, &Launch { threads: 2048, ..right.clone() }, "INVALID_VALUE");
    check_refused(&device, &Launch { grid: [1, 65_536, 1], ..right.clone() }, "INVALID_VALUE");
    check_refused(&device, &Launch { shared_bytes: 300 << 10, ..right.clone() }, "shared memory");
    // Allowed once it is asked for, as the launch does.
    cuda::launch(&device, &Launch { shared_bytes: 100 << 10, ..right.clone() }).unwrap();
    let arguments = right.arguments[1..].to_vec();
    check_refused(&device, &Launch { arguments, ..right.clone() }, "takes 5 arguments, not 4");
    // Nothing lies there.
    let nowhere = kernels::rms_norm(DType::F32, [out_address, 256, address], [1, 64], 1e-5);
    check_refused(&device, &nowhere, "ILLEGAL_ADDRESS");
}

#[test]
fn wrong_tensors_are_errors() {
    let Some(device) = emulator() else { return };
    let words = cuda::upload(&device, &[1, 2, 3, 4]).unwrap();
    let layout = Layout::contiguous((2, 2));
    assert!(cuda::address("test", &words, &layout, DType::U32).is_ok());
    let text = |error: candle_core::Error| error.to_string();
    assert!(text(cuda::address("test", &words, &layout, DType::F32).unwrap_err()).contains("test: a tensor of U32"));
    let turned = layout.transpose(0, 1).unwrap();
    assert!(text(cuda::address("test", &words, &turned, DType::U32).unwrap_err()).contains("must be contiguous"));
    assert!(text(cuda::dtype("test", &words).unwrap_err()).contains("no kernels for U32"));
    assert!(text(cuda::download("test", &words, &layout).unwrap_err()).contains("no numbers"));
}

#[test]
fn without_memory_there_is_an_error_that_says_so() {
    let Some(device) = emulator() else { return };
    let error = Error::from(cuda::output(&device, DType::F32, 1 << 40).unwrap_err());
    assert!(matches!(&error, Error::Unavailable(text) if text.contains("no memory left")), "{error}");
}

/// What waits for the device, and copies, are refused while a stream records, and the stream goes on as if nothing had been.
#[test]
fn what_cannot_be_recorded_is_an_error() {
    let Some(device) = emulator() else { return };
    let x = device.storage_from_slice(&[3.0f32; 64]).unwrap();
    let out = cuda::output(&device, DType::F32, 64).unwrap();
    let [out_address, address] = [&out, &x].map(|storage| cuda::base("test", storage).unwrap());
    let norm = kernels::rms_norm(DType::F32, [out_address, address, address], [1, 64], 0.0);
    let read = |storage| cuda::download("test", storage, &Layout::contiguous(64));
    let refused = |part: &str, work: &dyn Fn() -> candle_core::Result<()>| {
        // Dropped while the stream does not record any more what it is asked for.
        let text = Graph::record(&device, || cuda::output(&device, DType::F32, 8).and_then(|_living| work()));
        let text = text.unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
    };
    refused("CAPTURE_UNSUPPORTED", &|| device.synchronize());
    refused("capture", &|| cuda::upload(&device, &[1]).map(drop));
    refused("capture", &|| read(&x).map(drop));
    refused("its own", &|| candle_core::bail!("its own"));
    let graph = Graph::record(&device, || cuda::launch(&device, &norm)).unwrap();
    assert!(read(&out).unwrap()[0].is_nan());
    graph.launch().unwrap();
    assert_eq!(read(&out).unwrap(), [3.0; 64]);
}
