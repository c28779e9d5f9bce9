//! The only place where step plans meet tensors.

pub mod batch;
pub mod kv_cache;
#[allow(clippy::module_inception, reason = "the type it defines is the module's point")]
mod runner;
mod sampler;

pub use runner::Runner;
