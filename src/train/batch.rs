//! Placeholder for batches: only what a recipe says about them.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The `[batch]` section of a recipe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BatchRecipe {
    /// Examples of one optimiser step; a pair is one.
    pub examples: usize,
    /// Most tokens of one packed micro-batch. A longer example has one to itself.
    pub tokens: usize,
}

impl Default for BatchRecipe {
    fn default() -> Self {
        Self { examples: 32, tokens: 16_384 }
    }
}

impl BatchRecipe {
    /// Refuses values that no training can mean.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the key.
    pub fn check(&self) -> Result<()> {
        for (key, value) in [("batch.examples", self.examples), ("batch.tokens", self.tokens)] {
            if value == 0 {
                return Err(Error::invalid(key, format!("{key} must be at least 1")));
            }
        }
        Ok(())
    }
}
