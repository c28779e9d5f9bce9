//! Tests of the settings: precedence, unknown keys, ranges, secrets.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::Write;

use super::*;

fn environment(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn load(text: &str, variables: &[(&str, &str)], assignments: &[&str]) -> Result<Config> {
    let file = file(text);
    let mut overrides = Overrides::default();
    for assignment in assignments {
        overrides.set_text(assignment)?;
    }
    Config::from_sources(Some(file.path()), environment(variables), &overrides)
}

#[track_caller]
fn refused(text: &str, variables: &[(&str, &str)], assignments: &[&str], parts: &[&str]) {
    let message = load(text, variables, assignments).unwrap_err().to_string();
    for part in parts {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
}

#[test]
fn nothing_given_is_the_default() {
    assert_eq!(load("", &[], &[]).unwrap(), Config::default());
}

#[test]
fn flags_beat_environment_beats_file_beats_default() {
    let text = "[server]\nport = 1\nhost = \"a\"\nconnections_max = 7\n";
    let variables = [("EURUS_SERVER__PORT", "2"), ("EURUS_SERVER__HOST", "b")];
    let config = load(text, &variables, &["server.port=3"]).unwrap();
    assert_eq!((config.server.port, config.server.host.as_str()), (3, "b"));
    assert_eq!((config.server.connections_max, config.server.body_seconds_max), (7, 30));
}

#[test]
fn every_type_is_read_from_the_environment() {
    let variables = [
        ("EURUS_MODEL", "12"),
        ("EURUS_HUB__OFFLINE", "true"),
        ("EURUS_ENGINE__KV_CACHE_GIB", "1.5"),
        ("EURUS_ENGINE__LEN_MAX", "4096"),
        ("EURUS_SERVER__API_KEYS", "one, 22"),
        ("EURUS_SERVER__BODY_BYTES_MAX", "3MiB"),
        ("EURUS_LOG__FORMAT", "json"),
        ("EURUS_SERVER__API_KEY_FILE", "/run/keys"),
    ];
    let config = load("", &variables, &[]).unwrap();
    assert_eq!(config.model, "12");
    assert!(config.hub.offline);
    assert_eq!((config.engine.kv_cache_gib, config.engine.len_max), (Some(1.5), Some(4096)));
    assert_eq!(config.server.api_keys.reveal(), ["one", "22"]);
    assert_eq!(config.server.body_bytes_max, 3 << 20);
    assert_eq!(config.log.format, LogFormat::Json);
    assert_eq!(config.server.api_key_file.as_deref(), Some(Path::new("/run/keys")));
}

#[test]
fn unknown_keys_are_named_with_the_nearest_known_one() {
    refused("[server]\nprot = 1\n", &[], &[], &["`server.prot`", "did you mean `server.port`?"]);
    refused("modle = \"x\"\n", &[], &[], &["`modle`", "did you mean `model`?"]);
    refused("", &[("EURUS_ENGINE__RUNING_MAX", "1")], &[], &["`engine.running_max`?", "in the environment"]);
    refused("", &[], &["limits.zzzzzzzzzzzz=1"], &["`limits.zzzzzzzzzzzz`", "in the command line", "known are n_max"]);
}

#[test]
fn wrong_types_and_ranges_name_key_and_place() {
    refused("[server]\nport = 70000\n", &[], &[], &["server.port"]);
    refused("[server]\nport = \"many\"\n", &[], &[], &["server.port"]);
    refused("[log]\nformat = \"xml\"\n", &[], &[], &["log.format"]);
    refused("[server]\nbody_bytes_max = \"8 parsecs\"\n", &[], &[], &["server.body_bytes_max", "8MiB"]);
    refused("[server\n", &[], &[], &["line 1"]);
    let two = ["engine.step_tokens=0", "limits.n_max=5000"];
    refused("", &[], &two, &["engine.step_tokens = 0 is outside 1..=", "limits.n_max = 5000"]);
    refused("", &[], &["engine.kv_cache_gib=-1"], &["engine.kv_cache_gib"]);
    refused("", &[], &["engine.kv_cache_gib=NaN"], &["engine.kv_cache_gib"]);
    refused("", &[], &["model=none", "reward_model=none"], &["nothing to serve"]);
    refused("", &[], &["port"], &["key=value"]);
    let absent = Config::from_sources(Some(Path::new("/nowhere.toml")), environment(&[]), &Overrides::default());
    assert!(absent.unwrap_err().to_string().contains("/nowhere.toml"));
}

#[test]
fn byte_counts_have_units() {
    for (text, count) in [("17", 17), ("1kB", 1000), ("2 KiB", 2048), ("8MiB", 8 << 20), ("1GB", 1_000_000_000)] {
        assert_eq!(parse_bytes(text), Some(count), "{text}");
    }
    for text in ["", "MiB", "1.5MiB", "-1", "1mib", "99999999999GiB"] {
        assert_eq!(parse_bytes(text), None, "{text}");
    }
}

#[test]
fn keys_are_never_shown() {
    let config = load("[server]\napi_keys = [\"sesame\"]\n", &[], &[]).unwrap();
    assert_eq!(config.api_keys().unwrap().reveal(), ["sesame"]);
    assert!(!format!("{config:?}").contains("sesame"));
    assert!(!config.to_toml().contains("sesame"));
    let message = load("", &[("EURUS_SERVER__API_KEYS__X", "sesame")], &[]).unwrap_err().to_string();
    assert!(message.contains("api_keys") && !message.contains("sesame"), "{message}");
}

#[test]
fn the_key_file_adds_keys_and_may_not_be_empty() {
    let keys = file("first\n\n second \n");
    let mut config = Config::default();
    config.server.api_keys = ApiKeys::new(vec!["zero".into()]);
    config.server.api_key_file = Some(keys.path().to_path_buf());
    assert_eq!(config.api_keys().unwrap().reveal(), ["zero", "first", "second"]);
    let empty = file("\n\n");
    config.server.api_keys = ApiKeys::default();
    config.server.api_key_file = Some(empty.path().to_path_buf());
    assert!(config.api_keys().unwrap_err().to_string().contains("leave the server open"));
}

#[test]
fn shown_settings_load_back_to_themselves() {
    let text = "model = \"a/b\"\n[engine]\nlen_max = 5\nkv_cache_gib = 0.25\n[log]\nlevel = \"info,eurus=debug\"\n";
    let config = load(text, &[], &[]).unwrap();
    assert_eq!(load(&config.to_toml(), &[], &[]).unwrap(), config);
    assert_eq!(load(&Config::default().to_toml(), &[], &[]).unwrap(), Config::default());
}
