//! The one error type of the crate: what went wrong, told so that a user can act on it.
//! Which HTTP status or exit code it becomes is decided by `http::error` and `cli`.

/// Result of everything that the world can make fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. Messages name the field or the file and say what to do; they never carry prompts or keys.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// The caller's input is wrong: HTTP 400, exit code 2.
    #[error("{message}")]
    Invalid {
        /// What is wrong and what would be right.
        message: String,
        /// The request field, configuration key or argument, where one is to blame.
        field: Option<String>,
    },
    /// No such model or route: HTTP 404.
    #[error("{0}")]
    NotFound(String),
    /// A bounded queue is full: HTTP 429 with Retry-After.
    #[error("{0}")]
    Overloaded(String),
    /// Draining, or the engine is gone: HTTP 503 with Retry-After.
    #[error("{0}")]
    Unavailable(String),
    /// A checkpoint or one of its files is damaged or not what it says: exit code 2.
    #[error("{0}")]
    Checkpoint(String),
    /// The checkpoint is sound, but of a kind this program does not run: exit code 2.
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// Our own fault: HTTP 500, exit code 1.
    #[error("{0}")]
    Internal(String),
}

impl Error {
    /// Wrong input in `field`.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { message: message.into(), field: Some(field.into()) }
    }

    /// Our own fault, described.
    pub fn internal(message: impl std::fmt::Display) -> Self {
        Self::Internal(message.to_string())
    }

    /// An input/output failure on the file `path`.
    pub fn file(path: &std::path::Path, error: impl std::fmt::Display) -> Self {
        Self::Checkpoint(format!("{}: {error}", path.display()))
    }
}
