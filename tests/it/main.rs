//! The only integration-test binary: one module for each subject.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod black_box;
mod checkpoint;
mod commands;
mod concurrency;
mod http;
mod parity;
mod same_bits;
mod simulation;
mod tidy;
mod tokenizer;
mod training;
mod training_runs;
