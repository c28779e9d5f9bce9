//! `eurus check`: would these settings and checkpoints serve? Reads headers only.

use clap::Args;

use super::settings::SettingArgs;
use crate::error::Result;

/// Flags of `eurus check`.
#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    settings: SettingArgs,
}

/// Prints settings, sizes and memory plan, then every problem at once.
///
/// # Errors
/// If there is a problem.
pub(super) fn run(args: &CheckArgs) -> Result<()> {
    let config = args.settings.load(&args.settings.overrides()?)?;
    super::start_logging(&config.log)?;
    super::print(&format!("{}\n", config.to_toml()))?;
    let (report, outcome) = crate::serve::check(&config);
    super::print(&report)?;
    outcome
}
