//! What is noted about every request: an id, one log line, two metrics. Never its body, its key or its address.

use std::time::{Duration, Instant};

use axum::{
    body::Body,
    extract::{MatchedPath, Request, State},
    http::{HeaderName, HeaderValue, Method, StatusCode},
    middleware::Next,
    response::{IntoResponse, Response},
};
use uuid::Uuid;

use super::{AppState, error::ApiError, watched::OnDrop};

/// Carries the id of a request, given by the client or made here.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

const REQUEST_ID_BYTES_MAX: usize = 128;

/// The outermost layer: request id, log line, metrics; the clock stops with the last byte.
pub async fn observe(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_string();
    let method = known_method(request.method());
    let id = request_id(&request);
    let mut response = next.run(request).await;
    response.headers_mut().insert(REQUEST_ID, id.clone());
    let status = response.status();
    let note = move || note(&state, &route, method, status, &id, began.elapsed());
    response.map(|body| Body::new(OnDrop::new(body, note)))
}

fn note(state: &AppState, route: &str, method: &str, status: StatusCode, id: &HeaderValue, took: Duration) {
    let metrics = state.metrics();
    metrics.requests_total.with_label_values(&[route, status.as_str()]).inc();
    metrics.request_seconds.with_label_values(&[route]).observe(took.as_secs_f64());
    let id = id.to_str().unwrap_or("");
    tracing::info!(method, route, status = status.as_u16(), ms = took.as_millis() as u64, id, "request");
}

/// A layer: answers 408 when no response has begun in time. Streams watch the same deadline themselves.
pub async fn limit_time(State(state): State<AppState>, request: Request, next: Next) -> Response {
    match tokio::time::timeout(state.options().request_timeout, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            ApiError::new(StatusCode::REQUEST_TIMEOUT, "the request took longer than the server allows").into_response()
        }
    }
}

/// The client's id where it is short and plain, else a new one.
fn request_id(request: &Request) -> HeaderValue {
    let given = request.headers().get(REQUEST_ID).filter(|value| {
        let bytes = value.as_bytes();
        let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(byte);
        !bytes.is_empty() && bytes.len() <= REQUEST_ID_BYTES_MAX && bytes.iter().all(plain)
    });
    given.cloned().unwrap_or_else(|| {
        HeaderValue::try_from(Uuid::new_v4().to_string()).unwrap_or(HeaderValue::from_static("unknown"))
    })
}

/// Methods are free text on the wire; a log line has no room for that.
fn known_method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}
