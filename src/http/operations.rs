//! Probes, metrics, version and the way down. Nothing here waits for an engine.

use axum::{
    Json,
    extract::{MatchedPath, Request, State},
    http::{StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Redirect, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    AppState,
    auth::OPEN_ROUTES,
    error::{ApiError, ApiResult, ErrorResponse},
    listen::Stage,
};

/// A probe's good answer.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Status {
    /// `ok`
    pub status: &'static str,
}

/// Name and version of this program.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Version {
    /// Version of the package.
    pub version: &'static str,
    /// Name of the program.
    pub name: &'static str,
}

/// 200 while every engine works and requests are taken.
#[utoipa::path(get, path = "/health", responses((status = 200, body = Status), (status = 503, body = ErrorResponse)))]
pub async fn health(State(state): State<AppState>) -> ApiResult<Json<Status>> {
    if state.lifecycle().stage() != Stage::Serving {
        return Err(ApiError::draining());
    }
    check_engines(&state)?;
    Ok(Json(Status { status: "ok" }))
}

/// Every engine must live and, where it has work, have finished a step lately. Read from atomics.
fn check_engines(state: &AppState) -> ApiResult<()> {
    for model in state.service().models() {
        let status = model.engine.status();
        let problem = match status.dead() {
            Some(_) => "has died",
            None if status.step_age() > state.options().stall_timeout => "is stalled",
            None => continue,
        };
        let message = format!("the engine of model {} {problem}", model.name);
        return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message));
    }
    Ok(())
}

/// 200 while requests should be sent here. Models are loaded before the server listens.
#[utoipa::path(get, path = "/ready", responses((status = 200, body = Status), (status = 503, body = ErrorResponse)))]
pub async fn ready(state: State<AppState>) -> ApiResult<Json<Status>> {
    health(state).await
}

/// 200 until an engine is dead or stalled: draining is no reason to be killed.
#[utoipa::path(get, path = "/live", responses((status = 200, body = Status), (status = 503, body = ErrorResponse)))]
pub async fn live(State(state): State<AppState>) -> ApiResult<Json<Status>> {
    if state.lifecycle().stage() == Stage::Serving {
        check_engines(&state)?;
    }
    Ok(Json(Status { status: "ok" }))
}

/// Version of the running program.
#[utoipa::path(get, path = "/version", responses((status = 200, body = Version)))]
pub async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION"), name: env!("CARGO_PKG_NAME") })
}

/// Metrics in the Prometheus text format.
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String, content_type = "text/plain")))]
pub async fn metrics(State(state): State<AppState>) -> ApiResult<Response> {
    let text = state.metrics().render()?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}

/// Leads to the documentation.
#[utoipa::path(get, path = "/", responses((status = 307, description = "to /docs/")))]
pub async fn home() -> Redirect {
    Redirect::temporary("/docs/")
}

/// A layer: after the shutdown signal only probes and metrics are answered.
pub async fn refuse_while_draining(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let probe = path.is_some_and(|path| OPEN_ROUTES.contains(&path) || path == "/metrics");
    if state.lifecycle().stage() == Stage::Serving || probe {
        next.run(request).await
    } else {
        ApiError::draining().into_response()
    }
}
