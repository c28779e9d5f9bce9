//! The loop of training. Not written yet: this is what the command line calls.

use super::plan::Plan;
use super::recipe::Recipe;
use super::start::Start;
use crate::error::{Error, Result};

/// What a run tells while it goes on, and how it is told to stop. Implemented by the command line and by tests.
pub trait Watch {
    /// What is going on before the first step: loading, reading data, reference log-probabilities. `total` is 0 where unknown.
    fn preparing(&mut self, what: &str, done: u64, total: u64);
    /// Everything is read; training begins, or ends here for a dry run.
    fn planned(&mut self, plan: &Plan);
    /// A step is done.
    fn stepped(&mut self, progress: &StepProgress);
    /// Something that a user should know and that stops nothing: a full disk, a bad step, a damaged snapshot.
    fn warned(&mut self, what: &str);
    /// Asked after every step. Once true, the trainer saves a snapshot and returns [`Outcome::Stopped`].
    fn is_stopping(&self) -> bool;
}

/// Where a run is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepProgress {
    /// Steps that are done.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// Of the last step.
    pub loss: f64,
    /// Tokens of the last steps for each second.
    pub tokens_per_second: f64,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Only planned.
    Planned,
    /// All steps are done and the model is written.
    Finished {
        /// Steps that were done.
        steps: u64,
    },
    /// Told to stop; a snapshot is saved.
    Stopped {
        /// Steps that were done.
        step: u64,
    },
}

/// Trains as `recipe` says and writes records, snapshots, report and model into its output folder.
///
/// # Errors
/// [`Error::Unsupported`]: there is no trainer yet.
pub fn run(_recipe: &Recipe, _start: &Start, _watch: &mut dyn Watch) -> Result<Outcome> {
    Err(Error::Unsupported("this build cannot train yet".into()))
}
