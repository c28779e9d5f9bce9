//! Texts that are too long or too short to learn from: what is cut off, and what is dropped for which reason.

use super::counts::Reason;
use super::encode::Turns;
use super::recipe::Overlong;
use crate::train::example::Text;

/// The limits on texts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Most tokens of a text.
    pub(super) max_length: usize,
    /// What happens to longer ones.
    pub(super) overlong: Overlong,
    /// The token that stays in front when the beginning is cut off.
    pub(super) bos: Option<u32>,
}

/// Whether anything was cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    Nothing,
    Some,
}

impl Limits {
    /// One text within the limits.
    pub(super) fn one(&self, text: Text, turns: Turns) -> Result<(Text, Cut), Reason> {
        learnable(&text)?;
        let Some(excess) = self.excess(&text)? else { return Ok((text, Cut::Nothing)) };
        let spare = match turns {
            Turns::Last => text.prompt_len(),
            Turns::All => last_answer(&text),
        };
        let text = self.cut(text, excess, spare)?;
        Ok((text, Cut::Some))
    }

    /// Two texts within the limits, with the same prompt as before or the same part of it.
    pub(super) fn two(&self, chosen: Text, rejected: Text) -> Result<(Text, Text, Cut), Reason> {
        learnable(&chosen)?;
        learnable(&rejected)?;
        let excess = match (self.excess(&chosen)?, self.excess(&rejected)?) {
            (None, None) => return distinct(chosen, rejected, Cut::Nothing),
            (left, right) => left.max(right).unwrap_or_default(),
        };
        let spare = chosen.prompt_len().min(rejected.prompt_len());
        distinct(self.cut(chosen, excess, spare)?, self.cut(rejected, excess, spare)?, Cut::Some)
    }

    /// By how many tokens `text` is too long, where that can be mended.
    fn excess(&self, text: &Text) -> Result<Option<usize>, Reason> {
        match text.tokens.len().checked_sub(self.max_length) {
            None | Some(0) => Ok(None),
            Some(_) if self.overlong == Overlong::Drop => Err(Reason::TooLong),
            Some(excess) => Ok(Some(excess)),
        }
    }

    /// `text` without `excess` tokens at the start, of which the first `spare` may go, or with its end cut off.
    fn cut(&self, mut text: Text, excess: usize, spare: usize) -> Result<Text, Reason> {
        if self.overlong == Overlong::TruncateEnd {
            text.tokens.truncate(self.max_length);
            text.targets.truncate(self.max_length);
        } else {
            let kept = usize::from(self.bos.is_some() && text.tokens.first().copied() == self.bos);
            // A token must stay in front of the first that counts.
            if kept + excess > spare.saturating_sub(1 - kept) {
                return Err(Reason::TooLong);
            }
            text.tokens.drain(kept..kept + excess);
            text.targets.drain(kept..kept + excess);
            if let Some(first) = text.targets.first_mut() {
                *first = false;
            }
        }
        learnable(&text)?;
        Ok(text)
    }
}

fn learnable(text: &Text) -> Result<(), Reason> {
    match (text.tokens.len(), text.target_count()) {
        (0 | 1, _) => Err(Reason::TooShort),
        (_, 0) => Err(Reason::NoTarget),
        _ => Ok(()),
    }
}

fn distinct(chosen: Text, rejected: Text, cut: Cut) -> Result<(Text, Text, Cut), Reason> {
    if chosen.tokens == rejected.tokens { Err(Reason::SameAnswers) } else { Ok((chosen, rejected, cut)) }
}

/// Where the last run of tokens that count begins.
fn last_answer(text: &Text) -> usize {
    let end = text.targets.iter().rposition(|target| *target).map_or(0, |last| last + 1);
    text.targets[..end].iter().rposition(|target| !*target).map_or(0, |before| before + 1)
}
