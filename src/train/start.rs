//! How a run begins: from the first step or from a snapshot, never from a snapshot of another recipe, and never two at once.
//! Owns the choice and the recipe that is left in the output folder; the run itself is the trainer's.

use std::fs::{self, File, TryLockError};
use std::path::Path;

use super::recipe::Recipe;
use super::snapshot::{Snapshot, Snapshots};
use super::{export, folder};
use crate::error::{Error, Result};

/// What the user asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Wish {
    /// Goes on where there are snapshots of the same recipe, else begins.
    #[default]
    Any,
    /// Goes on, or fails.
    Resume,
    /// Removes the snapshots of earlier runs and begins.
    Fresh,
}

/// How a run begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// Reads model and data, tells the plan and ends; the output folder is not touched.
    Plan,
    /// From the first step.
    Fresh,
    /// From a snapshot.
    Resume(Snapshot),
}

/// Keeps other processes out of an output folder for as long as it lives, also if this process is killed.
#[derive(Debug)]
pub struct OutputLock {
    _file: File,
}

impl OutputLock {
    /// Creates the output folder of `recipe` and takes it.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if another run writes there, [`Error::Checkpoint`] if the folder cannot be written.
    pub fn take(recipe: &Recipe) -> Result<Self> {
        let output = &recipe.run.output;
        let path = output.join(".lock");
        let open = || {
            fs::create_dir_all(output)
                .and_then(|()| File::options().write(true).create(true).truncate(false).open(&path))
        };
        let file = open().map_err(|error| Error::file(&path, error))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => {
                let what = "is in use by another `eurus train`; wait for it or set run.output to another folder";
                Err(Error::Unavailable(format!("{} {what}", output.display())))
            }
            // Some network file systems have no locks; that is no reason not to train.
            Err(TryLockError::Error(_)) => Ok(Self { _file: file }),
        }
    }
}

/// Decides how the run of `recipe` begins, after removing what a crash has left, and leaves the recipe in the output folder.
/// Also returns what the user should know: damaged snapshots that were passed over.
///
/// # Errors
/// [`Error::Invalid`] if there are snapshots of another recipe, naming every key that differs, or if there is nothing to
/// resume from where that was asked for. [`Error::Checkpoint`] if all snapshots are damaged.
pub fn decide(recipe: &Recipe, wish: Wish) -> Result<(Start, Vec<String>)> {
    let snapshots = Snapshots::new(recipe.run.snapshots(), recipe.run.keep);
    snapshots.sweep()?;
    export::recover(&recipe.run.model())?;
    let output = recipe.run.output.display();
    let (start, warnings) = match (wish, snapshots.is_empty()?) {
        (Wish::Fresh, _) => {
            snapshots.clear()?;
            (Start::Fresh, Vec::new())
        }
        (Wish::Any, true) => (Start::Fresh, Vec::new()),
        (Wish::Resume, true) => {
            return Err(Error::invalid("--resume", format!("{output} has no snapshot to resume from")));
        }
        (Wish::Any | Wish::Resume, false) => {
            refuse_another_recipe(recipe)?;
            let newest = snapshots.newest()?;
            let Some(snapshot) = newest.snapshot else {
                let what = format!("all snapshots are damaged; --fresh starts over: {}", newest.damaged.join("; "));
                return Err(Error::Checkpoint(format!("{output}: {what}")));
            };
            (Start::Resume(snapshot), newest.damaged)
        }
    };
    leave_recipe(recipe)?;
    Ok((start, warnings))
}

fn refuse_another_recipe(recipe: &Recipe) -> Result<()> {
    let path = recipe.run.recipe_file();
    let advice = "begin anew with --fresh or set run.output to another folder";
    let before = Recipe::load_any(&path, &[]).map_err(|error| {
        let what =
            format!("{} tells not which recipe the snapshots beside it are of ({error}); {advice}", path.display());
        Error::invalid("--config", what)
    })?;
    let differences = recipe.differences(&before);
    if differences.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = differences.iter().map(|difference| format!("\n  {difference}")).collect();
    let output = recipe.run.output.display();
    let what = format!("{output} holds snapshots of another recipe; {advice}. It differs in{}", lines.concat());
    Err(Error::invalid("--config", what))
}

