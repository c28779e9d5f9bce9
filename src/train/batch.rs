//! Placeholder for batches: only what a recipe says about them.

use serde::{Deserialize, Serialize};

/// Section `batch`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BatchRecipe {
    /// Examples of one optimiser step.
    pub examples: usize,
    /// Most tokens of one packed micro-batch.
    pub tokens: usize,
}

impl Default for BatchRecipe {
    fn default() -> Self {
        Self { examples: 64, tokens: 8192 }
    }
}
