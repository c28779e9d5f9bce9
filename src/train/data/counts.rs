//! What became of the rows: every row that is not learnt from is counted under its reason.

use std::collections::BTreeMap;
use std::fmt;

/// Why a row is not learnt from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// It cannot be read or rendered, and `skip_bad` allows for it.
    Bad,
    /// Longer than `max_length`, and not to be truncated or not enough.
    TooLong,
    /// Fewer than two tokens.
    TooShort,
    /// The answer is empty.
    EmptyAnswer,
    /// No token of the answer is left, or the template prints none.
    NoTarget,
    /// The chosen and the rejected text are the same.
    SameAnswers,
    /// A bad answer, which is not to be imitated.
    Undesirable,
    /// The action is not the end of its branch.
    NotALeaf,
    /// The same correct action of the same instruction comes earlier.
    Repeated,
    /// Not drawn, by the source's weight.
    NotDrawn,
}

impl Reason {
    /// In words, after a number.
    pub fn text(self) -> &'static str {
        match self {
            Self::Bad => "cannot be read",
            Self::TooLong => "too long",
            Self::TooShort => "too short",
            Self::EmptyAnswer => "empty answer",
            Self::NoTarget => "nothing left to learn",
            Self::SameAnswers => "chosen equals rejected",
            Self::Undesirable => "bad answers",
            Self::NotALeaf => "not the end of a branch",
            Self::Repeated => "repeated action",
            Self::NotDrawn => "not drawn by weight",
        }
    }
}

/// What became of the rows of all sources.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// Rows in the files, bad ones included.
    pub rows: usize,
    /// Pairs that the augmentation added.
    pub augmented: usize,
    /// Examples to learn from in an epoch, repetitions included.
    pub train: usize,
    /// Examples that are held out.
    pub test: usize,
    /// Tokens of all texts to learn from.
    pub train_tokens: usize,
    /// Examples of which tokens were cut off.
    pub truncated: usize,
    /// Rows or examples that are not learnt from, by reason.
    pub dropped: BTreeMap<Reason, usize>,
}

impl Counts {
    /// One more for `reason`.
    pub(super) fn drop_one(&mut self, reason: Reason) {
        *self.dropped.entry(reason).or_default() += 1;
    }

    /// How many are not learnt from for `reason`.
    pub fn dropped_for(&self, reason: Reason) -> usize {
        self.dropped.get(&reason).copied().unwrap_or_default()
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, augmented, train, test, train_tokens, truncated, dropped } = self;
        write!(out, "{rows} rows: {train} examples to learn from ({train_tokens} tokens), {test} held out")?;
        if *augmented > 0 {
            write!(out, "; {augmented} pairs by augmentation")?;
        }
        if *truncated > 0 {
            write!(out, "; {truncated} truncated")?;
        }
        for (index, (reason, count)) in dropped.iter().enumerate() {
            write!(out, "{}{count} {}", if index == 0 { "; dropped: " } else { ", " }, reason.text())?;
        }
        Ok(())
    }
}
