//! The HTTP surface: wire types, routes and the accept loop. What a request means is the service's business.
//! Every route stands in one table, from which router, documentation and key check are made.

pub mod access;
pub mod aliases;
pub mod auth;
pub mod body;
pub mod chat;
pub mod choices;
pub mod completion_stream;
pub mod completions;
pub mod deadline;
pub mod error;
pub mod fields;
pub mod listen;
pub mod logprobs;
pub mod models;
pub mod openapi;
pub mod operations;
pub mod rerank;
pub mod rewards;
pub mod routes;
pub mod sampling;
pub mod stream;
pub mod tokenize;
pub mod watched;
pub mod wire;

use std::{sync::Arc, time::Duration};

use axum::{Router, middleware};
use tower_http::catch_panic::CatchPanicLayer;

use crate::{metrics::Metrics, service::Service};
use auth::{ApiKeys, MetricsAccess};
use error::{ApiError, OnPanic};
use listen::Lifecycle;

/// Limits and access of the routes; those of the accept loop are [`listen::ListenOptions`].
#[derive(Debug, Clone)]
pub struct HttpOptions {
    /// Accepted API keys; none leaves everything open.
    pub keys: ApiKeys,
    /// Whether `/metrics` needs a key too.
    pub metrics_access: MetricsAccess,
    /// Bytes of a request body.
    pub body_bytes_max: usize,
    /// From the head of a request to the end of its body.
    pub body_timeout: Duration,
    /// From the head of a request to the end of its answer.
    pub request_timeout: Duration,
    /// An engine that has work and finishes no step for this long counts as stalled.
    pub stall_timeout: Duration,
    /// Prompts of one completions request.
    pub prompts_max: usize,
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self {
            keys: ApiKeys::default(),
            metrics_access: MetricsAccess::Guarded,
            body_bytes_max: 8 << 20,
            body_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_secs(3600),
            stall_timeout: Duration::from_secs(30),
            prompts_max: 256,
        }
    }
}

/// What every handler can reach.
#[derive(Debug, Clone)]
pub struct AppState(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    service: Arc<Service>,
    options: HttpOptions,
    lifecycle: Lifecycle,
}

impl AppState {
    /// State of a router over `service`. `lifecycle` is shared with [`listen::serve`].
    pub fn new(service: Arc<Service>, options: HttpOptions, lifecycle: Lifecycle) -> Self {
        Self(Arc::new(Shared { service, options, lifecycle }))
    }

    /// The use cases.
    pub fn service(&self) -> &Arc<Service> {
        &self.0.service
    }

    /// Limits and access.
    pub fn options(&self) -> &HttpOptions {
        &self.0.options
    }

    /// How far the server is on its way down.
    pub fn lifecycle(&self) -> &Lifecycle {
        &self.0.lifecycle
    }

    /// The metrics of this process.
    pub fn metrics(&self) -> &Metrics {
        self.0.service.metrics()
    }
}

/// All routes with all their layers.
pub fn router(state: AppState) -> Router {
    let mut router = Router::new();
    for (path, methods) in routes::by_path() {
        router = router.route(path, methods);
    }
    router
        .merge(openapi::docs())
        .fallback(|| async { ApiError::no_route() })
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
        .layer(middleware::from_fn_with_state(state.clone(), access::limit_time))
        .layer(middleware::from_fn_with_state(state.clone(), operations::refuse_while_draining))
        .layer(middleware::from_fn_with_state(state.clone(), auth::require_key))
        .layer(CatchPanicLayer::custom(OnPanic))
        .layer(middleware::from_fn_with_state(state.clone(), access::observe))
        .with_state(state)
}
