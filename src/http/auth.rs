//! API keys: everything is refused without one, except a short list of probes.
//! Keys are kept and compared as digests, in constant time; they never reach a log.

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use subtle::ConstantTimeEq;

use super::{AppState, error::ApiError};

/// Probes that need no key. Everything else does, unknown routes included.
pub const OPEN_ROUTES: &[&str] = &["/health", "/live", "/ready", "/version"];

/// Who may read `/metrics`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricsAccess {
    /// Everyone.
    Open,
    /// Holders of a key.
    Guarded,
}

/// Digests of the accepted keys. Without keys everything is open.
#[derive(Clone, Default)]
pub struct ApiKeys(Vec<[u8; 32]>);

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ApiKeys({})", self.0.len())
    }
}

impl ApiKeys {
    /// Digests of `keys`; empty ones are left out.
    pub fn new<K: AsRef<str>>(keys: impl IntoIterator<Item = K>) -> Self {
        let digest = |key: K| {
            let key = key.as_ref().trim();
            (!key.is_empty()).then(|| *blake3::hash(key.as_bytes()).as_bytes())
        };
        Self(keys.into_iter().filter_map(digest).collect())
    }

    /// Whether every request is let in.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `key` is one of them. Looks at all of them, whichever fits.
    pub fn accepts(&self, key: &[u8]) -> bool {
        let presented = blake3::hash(key);
        let fits =
            self.0.iter().fold(subtle::Choice::from(0), |found, known| found | known.ct_eq(presented.as_bytes()));
        fits.into()
    }
}

/// The layer: lets a request pass or answers 401.
pub async fn require_key(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let options = state.options();
    if options.keys.is_empty() || is_open(&request, options.metrics_access) {
        return next.run(request).await;
    }
    match bearer(request.headers()) {
        Some(key) if options.keys.accepts(key) => next.run(request).await,
        Some(_) => ApiError::new(StatusCode::UNAUTHORIZED, "the API key is not valid").into_response(),
        None => {
            let message = "an API key is needed: send the header `Authorization: Bearer KEY`";
            ApiError::new(StatusCode::UNAUTHORIZED, message).into_response()
        }
    }
}

fn is_open(request: &Request, metrics: MetricsAccess) -> bool {
    let Some(path) = request.extensions().get::<MatchedPath>() else { return false };
    OPEN_ROUTES.contains(&path.as_str()) || (metrics == MetricsAccess::Open && path.as_str() == "/metrics")
}

/// The key of the only Authorization header; two headers are none.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return None };
    let (scheme, key) = value.as_bytes().split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then_some(key.trim_ascii())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn keys_are_compared_whole() {
        let keys = ApiKeys::new(["alpha", "beta", ""]);
        for (key, good) in
            [("alpha", true), ("beta", true), ("", false), ("alph", false), ("alphaa", false), ("ALPHA", false)]
        {
            assert_eq!(keys.accepts(key.as_bytes()), good, "{key}");
        }
        assert_eq!(format!("{keys:?}"), "ApiKeys(2)");
    }

    #[track_caller]
    fn check_header(values: &[&str], want: Option<&str>) {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::AUTHORIZATION, value.parse().unwrap());
        }
        assert_eq!(bearer(&headers), want.map(str::as_bytes));
    }

    #[test]
    fn the_header_is_read_strictly() {
        check_header(&["Bearer k"], Some("k"));
        check_header(&["bearer  k "], Some("k"));
        check_header(&["k"], None);
        check_header(&["Basic k"], None);
        check_header(&["Bearer a", "Bearer a"], None);
        check_header(&[], None);
    }
}
