//! A hub on this machine that serves a fixture over loopback as huggingface.co would, and the cache it fills.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use candle_core::Device;
use eurus::checkpoint::{self, Checkpoint, HubOptions, Progress, Source};
use eurus::error::{Error, Result};
use serde_json::json;
use tempfile::TempDir;

use super::{FIRST, INDEX, SECOND, fixture, take_all};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const OTHER_COMMIT: &str = "89abcdef0123456789abcdef0123456789abcdef";
const TOKEN: &str = "hf_secret";

/// What the hub does and what it was asked.
#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// Branches and the commits they are at.
    revisions: BTreeMap<String, String>,
    /// This file's first download ends after half of its bytes.
    breaks: Option<String>,
    /// Answers only to `TOKEN`.
    gated: bool,
    /// Sent for every file in place of a sound one.
    etag: Option<String>,
    /// The commit that files are said to be of, in place of the true one.
    commit: Option<String>,
    requests: Vec<String>,
}

struct Hub {
    state: Arc<Mutex<State>>,
    endpoint: String,
    cache: TempDir,
}

impl Hub {
    /// Serves the model files of a fixture, with files that must not be fetched beside them.
    fn serving(name: &str) -> Self {
        let mut state = State::default();
        for entry in fs::read_dir(fixture(name)).unwrap() {
            let entry = entry.unwrap();
            let file = entry.file_name().into_string().unwrap();
            if !file.starts_with("expected") {
                state.files.insert(file, fs::read(entry.path()).unwrap());
            }
        }
        for file in ["pytorch_model.bin", "modeling_eurus_rm.py", "README.md", "sub/config.json"] {
            state.files.insert(file.to_owned(), b"not needed".to_vec());
        }
        state.revisions.insert("main".to_owned(), COMMIT.to_owned());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(state));
        let shared = Arc::clone(&state);
        // Ends with the test process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = answer(&stream, &mut shared.lock().unwrap());
            }
        });
        Self { state, endpoint, cache: tempfile::tempdir().unwrap() }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    /// The requests since the last call.
    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }

    fn options(&self) -> HubOptions {
        HubOptions {
            revision: None,
            offline: false,
            token: None,
            endpoint: self.endpoint.clone(),
            cache: self.cache.path().to_owned(),
        }
    }

    fn offline(&self) -> HubOptions {
        HubOptions { offline: true, endpoint: "http://127.0.0.1:1".to_owned(), ..self.options() }
    }

    fn blobs(&self) -> PathBuf {
        self.cache.path().join("models--org--name/blobs")
    }
}

fn open(options: &HubOptions) -> Result<Checkpoint> {
    checkpoint::open(&Source::parse("org/name").unwrap(), options, &mut |_| {})
}

/// Answers one request and closes the connection.
fn answer(stream: &TcpStream, state: &mut State) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let mut headers = BTreeMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else { break };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let range = headers.get("range").and_then(|range| range.strip_prefix("bytes=")).unwrap_or_default();
    state.requests.push(format!("{path} {range}").trim().to_owned());
    if state.gated && headers.get("authorization").map(String::as_str) != Some(&format!("Bearer {TOKEN}")) {
        return respond(stream, "401 Unauthorized", &[], b"");
    }
    if let Some(revision) = path.strip_prefix("/api/models/org/name/revision/") {
        let Some(commit) = commit_of(state, revision) else { return respond(stream, "404 Not Found", &[], b"") };
        let siblings: Vec<_> = state.files.keys().map(|file| json!({ "rfilename": file })).collect();
        let info = json!({ "sha": commit, "siblings": siblings }).to_string();
        return respond(stream, "200 OK", &["Content-Type: application/json".to_owned()], info.as_bytes());
    }
    let file = path.strip_prefix("/org/name/resolve/").and_then(|rest| rest.split_once('/'));
    let found = file.and_then(|(revision, file)| Some((commit_of(state, revision)?, file, state.files.get(file)?)));
    let Some((commit, file, content)) = found else { return respond(stream, "404 Not Found", &[], b"") };
    let (start, end) = range.split_once('-').unwrap_or(("0", ""));
    let start: usize = start.parse().unwrap_or(0);
    let end = end.parse().map_or(content.len(), |end: usize| end + 1).min(content.len());
    if start >= content.len() {
        return respond(stream, "416 Range Not Satisfiable", &[], b"");
    }
    let etag = state.etag.clone().unwrap_or_else(|| format!("{:x}-{file}", content.len()).replace('.', "_"));
    let headers = [
        format!("ETag: \"{etag}\""),
        format!("X-Repo-Commit: {}", state.commit.as_ref().unwrap_or(&commit)),
        format!("Content-Range: bytes {start}-{}/{}", end - 1, content.len()),
    ];
    let breaks = state.breaks.as_deref() == Some(file) && end - start > 1;
    respond_with(stream, "206 Partial Content", &headers, &content[start..end], breaks)?;
    if breaks {
        state.breaks = None;
    }
    Ok(())
}

