//! Every kernel of kernels/*.cu, run by the emulator, against the operation's CPU body over random shapes; what the compiler made
//! of it for GPUs; and the proof that these comparisons notice errors. Needs g++, and with the feature `cuda` nvcc.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod attention;
#[cfg(feature = "cuda")]
mod compiled;
mod emulator;
mod linear;
mod planted;
mod rows;
mod sample;
mod samples;
