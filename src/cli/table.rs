//! Flags as data: the default of each setting for `--help`, and the tables of the README.

use std::fmt::Write;

use clap::{Arg, Command};
use serde_json::Value;

use crate::config::Config;

/// Shows variable and default of the setting behind each flag in the flag's help. The variables of settings are left to
/// [`Config::load`], which reads them whether or not they have a flag; clap reads the others.
pub(super) fn for_parsing(command: Command) -> Command {
    let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_string()).collect();
    let command = command.mut_args(|arg| if setting(&arg).is_some() { explained(arg) } else { arg });
    names.into_iter().fold(command, |command, name| command.mut_subcommand(name, for_parsing))
}

/// The default of the setting that the flag's variable names, null for none; None where it names no setting.
fn setting(arg: &Arg) -> Option<Value> {
    let key = arg.get_env()?.to_str()?.strip_prefix("EURUS_")?.to_lowercase().replace("__", "/");
    serde_json::to_value(Config::default()).ok()?.pointer(&format!("/{key}")).cloned()
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

/// The flags of one subcommand (such as `serve` or `bench serve`) as a Markdown table: flag, variable, default, meaning.
/// Settings that `serve` has a flag for are listed there only. None without such a subcommand.
pub fn markdown(command: &Command, path: &str) -> Option<String> {
    let serve = command.find_subcommand("serve")?;
    let subcommand = path.split(' ').try_fold(command, |command, name| command.find_subcommand(name))?;
    let elsewhere = |arg: &Arg| {
        path != "serve" && serve.get_arguments().any(|own| own.get_env().is_some() && own.get_env() == arg.get_env())
    };
    let mut text = String::from("| flag | variable | default | meaning |\n|---|---|---|---|\n");
    for arg in subcommand.get_arguments().filter(|arg| arg.get_id() != "help" && !elsewhere(arg)) {
        let variable = arg.get_env().and_then(|name| name.to_str()).map_or(String::new(), |name| format!("`{name}`"));
        let default = default_of(arg).or_else(|| clap_default(arg)).map_or(String::new(), |text| format!("`{text}`"));
        let meaning = arg.get_help().map(ToString::to_string).unwrap_or_default().replace('|', "\\|");
        // Writing to a String cannot fail.
        let _ = writeln!(text, "| `{}` | {variable} | {default} | {meaning} |", usage(arg));
    }
    Some(text)
}

/// `-n, --best-of BEST_OF`, `--offline`, `[MODEL]`.
fn usage(arg: &Arg) -> String {
    let value = arg.get_value_names().and_then(|names| names.first()).map_or(String::new(), ToString::to_string);
    let short = arg.get_short().map_or(String::new(), |short| format!("-{short}, "));
    let optional = arg.get_num_args().is_some_and(|range| range.min_values() == 0);
    match arg.get_long() {
        Some(long) if arg.get_action().takes_values() && !optional => format!("{short}--{long} {value}"),
        Some(long) => format!("{short}--{long}"),
        None if arg.is_required_set() => value,
        None => format!("[{value}]"),
    }
}

fn clap_default(arg: &Arg) -> Option<String> {
    arg.get_default_values().first().and_then(|value| value.to_str()).map(String::from)
}

/// The default of the setting behind the flag, where there is one.
fn default_of(arg: &Arg) -> Option<String> {
    match setting(arg)? {
        Value::Null => None,
        Value::String(text) => Some(text),
        value => Some(value.to_string()),
    }
}