fn commit_of(state: &State, revision: &str) -> Option<String> {
    let is_commit = state.revisions.values().any(|commit| commit == revision);
    if is_commit { Some(revision.to_owned()) } else { state.revisions.get(&revision.replace("%2F", "/")).cloned() }
}

fn respond(stream: &TcpStream, status: &str, headers: &[String], body: &[u8]) -> std::io::Result<()> {
    respond_with(stream, status, headers, body, false)
}

fn respond_with(
    mut stream: &TcpStream,
    status: &str,
    headers: &[String],
    body: &[u8],
    breaks: bool,
) -> std::io::Result<()> {
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    let length = body.len();
    write!(stream, "HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n")?;
    stream.write_all(if breaks { &body[..length / 2] } else { body })?;
    stream.flush()
}

fn downloads(requests: &[String]) -> Vec<String> {
    let data = requests.iter().filter(|request| request.ends_with('-'));
    data.map(|request| request.rsplit('/').next().unwrap_or_default().to_owned()).collect()
}

#[test]
fn a_model_is_fetched_once_and_only_what_it_needs() {
    let hub = Hub::serving("reward");
    let mut ends = BTreeMap::new();
    let source = Source::parse("org/name").unwrap();
    let checkpoint = checkpoint::open(&source, &hub.options(), &mut |progress| match progress {
        Progress::Download { file, done, total } => {
            assert!(done <= total, "{file}: {done} of {total}");
            ends.insert(file.to_owned(), (done, total));
        }
        Progress::Load { .. } => panic!("nothing is loaded yet"),
    });
    let checkpoint = checkpoint.unwrap();
    assert_eq!(checkpoint.name, "org/name");
    take_all(&checkpoint.config, checkpoint.load_weights(&Device::Cpu, &mut |_| {}).unwrap());
    let expected = ["config.json", "model.safetensors.index.json", "tokenizer.model", FIRST, SECOND];
    let expected: Vec<String> = expected.iter().map(|file| format!("{file} 0-")).collect();
    assert_eq!(downloads(&hub.requests()), expected);
    let mut files: Vec<&str> = ends.keys().map(String::as_str).collect();
    files.sort_unstable();
    assert_eq!(files, ["config.json", FIRST, SECOND, INDEX, "tokenizer.model"]);
    let size = fs::metadata(fixture("reward").join(FIRST)).unwrap().len();
    assert_eq!(ends[FIRST], (size, size));

    open(&hub.options()).unwrap();
    assert_eq!(hub.requests(), ["/api/models/org/name/revision/main"]);
    let pinned = HubOptions { revision: Some(COMMIT.to_owned()), ..hub.options() };
    open(&pinned).unwrap();
    assert_eq!(hub.requests(), [""; 0]);
    open(&hub.offline()).unwrap();
    assert_eq!(hub.requests(), [""; 0]);
}

