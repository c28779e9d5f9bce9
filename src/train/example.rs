//! What a training step learns from: tokenised texts with the tokens that count, alone, in pairs or labelled.

/// One tokenised text and which of its tokens are learnt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text {
    /// The whole text, prompt first.
    pub tokens: Vec<u32>,
    /// `[tokens]`: whether the log-probability of a token, given those before it, counts. The first never does.
    pub targets: Vec<bool>,
}

impl Text {
    /// How many tokens come before the first that counts; all of them where none does.
    pub fn prompt_len(&self) -> usize {
        self.targets.iter().position(|target| *target).unwrap_or(self.tokens.len())
    }

    /// How many tokens count.
    pub fn target_count(&self) -> usize {
        self.targets.iter().filter(|target| **target).count()
    }
}

/// One row of a training set.
#[derive(Debug, Clone, PartialEq)]
pub enum Example {
    /// To be imitated (SFT).
    Text(Text),
    /// Two continuations of one prompt (DPO, NCA, reward modelling).
    Pair {
        /// The better one.
        chosen: Text,
        /// The worse one.
        rejected: Text,
        /// Whether the rewards should also have the right sign on their own (L_DR of the Eurus paper, section 3).
        absolute: bool,
        /// By how much the rewards should differ, where the data say so.
        margin: Option<f32>,
    },
    /// One continuation with a label (KTO).
    Answer {
        /// Prompt and answer.
        text: Text,
        /// Whether the answer is a good one.
        desirable: bool,
    },
}

impl Example {
    /// Its texts: one, or the chosen and the rejected one.
    pub fn texts(&self) -> impl Iterator<Item = &Text> {
        let (first, second) = match self {
            Self::Text(text) | Self::Answer { text, .. } => (text, None),
            Self::Pair { chosen, rejected, .. } => (chosen, Some(rejected)),
        };
        std::iter::once(first).chain(second)
    }

    /// Tokens of all its texts.
    pub fn token_count(&self) -> usize {
        self.texts().map(|text| text.tokens.len()).sum()
    }
}
