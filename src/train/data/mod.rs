//! Placeholder for the reading of data: only what a recipe says about it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Section `data`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataRecipe {
    /// Tokens of the longest text that is kept whole.
    pub max_length: usize,
    /// What happens to longer ones.
    pub overlong: Overlong,
    /// Part of the rows that is held out for evaluation.
    pub test_fraction: f64,
    /// Bad rows that are passed over before reading stops with an error.
    pub skip_bad: usize,
    /// Files and how they are mixed.
    pub source: Vec<SourceRecipe>,
}

impl Default for DataRecipe {
    fn default() -> Self {
        Self { max_length: 2048, overlong: Overlong::Drop, test_fraction: 0.0, skip_bad: 0, source: Vec::new() }
    }
}

/// What happens to texts that are too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlong {
    /// The row is left out and counted.
    Drop,
    /// The oldest tokens go.
    TruncateStart,
    /// The end goes.
    TruncateEnd,
}

/// An entry of `data.source`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SourceRecipe {
    /// File or folder.
    pub path: PathBuf,
    /// Shape of its rows; by default told from the first row.
    pub schema: Option<String>,
    /// Share of its rows that is used in an epoch.
    pub weight: Option<f64>,
    /// Whether L_DR applies to its pairs.
    pub absolute: Option<bool>,
    /// Whether single-turn pairs are made from its trees.
    pub augment: Option<bool>,
}