#[test]
fn a_download_that_breaks_is_taken_up_where_it_broke() {
    let hub = Hub::serving("reward");
    hub.change(|state| state.breaks = Some(FIRST.to_owned()));
    let checkpoint = open(&hub.options()).unwrap();
    take_all(&checkpoint.config, checkpoint.load_weights(&Device::Cpu, &mut |_| {}).unwrap());
    let half = fs::metadata(fixture("reward").join(FIRST)).unwrap().len() / 2;
    let first: Vec<String> =
        downloads(&hub.requests()).into_iter().filter(|request| request.starts_with(FIRST)).collect();
    assert_eq!(first, [format!("{FIRST} 0-"), format!("{FIRST} {half}-")]);
}

#[test]
fn a_part_that_is_too_long_is_fetched_again() {
    let hub = Hub::serving("reward");
    let size = fs::metadata(fixture("reward").join(FIRST)).unwrap().len();
    fs::create_dir_all(hub.blobs()).unwrap();
    let etag = format!("{size:x}-{FIRST}").replace('.', "_");
    fs::write(hub.blobs().join(etag).with_extension("part"), vec![7; usize::try_from(size).unwrap()]).unwrap();
    let checkpoint = open(&hub.options()).unwrap();
    take_all(&checkpoint.config, checkpoint.load_weights(&Device::Cpu, &mut |_| {}).unwrap());
}

#[test]
fn another_revision_fetches_only_what_changed() {
    let hub = Hub::serving("reward");
    open(&hub.options()).unwrap();
    hub.requests();
    hub.change(|state| {
        state.revisions.insert("refs/pr/5".to_owned(), OTHER_COMMIT.to_owned());
        state.files.get_mut("config.json").unwrap().extend(b"\n");
    });
    let source = Source::parse("org/name@refs/pr/5").unwrap();
    let checkpoint = checkpoint::open(&source, &hub.options(), &mut |_| {}).unwrap();
    take_all(&checkpoint.config, checkpoint.load_weights(&Device::Cpu, &mut |_| {}).unwrap());
    let requests = hub.requests();
    assert_eq!(requests[0], "/api/models/org/name/revision/refs%2Fpr%2F5");
    assert_eq!(downloads(&requests), ["config.json 0-"]);
    checkpoint::open(&source, &hub.offline(), &mut |_| {}).unwrap();
    let seen =
        |revision: &str| fs::read_to_string(hub.cache.path().join("models--org--name/refs").join(revision)).unwrap();
    assert_eq!((seen("main"), seen("refs/pr/5")), (COMMIT.to_owned(), OTHER_COMMIT.to_owned()));
}

#[test]
fn the_token_is_sent_and_its_absence_explained() {
    let hub = Hub::serving("reward");
    hub.change(|state| state.gated = true);
    match open(&hub.options()) {
        Err(Error::NotFound(message)) => assert!(message.contains("Set HF_TOKEN"), "{message}"),
        other => panic!("{other:?}"),
    }
    open(&HubOptions { token: Some(TOKEN.to_owned()), ..hub.options() }).unwrap();
}

