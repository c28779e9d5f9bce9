//! The command line: parses arguments and hands them to the parts that do the work.
//! Owns flags, exit codes and the log format; knows nothing of models or HTTP itself.

mod bench;
mod best_of_n;
mod chat;
mod check;
mod fidelity;
mod health;
mod jsonl;
mod pull;
mod quantize;
mod score;
mod serve;
mod settings;
pub mod table;
mod train;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::{
    config::{LogConfig, LogFormat},
    error::{Error, Result},
    ops::memory,
};

/// Serves policies and reward models.
#[derive(Debug, Parser)]
#[command(name = "eurus", version, about, max_term_width = 100, disable_help_subcommand = true)]
#[command(after_help = "Every setting of a configuration file is also an environment variable: server.port is \
EURUS_SERVER__PORT. Flags beat the environment, the environment beats the file, the file beats the defaults.\n\
Exit codes: 0 success, 1 failure, 2 wrong usage, settings or checkpoint.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a policy and a reward model over HTTP.
    Serve(Box<serve::ServeArgs>),
    /// Talk to the policy in the terminal
    Chat(Box<chat::ChatArgs>),
    /// Rewards for a file of answers, JSON Lines in and out
    #[command(after_help = score::ROWS)]
    Score(Box<score::ScoreArgs>),
    /// The best of n answers for a file of prompts, JSON Lines in and out
    #[command(after_help = best_of_n::ROWS)]
    BestOfN(Box<best_of_n::BestOfNArgs>),
    /// Train a policy or a reward model as a recipe says, and go on where an earlier run of it stopped
    #[command(after_help = train::NOTES)]
    Train(train::TrainArgs),
    /// Write a checkpoint rounded to fewer bits, and compare rewards before and after
    #[command(after_help = quantize::NOTES)]
    Quantize(quantize::QuantizeArgs),
    /// Download checkpoints from the hub
    Pull(pull::PullArgs),
    /// Read settings and checkpoint headers; print sizes, memory plan and every problem
    Check(Box<check::CheckArgs>),
    /// Measure servers and models
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Ask a running server on this machine whether it is well: exit code 0 if so, 1 if not.
    Health(health::HealthArgs),
}

/// Parses the process's arguments and runs what they ask for.
pub fn run() -> ExitCode {
    memory::set_up();
    let matches = table::for_parsing(command()).get_matches();
    let outcome = Cli::from_arg_matches(&matches).map_err(|error| error.exit()).and_then(|cli| match cli.command {
        Command::Serve(args) => serve::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Score(args) => score::run(&args),
        Command::BestOfN(args) => best_of_n::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Pull(args) => pull::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Bench(command) => bench::run(&command),
        Command::Health(args) => health::run(&args),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(exit_code(&error))
        }
    }
}

/// The command line as declared: each flag of a setting carries the setting's environment variable.
pub fn command() -> clap::Command {
    Cli::command()
}

/// 2 where the caller can mend it, 1 otherwise.
fn exit_code(error: &Error) -> u8 {
    match error {
        Error::Invalid { .. } | Error::NotFound(_) | Error::Checkpoint(_) | Error::Unsupported(_) => 2,
        Error::Overloaded(_) | Error::Unavailable(_) | Error::Internal(_) => 1,
    }
}

/// Sends log lines to stderr. `EURUS_LOG`, then `RUST_LOG`, take precedence over the configured level.
///
/// # Errors
/// [`Error::Invalid`] if the level is not a filter, [`Error::Internal`] if logging has been set up before.
fn start_logging(log: &LogConfig) -> Result<()> {
    let directives = ["EURUS_LOG", "RUST_LOG"].iter().find_map(|name| std::env::var(name).ok());
    let directives = directives.filter(|text| !text.is_empty()).unwrap_or_else(|| log.level.clone());
    let filter = tracing_subscriber::EnvFilter::builder()
        .parse(&directives)
        .map_err(|error| Error::invalid("log.level", format!("`{directives}` is not a log filter: {error}")))?;
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr()) && std::env::var_os("NO_COLOR").is_none();
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours);
    match log.format {
        LogFormat::Text => builder.with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    }
    .map_err(Error::internal)
}

/// Writes to standard output.
///
/// # Errors
/// If it is closed.
fn print(text: &str) -> Result<()> {
    std::io::Write::write_all(&mut std::io::stdout().lock(), text.as_bytes()).map_err(Error::internal)
}

/// A runtime for commands that wait on sockets.
///
/// # Errors
/// [`Error::Internal`] if threads cannot be started.
fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(Error::internal)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
        table::for_parsing(command()).debug_assert();
    }

    #[test]
    fn what_the_caller_can_mend_exits_with_two() {
        assert_eq!(exit_code(&Error::invalid("x", "y")), 2);
        assert_eq!(exit_code(&Error::Checkpoint("truncated".into())), 2);
        assert_eq!(exit_code(&Error::internal("x")), 1);
    }
}
