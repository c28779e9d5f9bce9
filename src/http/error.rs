//! The one error shape of the HTTP surface, `{"error":{"message","type","param","code"}}`, and the status of each failure.
//! What is wrong in detail stays in the log; messages carry no paths and no panic texts.

use std::any::Any;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use crate::error::Error;

/// Seconds after which a refused client may try again.
const RETRY_AFTER_SECONDS: u32 = 1;
/// Longer messages are cut: they may quote what the caller sent.
const MESSAGE_CHARS_MAX: usize = 500;

/// Result of every extractor and handler.
pub type ApiResult<T> = Result<T, ApiError>;

/// A failed request.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// What goes into the body.
    pub body: ErrorBody,
}

/// The error object of a response.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ErrorBody {
    /// What is wrong and what would be right.
    pub message: String,
    /// Class of the error, as OpenAI names it.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Path of the request field to blame.
    pub param: Option<String>,
    /// Machine-readable reason, where one is defined.
    pub code: Option<&'static str>,
}

/// The envelope.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ErrorResponse {
    /// The error.
    pub error: ErrorBody,
}

impl ApiError {
    /// An error of `status`; its type follows from the status.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let (kind, code) = match status {
            StatusCode::UNAUTHORIZED => ("authentication_error", Some("invalid_api_key")),
            StatusCode::NOT_FOUND => ("not_found_error", None),
            StatusCode::REQUEST_TIMEOUT => ("timeout_error", None),
            StatusCode::TOO_MANY_REQUESTS => ("rate_limit_error", Some("queue_full")),
            StatusCode::SERVICE_UNAVAILABLE => ("service_unavailable_error", None),
            status if status.is_server_error() => ("internal_error", None),
            _ => ("invalid_request_error", None),
        };
        let body = ErrorBody { message: bounded(message.into()), kind, param: None, code };
        Self { status, body }
    }

    /// 400 with the field to blame.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::BAD_REQUEST, message);
        error.body.param = Some(bounded(param.into()));
        error
    }

    /// Blames `to` where `from` is blamed: a route may call a field otherwise than the service.
    #[must_use]
    pub fn renamed(mut self, from: &str, to: &str) -> Self {
        if self.body.param.as_deref() != Some(from) {
            return self;
        }
        let rest = self.body.message.strip_prefix(from).filter(|rest| rest.starts_with([':', ' ']));
        if let Some(message) = rest.map(|rest| format!("{to}{rest}")) {
            self.body.message = message;
        }
        self.body.param = Some(to.to_string());
        self
    }

    /// 400: the field exists elsewhere and would change the result, but is not implemented here.
    pub fn unsupported(param: &str) -> Self {
        Self::invalid(param, format!("`{param}` is not supported yet"))
    }

    /// 404 for a route.
    pub fn no_route() -> Self {
        Self::new(StatusCode::NOT_FOUND, "there is no such route")
    }

    /// 405.
    pub fn method_not_allowed() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "this route does not take this method")
    }

    /// 404 for a model that is not served.
    pub fn no_model() -> Self {
        let mut error =
            Self::new(StatusCode::NOT_FOUND, "the model does not exist; GET /v1/models lists what is served");
        error.body.param = Some("model".into());
        error.body.code = Some("model_not_found");
        error
    }

    /// 503 while the server drains.
    pub fn draining() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down")
    }

    /// 500 without a word about the inside.
    pub fn internal() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal error; the server's log tells more")
    }

    /// The envelope as JSON text, for an event stream.
    pub fn to_json(&self) -> String {
        serde_json::to_string(&ErrorResponse { error: self.body.clone() }).unwrap_or_default()
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        match error {
            Error::Invalid { message, field: Some(field) } => Self::invalid(field, message),
            Error::Invalid { message, field: None } => Self::new(StatusCode::BAD_REQUEST, message),
            Error::Unsupported(message) => Self::new(StatusCode::BAD_REQUEST, format!("unsupported: {message}")),
            Error::NotFound(message) => {
                let mut error = Self::no_model();
                error.body.message = bounded(message);
                error
            }
            Error::Overloaded(message) => Self::new(StatusCode::TOO_MANY_REQUESTS, message),
            Error::Unavailable(message) => {
                // The reason may be the text of a panic.
                tracing::warn!(error = %message, "request refused");
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "the model cannot answer now; the server's log tells more")
            }
            Error::Checkpoint(message) | Error::Internal(message) => {
                tracing::error!(error = %message, "request failed");
                Self::internal()
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = self.status;
        let mut response = (status, Json(ErrorResponse { error: self.body })).into_response();
        let headers = response.headers_mut();
        if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_SECONDS));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// What a panicking request is answered with. The panic's text stays in the log.
