//! The binary as users run it: it starts, answers the examples, drains on SIGTERM and says with its exit code how it went.
//! Everything on loopback with the built-in models.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver},
};

use serde_json::{Value, json};

const QUESTION: &str = "Use the numbers 3, 5, 8 to make 29.";

/// `eurus` with nothing of the caller's environment that could change what it does.
pub(super) fn eurus(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_eurus"));
    command.args(arguments).env_clear().env("HF_HUB_OFFLINE", "1").env("HOME", "/nonexistent");
    // No eurus.toml there.
    command.current_dir(env!("CARGO_TARGET_TMPDIR")).stdin(Stdio::null());
    command
}

/// A running server. Dropping it kills it.
struct Server {
    child: Child,
    /// Lines of stderr, read by a thread so that the server never waits for us.
    log: Receiver<String>,
    seen: String,
    address: String,
}

impl Server {
    fn start(variables: &[(&str, &str)]) -> Self {
        let mut command = eurus(&["serve", "--port", "0", "--log-format", "json"]);
        command.envs(variables.iter().copied()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, log) = mpsc::channel();
        std::thread::spawn(move || stderr.lines().map_while(|line| line.ok()).try_for_each(|line| sender.send(line)));
        let mut server = Self { child, log, seen: String::new(), address: String::new() };
        let line = server.wait_for("listening on http://");
        let message = line["message"].as_str().unwrap();
        server.address = message.rsplit('/').next().unwrap().to_string();
        server
    }

    /// The next log line whose message contains `text`.
    #[track_caller]
    fn wait_for(&mut self, text: &str) -> Value {
        loop {
            let Ok(line) = self.log.recv() else { panic!("ended before {text:?}:\n{}", self.seen) };
            self.seen.push_str(&line);
            self.seen.push('\n');
            let line: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("not JSON: {line}"));
            if line["message"].as_str().is_some_and(|message| message.contains(text)) {
                return line;
            }
        }
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Exit code and the whole log.
    fn end(mut self) -> (Option<i32>, String) {
        self.seen.extend(self.log.iter().map(|line| line + "\n"));
        (self.child.wait().unwrap().code(), std::mem::take(&mut self.seen))
    }

    fn send(&self, method: &str, path: &str, headers: &str, body: Option<&Value>) -> BufReader<TcpStream> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n{headers}", self.address);
        let kind = "Content-Type: application/json\r\n";
        write!(stream, "{head}{kind}Content-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        BufReader::new(stream)
    }

    /// Status and body of an answer that is not streamed.
    fn ask(&self, method: &str, path: &str, headers: &str, body: Option<&Value>) -> (u16, String) {
        let mut text = String::new();
        self.send(method, path, headers, body).read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_string())
    }

    /// A streamed answer of `tokens` tokens, its first event read.
    fn stream(&self, tokens: usize) -> Events {
        let body = json!({"messages": [{"role": "user", "content": QUESTION}], "stream": true, "temperature": 0,
            "max_tokens": tokens, "ignore_eos": true});
        let mut events = Events(self.send("POST", "/v1/chat/completions", "", Some(&body)));
        assert!(events.next().is_some(), "no first event");
        events
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The `data:` lines of a streamed answer.
struct Events(BufReader<TcpStream>);

impl Iterator for Events {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        let mut line = String::new();
        while self.0.read_line(&mut line).unwrap_or(0) > 0 {
            if let Some(data) = line.strip_prefix("data: ") {
                return Some(data.trim_end().to_string());
            }
            line.clear();
        }
        None
    }
}

