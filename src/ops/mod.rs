//! One operation a file: formula, shapes, CPU body, device launch, gradient and tests.
//! The only place, with `device`, that may tell a CPU from a GPU.

pub mod logprobs;
pub mod sample;

use crate::error::Error;

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Internal(error.to_string())
    }
}
