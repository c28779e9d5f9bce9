//! `eurus serve`: flags as overrides of the settings.

use std::path::PathBuf;

use clap::Args;

use crate::{
    config::{Config, Overrides},
    error::Result,
};

/// Flags of `eurus serve`. The name of its environment variable ties each flag to its setting.
#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// Policy: a built-in name, a folder, or a hub id org/name[@revision]; "none" for no policy
    #[arg(env = "EURUS_MODEL")]
    model: Option<String>,
    /// Reward model, named like the policy; "none" for no reward model
    #[arg(long, env = "EURUS_REWARD_MODEL", value_name = "MODEL")]
    reward_model: Option<String>,
    /// Name of the policy in requests
    #[arg(long, env = "EURUS_MODEL_NAME", value_name = "NAME")]
    model_name: Option<String>,
    /// Name of the reward model in requests
    #[arg(long, env = "EURUS_REWARD_MODEL_NAME", value_name = "NAME")]
    reward_model_name: Option<String>,
    /// Settings file
    #[arg(long, env = "EURUS_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Branch, tag or commit of the policy on the hub
    #[arg(long, env = "EURUS_HUB__REVISION", value_name = "REV")]
    revision: Option<String>,
    /// Branch, tag or commit of the reward model on the hub
    #[arg(long, env = "EURUS_HUB__REWARD_REVISION", value_name = "REV")]
    reward_revision: Option<String>,
    /// Use only checkpoints that are on this machine (as HF_HUB_OFFLINE=1)
    #[arg(long, env = "EURUS_HUB__OFFLINE", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    offline: Option<bool>,
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
    /// Threads for arithmetic
    #[arg(long, env = "EURUS_ENGINE__THREADS", value_name = "COUNT")]
    threads: Option<usize>,
    /// Longest sequence in tokens, prompt and answer together
    #[arg(long, env = "EURUS_ENGINE__LEN_MAX", value_name = "TOKENS")]
    len_max: Option<usize>,
    /// Memory of each model's key/value cache, in GiB
    #[arg(long, env = "EURUS_ENGINE__KV_CACHE_GIB", value_name = "GIB")]
    kv_cache_gib: Option<f64>,
    /// Tokens computed in one step at most
    #[arg(long, env = "EURUS_ENGINE__STEP_TOKENS", value_name = "TOKENS")]
    step_tokens: Option<usize>,
    /// Sequences that run at once
    #[arg(long, env = "EURUS_ENGINE__RUNNING_MAX", value_name = "COUNT")]
    running_max: Option<usize>,
    /// Sequences that wait for their turn before requests are refused with 429
    #[arg(long, env = "EURUS_ENGINE__WAITING_MAX", value_name = "COUNT")]
    waiting_max: Option<usize>,
    /// text or json
    #[arg(long, env = "EURUS_LOG__FORMAT", value_name = "FORMAT", value_parser = ["text", "json"])]
    log_format: Option<String>,
    /// error, warn, info, debug, trace, or filter directives
    #[arg(long, env = "EURUS_LOG__LEVEL", value_name = "LEVEL")]
    log_level: Option<String>,
    /// Any other setting of the file, such as limits.n_max=16; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl ServeArgs {
    fn overrides(&self) -> Result<Overrides> {
        let mut overrides = Overrides::default();
        for assignment in &self.set {
            overrides.set_text(assignment)?;
        }
        overrides.set("model", self.model.clone());
        overrides.set("reward_model", self.reward_model.clone());
        overrides.set("model_name", self.model_name.clone());
        overrides.set("reward_model_name", self.reward_model_name.clone());
        overrides.set("hub.revision", self.revision.clone());
        overrides.set("hub.reward_revision", self.reward_revision.clone());
        overrides.set("hub.offline", self.offline);
        overrides.set("server.host", self.host.clone());
        overrides.set("server.port", self.port);
        overrides.set("server.api_key_file", self.api_key_file.clone());
        overrides.set("server.drain_seconds_max", self.drain_seconds_max);
        overrides.set("engine.threads", self.threads);
        overrides.set("engine.len_max", self.len_max);
        overrides.set("engine.kv_cache_gib", self.kv_cache_gib);
        overrides.set("engine.step_tokens", self.step_tokens);
        overrides.set("engine.running_max", self.running_max);
        overrides.set("engine.waiting_max", self.waiting_max);
        overrides.set("log.format", self.log_format.clone());
        overrides.set("log.level", self.log_level.clone());
        Ok(overrides)
    }
}

/// Loads the settings and serves until told to stop.
///
/// # Errors
/// Wrong settings, a checkpoint that cannot be opened, an address that cannot be bound.
pub(super) fn run(args: &ServeArgs) -> Result<()> {
    let config = Config::load(args.config.as_deref(), &args.overrides()?)?;
    super::start_logging(&config.log)?;
    super::runtime()?.block_on(crate::serve::run(config))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use clap::{FromArgMatches, Parser};

    use super::*;

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
                "offline" => "true",
                "log_level" => "warn",
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
        assert!(tried >= 19, "only {tried} flags were tried");
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
