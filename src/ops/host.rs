//! Numbers where the host can read them: f32, in its own memory. On a GPU reading waits for everything that was asked for before.

use crate::error::Result;
use candle_core::{Device, Storage, Tensor};

/// All elements of a contiguous tensor, as f32.
///
/// # Errors
/// If it is strided or no number, and with whatever went wrong before on its device.
pub fn floats(x: &Tensor) -> Result<Vec<f32>> {
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(super::storage::Weights::new("read", storage, layout)?.widened().into_owned()),
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => Ok(super::cuda::download("read", storage, layout)?),
        _ => Err(crate::error::Error::internal("a tensor of a device that this program does not know")),
    }
}

/// The same numbers as an f32 tensor on the host; a tensor that is one already is shared.
///
/// # Errors
/// As [`floats`].
pub fn tensor(x: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() && x.dtype() == candle_core::DType::F32 {
        return Ok(x.clone());
    }
    Ok(Tensor::from_vec(floats(x)?, x.shape(), &Device::Cpu)?)
}
