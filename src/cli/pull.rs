//! `eurus pull`: brings checkpoints from the hub into the local cache.

use clap::Args;

use crate::checkpoint::{HubOptions, Source};
use crate::config::LogConfig;
use crate::error::Result;
use crate::serve::ProgressLine;

/// Flags of `eurus pull`.
#[derive(Debug, Args)]
pub(super) struct PullArgs {
    /// Hub ids, org/name[@revision], or of GGUF files org/name:FILE or org/name:Q4_K_M
    #[arg(value_name = "MODEL", required = true)]
    models: Vec<String>,
}

/// Downloads what is not there yet, one model after the other.
///
/// # Errors
/// What the hub does not have or give, or files that do not make a checkpoint.
pub(super) fn run(args: &PullArgs) -> Result<()> {
    super::start_logging(&LogConfig::default())?;
    for model in &args.models {
        let source = Source::parse(model)?;
        let mut line = ProgressLine::start();
        let checkpoint = crate::checkpoint::open(&source, &HubOptions::from_env(), &mut |progress| line.show(progress));
        line.end();
        let checkpoint = checkpoint?;
        let bytes: u64 = checkpoint.headers().iter().map(|tensor| tensor.bytes).sum();
        super::print(&format!("{}: {} MiB of tensors, complete\n", checkpoint.name, bytes >> 20))?;
    }
    Ok(())
}
