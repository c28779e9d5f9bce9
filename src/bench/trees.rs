//! `eurus bench make-trees`: solutions to imitate and preference trees, in the schemas of UltraInteract, for the task of
//! eurus-mini. A checker plays the environment and the critique. Every row follows from the seed and its number.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use indicatif::ProgressBar;
use serde::Serialize;

use super::problems::{Draws, Solved, Source};
use crate::error::{Error, Result};

/// Probability that a turn is the last: about half of UltraInteract's trees have one (arXiv 2404.02078, table 1).
const ENDS: f64 = 0.5;
/// Trees draw from other numbers than solutions.
const TREES: u64 = 1 << 32;

/// What to write.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Folder for sft.jsonl and trees.jsonl; made if missing
    #[arg(value_name = "DIR")]
    pub out: PathBuf,
    /// Seed, below 2^32
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(..1 << 32))]
    pub seed: u64,
    /// Rows of sft.jsonl, one solution each
    #[arg(long, default_value_t = 500_000)]
    pub solutions: u64,
    /// Trees, each one to five rows of trees.jsonl
    #[arg(long, default_value_t = 5_000)]
    pub trees: u64,
    /// Turns of a tree at most
    #[arg(long, default_value_t = 5)]
    pub turns: usize,
    /// Problems that are never written: JSON Lines with `prompt`, `nums` and `target`
    #[arg(long, value_name = "FILE", default_value = "models/eurus-mini/heldout.jsonl")]
    pub exclude: PathBuf,
}

/// Rows that were written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Of sft.jsonl.
    pub solutions: u64,
    /// Of trees.jsonl.
    pub pairs: u64,
}

/// A row of UltraInteract_sft.
#[derive(Debug, Serialize)]
struct SftRow<'a> {
    id: String,
    parent_id: &'a str,
    task: &'static str,
    dataset: &'static str,
    instruction: &'a str,
    response: &'a str,
}

/// A row of UltraInteract_pair.
#[derive(Debug, Serialize)]
pub(super) struct PairRow<'a> {
    id: String,
    parent_id: &'a str,
    task: &'static str,
    dataset: &'static str,
    trajectory: &'a [Message],
    chosen: &'a str,
    rejected: &'a str,
}

/// A turn of a trajectory.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Message {
    from: &'static str,
    value: String,
}

impl Message {
    pub(super) fn user(value: String) -> Self {
        Self { from: "user", value }
    }
}

const TASK: &str = "Math_CoT";
const DATASET: &str = "countdown";

impl<'a> PairRow<'a> {
    /// Turn `turn` of `depth`; `parent` is the name of the problem.
    pub(super) fn new(
        parent: &'a str,
        (depth, turn): (usize, usize),
        trajectory: &'a [Message],
        actions: [&'a str; 2],
    ) -> Self {
        let [chosen, rejected] = actions;
        let id = format!("{parent}_{depth}_{turn}");
        Self { id, parent_id: parent, task: TASK, dataset: DATASET, trajectory, chosen, rejected }
    }
}

/// The name that all rows of a problem share.
pub(super) fn parent(prompt: &str) -> String {
    blake3::hash(prompt.as_bytes()).to_hex()[..16].to_owned()
}

/// A file of rows.
pub(super) struct Rows {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Rows {
    /// An empty file.
    pub(super) fn create(path: PathBuf) -> Result<Self> {
        let file = File::create(&path).map_err(|error| Error::file(&path, error))?;
        Ok(Self { path, file: BufWriter::new(file) })
    }

    /// Adds a row.
    pub(super) fn write(&mut self, row: &impl Serialize) -> Result<()> {
        let line = serde_json::to_string(row).map_err(Error::internal)?;
        writeln!(self.file, "{line}").map_err(|error| Error::file(&self.path, error))
    }

