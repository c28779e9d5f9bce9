//! `eurus serve`: flags as overrides of the settings.

use clap::Args;

use super::settings::SettingArgs;
use crate::{config::Overrides, error::Result};

/// Flags of `eurus serve`. The name of its environment variable ties each flag to its setting.
#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    #[command(flatten)]
    settings: SettingArgs,
    /// Address to listen on
    #[arg(long, env = "EURUS_SERVER__HOST")]
    host: Option<String>,
    /// TCP port; 0 takes a free one
    #[arg(long, env = "EURUS_SERVER__PORT")]
    port: Option<u16>,
    /// File with one accepted API key on each line
    #[arg(long, env = "EURUS_SERVER__API_KEY_FILE", value_name = "FILE")]
    api_key_file: Option<String>,
    /// Seconds that running requests get to finish after SIGTERM
    #[arg(long, env = "EURUS_SERVER__DRAIN_SECONDS_MAX", value_name = "SECONDS")]
    drain_seconds_max: Option<u64>,
}

impl ServeArgs {
    fn overrides(&self) -> Result<Overrides> {
        let mut overrides = self.settings.overrides()?;
        overrides.set("server.host", self.host.clone());
        overrides.set("server.port", self.port);
        overrides.set("server.api_key_file", self.api_key_file.clone());
        overrides.set("server.drain_seconds_max", self.drain_seconds_max);
        Ok(overrides)
    }
}

/// Loads the settings and serves until told to stop.
///
/// # Errors
/// Wrong settings, a checkpoint that cannot be opened, an address that cannot be bound.
pub(super) fn run(args: &ServeArgs) -> Result<()> {
    let config = args.settings.load(&args.overrides()?)?;
    super::start_logging(&config.log)?;
    super::runtime()?.block_on(crate::serve::run(config))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use clap::{FromArgMatches, Parser};

    use super::*;
    use crate::config::Config;

    #[derive(Parser)]
    struct Alone {
        #[command(flatten)]
        serve: ServeArgs,
    }

    fn load(arguments: &[&str]) -> Config {
        let command = <Alone as clap::CommandFactory>::command().mut_args(|arg| arg.env(None::<&str>));
        let matches = command.get_matches_from(std::iter::once(&"eurus").chain(arguments));
        let serve = Alone::from_arg_matches(&matches).unwrap().serve;
        Config::from_sources(None, [], &serve.overrides().unwrap()).unwrap()
    }

    #[test]
    fn every_flag_reaches_the_setting_that_its_variable_names() {
        let command = super::super::command();
        let serve = command.find_subcommand("serve").unwrap();
        let defaults = serde_json::to_value(Config::default()).unwrap();
        let mut tried = 0;
        for arg in serve.get_arguments() {
            let Some(variable) = arg.get_env().and_then(|name| name.to_str()).filter(|name| *name != "EURUS_CONFIG")
            else {
                continue;
            };
            let key = variable.trim_start_matches("EURUS_").to_lowercase().replace("__", "/");
            let pointer = format!("/{key}");
            let value = match arg.get_id().as_str() {
                "log_format" => "json",
                "device" => "cpu",
                "offline" | "pin_threads" => "true",
                "log_level" => "warn",
                "quantize" | "reward_quantize" => "q4_k_m",
                "compute_dtype" | "reward_compute_dtype" | "kv_cache_dtype" => "bf16",
                _ => "7",
            };
            let arguments = match arg.get_long() {
                Some(long) => vec![format!("--{long}={value}")],
                None => vec![value.to_string()],
            };
            let config = load(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
            let changed = serde_json::to_value(config).unwrap();
            assert_ne!(changed.pointer(&pointer), defaults.pointer(&pointer), "{variable} does not set {key}");
            tried += 1;
        }
        assert!(tried >= 22, "only {tried} flags were tried");
    }

    #[test]
    fn set_reaches_any_setting_and_flags_beat_it() {
        let config = load(&["--set", "limits.n_max=3", "--set", "server.port=1", "--port", "2"]);
        assert_eq!((config.limits.n_max, config.server.port), (3, 2));
    }

    #[test]
    fn offline_is_a_switch() {
        assert!(load(&["--offline"]).hub.offline);
        assert!(!load(&["--offline=false"]).hub.offline);
    }
}
