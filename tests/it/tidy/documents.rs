//! The documents against the code: tables of flags, endpoints and metrics, the dashboard, the first commands.

use std::{collections::BTreeSet, fs};

use regex::Regex;

use super::{read, root};

/// Text between two marks in the README.
fn between<'a>(text: &'a str, start: &str, end: &str) -> &'a str {
    let from = text.find(start).unwrap_or_else(|| panic!("the README lacks {start}")) + start.len();
    let until = text[from..].find(end).unwrap_or_else(|| panic!("the README lacks {end} after {start}"));
    &text[from..from + until]
}

/// Every command by the words that call it.
fn commands(command: &clap::Command, prefix: &str) -> Vec<String> {
    let subcommands = command.get_subcommands().filter(|sub| sub.get_name() != "help");
    let found = subcommands.flat_map(|sub| {
        let path = format!("{prefix}{}", sub.get_name());
        if sub.has_subcommands() { commands(sub, &format!("{path} ")) } else { vec![path] }
    });
    found.collect()
}

/// `EURUS_UPDATE_DOCS=1 cargo test --test it tidy` rewrites the tables.
#[test]
fn the_tables_of_flags_are_those_of_the_command_line() {
    let command = eurus::cli::command();
    let mut text = read("README.md");
    let paths = commands(&command, "");
    assert!(paths.contains(&"bench serve".to_string()), "{paths:?}");
    for path in paths {
        let start = format!("<!-- flags of {path} -->\n");
        let table = eurus::cli::table::markdown(&command, &path).unwrap();
        let written = between(&text, &start, "<!-- end -->").to_string();
        if std::env::var_os("EURUS_UPDATE_DOCS").is_some() {
            text = text.replace(&format!("{start}{written}<!-- end -->"), &format!("{start}{table}<!-- end -->"));
            fs::write(root().join("README.md"), &text).unwrap();
        } else {
            assert_eq!(written, table, "flags of {path}");
        }
    }
}

#[test]
fn the_table_of_endpoints_is_the_table_of_routes() {
    let text = read("README.md");
    let row = Regex::new(r"`(GET|POST) (/[^`]*)`").unwrap();
    let section = between(&text, "\n## Endpoints\n", "\n## ");
    let written: BTreeSet<String> = row.captures_iter(section).map(|hit| format!("{} {}", &hit[1], &hit[2])).collect();
    let routes = eurus::http::routes::table();
    let mut served: BTreeSet<String> =
        routes.iter().map(|route| format!("{} {}", route.method, route.documented_path())).collect();
    // The documentation page is not in the table of routes.
    served.insert("GET /docs".into());
    assert_eq!(written, served);
    let document = serde_json::to_value(eurus::http::openapi::api()).unwrap();
    for route in routes {
        assert!(!document["paths"][route.documented_path()].is_null(), "{} is not in /openapi.json", route.path);
    }
}

/// Names declared in src/metrics.rs: the registry itself shows only those that were touched.
fn metrics() -> BTreeSet<String> {
    let declaration = Regex::new(r#"\b(?:counter|gauge|histogram)\(\s*r,\s*"(\w+)""#).unwrap();
    let names: BTreeSet<String> =
        declaration.captures_iter(&read("src/metrics.rs")).map(|hit| format!("eurus_{}", &hit[1])).collect();
    assert!(names.len() > 15, "{names:?}");
    names
}

#[test]
fn the_table_of_metrics_is_what_is_exported() {
    let text = read("README.md");
    let row = Regex::new(r"(?m)^\| `(eurus_\w+)").unwrap();
    let section = between(&text, "\n## Metrics\n", "\n## ");
    let written: BTreeSet<String> = row.captures_iter(section).map(|hit| hit[1].to_string()).collect();
    assert_eq!(written, metrics());
}

#[test]
fn the_dashboard_asks_for_metrics_that_exist() {
    let dashboard: serde_json::Value = serde_json::from_str(&read("config/grafana-dashboard.json")).unwrap();
    let names = metrics();
    let mut asked = 0;
    for hit in Regex::new(r"\beurus_\w+").unwrap().find_iter(&dashboard["panels"].to_string()) {
        let name = ["_bucket", "_sum", "_count"].iter().fold(hit.as_str(), |name, end| name.trim_end_matches(end));
        assert!(names.contains(name), "the dashboard asks for {name}");
        asked += 1;
    }
    assert!(asked > 15, "{asked}");
}

#[test]
fn the_readme_begins_with_the_two_commands() {
    let text = read("README.md");
    let block = between(&text, "```sh\n", "```");
    let commands: Vec<&str> = block.lines().filter(|line| line.starts_with("cargo")).collect();
    assert_eq!(commands, ["cargo run --release -- serve", "cargo test"]);
}
