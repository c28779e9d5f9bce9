//! Placeholder for the reading of data: only what a recipe and a model card say about it.

use std::path::PathBuf;

mod recipe;

pub use recipe::{DataRecipe, Overlong, Schema, SourceRecipe, SpecialText};

/// A file that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFile {
    /// Where it is.
    pub path: PathBuf,
    /// Hash of its bytes as they are on disk, in hexadecimal.
    pub blake3: String,
    /// Rows it has.
    pub rows: usize,
}
