//! The table of routes. Several paths may lead to one use case; `like` names the path that documents it.

use axum::{
    http::Method,
    routing::{MethodRouter, get, post},
};

use super::{AppState, aliases, chat, completions, models, openapi, operations, rerank, rewards, tokenize};

/// One path and method.
pub struct Route {
    /// Path template.
    pub path: &'static str,
    /// Method.
    pub method: Method,
    /// The path under which the handler is documented; its own as a rule.
    pub like: &'static str,
    make: fn() -> MethodRouter<AppState>,
}

impl Route {
    /// The path as OpenAPI writes it: there, a parameter that spans slashes looks like any other.
    pub fn documented_path(&self) -> String {
        self.path.replace("{*", "{")
    }
}

impl std::fmt::Debug for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.method, self.path)
    }
}

macro_rules! route {
    ($method:ident $path:literal $handler:expr) => {
        route!($method $path $handler, like $path)
    };
    ($method:ident $path:literal $handler:expr, like $like:literal) => {
        Route { path: $path, method: route!(@ $method), like: $like, make: || $method($handler) }
    };
    (@ get) => { Method::GET };
    (@ post) => { Method::POST };
}

/// Every route except the documentation page.
pub fn table() -> Vec<Route> {
    vec![
        route!(post "/v1/chat/completions" chat::chat),
        route!(post "/v1/completions" completions::completions),
        route!(get "/v1/models" models::list),
        route!(get "/v1/models/{*id}" models::retrieve, like "/v1/models/{id}"),
        route!(post "/tokenize" tokenize::tokenize),
        route!(post "/v1/tokenize" tokenize::tokenize, like "/tokenize"),
        route!(post "/detokenize" tokenize::detokenize),
        route!(post "/v1/detokenize" tokenize::detokenize, like "/detokenize"),
        route!(get "/tokenizer_info" tokenize::info),
        route!(get "/v1/tokenizer_info" tokenize::info, like "/tokenizer_info"),
        route!(post "/v1/rewards" rewards::rewards),
        route!(post "/classify" aliases::classify),
        route!(post "/v1/classify" aliases::classify, like "/classify"),
        route!(post "/pooling" aliases::pooling),
        route!(post "/v1/pooling" aliases::pooling, like "/pooling"),
        route!(post "/predict" aliases::predict),
        route!(post "/get_reward" aliases::get_reward),
        route!(post "/v1/score/evaluation" aliases::evaluation),
        route!(post "/score" rerank::score),
        route!(post "/v1/score" rerank::score, like "/score"),
        route!(post "/rerank" rerank::rerank),
        route!(post "/v1/rerank" rerank::rerank, like "/rerank"),
        route!(post "/v2/rerank" rerank::rerank, like "/rerank"),
        route!(get "/health" operations::health),
        route!(get "/ready" operations::ready),
        route!(get "/live" operations::live),
        route!(get "/version" operations::version),
        route!(get "/metrics" operations::metrics),
        route!(get "/openapi.json" openapi::document),
        route!(get "/" operations::home),
    ]
}

/// The table as axum takes it.
pub fn by_path() -> impl Iterator<Item = (&'static str, MethodRouter<AppState>)> {
    table().into_iter().map(|route| (route.path, (route.make)()))
}
