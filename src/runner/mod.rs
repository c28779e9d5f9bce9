//! The only place where step plans meet tensors.

pub mod batch;
pub mod kv_cache;
mod runner;
mod sampler;

pub use runner::Runner;
