//! Flags as data: the default of each setting for `--help`, and the tables of the README.

use std::fmt::Write;

use clap::{Arg, Command};
use serde_json::Value;

use crate::config::Config;

/// Shows variable and default of the setting behind each flag in the flag's help. The variables themselves are left to
/// [`Config::load`], which reads them whether or not they have a flag; only that of the settings file stays here.
pub(super) fn for_parsing(command: Command) -> Command {
    let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_string()).collect();
    names.into_iter().fold(command, |command, name| {
        command.mut_subcommand(name, |sub| sub.mut_args(|arg| if is_setting(&arg) { explained(arg) } else { arg }))
    })
}

fn is_setting(arg: &Arg) -> bool {
    arg.get_env().is_some_and(|name| name != "EURUS_CONFIG")
}

fn explained(arg: Arg) -> Arg {
    let mut help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    if let Some(variable) = arg.get_env().and_then(|name| name.to_str()) {
        help.push_str(&format!(" [env: {variable}]"));
    }
    if let Some(default) = default_of(&arg) {
        help.push_str(&format!(" [default: {default}]"));
    }
    arg.help(help).env(None::<&str>)
}

/// The flags of one subcommand as a Markdown table: flag, variable, default, meaning. None without such a subcommand.
pub fn markdown(command: &Command, subcommand: &str) -> Option<String> {
    let command = command.find_subcommand(subcommand)?;
    let mut text = String::from("| flag | variable | default | meaning |\n|---|---|---|---|\n");
    for arg in command.get_arguments().filter(|arg| arg.get_id() != "help") {
        let value = arg.get_value_names().and_then(|names| names.first()).map_or(String::new(), ToString::to_string);
        let flag = match (arg.get_long(), arg.get_action().takes_values()) {
            (Some(long), true) if arg.get_num_args().is_some_and(|range| range.min_values() == 0) => {
                format!("--{long}")
            }
            (Some(long), true) => format!("--{long} {value}"),
            (Some(long), false) => format!("--{long}"),
            (None, _) => format!("[{value}]"),
        };
        let variable = arg.get_env().and_then(|name| name.to_str()).map_or(String::new(), |name| format!("`{name}`"));
        let default = default_of(arg).or_else(|| clap_default(arg)).map_or(String::new(), |text| format!("`{text}`"));
        let meaning = arg.get_help().map(ToString::to_string).unwrap_or_default().replace('|', "\\|");
        // Writing to a String cannot fail.
        let _ = writeln!(text, "| `{flag}` | {variable} | {default} | {meaning} |");
    }
    Some(text)
}

fn clap_default(arg: &Arg) -> Option<String> {
    arg.get_default_values().first().and_then(|value| value.to_str()).map(String::from)
}

/// The default of the setting that the flag's variable names, where it has one.
fn default_of(arg: &Arg) -> Option<String> {
    let key = arg.get_env()?.to_str()?.strip_prefix("EURUS_")?.to_lowercase().replace("__", "/");
    let defaults = serde_json::to_value(Config::default()).ok()?;
    match defaults.pointer(&format!("/{key}"))? {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        value => Some(value.to_string()),
    }
}
