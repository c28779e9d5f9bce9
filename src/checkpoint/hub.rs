//! Models from the Hugging Face hub, through the cache that all its tools share.

use std::path::PathBuf;

use super::{Progress, Repository};
use crate::error::{Error, Result};

/// How to reach the hub.
#[derive(Debug, Clone, Default)]
pub struct HubOptions {
    /// Branch, tag or commit, unless the repository was named with one.
    pub revision: Option<String>,
}

pub(super) fn fetch(
    repository: &Repository,
    _options: &HubOptions,
    _progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf> {
    Err(Error::Unavailable(format!("{}: no hub yet", repository.id)))
}
