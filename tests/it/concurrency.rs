//! Many clients at once on the real built-in models, through the router: every stream is what it is alone, clients
//! that leave free their cache within two steps, and a full queue refuses at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response, StatusCode, header};
use eurus::config::{Config, Overrides};
use eurus::engine::request::{Event, SamplingParams, Task};
use eurus::engine::step::{Last, Outcome, StepOutput, StepPlan, Want};
use eurus::engine::{BlockPool, Limits, Scheduler};
use eurus::http::{self, AppState, HttpOptions, listen::Lifecycle};
use eurus::service::Service;
use futures_util::{StreamExt, future};
use serde_json::{Value, json};
use tower::ServiceExt;

const STREAMS: usize = 256;
/// Different requests; each is sent by several of the clients.
const KINDS: usize = 32;

fn start(settings: &[(&str, usize)]) -> (Router, Arc<Service>) {
    let mut overrides = Overrides::default();
    for (key, value) in settings {
        overrides.set(key, Some(*value));
    }
    let config = Config::from_sources(None, [], &overrides).unwrap();
    let service = eurus::serve::service(&config).unwrap();
    (http::router(AppState::new(Arc::clone(&service), HttpOptions::default(), Lifecycle::default())), service)
}

fn request(kind: usize) -> Request<Body> {
    let prompt = format!("Use the numbers {}, {}, {} to make {}.", 2 + kind % 7, 3 + kind % 5, 4 + kind % 3, 20 + kind);
    let body = json!({
        "messages": [{"role": "user", "content": prompt}], "seed": kind, "temperature": 1.0, "max_tokens": 60,
        "stream": true, "stream_options": {"include_usage": true}, "return_token_ids": true,
    });
    Request::post("/v1/chat/completions")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from(body.to_string()))
        .unwrap()
}

/// The text, the token ids and the usage of a stream that ends as it should.
async fn read(response: Response<Body>) -> (String, Vec<u64>, Value) {
    assert_eq!(response.status(), StatusCode::OK);
    let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    let (mut content, mut ids, mut usage) = (String::new(), Vec::new(), Value::Null);
    for event in text.lines().filter_map(|line| line.strip_prefix("data: {")) {
        let event: Value = serde_json::from_str(&format!("{{{event}")).unwrap();
        let choice = &event["choices"][0];
        content.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        ids.extend(choice["token_ids"].as_array().into_iter().flatten().filter_map(Value::as_u64));
        if !event["usage"].is_null() {
            usage = event["usage"]["completion_tokens"].clone();
        }
    }
    (content, ids, usage)
}

/// Waits until no sequence holds a block, for at most ten seconds.
async fn all_blocks_free(service: &Service) {
    let engine = &service.models()[0].engine;
    let deadline = Instant::now() + Duration::from_secs(10);
    while engine.status().blocks_used() > 0 {
        assert!(Instant::now() < deadline, "{} blocks are still in use", engine.status().blocks_used());
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_and_fifty_six_streams_are_what_they_are_alone() {
    let (router, service) = start(&[]);
    let mut alone = Vec::new();
    for kind in 0..KINDS {
        alone.push(read(router.clone().oneshot(request(kind)).await.unwrap()).await);
    }
    assert!(alone.iter().all(|(text, ids, usage)| !text.is_empty() && *usage == ids.len()), "{alone:?}");
    let streams = (0..STREAMS).map(|index| {
        let router = router.clone();
        tokio::spawn(async move { read(router.oneshot(request(index % KINDS)).await.unwrap()).await })
    });
    for (index, stream) in future::join_all(streams).await.into_iter().enumerate() {
        assert_eq!(stream.unwrap(), alone[index % KINDS], "stream {index}");
    }
    all_blocks_free(&service).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_other_half_finishes_when_half_of_the_clients_leave() {
    let (router, service) = start(&[]);
    let mut alone = Vec::new();
    for kind in 0..KINDS {
        alone.push(read(router.clone().oneshot(request(kind)).await.unwrap()).await);
    }
    let streams = (0..STREAMS).map(|index| {
        let router = router.clone();
        tokio::spawn(async move {
            let response = router.oneshot(request(index % KINDS)).await.unwrap();
            if index % 2 == 0 {
                return Some(read(response).await);
            }
            // Leaves after the first event.
            let _ = response.into_body().into_data_stream().next().await;
            None
        })
    });
    for (index, stream) in future::join_all(streams).await.into_iter().enumerate() {
        if let Some(found) = stream.unwrap() {
            assert_eq!(found, alone[index % KINDS], "stream {index}");
        }
    }
    all_blocks_free(&service).await;
}

/// One step of a model that always draws token 5.
fn step(scheduler: &mut Scheduler) -> StepPlan {
    let plan = scheduler.plan();
    let outcomes = plan.chunks.iter().map(|chunk| Outcome {
        logprobs: Vec::new(),
        scores: Vec::new(),
        last: if matches!(chunk.want, Want::Token(_)) { Last::Token(5, None) } else { Last::Nothing },
    });
    let output = StepOutput { outcomes: outcomes.collect() };
    scheduler.commit(&plan, output);
    scheduler.tell();
    plan
}

#[test]
fn blocks_of_clients_that_left_are_free_two_steps_later() {
    let limits = Limits { step_tokens: 4096, running_max: STREAMS, waiting_max: STREAMS, len_max: 64 };
    let mut scheduler = Scheduler::new(limits, BlockPool::new(STREAMS * 4, 16));
    let mut readers: Vec<Option<tokio::sync::mpsc::Receiver<Event>>> = Vec::new();
    for index in 0..STREAMS as u32 {
        let (reply, reader) = tokio::sync::mpsc::channel(64);
        let params = SamplingParams { max_tokens: 40, ..SamplingParams::default() };
        let prompt = vec![1, 10 + index, 3];
        let request = eurus::engine::request::Request { prompt, task: Task::Generate(Arc::new(params)), reply };
        scheduler.add(request).unwrap();
        readers.push(Some(reader));
    }
    assert_eq!(step(&mut scheduler).chunks.len(), STREAMS);
    let before = scheduler.pool().used_count();
    assert_eq!(before, STREAMS);
    for reader in readers.iter_mut().step_by(2) {
        *reader = None;
    }
    step(&mut scheduler);
    assert_eq!(step(&mut scheduler).chunks.len(), STREAMS / 2);
    assert_eq!(scheduler.pool().used_count(), STREAMS / 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_refuses_at_once() {
    let (router, service) = start(&[("engine.running_max", 1), ("engine.waiting_max", 4)]);
    let streams = (0..32).map(|kind| {
        let router = router.clone();
        tokio::spawn(async move {
            let response = router.oneshot(request(kind)).await.unwrap();
            let status = response.status();
            let wait = response.headers().get(header::RETRY_AFTER).cloned();
            let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
            (status, wait, String::from_utf8(bytes.to_vec()).unwrap())
        })
    });
    let answers: Vec<_> = future::join_all(streams).await.into_iter().map(Result::unwrap).collect();
    let (finished, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(|(status, ..)| *status == StatusCode::OK);
    assert!(finished.len() >= 4 && finished.iter().all(|(.., body)| body.ends_with("data: [DONE]\n\n")));
    assert!(!refused.is_empty());
    for (status, wait, body) in refused {
        assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
        assert!(wait.unwrap().to_str().unwrap().parse::<u64>().unwrap() >= 1);
        let error: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(error["error"]["type"], "rate_limit_error");
    }
    all_blocks_free(&service).await;
}