/// What a shell script prints, run against `server`.
#[track_caller]
fn shell(server: &Server, arguments: &[&str]) -> String {
    let url = format!("http://{}", server.address);
    let output = Command::new("bash").args(arguments).env("EURUS_URL", url).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn example(server: &Server, name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(name);
    shell(server, &[path.to_str().unwrap()])
}

/// Sum of the numbers in an expression of sums and products, as the built-in policy writes them.
fn value(expression: &str) -> i64 {
    expression
        .split('+')
        .map(|term| term.split('*').map(|factor| factor.parse::<i64>().unwrap()).product::<i64>())
        .sum()
}

#[test]
fn the_examples_answer() {
    let server = Server::start(&[]);
    let mut text = String::new();
    let stream = example(&server, "chat.sh");
    let events: Vec<&str> = stream.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    let (done, chunks) = events.split_last().unwrap();
    assert_eq!(*done, "[DONE]");
    for chunk in chunks {
        let chunk: Value = serde_json::from_str(chunk).unwrap();
        text += chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
    }
    assert_eq!(text, "Step 1: 3*8=24, left 5 24\nStep 2: 24+5=29, left 29\nAnswer: \\boxed{3*8+5}");
    let usage: Value = serde_json::from_str(chunks.last().unwrap()).unwrap();
    assert_eq!(usage["usage"]["completion_tokens"], 38);

    let scores: Value = serde_json::from_str(&example(&server, "score.sh")).unwrap();
    let rewards: Vec<f64> =
        scores["data"].as_array().unwrap().iter().map(|row| row["reward"].as_f64().unwrap()).collect();
    assert!(rewards.len() == 2 && rewards[0] > rewards[1], "{rewards:?}");

    let best: Value = serde_json::from_str(&example(&server, "best_of_n.sh")).unwrap();
    let candidates = best["best_of"]["candidates"].as_array().unwrap();
    assert_eq!((candidates.len(), best["choices"].as_array().unwrap().len()), (16, 1));
    let chosen = &best["choices"][0];
    let highest = candidates.iter().map(|candidate| candidate["reward"].as_f64().unwrap()).fold(f64::MIN, f64::max);
    assert_eq!(chosen["reward"].as_f64().unwrap(), highest);
    assert_eq!(value(chosen["answer"].as_str().unwrap()), 29);
}

#[test]
fn the_first_request_of_the_readme_gives_the_answer_printed_there() {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let mut blocks = readme.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let request = blocks.find(|block| block.starts_with("curl")).unwrap();
    let server = Server::start(&[]);
    let answer = shell(&server, &["-c", &request.replace("127.0.0.1:8000", &server.address)]);
    let answer: Value = serde_json::from_str(&answer).unwrap();
    let content = answer["choices"][0]["message"]["content"].to_string();
    assert!(readme.contains(&content), "{content}");
    let counts = format!("{}", answer["usage"]).replace(' ', "");
    assert!(readme.contains(&counts), "{counts}");
}

#[test]
fn sigterm_lets_a_running_stream_finish() {
    let mut server = Server::start(&[]);
    let events = server.stream(300);
    server.signal("TERM");
    server.wait_for("draining");
    // The listener is closed by now.
    assert!(TcpStream::connect(&server.address).is_err());
    let events: Vec<String> = events.collect();
    let (done, chunks) = events.split_last().unwrap();
    assert_eq!(done, "[DONE]");
    let reasons: Vec<Value> = chunks
        .iter()
        .map(|chunk| serde_json::from_str::<Value>(chunk).unwrap()["choices"][0]["finish_reason"].clone())
        .filter(Value::is_string)
        .collect();
    assert_eq!(reasons, ["length"]);
    let (code, log) = server.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("all requests answered"), "{log}");
}

#[test]
fn a_second_signal_ends_at_once() {
    let mut server = Server::start(&[]);
    let _events = server.stream(1000);
    server.signal("TERM");
    server.wait_for("draining");
    server.signal("INT");
    let (code, log) = server.end();
    assert_eq!(code, Some(130), "{log}");
}

