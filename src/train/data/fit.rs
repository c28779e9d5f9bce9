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

#[cfg(test)]
mod tests {
    use super::*;

    const BOS: u32 = 1;

    /// `prompt` tokens from BOS on, then `answer` tokens that count.
    fn text(prompt: u32, answer: u32) -> Text {
        let targets = std::iter::repeat_n(false, prompt as usize).chain(std::iter::repeat_n(true, answer as usize));
        Text { tokens: (BOS..=prompt + answer).collect(), targets: targets.collect() }
    }

    fn limits(overlong: Overlong) -> Limits {
        Limits { max_length: 10, overlong, bos: Some(BOS) }
    }

    #[track_caller]
    fn check(overlong: Overlong, given: Text, expected: Result<(&[u32], usize), Reason>) {
        let cut = limits(overlong).one(given.clone(), Turns::Last);
        if let Ok((text, cut)) = &cut {
            assert_eq!(*cut == Cut::Nothing, *text == given);
            assert!(!text.targets[0] && text.targets.len() == text.tokens.len());
        }
        let expected = expected.map(|(tokens, prompt)| (tokens.to_vec(), prompt));
        assert_eq!(cut.map(|(text, _)| (text.tokens.clone(), text.prompt_len())), expected);
    }

    #[test]
    fn long_texts_are_dropped_or_cut_by_rule() {
        use Overlong::{Drop, TruncateEnd, TruncateStart};
        let ten: Vec<u32> = (1..=10).collect();
        for rule in [Drop, TruncateStart, TruncateEnd] {
            check(rule, text(6, 4), Ok((&ten, 6)));
            check(rule, text(1, 0), Err(Reason::TooShort));
            check(rule, text(5, 0), Err(Reason::NoTarget));
        }
        check(Drop, text(6, 5), Err(Reason::TooLong));
        check(TruncateEnd, text(6, 9), Ok((&ten, 6)));
        check(TruncateEnd, text(9, 9), Ok((&ten, 9)));
        check(TruncateEnd, text(10, 3), Err(Reason::NoTarget));
        check(TruncateStart, text(9, 4), Ok((&[1, 5, 6, 7, 8, 9, 10, 11, 12, 13], 6)));
        check(TruncateStart, text(9, 9), Ok((&[1, 10, 11, 12, 13, 14, 15, 16, 17, 18], 1)));
        check(TruncateStart, text(9, 10), Err(Reason::TooLong));
    }

    #[test]
    fn without_bos_one_token_of_the_prompt_stays() {
        let limits = Limits { bos: None, ..limits(Overlong::TruncateStart) };
        let (cut, _) = limits.one(text(9, 9), Turns::Last).ok().filter(|(cut, _)| cut.tokens[0] == 9).unwrap();
        assert_eq!((cut.prompt_len(), cut.tokens.len()), (1, 10));
        assert_eq!(limits.one(text(9, 10), Turns::Last), Err(Reason::TooLong));
    }

    #[test]
    fn earlier_answers_may_go_and_the_last_stays() {
        let mut conversation = text(8, 4);
        conversation.targets[2] = true;
        let limits = limits(Overlong::TruncateStart);
        let (cut, _) = limits.one(conversation.clone(), Turns::All).ok().unwrap();
        assert_eq!((cut.tokens[1], cut.target_count()), (4, 4));
        assert_eq!(limits.one(conversation, Turns::Last), Err(Reason::TooLong));
    }

    #[test]
    fn both_texts_of_a_pair_lose_the_same_tokens() {
        let start = limits(Overlong::TruncateStart);
        let (chosen, rejected, cut) = start.two(text(6, 2), text(6, 7)).ok().unwrap();
        assert_eq!((chosen.tokens, cut), (vec![1, 5, 6, 7, 8], Cut::Some));
        assert_eq!(rejected.tokens, [1, 5, 6, 7, 8, 9, 10, 11, 12, 13]);
        assert_eq!(start.two(text(6, 2), text(6, 10)), Err(Reason::TooLong));
        assert_eq!(start.two(text(6, 2), text(6, 2)), Err(Reason::SameAnswers));
        let end = limits(Overlong::TruncateEnd);
        assert_eq!(end.two(text(6, 5), text(6, 7)), Err(Reason::SameAnswers));
        assert_eq!(limits(Overlong::Drop).two(text(6, 2), text(6, 7)), Err(Reason::TooLong));
    }
}
