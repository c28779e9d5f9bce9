//! The use cases, free of HTTP: generate, score, best of n, tokenise.
//! Owns the served models, every limit on a request and what a field means; no tensors and no wire formats.

pub mod best_of_n;
pub mod generate;
mod generation;
pub mod model;
pub mod prompt;
pub mod score;
pub mod select;
pub mod tokens;
pub mod updates;
mod validate;

use std::sync::Arc;

use tokio::sync::Semaphore;

pub use crate::engine::request::{TokenId, Usage};
use crate::{
    error::{Error, Result},
    metrics::Metrics,
};
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
    /// As many texts are tokenised at once as there are processors; others wait here.
    tokenising: Arc<Semaphore>,
}

impl Service {
    /// Serves `models`; the first of each kind is the one requests without a name get.
    ///
    /// # Errors
    /// Invalid if two models share a name or an alias, or if there is no model.
    pub fn new(models: Vec<ServedModel>, limits: ServiceLimits, metrics: Arc<Metrics>) -> Result<Self> {
        if models.is_empty() {
            return Err(Error::invalid("models", "models: at least one model is needed"));
        }
        for (index, model) in models.iter().enumerate() {
            for name in std::iter::once(&model.name).chain(&model.aliases) {
                if models[index + 1..].iter().any(|other| other.is_called(name)) {
                    let message = format!("models: two of them are called {name}; set model_name or reward_model_name");
                    return Err(Error::invalid("models", message));
                }
            }
        }
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let tokenising = Arc::new(Semaphore::new(processors));
        Ok(Self { models: models.into_iter().map(Arc::new).collect(), limits, metrics, tokenising })
    }

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
    /// [`Error::NotFound`], which lists what is served.
    pub fn model(&self, name: Option<&str>) -> Result<&Arc<ServedModel>> {
        let Some(name) = name else {
            return self.models.first().ok_or_else(|| Error::NotFound("no model is served".into()));
        };
        self.models.iter().find(|model| model.is_called(name)).ok_or_else(|| {
            let served: Vec<&str> = self.models.iter().map(|model| model.name.as_str()).collect();
            Error::NotFound(format!("model {} is not served; served: {}", shown(name), served.join(", ")))
        })
    }

    /// The policy called `name`; without a name, the first one.
    ///
    /// # Errors
    /// [`Error::NotFound`] as [`Self::model`]; Invalid in `model` if it is a reward model.
    pub fn policy(&self, name: Option<&str>) -> Result<&Arc<ServedModel>> {
        self.of_kind(Kind::Policy, name, "model")
    }

    /// The reward model called `name`; without a name, the first one.
    ///
    /// # Errors
    /// [`Error::NotFound`] as [`Self::model`]; Invalid in `model` if it is a policy.
    pub fn reward_model(&self, name: Option<&str>) -> Result<&Arc<ServedModel>> {
        self.of_kind(Kind::Reward, name, "model")
    }

    fn of_kind(&self, kind: Kind, name: Option<&str>, field: &str) -> Result<&Arc<ServedModel>> {
        let (lacks, has) = match kind {
            Kind::Policy => ("only gives rewards and cannot generate", "policy"),
            Kind::Reward => ("has no reward head", "reward model"),
        };
        let first = self.models.iter().find(|model| model.kind == kind);
        let Some(name) = name else {
            return first.ok_or_else(|| Error::invalid(field, format!("no {has} is served")));
        };
        let model = self.model(Some(name))?;
        if model.kind == kind {
            return Ok(model);
        }
        let advice = first.map_or(format!("no {has} is served"), |first| format!("use {}", first.name));
        Err(Error::invalid(field, format!("{} {lacks}; {advice}", model.name)))
    }

    /// Runs work that takes time in proportion to its input, away from the threads that serve connections.
    async fn off_thread<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        let permit = Arc::clone(&self.tokenising).acquire_owned().await.map_err(Error::internal)?;
        let task = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        });
        task.await.map_err(|_| Error::internal("reading the request failed"))?
    }
}

/// A name from a request, short enough and harmless in a message or a log.
fn shown(name: &str) -> String {
    let clean: String = name.chars().filter(|character| !character.is_control()).take(80).collect();
    if clean.is_empty() { "\"\"".into() } else { clean }
}

#[cfg(test)]
mod tests;
