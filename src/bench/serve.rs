//! A load generator: so many clients, each sending its next request as soon as the last one is answered.
//! Speaks plain HTTP to any server with /v1/completions (streamed) or /v1/rewards; knows nothing of our engine.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::{StreamExt, future};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::{Value, json};

use super::Quantiles;
use crate::error::{Error, Result};
use crate::ops::sample::uniform;

/// What to send.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Address of the server
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub url: String,
    /// Model name to ask for; the server's first one of the kind if absent
    #[arg(long)]
    pub model: Option<String>,
    /// Key sent as a bearer token
    #[arg(long, env = "EURUS_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// What each request asks for
    #[arg(long, value_enum, default_value_t = Work::Stream)]
    pub work: Work,
    /// Clients that wait for an answer at the same time
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub concurrency: u32,
    /// Requests in all
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub requests: u32,
    /// Tokens of each prompt
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt_tokens: u32,
    /// Tokens of each completion (generation only)
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub output_tokens: u32,
    /// Leading prompt tokens that all requests share
    #[arg(long, default_value_t = 0)]
    pub shared_prefix: u32,
    /// Prompts are random token ids from 3 up to this
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(4..))]
    pub vocab: u32,
    /// Seed of the prompts
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Also write the report to this file, as JSON
    #[arg(long)]
    pub json: Option<std::path::PathBuf>,
}

/// What each request of the load asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// A streamed completion.
    Stream,
    /// A completion answered at once.
    Whole,
    /// The reward of one sequence.
    Reward,
}

/// What was measured. Times are seconds unless the name says otherwise.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// What was asked for.
    pub work: Work,
    /// Clients at the same time.
    pub concurrency: u32,
    /// Requests answered with success.
    pub completed: usize,
    /// Requests refused or failed.
    pub failed: usize,
    /// The first failure, in the server's words.
    pub first_failure: Option<String>,
    /// From the first request to the last answer.
    pub elapsed_seconds: f64,
    /// Answers per second.
    pub requests_per_second: f64,
    /// Prompt tokens per second.
    pub prompt_tokens_per_second: f64,
    /// Generated tokens per second, all clients together.
    pub output_tokens_per_second: f64,
    /// Request sent to first token (streamed only).
    pub time_to_first_token: Quantiles,
    /// Between events of one stream that carry tokens (streamed only).
    pub inter_token: Quantiles,
    /// Request sent to last byte.
    pub request: Quantiles,
}

#[derive(Default)]
struct Sample {
    prompt_tokens: u64,
    output_tokens: u64,
    first_token: Option<f64>,
    gaps: Vec<f64>,
    total: f64,
}

/// Sends the load and measures it, with a progress bar on a terminal's stderr.
///
/// # Errors
/// If the client cannot be set up, or no request succeeded.
pub async fn run(options: &Options) -> Result<Report> {
    let client = reqwest::Client::builder().build().map_err(Error::internal)?;
    let bar = ProgressBar::new(u64::from(options.requests));
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} requests, {per_sec}, {eta} left") {
        bar.set_style(style);
    }
    let next = AtomicUsize::new(0);
    let started = Instant::now();
    let clients = (0..options.concurrency).map(|_| run_client(&client, options, &next, &bar));
    let samples: Vec<Result<Sample>> = future::join_all(clients).await.into_iter().flatten().collect();
    bar.finish_and_clear();
    report(options, samples, started.elapsed())
}

/// One client: requests one after the other until none is left.
async fn run_client(
    client: &reqwest::Client,
    options: &Options,
    next: &AtomicUsize,
    bar: &ProgressBar,
) -> Vec<Result<Sample>> {
    let mut samples = Vec::new();
    loop {
        let index = next.fetch_add(1, Ordering::Relaxed);
        if index >= options.requests as usize {
            return samples;
        }
        samples.push(send(client, options, index as u64).await);
        bar.inc(1);
    }
}

fn report(options: &Options, samples: Vec<Result<Sample>>, elapsed: Duration) -> Result<Report> {
    let (mut good, mut failures) = (Vec::new(), Vec::new());
    for sample in samples {
        match sample {
            Ok(sample) => good.push(sample),
            Err(error) => failures.push(error.to_string()),
        }
    }
    if good.is_empty() {
        return Err(Error::Unavailable(format!("no request succeeded: {}", failures.swap_remove(0))));
    }
    let seconds = elapsed.as_secs_f64();
    let rate = |count: u64| count as f64 / seconds;
    Ok(Report {
        work: options.work,
        concurrency: options.concurrency,
        completed: good.len(),
        failed: failures.len(),
        first_failure: failures.into_iter().next(),
        elapsed_seconds: seconds,
        requests_per_second: rate(good.len() as u64),
        prompt_tokens_per_second: rate(good.iter().map(|s| s.prompt_tokens).sum()),
        output_tokens_per_second: rate(good.iter().map(|s| s.output_tokens).sum()),
        time_to_first_token: Quantiles::of(good.iter().filter_map(|s| s.first_token).collect()),
        inter_token: Quantiles::of(good.iter().flat_map(|s| s.gaps.iter().copied()).collect()),
        request: Quantiles::of(good.iter().map(|s| s.total).collect()),
    })
}