    /// Makes sure that all rows are in the file.
    pub(super) fn finish(mut self) -> Result<()> {
        self.file.flush().map_err(|error| Error::file(&self.path, error))
    }
}

/// Writes both files, with a progress bar on a terminal's stderr.
///
/// # Errors
/// `exclude` cannot be read, or `out` cannot be written.
pub fn run(options: &Options) -> Result<Written> {
    let source = Source::excluding(&options.exclude)?;
    fs::create_dir_all(&options.out).map_err(|error| Error::file(&options.out, error))?;
    let bar = ProgressBar::new(options.solutions + options.trees);
    write_solutions(options, &source, &bar)?;
    let pairs = write_trees(options, &source, &options.out.join("trees.jsonl"), &bar)?;
    bar.finish_and_clear();
    Ok(Written { solutions: options.solutions, pairs })
}

fn write_solutions(options: &Options, source: &Source, bar: &ProgressBar) -> Result<()> {
    let mut rows = Rows::create(options.out.join("sft.jsonl"))?;
    for index in 0..options.solutions {
        let Solved { problem, solution } = source.draw(&mut Draws::new(options.seed, index));
        let parent = parent(&problem.prompt);
        let id = format!("{parent}_{index}");
        let (instruction, response) = (&problem.prompt, &solution);
        rows.write(&SftRow { id, parent_id: &parent, task: TASK, dataset: DATASET, instruction, response })?;
        bar.inc(1);
    }
    rows.finish()
}

fn write_trees(options: &Options, source: &Source, path: &Path, bar: &ProgressBar) -> Result<u64> {
    let mut rows = Rows::create(path.to_owned())?;
    let mut pairs = 0;
    for index in 0..options.trees {
        let mut draws = Draws::new(options.seed | TREES, index);
        pairs += write_tree(&source.draw(&mut draws), options.turns, &mut draws, &mut rows)?;
        bar.inc(1);
    }
    rows.finish()?;
    Ok(pairs)
}

/// Writes a tree, whose wrong actions are each answered by the next turn, and returns its pairs.
fn write_tree(solved: &Solved, turns: usize, draws: &mut Draws, rows: &mut Rows) -> Result<u64> {
    let mut depth = 1;
    while depth < turns && !draws.chance(ENDS) {
        depth += 1;
    }
    let parent = parent(&solved.problem.prompt);
    let mut trajectory = vec![Message::user(solved.problem.prompt.clone())];
    for turn in 1..=depth {
        let (right, wrong) = (solved.another(draws), solved.wrong(draws));
        rows.write(&PairRow::new(&parent, (depth, turn), &trajectory, [&right, &wrong]))?;
        let observation = solved.observation(&wrong);
        trajectory.extend([Message { from: "assistant", value: wrong }, Message::user(observation)]);
    }
    Ok(depth as u64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::Value;

    use super::*;

    fn lines(path: &Path) -> Vec<Value> {
        fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn both_files_have_the_rows_of_ultrainteract_and_follow_from_the_seed() {
        let folder = tempfile::tempdir().unwrap();
        let exclude = folder.path().join("heldout.jsonl");
        fs::write(&exclude, r#"{"prompt":"Use the numbers 1, 2, 9 to make 20.","nums":[1,2,9],"target":20}"#).unwrap();
        let options = |out: &str| Options {
            out: folder.path().join(out),
            seed: 4,
            solutions: 20,
            trees: 40,
            turns: 5,
            exclude: exclude.clone(),
        };
        let written = run(&options("a")).unwrap();
        assert_eq!(run(&options("b")).unwrap(), written);
        for name in ["sft.jsonl", "trees.jsonl"] {
            let file = |out: &str| fs::read(folder.path().join(out).join(name)).unwrap();
            assert!(file("a") == file("b"));
        }
        let sft = lines(&folder.path().join("a/sft.jsonl"));
        assert!(sft.len() == 20 && sft[0]["instruction"].as_str().unwrap().starts_with("Use the numbers "));
        let pairs = lines(&folder.path().join("a/trees.jsonl"));
        assert_eq!(pairs.len() as u64, written.pairs);
        for pair in &pairs {
            let mut parts = pair["id"].as_str().unwrap().rsplitn(3, '_').map(|part| part.parse::<usize>().ok());
            let (turn, depth) = (parts.next().unwrap().unwrap(), parts.next().unwrap().unwrap());
            assert!(turn <= depth && depth <= 5);
            let trajectory = pair["trajectory"].as_array().unwrap();
            assert_eq!(trajectory.len(), 2 * turn - 1);
            assert_eq!(trajectory.last().unwrap()["from"], "user");
            assert_ne!(pair["chosen"], pair["rejected"]);
        }
        assert!(pairs.iter().any(|pair| pair["trajectory"].as_array().unwrap().len() == 5));
    }
}
