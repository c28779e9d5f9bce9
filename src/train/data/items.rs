//! From rows to what a stage learns: conversions between forms, leaves of trees, augmentation, and how often each is taken.

use std::path::Path;
use std::sync::Arc;

use super::Form;
use super::counts::{Counts, Reason};
use super::read::{self, DataFile};
use super::recipe::SourceRecipe;
use super::schema::{self, Content, Row};
use super::tree::{self, Action};
use crate::error::{Error, Result};
use crate::text::chat::Message;
use crate::train::batch::Order;

/// A row and where it stands.
#[derive(Debug)]
pub(super) struct Placed {
    file: Arc<Path>,
    number: usize,
    /// The row.
    pub(super) row: Row,
}

impl Placed {
    /// Where it stands, for people.
    pub(super) fn place(&self) -> String {
        read::place(&self.file, self.number)
    }
}

/// What is learnt from one example.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Lesson<'a> {
    /// To imitate all turns of the assistant.
    Conversation(&'a [Message]),
    /// To imitate one answer.
    Imitate { prompt: &'a [Message], answer: &'a str },
    /// To give one answer more or less often.
    Judge { prompt: &'a [Message], answer: &'a str, desirable: bool },
    /// To prefer one answer to another.
    Prefer { prompt: &'a [Message], chosen: &'a str, rejected: &'a str, absolute: bool, margin: Option<f32> },
}

/// A lesson and the row it comes from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Item<'a> {
    /// Place of the row among those of its source.
    pub(super) index: usize,
    /// The row.
    pub(super) placed: &'a Placed,
    /// What is learnt.
    pub(super) lesson: Lesson<'a>,
}

/// What was drawn of an item.
#[derive(Debug, Clone, Copy)]
pub(super) struct Drawn<'a> {
    /// The item.
    pub(super) item: Item<'a>,
    /// How often it is taken in an epoch; what is held out, once.
    pub(super) copies: usize,
    /// Whether it is held out.
    pub(super) is_test: bool,
}

/// Counts, and how many bad rows may still be passed over.
pub(super) struct Tally {
    /// What became of the rows.
    pub(super) counts: Counts,
    /// `skip_bad`.
    pub(super) allowed: usize,
}

impl Tally {
    /// One more bad row.
    pub(super) fn bad(&mut self, message: String) -> Result<()> {
        if self.counts.dropped_for(Reason::Bad) >= self.allowed {
            let passed = match self.allowed {
                0 => String::new(),
                allowed => format!(" (after {allowed} bad rows, which is what data.skip_bad allows)"),
            };
            return Err(Error::invalid("data.source", message + &passed));
        }
        self.counts.drop_one(Reason::Bad);
        Ok(())
    }
}

/// All rows of one source.
pub(super) fn read_source(source: &SourceRecipe, files: &mut Vec<DataFile>, tally: &mut Tally) -> Result<Vec<Placed>> {
    let mut all = Vec::new();
    for path in read::files(&source.path)? {
        let (file, rows) = read::read(&path, |value| schema::parse(value, source.schema))?;
        tally.counts.rows += file.rows;
        files.push(file);
        let shared: Arc<Path> = Arc::from(path.as_path());
        for (number, row) in rows {
            match row {
                Ok(row) => all.push(Placed { file: Arc::clone(&shared), number, row }),
                Err(message) => tally.bad(format!("{}: {message}", read::place(&path, number)))?,
            }
        }
    }
    Ok(all)
}

