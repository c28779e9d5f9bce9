//! One operation a file: formula, shapes, CPU body, device launch, gradient and tests.
//! The only place, with `device`, that may tell a CPU from a GPU.
//! Nothing is recorded for candle's own differentiation: where an operation has a gradient, a function beside it computes it.
//! On a CPU every row of every result has the same bits whatever else is in the batch and whatever the processor or the number of
//! threads; products in bf16 alone, and the gradients of layers, are the same only on processors with the same instructions.

pub mod accumulate;
pub mod adamw;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
#[path = "no_amx.rs"]
mod amx;
pub mod attention;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod embed;
pub mod experts;
pub mod host;
pub mod kernels;
pub mod kv_write;
mod lanes;
pub mod linear;
pub mod logprobs;
pub mod memory;
pub mod parallel;
pub mod parameter;
pub mod place;
pub mod quantized;
pub mod replay;
pub mod rms_norm;
pub mod rope;
pub mod sample;
#[cfg(test)]
mod samples;
mod select;
mod storage;
pub mod swiglu;

use crate::error::Error;

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        let text = error.to_string();
        // The driver's word. Others may have ended when the same is asked for again.
        if text.contains("OUT_OF_MEMORY") {
            return Self::Unavailable(format!("the device has no memory left: {text}"));
        }
        Self::Internal(text)
    }
}
