//! The arithmetic of Llama-shaped checkpoints: one decoder for serving and training.

pub mod config;
pub mod weights;
