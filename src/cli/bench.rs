//! `eurus bench`: hands the flags to the benchmarks and prints what they measure.

use std::path::Path;

use clap::Subcommand;

use crate::bench::{bon_curve, kernels, make_model, memory, model, sample_pairs, serve, train, trees};
use crate::config::LogConfig;
use crate::device::Choice;
use crate::error::{Error, Result};

/// What is measured.
#[derive(Debug, Subcommand)]
pub(super) enum BenchCommand {
    /// Load a running server and measure throughput and latencies
    Serve(serve::Options),
    /// Time a model without a server: prompt and generated tokens per second
    Model(model::Options),
    /// Time single operations on a device, beside a copy of memory and the library's matrix product
    Kernels(kernels::Options),
    /// Time training without data: tokens per second and memory
    Train(train::Options),
    /// Time reading memory, the limit of generation with few sequences
    Memory(memory::Options),
    /// Write a checkpoint of a chosen shape with random weights
    MakeModel(make_model::Options),
    /// Accuracy of best-of-n on verifiable problems, by n and strategy
    BonCurve(bon_curve::Options),
    /// Write solutions to imitate and preference trees for the task of eurus-mini, in the schemas of UltraInteract
    MakeTrees(trees::Options),
    /// Write graded pairs of a policy's own answers to problems of that task
    SamplePairs(sample_pairs::Options),
}

/// Runs one benchmark.
///
/// # Errors
/// As the benchmark says.
pub(super) fn run(command: &BenchCommand) -> Result<()> {
    super::start_logging(&LogConfig { level: "warn".into(), ..LogConfig::default() })?;
    match command {
        BenchCommand::Serve(options) => {
            let report = super::runtime()?.block_on(serve::run(options))?;
            if let Some(path) = &options.json {
                write_json(path, &report)?;
            }
            super::print(&format!("{report}\n"))
        }
        BenchCommand::Model(options) => {
            model::set_threads(options);
            let report = model::run(options, crate::serve::model(&options.model, options.device)?)?;
            let text = if options.json { to_json(&report)? } else { report.to_string() };
            super::print(&format!("{text}\n"))
        }
        BenchCommand::Kernels(options) => {
            let report = kernels::run(options)?;
            let text = if options.json { to_json(&report)? } else { report.to_string() };
            super::print(&format!("{text}\n"))
        }
        BenchCommand::Train(options) => {
            let report = train::run(options, crate::serve::model(&options.model, Choice::Cpu)?)?;
            let text = if options.json { to_json(&report)? } else { report.to_string() };
            super::print(&format!("{text}\n"))
        }
        BenchCommand::Memory(options) => {
            let report = memory::run(options)?;
            let text = if options.json { to_json(&report)? } else { report.to_string() };
            super::print(&format!("{text}\n"))
        }
        BenchCommand::MakeModel(options) => {
            let count = make_model::run(options)?;
            super::print(&format!("{}: {count} parameters\n", options.out.display()))
        }
        BenchCommand::BonCurve(options) => {
            let curve = super::runtime()?.block_on(async {
                let service = crate::serve::service(&bon_curve::settings(options)?)?;
                bon_curve::run(options, &service).await
            })?;
            if let Some(path) = &options.json {
                write_json(path, &curve)?;
            }
            super::print(&format!("{curve}\n"))
        }
        BenchCommand::MakeTrees(options) => {
            let trees::Written { solutions, pairs } = trees::run(options)?;
            super::print(&format!("{}: {solutions} solutions, {pairs} pairs\n", options.out.display()))
        }
        BenchCommand::SamplePairs(options) => {
            let drawn = super::runtime()?.block_on(async {
                let service = crate::serve::service(&sample_pairs::settings(options)?)?;
                sample_pairs::run(options, &service).await
            })?;
            super::print(&format!("{}: {drawn}\n", options.out.display()))
        }
    }
}

fn to_json(report: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string_pretty(report).map_err(Error::internal)
}

fn write_json(path: &Path, report: &impl serde::Serialize) -> Result<()> {
    std::fs::write(path, to_json(report)?).map_err(|error| Error::file(path, error))
}
