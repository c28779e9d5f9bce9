//! Training: recipes of the paper's stages, their data, the step, and checkpoints that `serve` loads.
//! Uses the decoder and the operations of serving; knows no engine and no HTTP.

pub mod batch;
pub mod card;
pub mod course;
pub mod data;
mod events;
pub mod example;
pub mod export;
mod folder;
pub mod initial;
pub mod learner;
pub mod objective;
pub mod optimizer;
pub mod plan;
pub mod recipe;
pub mod record;
pub mod reference;
pub mod report;
pub mod schedule;
pub mod snapshot;
pub mod start;
pub mod state;
pub mod step;
pub mod trainer;