/// Local and remote addresses of the sockets of a process, in the hexadecimal of /proc.
#[cfg(target_os = "linux")]
fn sockets(process: u32) -> Vec<(String, String)> {
    let links = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    let targets = links.filter_map(|link| std::fs::read_link(link.unwrap().path()).ok());
    let inodes: Vec<String> = targets
        .filter_map(|target| Some(target.to_str()?.strip_prefix("socket:[")?.trim_end_matches(']').to_string()))
        .collect();
    let mut found = Vec::new();
    for table in ["tcp", "tcp6", "udp", "udp6"] {
        let text = std::fs::read_to_string(format!("/proc/{process}/net/{table}")).unwrap_or_default();
        for line in text.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            if inodes.iter().any(|inode| inode == fields[9]) {
                found.push((fields[1].to_string(), fields[2].to_string()));
            }
        }
    }
    found
}

#[cfg(target_os = "linux")]
#[test]
fn only_loopback_is_touched() {
    let server = Server::start(&[]);
    let mut events = server.stream(64);
    let sockets = sockets(server.child.id());
    // The listener and the stream's connection.
    assert!(sockets.len() >= 2, "{sockets:?}");
    for (local, remote) in &sockets {
        assert!(local.starts_with("0100007F:"), "{sockets:?}");
        assert!(remote.starts_with("0100007F:") || remote == "00000000:0000", "{sockets:?}");
    }
    assert_eq!(events.by_ref().last().as_deref(), Some("[DONE]"));
}

#[test]
fn keys_guard_the_routes_and_stay_out_of_the_log() {
    let server = Server::start(&[("EURUS_SERVER__API_KEYS", "sesame,thyme"), ("EURUS_LOG", "trace")]);
    let body = json!({"prompt": [1, 2, 3], "max_tokens": 1});
    for (headers, status) in [
        ("", 401),
        ("Authorization: Bearer sesam\r\n", 401),
        ("Authorization: Bearer sesame\r\n", 200),
        ("Authorization: Bearer thyme\r\n", 200),
    ] {
        let (got, text) = server.ask("POST", "/v1/completions", headers, Some(&body));
        assert_eq!(got, status, "{headers} {text}");
    }
    assert_eq!(server.ask("GET", "/health", "", None).0, 200);
    assert_eq!(server.ask("GET", "/metrics", "", None).0, 401);
    server.signal("TERM");
    let (code, log) = server.end();
    assert_eq!(code, Some(0));
    assert!(!log.contains("sesame") && !log.contains("thyme"), "a key is in the log");
}

#[test]
fn health_tells_by_its_exit_code() {
    let server = Server::start(&[]);
    let port = server.address.rsplit(':').next().unwrap().to_string();
    let health = || eurus(&["health", "--port", &port]).output().unwrap();
    assert_eq!(health().status.code(), Some(0));
    drop(server);
    let gone = health();
    assert_eq!(gone.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&gone.stderr).contains("/health"));
}

#[track_caller]
fn refused(arguments: &[&str], part: &str) {
    let output = eurus(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).to_string();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains(part), "{text}");
}

#[test]
fn what_the_caller_can_mend_exits_with_two() {
    refused(&["serve", "--prot", "1"], "--port");
    refused(&["serve", "--set", "server.prot=1"], "did you mean `server.port`?");
    refused(&["serve", "--config", "/nonexistent.toml"], "/nonexistent.toml");
    refused(&["serve", "--model", "eurus-mini/reward", "--port", "0"], "is a reward model");
    refused(&["serve", "--model", "../../etc/passwd", "--port", "0"], "passwd");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    refused(&["serve", "--port", &taken.local_addr().unwrap().port().to_string()], "cannot listen on 127.0.0.1");
}

#[test]
fn the_training_example_writes_a_model_that_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/train.sh");
    let run = Command::new("bash")
        .arg(script)
        .arg(&output)
        .env("EURUS", env!("CARGO_BIN_EXE_eurus"))
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let last: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert!(last["rewards/margins"].as_f64().unwrap() > 0.0, "{last}");
    let model = output.join("model").display().to_string();
    let server = Server::start(&[("EURUS_MODEL", model.as_str())]);
    let models: Value = serde_json::from_str(&shell(&server, &["-c", "curl -sS \"$EURUS_URL/v1/models\""])).unwrap();
    assert_eq!(models["data"][0]["id"], "out", "the run around the folder");
}