fn leave_recipe(recipe: &Recipe) -> Result<()> {
    let path = recipe.run.recipe_file();
    let temporary = path.with_extension("toml.tmp");
    let unwritable = |error: std::io::Error| Error::file(&path, error);
    fs::create_dir_all(&recipe.run.output).map_err(unwritable)?;
    fs::write(&temporary, recipe.to_toml()).map_err(unwritable)?;
    folder::sync(&temporary)?;
    fs::rename(&temporary, &path).map_err(unwritable)?;
    folder::sync(path.parent().unwrap_or(Path::new(".")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::train::recipe::Stage;

    fn recipe(output: &Path, assignments: &[&str]) -> Recipe {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = format!("model.from = \"m\"\nrun.output = {output:?}\ndata.source = [{{ path = \"d\" }}]\n");
        fs::write(file.path(), text).unwrap();
        let assignments: Vec<String> = assignments.iter().map(|text| (*text).to_owned()).collect();
        Recipe::load(Stage::Dpo, file.path(), &assignments).unwrap()
    }

    fn save(recipe: &Recipe, step: u64) {
        let snapshots = Snapshots::new(recipe.run.snapshots(), 9);
        let mut write = |folder: &Path| {
            fs::write(folder.join("x"), step.to_string()).unwrap();
            Ok(())
        };
        snapshots.save(step, &mut write).unwrap();
    }

    #[track_caller]
    fn step(outcome: Result<(Start, Vec<String>)>) -> Option<u64> {
        match outcome.unwrap().0 {
            Start::Resume(snapshot) => Some(snapshot.step),
            _ => None,
        }
    }

    #[test]
    fn a_run_goes_on_where_the_same_recipe_stopped() {
        let root = tempfile::tempdir().unwrap();
        let output = root.path().join("out");
        let first = recipe(&output, &[]);
        let refused = decide(&first, Wish::Resume).unwrap_err().to_string();
        assert!(refused.contains("no snapshot to resume from"), "{refused}");
        assert_eq!(step(decide(&first, Wish::Any)), None);
        assert_eq!(fs::read_to_string(output.join("recipe.toml")).unwrap(), first.to_toml());
        save(&first, 3);
        save(&first, 7);
        for wish in [Wish::Any, Wish::Resume] {
            assert_eq!(step(decide(&recipe(&output, &["run.threads=2"]), wish)), Some(7));
        }
        assert_eq!(step(decide(&first, Wish::Fresh)), None);
        assert_eq!(step(decide(&first, Wish::Any)), None, "the snapshots are gone");
    }

    #[test]
    fn snapshots_of_another_recipe_are_refused_with_the_keys_that_differ() {
        let root = tempfile::tempdir().unwrap();
        let before = recipe(root.path(), &[]);
        decide(&before, Wish::Any).unwrap();
        save(&before, 3);
        let other = recipe(root.path(), &["objective.beta=0.5", "run.seed=1", "run.keep=7"]);
        for wish in [Wish::Any, Wish::Resume] {
            let message = decide(&other, wish).unwrap_err().to_string();
            for part in ["--fresh", "objective.beta: 0.1 before, 0.5 now", "run.seed: 0 before, 1 now"] {
                assert!(message.contains(part), "{message}");
            }
            assert!(!message.contains("run.keep"), "{message}");
        }
        assert_eq!(step(decide(&before, Wish::Any)), Some(3), "nothing was touched");
        fs::remove_file(before.run.recipe_file()).unwrap();
        assert!(decide(&before, Wish::Any).unwrap_err().to_string().contains("recipe.toml"));
        assert_eq!(step(decide(&other, Wish::Fresh)), None);
    }

    #[test]
    fn damaged_snapshots_are_told_and_all_damaged_ones_are_an_error() {
        let root = tempfile::tempdir().unwrap();
        let recipe = recipe(root.path(), &[]);
        decide(&recipe, Wish::Any).unwrap();
        save(&recipe, 3);
        save(&recipe, 7);
        fs::write(recipe.run.snapshots().join("step-00000007/x"), "8").unwrap();
        let (start, warnings) = decide(&recipe, Wish::Any).unwrap();
        assert!(matches!(start, Start::Resume(Snapshot { step: 3, .. })), "{start:?}");
        assert!(warnings.len() == 1 && warnings[0].contains("step-00000007"), "{warnings:?}");
        fs::write(recipe.run.snapshots().join("step-00000003/x"), "8").unwrap();
        let message = decide(&recipe, Wish::Any).unwrap_err().to_string();
        assert!(message.contains("step-00000003") && message.contains("--fresh"), "{message}");
    }

    #[test]
    fn an_output_folder_has_one_run_at_a_time() {
        let root = tempfile::tempdir().unwrap();
        let recipe = recipe(&root.path().join("new"), &[]);
        let lock = OutputLock::take(&recipe).unwrap();
        assert!(matches!(OutputLock::take(&recipe), Err(Error::Unavailable(_))));
        drop(lock);
        OutputLock::take(&recipe).unwrap();
    }
}