#[derive(Debug, Clone, Copy)]
pub struct OnPanic;

impl tower_http::catch_panic::ResponseForPanic for OnPanic {
    type ResponseBody = axum::body::Body;

    fn response_for_panic(&mut self, panic: Box<dyn Any + Send + 'static>) -> Response {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        tracing::error!(panic = text.unwrap_or("unknown"), "request panicked");
        ApiError::internal().into_response()
    }
}

fn bounded(mut text: String) -> String {
    if let Some((at, _)) = text.char_indices().nth(MESSAGE_CHARS_MAX) {
        text.truncate(at);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[track_caller]
    fn check(error: Error, status: u16, kind: &str, param: Option<&str>) {
        let api = ApiError::from(error);
        assert_eq!((api.status.as_u16(), api.body.kind, api.body.param.as_deref()), (status, kind, param));
    }

    #[test]
    fn every_error_has_its_status() {
        check(Error::invalid("n", "too many"), 400, "invalid_request_error", Some("n"));
        check(Error::Unsupported("mixtral".into()), 400, "invalid_request_error", None);
        check(Error::NotFound("no such model".into()), 404, "not_found_error", Some("model"));
        check(Error::Overloaded("full".into()), 429, "rate_limit_error", None);
        check(Error::Unavailable("gone".into()), 503, "service_unavailable_error", None);
        check(Error::Internal("x".into()), 500, "internal_error", None);
        check(Error::Checkpoint("x".into()), 500, "internal_error", None);
    }

    #[test]
    fn the_field_that_was_used_is_blamed() {
        let error = ApiError::invalid("input", "input: number 3 is empty").renamed("input", "texts");
        assert_eq!(
            (error.body.message.as_str(), error.body.param.as_deref()),
            ("texts: number 3 is empty", Some("texts"))
        );
        let other = ApiError::invalid("inputs", "inputs are empty");
        assert_eq!(other.clone().renamed("input", "texts"), other);
    }

    #[test]
    fn inside_stays_inside() {
        let error = ApiError::from(Error::Internal("/root/secret: bad".into()));
        assert!(!error.to_json().contains("secret"));
    }

    #[test]
    fn refusals_say_when_to_return() {
        for error in [Error::Overloaded("full".into()), Error::Unavailable("gone".into())] {
            let response = ApiError::from(error).into_response();
            assert_eq!(response.headers()[header::RETRY_AFTER], "1");
        }
    }

    #[tokio::test]
    async fn panics_are_answered_without_their_text() {
        async fn panics() {
            panic!("secret");
        }
        let router = axum::Router::new()
            .route("/", axum::routing::get(panics))
            .layer(tower_http::catch_panic::CatchPanicLayer::custom(OnPanic));
        let request = axum::extract::Request::new(axum::body::Body::empty());
        let response = tower::ServiceExt::oneshot(router, request).await.unwrap();
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        let bytes = axum::body::to_bytes(response.into_body(), 10_000).await.unwrap();
        assert_eq!(bytes, ApiError::internal().to_json().as_bytes());
    }

    #[test]
    fn long_messages_are_cut() {
        let error = ApiError::invalid("é".repeat(10_000), "ü".repeat(10_000));
        assert!(error.body.message.chars().count() <= MESSAGE_CHARS_MAX + 1);
        assert!(error.body.param.unwrap().chars().count() <= MESSAGE_CHARS_MAX + 1);
    }
}