/// What the rows of one source teach in `form`.
pub(super) fn items<'a>(
    source: &SourceRecipe,
    rows: &'a [Placed],
    form: Form,
    seed: u64,
    counts: &mut Counts,
) -> Result<Vec<Item<'a>>> {
    let bare: Vec<&Row> = rows.iter().map(|placed| &placed.row).collect();
    let leaves = if form == Form::Text { tree::leaves(&bare) } else { Vec::new() };
    let mut items = Vec::with_capacity(rows.len());
    for (index, placed) in rows.iter().enumerate() {
        let mut push = |lesson| items.push(Item { index, placed, lesson });
        match (form, &placed.row.content) {
            (Form::Text, Content::Conversation(messages)) => push(Lesson::Conversation(messages)),
            (Form::Text, Content::Answer { desirable: Some(false), .. }) => counts.drop_one(Reason::Undesirable),
            (Form::Text, Content::Answer { prompt, answer, .. }) => push(Lesson::Imitate { prompt, answer }),
            (Form::Text, Content::Pair { prompt, chosen, .. }) => match leaves[index] {
                None => push(Lesson::Imitate { prompt, answer: chosen }),
                // History is dropped: the instruction is the first turn.
                Some(Action::Leaf) => push(Lesson::Imitate { prompt: &prompt[..1], answer: chosen }),
                Some(Action::Inner) => counts.drop_one(Reason::NotALeaf),
                Some(Action::Repeated) => counts.drop_one(Reason::Repeated),
            },
            (Form::Pair, Content::Pair { prompt, chosen, rejected, margin, turn }) => {
                let absolute = source.absolute.unwrap_or(turn.is_some());
                push(Lesson::Prefer { prompt, chosen, rejected, absolute, margin: *margin });
            }
            (Form::Answer, Content::Pair { prompt, chosen, rejected, .. }) => {
                push(Lesson::Judge { prompt, answer: chosen, desirable: true });
                push(Lesson::Judge { prompt, answer: rejected, desirable: false });
            }
            (Form::Answer, Content::Answer { prompt, answer, desirable: Some(desirable) }) => {
                push(Lesson::Judge { prompt, answer, desirable: *desirable });
            }
            (Form::Pair, _) => return Err(unfit(placed, "needs pairs: rows with chosen and rejected")),
            (Form::Answer, _) => return Err(unfit(placed, "needs answers with a label, or pairs")),
        }
    }
    if source.augment {
        let added = tree::augment(&bare, seed);
        counts.augmented += added.len();
        items.extend(added.into_iter().filter_map(|pair| single_turn(source, rows, pair)));
    }
    Ok(items)
}

fn unfit(placed: &Placed, what: &str) -> Error {
    Error::invalid("data.source", format!("{}: this stage {what}; this row is of another form", placed.place()))
}

/// The pair as answers to the bare instruction.
fn single_turn<'a>(source: &SourceRecipe, rows: &'a [Placed], pair: tree::Augmented) -> Option<Item<'a>> {
    let placed = &rows[pair.chosen];
    match (&placed.row.content, &rows[pair.rejected].row.content) {
        (Content::Pair { prompt, chosen, .. }, Content::Pair { rejected, .. }) => {
            let absolute = source.absolute.unwrap_or(true);
            let lesson = Lesson::Prefer { prompt: &prompt[..1], chosen, rejected, absolute, margin: None };
            Some(Item { index: pair.chosen, placed, lesson })
        }
        _ => None,
    }
}

/// How often each of `items` is taken; the fraction of the weight is drawn by `seed`, on either side alike.
pub(super) fn draw<'a>(
    source: &SourceRecipe,
    items: &[Item<'a>],
    is_test: impl Fn(&Item<'a>) -> bool,
    seed: u64,
    counts: &mut Counts,
) -> Vec<Drawn<'a>> {
    let (test, train): (Vec<usize>, Vec<usize>) = (0..items.len()).partition(|index| is_test(&items[*index]));
    let mut copies = vec![0; items.len()];
    for side in [&train, &test] {
        let more = (source.weight.fract() * side.len() as f64).round() as usize;
        side.iter().for_each(|index| copies[*index] = source.weight.trunc() as usize);
        Order::new(side.len(), seed, 0).into_iter().take(more).for_each(|place| copies[side[place]] += 1);
    }
    let mut held = vec![false; items.len()];
    test.iter().for_each(|index| held[*index] = true);
    let mut drawn = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        match copies[index] {
            0 => counts.drop_one(Reason::NotDrawn),
            copies => drawn.push(Drawn { item: *item, copies, is_test: held[index] }),
        }
    }
    drawn
}