#[test]
fn what_the_hub_does_not_have_is_not_found() {
    let hub = Hub::serving("reward");
    let revision = HubOptions { revision: Some("v9".to_owned()), ..hub.options() };
    match open(&revision) {
        Err(Error::NotFound(message)) => assert!(message.contains("org/name (v9)"), "{message}"),
        other => panic!("{other:?}"),
    }
    hub.change(|state| {
        state.files.remove(SECOND);
    });
    match open(&hub.options()) {
        Err(Error::NotFound(message)) => assert!(message.contains(SECOND), "{message}"),
        other => panic!("{other:?}"),
    }
    let hub = Hub::serving("reward");
    hub.change(|state| {
        for file in [INDEX, FIRST, SECOND] {
            state.files.remove(file);
        }
    });
    match open(&hub.options()) {
        Err(Error::Unsupported(message)) => assert!(message.contains("no safetensors files"), "{message}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_model_that_cannot_be_run_is_refused_before_its_tensors_are_fetched() {
    let hub = Hub::serving("mixtral");
    hub.change(|state| {
        let config = String::from_utf8(state.files["config.json"].clone()).unwrap();
        let other = config.replace(r#""model_type": "mixtral""#, r#""model_type": "qwen2""#);
        state.files.insert("config.json".to_owned(), other.into_bytes());
    });
    match open(&hub.options()) {
        Err(Error::Unsupported(message)) => assert!(message.contains("model_type qwen2"), "{message}"),
        other => panic!("{other:?}"),
    }
    let fetched = downloads(&hub.requests());
    assert!(!fetched.is_empty() && fetched.iter().all(|request| !request.contains("safetensors")), "{fetched:?}");
}

#[test]
fn tags_and_commits_cannot_name_files_outside_the_cache() {
    let hub = Hub::serving("reward");
    let outside = hub.cache.path().join("outside");
    for etag in ["../../outside", outside.to_str().unwrap(), "a..b", ""] {
        hub.change(|state| state.etag = Some(etag.to_owned()));
        assert!(matches!(open(&hub.options()), Err(Error::Unavailable(_))), "{etag:?}");
    }
    hub.change(|state| {
        state.etag = None;
        state.commit = Some("../../../outside".to_owned());
    });
    assert!(matches!(open(&hub.options()), Err(Error::Unavailable(_))));
    hub.change(|state| {
        state.commit = None;
        state.revisions.insert("main".to_owned(), "../../../outside".to_owned());
    });
    assert!(matches!(open(&hub.options()), Err(Error::Unavailable(_))));
    assert!(!outside.exists());
}

#[test]
fn offline_says_what_is_missing_and_asks_nobody() {
    let hub = Hub::serving("reward");
    let missing = |part: &str| match open(&hub.offline()) {
        Err(Error::NotFound(message)) => {
            assert!(message.contains(part) && message.contains("hf download org/name"), "{message}");
        }
        other => panic!("{other:?}"),
    };
    missing("revision main has never been fetched");
    open(&hub.options()).unwrap();
    open(&hub.offline()).unwrap();
    hub.requests();
    fs::remove_file(hub.cache.path().join("models--org--name/snapshots").join(COMMIT).join(SECOND)).unwrap();
    missing(&format!("commit {COMMIT} lacks {SECOND}"));
    assert_eq!(hub.requests(), [""; 0]);
}

#[test]
fn a_hub_out_of_reach_is_no_harm_to_what_is_cached() {
    let hub = Hub::serving("reward");
    let unreachable = HubOptions { offline: false, ..hub.offline() };
    assert!(matches!(open(&unreachable), Err(Error::Unavailable(_))));
    open(&hub.options()).unwrap();
    open(&unreachable).unwrap();
}

#[test]
fn the_cache_is_laid_out_as_other_tools_expect() {
    let hub = Hub::serving("llama-eos-list");
    open(&hub.options()).unwrap();
    let snapshot = hub.cache.path().join("models--org--name/snapshots").join(COMMIT);
    let target = fs::read_link(snapshot.join("config.json")).unwrap();
    assert!(target.starts_with("../../blobs") && snapshot.join(&target).is_file(), "{target:?}");
    let folder = Source::parse(snapshot.to_str().unwrap()).unwrap();
    assert_eq!(folder, Source::Folder(Path::new(&snapshot).to_owned()));
    let checkpoint = checkpoint::open(&folder, &hub.offline(), &mut |_| {}).unwrap();
    assert_eq!(checkpoint.config.eos, [2, 7]);
}

/// A repository of GGUF files: two formats, one of them in two parts in a folder of its own.
fn serving_gguf() -> Hub {
    let hub = Hub::serving("reward");
    let scratch = tempfile::tempdir().unwrap();
    let parts = super::gguf::split(&super::gguf::fixture("q8_0.gguf"), scratch.path());
    hub.change(|state| {
        state.files.clear();
        state.files.insert("README.md".to_owned(), b"not needed".to_vec());
        state.files.insert("m.Q4_0.gguf".to_owned(), fs::read(super::gguf::fixture("q4_0.gguf")).unwrap());
        for (index, part) in parts.iter().enumerate() {
            state.files.insert(format!("Q8_0/m.Q8_0-0000{}-of-00002.gguf", index + 1), fs::read(part).unwrap());
        }
    });
    hub
}

fn open_named(name: &str, options: &HubOptions) -> Result<Checkpoint> {
    checkpoint::open(&Source::parse(name).unwrap(), options, &mut |_| {})
}

#[test]
fn the_one_gguf_file_that_is_meant_is_fetched_and_found_again_offline() {
    let hub = serving_gguf();
    let files = ["m.Q4_0.gguf", "m.Q8_0-00001-of-00002.gguf", "m.Q8_0-00002-of-00002.gguf"];
    for (name, fetched) in [("org/name:q4_0", &files[..1]), ("org/name:Q8_0", &files[1..])] {
        let checkpoint = open_named(name, &hub.options()).unwrap();
        assert_eq!(checkpoint.name, "org/name");
        checkpoint.load_weights(&Device::Cpu, &mut |_| {}).unwrap();
        assert_eq!(downloads(&hub.requests()), fetched.iter().map(|file| format!("{file} 0-")).collect::<Vec<_>>());
        let offline = open_named(name, &hub.offline()).unwrap();
        assert_eq!(offline.headers(), checkpoint.headers());
        open_named(name, &HubOptions { revision: Some(COMMIT.to_owned()), ..hub.offline() }).unwrap();
    }
    open_named("org/name:Q8_0/m.Q8_0-00001-of-00002.gguf", &hub.options()).unwrap();
    assert_eq!(downloads(&hub.requests()), [""; 0]);
    // With blobs but without links, as after another tool's clean-up, nothing is fetched again.
    fs::remove_dir_all(hub.cache.path().join("models--org--name/snapshots")).unwrap();
    open_named("org/name:Q8_0", &hub.options()).unwrap().load_weights(&Device::Cpu, &mut |_| {}).unwrap();
    assert!(downloads(&hub.requests()).iter().all(|request| request.ends_with("0-0")));
}

#[test]
fn a_gguf_repository_that_leaves_a_choice_says_which() {
    let hub = serving_gguf();
    for (name, part) in [
        ("org/name", "has several GGUF models; name one of its files: Q8_0/m.Q8_0-*.gguf, m.Q4_0.gguf"),
        ("org/name:Q5_K_M", "has no GGUF model \"Q5_K_M\"; it has Q8_0/m.Q8_0-*.gguf, m.Q4_0.gguf"),
        ("org/name:x.gguf", "has no GGUF model \"x.gguf\""),
    ] {
        let error = open_named(name, &hub.options()).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(downloads(&hub.requests()), [""; 0]);
    hub.change(|state| drop(state.files.remove("m.Q4_0.gguf")));
    open_named("org/name", &hub.options()).unwrap();
    open_named("org/name", &hub.offline()).unwrap();
    let error = open_named("org/name:Q4_0", &hub.offline()).unwrap_err().to_string();
    assert!(error.contains("has no GGUF model \"Q4_0\"; it has Q8_0/m.Q8_0-*.gguf"), "{error}");
    // Safetensors are what a name without a file means, where a repository has both.
    let hub = Hub::serving("reward");
    hub.change(|state| {
        drop(state.files.insert("m.Q4_0.gguf".to_owned(), fs::read(super::gguf::fixture("q4_0.gguf")).unwrap()))
    });
    assert!(open(&hub.options()).unwrap().headers().len() > 12);
    assert!(open_named("org/name:Q4_0", &hub.options()).unwrap().headers().len() == 12);
    assert!(open(&hub.offline()).unwrap().headers().len() > 12);
}
