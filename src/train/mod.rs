//! Training: recipes of the paper's stages, their data, the step, and checkpoints that `serve` loads.
//! Uses the decoder and the operations of serving; knows no engine and no HTTP.

pub mod batch;
pub mod data;
pub mod example;
mod folder;
pub mod recipe;
pub mod snapshot;
