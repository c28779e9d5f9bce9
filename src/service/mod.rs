//! The use cases, free of HTTP: generate, score, best of n, tokenise.
//! Owns the served models, every limit on a request and what a field means; no tensors and no wire formats.

pub mod best_of_n;
pub mod generate;
pub mod model;
pub mod prompt;
pub mod score;
pub mod select;
pub mod tokens;
pub mod updates;

use std::sync::Arc;

pub use crate::engine::request::{TokenId, Usage};
use crate::{error::Result, metrics::Metrics};
pub use model::{Kind, ServedModel};
pub use prompt::{Conversation, Ending, Message, Prompt};

/// What one request may ask for at most. Every field is a configuration key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceLimits {
    /// Candidates that one request may return.
    pub n_max: usize,
    /// Candidates that one best-of-n request may draw.
    pub best_of_max: usize,
    /// Bytes of one prompt, before it is tokenised.
    pub prompt_bytes_max: usize,
    /// Messages of one conversation.
    pub messages_max: usize,
    /// Stop strings, and stop token ids.
    pub stop_max: usize,
    /// Bytes of one stop string.
    pub stop_bytes_max: usize,
    /// Entries of `logit_bias`.
    pub logit_bias_max: usize,
    /// Alternatives reported with each token.
    pub top_logprobs_max: usize,
    /// Sequences of one scoring request.
    pub score_batch_max: usize,
}

impl Default for ServiceLimits {
    fn default() -> Self {
        Self {
            n_max: 64,
            best_of_max: 64,
            prompt_bytes_max: 1 << 20,
            messages_max: 1024,
            stop_max: 16,
            stop_bytes_max: 256,
            logit_bias_max: 1024,
            top_logprobs_max: 20,
            score_batch_max: 256,
        }
    }
}

/// The models of this process and what can be asked of them.
#[derive(Debug)]
pub struct Service {
    models: Vec<Arc<ServedModel>>,
    limits: ServiceLimits,
    metrics: Arc<Metrics>,
}

impl Service {
    /// The models of this process, in the order in which they are listed.
    pub fn models(&self) -> &[Arc<ServedModel>] {
        &self.models
    }

    /// What one request may ask for.
    pub fn limits(&self) -> &ServiceLimits {
        &self.limits
    }

    /// The metrics of this process.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// The model called `name`, of either kind; without a name, the first one.
    ///
    /// # Errors
    /// [`crate::error::Error::NotFound`], which lists what is served.
    pub fn model(&self, _name: Option<&str>) -> Result<&Arc<ServedModel>> {
        Err(crate::error::Error::internal("not built yet"))
    }
}
