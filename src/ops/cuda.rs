//! GPUs: opening one, memory, and the only place that launches kernels. What is launched is `kernels`' business.
//! A device has one stream. All work on its tensors goes there in order, whichever thread asks for it.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::cudarc::driver::{
    self, CudaContext, CudaFunction, CudaStream, DevicePtr, DriverError, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Layout, Result, Shape};
use half::{bf16, f16};

use super::kernels::{Argument, FAMILIES, IMAGES, Launch};
use super::storage::range;

pub mod graph;
mod imports;

/// Dynamic shared memory that a launch gets without asking for it.
const SHARED_BYTES: u32 = 48 << 10;

/// The first GPU of this machine, with a stream of its own.
///
/// # Errors
/// What is missing: the driver, a library, or a GPU.
pub fn open() -> std::result::Result<Device, String> {
    imports::find(imports::Source::Nvidia)?;
    opened()
}

/// A device that kernels/emulator computes on the CPU, for tests of everything around the kernels.
///
/// # Errors
/// If this process has opened a real one before.
#[cfg(feature = "emulator")]
pub fn open_emulator() -> std::result::Result<Device, String> {
    imports::find(imports::Source::Emulator)?;
    opened()
}

/// One more device on the GPU, or the emulator, that was opened before, with a stream of its own.
///
/// # Errors
/// If the driver fails.
pub fn another() -> std::result::Result<Device, String> {
    opened()
}

fn opened() -> std::result::Result<Device, String> {
    let device = CudaDevice::new_with_stream(0).map_err(|error| error.to_string())?;
    // SAFETY: events order streams among each other. Tensors of this device are used on its one stream only: candle makes no other,
    // and two devices do not share tensors.
    unsafe { device.disable_event_tracking() };
    keep_freed(&device).map_err(|error| error.to_string())?;
    load(device.cuda_stream().context()).map_err(|error| error.to_string())?;
    Ok(Device::Cuda(device))
}

/// Lets the driver keep what is freed: by default it gives everything back whenever the stream is waited for, which is each step.
fn keep_freed(device: &CudaDevice) -> std::result::Result<(), DriverError> {
    use driver::sys::{CUmemPool_attribute, cuDeviceGetDefaultMemPool, cuMemPoolSetAttribute};
    let stream = device.cuda_stream();
    let (mut pool, mut threshold) = (std::ptr::null_mut(), u64::MAX);
    // SAFETY: both calls write to or read from the variables they are given, which have the types that they expect.
    unsafe {
        cuDeviceGetDefaultMemPool(&mut pool, stream.context().cu_device()).result()?;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast()).result()
    }
}

/// The device's name and the bytes that are free and there in all.
///
/// # Errors
/// If the driver fails.
pub fn describe(device: &CudaDevice) -> Result<(String, [u64; 2])> {
    let stream = device.cuda_stream();
    let (free, total) = stream.context().mem_get_info().w()?;
    Ok((stream.context().name().w()?, [free as u64, total as u64]))
}

/// Puts a kernel in line on the device's stream; one without blocks is none. Addresses are trusted: operations check the tensors that
/// they are of.
///
/// # Errors
/// If the launch does not fit the kernel or the device; what a kernel does wrong is an error of a later call.
pub fn launch(device: &CudaDevice, launch: &Launch) -> Result<()> {
    if launch.grid.contains(&0) {
        return Ok(());
    }
    let stream = device.cuda_stream();
    let function = function(&stream, launch)?;
    let mut call = stream.launch_builder(&function);
    for argument in &launch.arguments {
        match argument {
            Argument::Address(address) => call.arg(address),
            Argument::Count(count) => call.arg(count),
            Argument::Real(x) => call.arg(x),
        };
    }
    let [x, y, z] = launch.grid;
    let config =
        LaunchConfig { grid_dim: (x, y, z), block_dim: (launch.threads, 1, 1), shared_mem_bytes: launch.shared_bytes };
    // SAFETY: as many arguments as the kernel has parameters (checked), of their kinds: `kernels` makes launches, and tests compare
    // them with the kernels. That the addresses are those of tensors of the right sizes is what the operations check.
    match unsafe { call.launch(config) } {
        Ok(_) => Ok(()),
        Err(error) => candle_core::bail!("{} on a grid of {:?}: {error}", launch.kernel, launch.grid),
    }
}

/// A loaded kernel, its parameters, and the shared memory that it may ask for.
struct Loaded {
    function: CudaFunction,
    parameter_count: usize,
    shared_bytes: u32,
}

/// By context, then by name. Kernels stay loaded as long as the process.
static LOADED: Mutex<Option<HashMap<usize, HashMap<String, Loaded>>>> = Mutex::new(None);

