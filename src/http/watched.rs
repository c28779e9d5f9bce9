//! A response body that tells when it is over: sent whole, failed, or dropped because the client left.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use axum::body::{Body, Bytes};
use hyper::body::{Body as HttpBody, Frame, SizeHint};

/// Passes a body through and calls `done` once, when it is dropped.
#[derive(Debug)]
pub struct OnDrop<F: FnOnce()> {
    body: Body,
    done: Option<F>,
}

impl<F: FnOnce()> OnDrop<F> {
    /// Wraps `body`.
    pub fn new(body: Body, done: F) -> Self {
        Self { body, done: Some(done) }
    }
}

impl<F: FnOnce() + Unpin> HttpBody for OnDrop<F> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<F: FnOnce()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        if let Some(done) = self.done.take() {
            done();
        }
    }
}
