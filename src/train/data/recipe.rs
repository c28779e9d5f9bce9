//! The `[data]` section of a recipe: which files, what their rows are, and what happens to rows that do not fit.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Where the examples come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataRecipe {
    /// Most tokens of one text.
    pub max_length: usize,
    /// What happens to a longer one.
    pub overlong: Overlong,
    /// Share of the instructions that is held out; an instruction is never on both sides.
    pub test_fraction: f64,
    /// How many rows that cannot be read or rendered are passed over before reading fails.
    pub skip_bad: usize,
    /// What special tokens become that a message spells out.
    pub special_text: SpecialText,
    /// The files, in the order in which their rows are taken.
    pub source: Vec<SourceRecipe>,
}

impl Default for DataRecipe {
    fn default() -> Self {
        Self {
            // UltraInteract's trajectories average 1.2 thousand tokens (Table 1 of the paper).
            max_length: 4096,
            overlong: Overlong::Drop,
            test_fraction: 0.0,
            skip_bad: 0,
            special_text: SpecialText::Text,
            source: Vec::new(),
        }
    }
}

/// One file, or a folder of files that are taken in the order of their names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceRecipe {
    /// `.jsonl`, `.json`, `.jsonl.gz`, `.jsonl.zst` or `.parquet`, or a folder with such files.
    pub path: PathBuf,
    /// What the rows are; without it, each row's keys tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<Schema>,
    /// How often each example is taken in an epoch: 0.5 takes half of them, 2 takes each twice.
    #[serde(default = "one")]
    pub weight: f64,
    /// Whether rewards of its pairs should also have the right sign on their own (L_DR). Without it, those of
    /// `ultrainteract_pair` rows only, as in the paper (section 3).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub absolute: Option<bool>,
    /// Whether single-turn pairs of the correct and incorrect actions of different turns are added to `ultrainteract_pair` rows.
    #[serde(default)]
    pub augment: bool,
}

fn one() -> f64 {
    1.0
}

impl SourceRecipe {
    /// The rows of `path`, each once.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), schema: None, weight: one(), absolute: None, augment: false }
    }
}

/// What happens to a text of more than `max_length` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlong {
    /// Its row is dropped.
    #[default]
    Drop,
    /// The oldest tokens after BOS are dropped, the same number from both texts of a pair and never any of the last
    /// answer; where that is not enough, the row is.
    TruncateStart,
    /// The end is dropped; where no token of the answer is left, the row is.
    TruncateEnd,
}

/// What special tokens become that a message spells out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpecialText {
    /// Text, as in serving: nobody can end a turn by writing `</s>`.
    #[default]
    Text,
    /// Special tokens, as Hugging Face's `apply_chat_template` has it.
    Parse,
}

/// What the rows of a file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schema {
    /// `id`, `parent_id`, `task`, `dataset`, `instruction`, `response`.
    #[serde(rename = "ultrainteract_sft")]
    UltraInteractSft,
    /// `id`, `parent_id`, `task`, `dataset`, `trajectory`, `chosen`, `rejected`.
    #[serde(rename = "ultrainteract_pair")]
    UltraInteractPair,
    /// `messages` of role and content, or `conversations` of from and value.
    Messages,
    /// `prompt` and `completion`, each a text or messages.
    PromptCompletion,
    /// `chosen` and `rejected`, with a `prompt` or as whole conversations that begin alike; perhaps a `margin`.
    Preference,
    /// `prompt`, `completion` and `label`: true for a good completion.
    Unpaired,
}

impl Schema {
    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::UltraInteractSft => "ultrainteract_sft",
            Self::UltraInteractPair => "ultrainteract_pair",
            Self::Messages => "messages",
            Self::PromptCompletion => "prompt_completion",
            Self::Preference => "preference",
            Self::Unpaired => "unpaired",
        }
    }
}

impl DataRecipe {
    /// Refuses values that no training can mean.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the key.
    pub fn check(&self) -> Result<()> {
        let invalid =
            |key: &str, message: String| Err(Error::invalid(format!("data.{key}"), format!("data.{key} {message}")));
        if self.max_length < 2 {
            return invalid("max_length", format!("must be at least 2, not {}", self.max_length));
        }
        if !(0.0..1.0).contains(&self.test_fraction) {
            return invalid("test_fraction", format!("must be at least 0 and less than 1, not {}", self.test_fraction));
        }
        if self.source.is_empty() {
            return invalid("source", "is missing: name at least one file".to_owned());
        }
        for (index, source) in self.source.iter().enumerate() {
            let key = |name: &str| format!("source[{index}].{name}");
            if !(source.weight > 0.0 && source.weight <= WEIGHT_MAX) {
                return invalid(
                    &key("weight"),
                    format!("must be more than 0 and at most {WEIGHT_MAX}, not {}", source.weight),
                );
            }
            let other = source.schema.filter(|schema| *schema != Schema::UltraInteractPair);
            if let (true, Some(schema)) = (source.augment, other) {
                return invalid(&key("augment"), format!("needs rows of ultrainteract_pair, not of {}", schema.name()));
            }
        }
        Ok(())
    }
}

/// More repetitions than any mixture needs.
const WEIGHT_MAX: f64 = 1000.0;
