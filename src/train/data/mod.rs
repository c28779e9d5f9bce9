//! Training data: files of rows to tokenised examples, for any stage. Reading, meaning, trees, mixtures and encoding each
//! have a file; here they follow each other. Everything depends on the recipe, the files and the seed only.

mod counts;
mod encode;
mod fit;
mod items;
mod parallel;
mod parquet;
mod read;
mod recipe;
mod schema;
#[cfg(test)]
mod tests;
mod tree;
mod zstd;

pub use counts::{Counts, Reason};
pub use encode::{Encoder, TextEnd, Turns};
pub use read::DataFile;
pub use recipe::{DataRecipe, Overlong, Schema, SourceRecipe, SpecialText};

use fit::{Cut, Limits};
use items::{Drawn, Item, Lesson, Tally};

use super::example::Example;
use crate::error::{Error, Result};
use crate::text::chat::Message;

/// What a stage learns from; rows of another form are converted where that can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Texts to imitate (SFT). Of a pair it is the chosen answer; of a tree each correct action that ends its branch, as an
    /// answer to the bare instruction.
    Text,
    /// Pairs (DPO, NCA, reward models).
    Pair,
    /// Labelled answers (KTO). A pair is two.
    Answer,
}

/// Examples to learn from and to test with.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Dataset {
    /// To learn from, in the order of the files; repetitions follow each other.
    pub train: Vec<Example>,
    /// Held out.
    pub test: Vec<Example>,
    /// What became of the rows.
    pub counts: Counts,
    /// The files that were read.
    pub files: Vec<DataFile>,
}

/// Items that are encoded together, between two calls of `progress`.
const WINDOW: usize = 4096;

/// Reads and encodes what `recipe` names. `progress` is told how many examples are encoded so far.
///
/// # Errors
/// [`Error::Invalid`] naming the recipe's key, or file and row of a row that is not as expected, unless `skip_bad` allows for
/// it; [`Error::Checkpoint`] for files that are missing or damaged.
pub fn load(
    recipe: &DataRecipe,
    form: Form,
    seed: u64,
    text: &Encoder,
    progress: &mut dyn FnMut(usize),
) -> Result<Dataset> {
    recipe.check()?;
    check_form(recipe, form)?;
    let mut tally = Tally { counts: Counts::default(), allowed: recipe.skip_bad };
    let mut files = Vec::new();
    let mut sources = Vec::with_capacity(recipe.source.len());
    for source in &recipe.source {
        sources.push(items::read_source(source, &mut files, &mut tally)?);
    }
    let mut families = tree::Families::new();
    let mut items = Vec::with_capacity(sources.len());
    for (recipe, rows) in recipe.source.iter().zip(&sources) {
        items.push(items::items(recipe, rows, form, seed, &mut tally.counts)?);
    }
    let members: Vec<Vec<usize>> =
        sources.iter().map(|rows| rows.iter().map(|placed| families.add(&placed.row)).collect()).collect();
    let held = families.held_out(recipe.test_fraction, seed);
    let mut drawn = Vec::new();
    for (number, (source, items)) in recipe.source.iter().zip(&items).enumerate() {
        let is_test = |item: &Item<'_>| held[members[number][item.index]];
        drawn.extend(items::draw(source, items, is_test, seed.wrapping_add(number as u64), &mut tally.counts));
    }
    let limits = Limits { max_length: recipe.max_length, overlong: recipe.overlong, bos: text.tokenizer().bos() };
    let mut dataset = Dataset { files, ..Dataset::default() };
    for (number, window) in drawn.chunks(WINDOW).enumerate() {
        let encoded = parallel::map(window, |drawn| encode(&drawn.item.lesson, &limits, recipe.special_text, text));
        for (drawn, outcome) in window.iter().zip(encoded) {
            dataset.take(drawn, outcome, &mut tally)?;
        }
        progress(number * WINDOW + window.len());
    }
    dataset.counts = tally.counts;
    if dataset.train.is_empty() {
        let message = format!("no example is left to learn from: {}", dataset.counts);
        return Err(Error::invalid("data.source", message));
    }
    Ok(dataset)
}

fn check_form(recipe: &DataRecipe, form: Form) -> Result<()> {
    match recipe.source.iter().position(|source| source.augment) {
        Some(index) if form != Form::Pair => {
            let key = format!("data.source[{index}].augment");
            let message = format!("{key} adds pairs, and this stage does not learn from pairs");
            Err(Error::invalid(key, message))
        }
        _ => Ok(()),
    }
}

/// What became of a lesson that could be rendered.
enum Outcome {
    Kept(Example, Cut),
    Dropped(Reason),
}

impl Dataset {
    fn take(&mut self, drawn: &Drawn<'_>, outcome: Result<Outcome>, tally: &mut Tally) -> Result<()> {
        let counts = &mut tally.counts;
        let (example, cut) = match outcome {
            Ok(Outcome::Kept(example, cut)) => (example, cut),
            Ok(Outcome::Dropped(reason)) => {
                counts.drop_one(reason);
                return Ok(());
            }
            Err(error) => return tally.bad(format!("{}: {error}", drawn.item.placed.place())),
        };
        counts.truncated += usize::from(cut == Cut::Some);
        if drawn.is_test {
            counts.test += 1;
            self.test.push(example);
            return Ok(());
        }
        counts.train += drawn.copies;
        counts.train_tokens += drawn.copies * example.token_count();
        self.train.extend(std::iter::repeat_n(example, drawn.copies));
        Ok(())
    }
}

fn encode(lesson: &Lesson<'_>, limits: &Limits, special: SpecialText, text: &Encoder) -> Result<Outcome> {
    let is_empty = |answer: &str| answer.trim().is_empty();
    let answered = |prompt: &[Message], answer: &str| {
        let mut messages = prompt.to_vec();
        messages.push(Message::new("assistant", answer));
        text.encode(&messages, Turns::Last, special)
    };
    let kept = match *lesson {
        Lesson::Conversation(messages) => {
            if messages.iter().all(|message| message.role != "assistant" || is_empty(&message.content)) {
                return Ok(Outcome::Dropped(Reason::EmptyAnswer));
            }
            let encoded = text.encode(messages, Turns::All, special)?;
            limits.one(encoded, Turns::All).map(|(text, cut)| (Example::Text(text), cut))
        }
        Lesson::Imitate { answer, .. } | Lesson::Judge { answer, .. } if is_empty(answer) => Err(Reason::EmptyAnswer),
        Lesson::Imitate { prompt, answer } => {
            let fitted = limits.one(answered(prompt, answer)?, Turns::Last);
            fitted.map(|(text, cut)| (Example::Text(text), cut))
        }
        Lesson::Judge { prompt, answer, desirable } => {
            let fitted = limits.one(answered(prompt, answer)?, Turns::Last);
            fitted.map(|(text, cut)| (Example::Answer { text, desirable }, cut))
        }
        Lesson::Prefer { chosen, rejected, .. } if is_empty(chosen) || is_empty(rejected) => Err(Reason::EmptyAnswer),
        Lesson::Prefer { prompt, chosen, rejected, absolute, margin } => {
            let fitted = limits.two(answered(prompt, chosen)?, answered(prompt, rejected)?);
            fitted.map(|(chosen, rejected, cut)| (Example::Pair { chosen, rejected, absolute, margin }, cut))
        }
    };
    Ok(kept.map_or_else(Outcome::Dropped, |(example, cut)| Outcome::Kept(example, cut)))
}
