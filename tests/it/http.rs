//! The HTTP surface in process: real router, real service, real engines, models without weights.

mod fake;
mod generation;
mod hostile;
mod operations;
mod rewards;
mod socket;

use axum::{
    Router,
    body::{Body, to_bytes},
    http::{HeaderMap, Request, StatusCode, header},
};
use eurus::http::{AppState, HttpOptions, auth::ApiKeys, listen::Lifecycle, router};
use serde_json::Value;
use tower::ServiceExt;

use fake::Setup;

/// A server without a socket.
#[derive(Clone)]
struct Server {
    router: Router,
    state: AppState,
}

/// What came back.
#[derive(Debug)]
struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    text: String,
}

impl Server {
    fn new(setup: &Setup) -> Self {
        Self::with(setup, HttpOptions::default())
    }

    fn with(setup: &Setup, options: HttpOptions) -> Self {
        let state = AppState::new(setup.service(), options, Lifecycle::default());
        Self { router: router(state.clone()), state }
    }

    fn with_key(setup: &Setup) -> Self {
        Self::with(setup, HttpOptions { keys: ApiKeys::new(["sesame"]), ..HttpOptions::default() })
    }

    async fn send(&self, request: Request<Body>) -> Reply {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = to_bytes(body, usize::MAX).await.unwrap();
        Reply { status: parts.status, headers: parts.headers, text: String::from_utf8(bytes.to_vec()).unwrap() }
    }

    async fn get(&self, path: &str) -> Reply {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }

    async fn post_text(&self, path: &str, body: impl Into<String>) -> Reply {
        let request = Request::post(path).header(header::CONTENT_TYPE, "application/json");
        self.send(request.body(Body::from(body.into())).unwrap()).await
    }

    async fn post(&self, path: &str, body: &Value) -> Reply {
        self.post_text(path, body.to_string()).await
    }

    /// The JSON of a good answer.
    async fn ok(&self, path: &str, body: Value) -> Value {
        let reply = self.post(path, &body).await;
        assert_eq!(reply.status, StatusCode::OK, "{path} {body}: {}", reply.text);
        reply.json()
    }

    /// The blamed field of a 400.
    async fn refused(&self, path: &str, body: Value) -> String {
        let reply = self.post(path, &body).await;
        reply.check_error(400, "invalid_request_error");
        let json = reply.json();
        json["error"]["param"].as_str().unwrap_or_else(|| panic!("{path} {body}: no param in {json}")).to_string()
    }
}

impl Reply {
    #[track_caller]
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// The envelope, exactly.
    #[track_caller]
    fn check_error(&self, status: u16, kind: &str) {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        let json = self.json();
        let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&json), ["error"], "{json}");
        assert_eq!(keys(&json["error"]), ["message", "type", "param", "code"], "{json}");
        assert_eq!(json["error"]["type"], kind, "{json}");
        assert!(!json["error"]["message"].as_str().unwrap().is_empty());
        assert!(!self.text.contains("secret"), "{json}");
    }

    /// The data of a stream's events.
    #[track_caller]
    fn events(&self) -> Vec<String> {
        assert_eq!(self.headers[header::CONTENT_TYPE], "text/event-stream");
        let lines = self.text.lines().filter(|line| !line.is_empty());
        lines.map(|line| line.strip_prefix("data: ").unwrap_or_else(|| panic!("{line}")).to_string()).collect()
    }

    /// The chunks of a stream that ends well.
    #[track_caller]
    fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}
