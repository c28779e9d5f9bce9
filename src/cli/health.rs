//! `eurus health`: asks a running server on this machine how it is, for container health checks without curl.

use std::{path::PathBuf, time::Duration};

use clap::Args;

use crate::{
    config::{Config, Overrides},
    error::{Error, Result},
};

/// A busy server answers from a flag, not from its queue, so this is generous.
const PATIENCE: Duration = Duration::from_secs(5);

/// Flags of `eurus health`.
#[derive(Debug, Args)]
pub(super) struct HealthArgs {
    /// Port of the server
    #[arg(long, env = "EURUS_SERVER__PORT")]
    port: Option<u16>,
    /// Settings file of the server
    #[arg(long, env = "EURUS_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Prints the server's answer.
///
/// # Errors
/// [`Error::Unavailable`] unless the answer is 200.
pub(super) fn run(args: &HealthArgs) -> Result<()> {
    let mut overrides = Overrides::default();
    overrides.set("server.port", args.port);
    let config = Config::load(args.config.as_deref(), &overrides)?;
    let url = format!("http://{}/health", address(&config.server.host, config.server.port));
    let answer = super::runtime()?.block_on(ask(&url))?;
    eprintln!("{}", answer.trim_end());
    Ok(())
}

/// A server that listens on every address is asked on loopback.
fn address(host: &str, port: u16) -> String {
    match host {
        "0.0.0.0" => format!("127.0.0.1:{port}"),
        "::" => format!("[::1]:{port}"),
        host if host.contains(':') => format!("[{host}]:{port}"),
        host => format!("{host}:{port}"),
    }
}

async fn ask(url: &str) -> Result<String> {
    let failed = |error: reqwest::Error| Error::Unavailable(format!("{url}: {error}"));
    let client = reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().map_err(failed)?;
    let answer = client.get(url).send().await.map_err(failed)?;
    let status = answer.status();
    let text = answer.text().await.map_err(failed)?;
    if status.is_success() { Ok(text) } else { Err(Error::Unavailable(format!("{url}: {status}: {text}"))) }
}

#[cfg(test)]
mod tests {
    use super::address;

    #[test]
    fn wildcard_addresses_are_asked_on_loopback() {
        assert_eq!(address("0.0.0.0", 8000), "127.0.0.1:8000");
        assert_eq!(address("::", 1), "[::1]:1");
        assert_eq!(address("fe80::1", 1), "[fe80::1]:1");
        assert_eq!(address("localhost", 1), "localhost:1");
    }
}