async fn send(client: &reqwest::Client, options: &Options, index: u64) -> Result<Sample> {
    let path = if options.work == Work::Reward { "/v1/rewards" } else { "/v1/completions" };
    let mut request = client.post(format!("{}{path}", options.url.trim_end_matches('/'))).json(&body(options, index));
    if let Some(key) = &options.api_key {
        request = request.bearer_auth(key);
    }
    let sent = Instant::now();
    let response = request.send().await.map_err(unreachable_server)?;
    if !response.status().is_success() {
        let status = response.status();
        let text = response.text().await.unwrap_or_default();
        return Err(Error::Unavailable(format!("{status}: {text}")));
    }
    match options.work {
        Work::Stream => read_stream(response, sent).await,
        Work::Whole | Work::Reward => read_whole(response, sent).await,
    }
}

fn unreachable_server(error: reqwest::Error) -> Error {
    Error::Unavailable(format!(
        "the server does not answer ({error}); start it with `eurus serve` or name it with --url"
    ))
}

async fn read_whole(response: reqwest::Response, sent: Instant) -> Result<Sample> {
    let answer: Value = response.json().await.map_err(unreachable_server)?;
    let mut sample = Sample { total: sent.elapsed().as_secs_f64(), ..Sample::default() };
    sample.count(&answer["usage"]);
    Ok(sample)
}

/// Reads server-sent events to the end. Every event with a choice counts as a token for the gaps.
async fn read_stream(response: reqwest::Response, sent: Instant) -> Result<Sample> {
    let mut sample = Sample::default();
    let mut bytes = response.bytes_stream();
    let (mut buffer, mut last) = (Vec::new(), None);
    while let Some(piece) = bytes.next().await {
        buffer.extend_from_slice(&piece.map_err(unreachable_server)?);
        while let Some(end) = buffer.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            let Some(data) = line.strip_prefix(b"data: ") else { continue };
            let Ok(event) = serde_json::from_slice::<Value>(data) else { continue };
            if let Some(message) = event["error"]["message"].as_str() {
                return Err(Error::Unavailable(message.to_string()));
            }
            sample.count(&event["usage"]);
            let choice = &event["choices"][0];
            if choice.is_null() || !choice["finish_reason"].is_null() {
                continue;
            }
            let now = sent.elapsed().as_secs_f64();
            match last.replace(now) {
                None => sample.first_token = Some(now),
                Some(before) => sample.gaps.push(now - before),
            }
        }
    }
    sample.total = sent.elapsed().as_secs_f64();
    Ok(sample)
}

impl Sample {
    fn count(&mut self, usage: &Value) {
        if let Some(tokens) = usage["prompt_tokens"].as_u64() {
            self.prompt_tokens = tokens;
            self.output_tokens = usage["completion_tokens"].as_u64().unwrap_or_default();
        }
    }
}

/// The request body of request number `index`.
fn body(options: &Options, index: u64) -> Value {
    let shared = options.shared_prefix.min(options.prompt_tokens);
    let ids: Vec<u32> = (0..options.prompt_tokens)
        .map(|position| {
            let stream = if position < shared { u64::from(u32::MAX) } else { index };
            let share = uniform(options.seed, stream << 32 | u64::from(position));
            3 + (share * f64::from(options.vocab - 3)) as u32
        })
        .collect();
    let mut body = match options.work {
        Work::Reward => json!({"input": [ids]}),
        Work::Stream | Work::Whole => json!({
            "prompt": ids, "max_tokens": options.output_tokens, "ignore_eos": true, "temperature": 0.0, "seed": index,
        }),
    };
    if options.work == Work::Stream {
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
    }
    if let Some(model) = &options.model {
        body["model"] = json!(model);
    }
    body
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |f: &mut fmt::Formatter<'_>, name: &str, q: &Quantiles| {
            writeln!(f, "{name:<22} p50 {:>9.2} ms   p99 {:>9.2} ms   max {:>9.2} ms", q.p50_ms, q.p99_ms, q.max_ms)
        };
        writeln!(
            f,
            "completed {} of {}, {} clients, {:.2} s",
            self.completed,
            self.completed + self.failed,
            self.concurrency,
            self.elapsed_seconds
        )?;
        writeln!(f, "requests/s             {:>10.2}", self.requests_per_second)?;
        writeln!(f, "prompt tokens/s        {:>10.1}", self.prompt_tokens_per_second)?;
        if self.work != Work::Reward {
            writeln!(f, "output tokens/s        {:>10.1}", self.output_tokens_per_second)?;
        }
        if self.work == Work::Stream {
            row(f, "time to first token", &self.time_to_first_token)?;
            row(f, "inter-token", &self.inter_token)?;
        }
        row(f, "request", &self.request)?;
        match &self.first_failure {
            Some(failure) => write!(f, "first failure: {failure}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use clap::Parser;

    use super::*;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        options: Options,
    }

    #[track_caller]
    fn prompt(arguments: &[&str], index: u64) -> Vec<u64> {
        let cli = Cli::try_parse_from(std::iter::once(&"bench").chain(arguments)).unwrap();
        let body = body(&cli.options, index);
        body["prompt"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
    }

    #[test]
    fn prompts_differ_after_the_shared_prefix_and_stay_in_the_vocabulary() {
        let arguments = ["--prompt-tokens", "40", "--shared-prefix", "10", "--vocab", "50"];
        let (a, b) = (prompt(&arguments, 0), prompt(&arguments, 1));
        assert_eq!(a[..10], b[..10]);
        assert_ne!(a[10..], b[10..]);
        assert_eq!(a, prompt(&arguments, 0));
        assert!(a.iter().all(|id| (3..50).contains(id)));
    }
}
