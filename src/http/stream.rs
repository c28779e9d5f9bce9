//! Server-sent events: updates of several generations become chunks, then `[DONE]`.
//! A failure in the middle becomes an event with the error envelope. Dropping the stream cancels its generations.

use std::{
    collections::VecDeque,
    convert::Infallible,
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    time::Duration,
};

use axum::{
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{
        IntoResponse, Response, Sse,
        sse::{Event, KeepAlive},
    },
};
use futures_util::stream::unfold;
use serde::Serialize;
use tokio_stream::{Stream, StreamExt, StreamMap};

use super::{AppState, error::ApiError, listen::Stage};
use crate::{
    error::Result,
    service::{generate::Generation, updates::Update},
};

/// Comments between events keep proxies from closing a stream that waits for its turn.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Turns updates into the chunks of one API.
pub trait Chunks: Send + 'static {
    /// Chunks for an update of the generation of prompt number `prompt`.
    fn update(&mut self, prompt: usize, update: Update) -> Vec<String>;
    /// Chunks after the last update.
    fn closing(&mut self) -> Vec<String>;
}

/// A chunk as JSON.
pub fn to_json<T: Serialize>(chunk: &T) -> String {
    serde_json::to_string(chunk).unwrap_or_else(|_| ApiError::internal().to_json())
}

/// The response that streams `generations` through `chunks`.
pub fn respond(state: &AppState, generations: Vec<Generation>, chunks: impl Chunks) -> Response {
    let mut updates = StreamMap::new();
    for (prompt, generation) in generations.into_iter().enumerate() {
        updates.insert(prompt, Box::pin(updates_of(generation)) as Updates);
    }
    let flow = Flow { chunks, updates, ready: VecDeque::new(), done: false, interrupted: interruption(state) };
    let events = unfold(flow, |mut flow| async move {
        let text = flow.next().await?;
        Some((Ok::<_, Infallible>(Event::default().data(text)), flow))
    });
    let headers = [
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    (headers, Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE))).into_response()
}

type Updates = Pin<Box<dyn Stream<Item = Result<Update>> + Send>>;

fn updates_of(generation: Generation) -> impl Stream<Item = Result<Update>> {
    unfold(generation, |mut generation| async move { Some((generation.next().await?, generation)) })
}

/// Completes when the stream may not go on: its time is over, or the server's.
fn interruption(state: &AppState) -> Pin<Box<dyn Future<Output = ApiError> + Send>> {
    let (lifecycle, timeout) = (state.lifecycle().clone(), state.options().request_timeout);
    Box::pin(async move {
        tokio::select! {
            () = lifecycle.reached(Stage::Ending) => ApiError::draining(),
            () = tokio::time::sleep(timeout) => {
                ApiError::new(StatusCode::REQUEST_TIMEOUT, "the request took longer than the server allows")
            }
        }
    })
}

struct Flow<C> {
    chunks: C,
    updates: StreamMap<usize, Updates>,
    ready: VecDeque<String>,
    done: bool,
    interrupted: Pin<Box<dyn Future<Output = ApiError> + Send>>,
}

impl<C: Chunks> Flow<C> {
    /// The data of the next event.
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(text) = self.ready.pop_front() {
                return Some(text);
            }
            if self.done {
                return None;
            }
            match caught(self.step()).await {
                Ok(texts) => self.ready.extend(texts),
                Err(error) => self.fail(&error),
            }
        }
    }

    async fn step(&mut self) -> Result<Vec<String>, ApiError> {
        tokio::select! {
            biased;
            error = &mut self.interrupted => Err(error),
            update = self.updates.next() => match update {
                Some((prompt, Ok(update))) => Ok(self.chunks.update(prompt, update)),
                Some((_, Err(error))) => Err(error.into()),
                None => {
                    self.done = true;
                    let mut texts = self.chunks.closing();
                    texts.push("[DONE]".to_string());
                    Ok(texts)
                }
            },
        }
    }

    fn fail(&mut self, error: &ApiError) {
        self.done = true;
        self.updates.clear();
        self.ready.extend([error.to_json(), "[DONE]".to_string()]);
    }
}

/// A panic inside `step` as an error: the response has begun, so no layer can answer for it.
async fn caught<T>(step: impl Future<Output = Result<T, ApiError>>) -> Result<T, ApiError> {
    let mut step = pin!(step);
    poll_fn(|cx| {
        catch_unwind(AssertUnwindSafe(|| step.as_mut().poll(cx))).unwrap_or_else(|_| {
            tracing::error!("a stream panicked");
            std::task::Poll::Ready(Err(ApiError::internal()))
        })
    })
    .await
}
