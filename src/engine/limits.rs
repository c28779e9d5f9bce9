//! The bounds of one engine, and whether a request can be served within them at all.

use super::request::{Request, Task};
use super::sequence::events_max;
use crate::error::{Error, Result};

/// Bounds of one engine, all at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Tokens computed in one step.
    pub step_tokens: usize,
    /// Sequences that hold blocks.
    pub running_max: usize,
    /// Requests that wait for their first step.
    pub waiting_max: usize,
    /// Tokens of one sequence, prompt and completion.
    pub len_max: usize,
}

impl Limits {
    /// Whether `request` can ever be served within these limits by a pool of `block_count` blocks.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `prompt` or `max_tokens`, or [`Error::Internal`] for a reply channel without room for
    /// the events of one step.
    pub fn check(&self, request: &Request, block_count: usize, block_size: usize) -> Result<()> {
        let prompt_len = request.prompt.len();
        let cache_len = block_count.saturating_mul(block_size);
        if prompt_len == 0 {
            return Err(Error::invalid("prompt", "the prompt is empty: at least one token is needed"));
        }
        if prompt_len > self.len_max {
            let message = format!("the prompt has {prompt_len} tokens, this model takes at most {}", self.len_max);
            return Err(Error::invalid("prompt", message));
        }
        if prompt_len > cache_len {
            let message = format!("the prompt has {prompt_len} tokens, the cache holds {cache_len}");
            return Err(Error::invalid("prompt", message));
        }
        if let Task::Generate(params) = &request.task {
            let max_tokens = params.max_tokens;
            if max_tokens == 0 && params.prompt_logprobs.is_none() {
                return Err(Error::invalid(
                    "max_tokens",
                    "0 is for reading prompt log-probabilities; ask for 1 or more",
                ));
            }
            let len_max = self.len_max.min(cache_len.saturating_add(1));
            if prompt_len.saturating_add(max_tokens) > len_max {
                let message = format!(
                    "{prompt_len} tokens of prompt and max_tokens {max_tokens} exceed the {len_max} tokens there is room for"
                );
                return Err(Error::invalid("max_tokens", message));
            }
        }
        if request.reply.max_capacity() < events_max(&request.task, false) {
            return Err(Error::internal("the reply channel is too small for the events of one step"));
        }
        Ok(())
    }
}
