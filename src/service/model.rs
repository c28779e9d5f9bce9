//! One served model: its name, its tokenizer and template, and the engine that runs it.

/// What a model's head gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The next token.
    Policy,
    /// A reward.
    Reward,
}

/// A model that this process serves.
#[derive(Debug)]
pub struct ServedModel {
    /// The name requests use.
    pub name: String,
    /// Other names for it.
    pub aliases: Vec<String>,
    /// What its head gives.
    pub kind: Kind,
    /// Tokens of prompt and output together, at most.
    pub len_max: usize,
    /// Whether a scored text ends with the end-of-sequence token unless the request says otherwise.
    pub append_eos: bool,
    /// Tokens that end a generation.
    pub eos_ids: Vec<u32>,
    /// When it was loaded, in unix seconds.
    pub created: u64,
}
