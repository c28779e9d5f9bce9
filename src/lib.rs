//! Eurus serves, scores, reranks and trains reasoning models from one binary.
//! ARCHITECTURE.md tells how the modules fit together.

pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod device;
pub mod engine;
pub mod error;
pub mod http;
pub mod metrics;
pub mod model;
pub mod ops;
pub mod runner;
pub mod serve;
pub mod service;
pub mod text;
pub mod train;