/// Loads all kernels, once for each context: a GPU that they do not run on shows here.
fn load(context: &Arc<CudaContext>) -> Result<()> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let kernels = loaded.get_or_insert_default().entry(context.cu_ctx() as usize).or_default();
    if !kernels.is_empty() {
        return Ok(());
    }
    let mut found = HashMap::new();
    for (file, image) in IMAGES {
        let module = context.load_module(Ptx::from_binary(image.to_vec())).w()?;
        for family in FAMILIES.iter().filter(|family| family.file == *file) {
            for symbol in family.symbols() {
                let function = module.load_function(&symbol).w()?;
                let parameter_count = family.parameter_count;
                found.insert(symbol, Loaded { function, parameter_count, shared_bytes: SHARED_BYTES });
            }
        }
    }
    *kernels = found;
    Ok(())
}

/// The kernel of a launch, if that fits it.
fn function(stream: &Arc<CudaStream>, launch: &Launch) -> Result<CudaFunction> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let kernels = loaded.get_or_insert_default().entry(stream.context().cu_ctx() as usize).or_default();
    let Some(found) = kernels.get_mut(&launch.kernel) else {
        candle_core::bail!("there is no kernel {}", launch.kernel)
    };
    if launch.arguments.len() != found.parameter_count {
        let (name, count) = (&launch.kernel, launch.arguments.len());
        candle_core::bail!("{name} takes {} arguments, not {count}", found.parameter_count);
    }
    if launch.shared_bytes > found.shared_bytes {
        let attribute = driver::sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        if let Err(error) = found.function.set_attribute(attribute, launch.shared_bytes as i32) {
            candle_core::bail!("{} with {} bytes of shared memory: {error}", launch.kernel, launch.shared_bytes);
        }
        found.shared_bytes = launch.shared_bytes;
    }
    Ok(found.function.clone())
}

/// Where a contiguous tensor begins on the device. It must be of type `dtype`.
///
/// # Errors
/// If it is strided or of another type.
pub fn address(op: &str, storage: &CudaStorage, layout: &Layout, dtype: DType) -> Result<u64> {
    let (start, _) = range(op, layout)?;
    if storage.dtype() != dtype {
        candle_core::bail!("{op}: a tensor of {:?} where one of {dtype:?} belongs", storage.dtype());
    }
    Ok(base(op, storage)? + (start * dtype.size_in_bytes()) as u64)
}

/// The type of a storage that kernels compute in.
///
/// # Errors
/// If there are no kernels for it.
pub fn dtype(op: &str, storage: &CudaStorage) -> Result<DType> {
    match storage.dtype() {
        dtype @ (DType::F32 | DType::BF16 | DType::F16) => Ok(dtype),
        other => candle_core::bail!("{op}: there are no kernels for {other:?}"),
    }
}

/// Where a storage begins. The address is good for launches on the device's stream for as long as the storage lives.
pub fn base(op: &str, storage: &CudaStorage) -> Result<u64> {
    let stream = storage.device.cuda_stream();
    // The guards would record events, which are off.
    let address = match &storage.slice {
        CudaStorageSlice::F32(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::BF16(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::F16(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::U32(slice) => slice.device_ptr(&stream).0,
        _ => candle_core::bail!("{op}: no kernel takes {:?}", storage.dtype()),
    };
    Ok(address)
}

/// Memory for `count` elements, which the next launches must write.
///
/// # Errors
/// If there is no memory left.
pub fn output(device: &CudaDevice, dtype: DType, count: usize) -> Result<CudaStorage> {
    // SAFETY: of numbers any bytes are values; the caller launches what writes them.
    unsafe { device.alloc_uninit(&Shape::from(count), dtype) }
}

/// A copy on the device.
///
/// # Errors
/// If there is no memory left.
pub fn upload(device: &CudaDevice, words: &[u32]) -> Result<CudaStorage> {
    device.storage_from_slice(words)
}

/// The elements of a contiguous tensor, once everything before is computed, widened to f32.
///
/// # Errors
/// If the tensor is strided or of another type, and with whatever went wrong on the device before.
pub fn download(op: &str, storage: &CudaStorage, layout: &Layout) -> Result<Vec<f32>> {
    let (start, end) = range(op, layout)?;
    let device = &storage.device;
    Ok(match &storage.slice {
        CudaStorageSlice::F32(slice) => device.clone_dtoh(&slice.slice(start..end))?,
        CudaStorageSlice::BF16(slice) => widened(device.clone_dtoh(&slice.slice(start..end))?, bf16::to_f32),
        CudaStorageSlice::F16(slice) => widened(device.clone_dtoh(&slice.slice(start..end))?, f16::to_f32),
        _ => candle_core::bail!("{op}: {:?} are no numbers to read", storage.dtype()),
    })
}

fn widened<T>(numbers: Vec<T>, widen: impl Fn(T) -> f32) -> Vec<f32> {
    numbers.into_iter().map(widen).collect()
}
