//! `eurus bench sample-pairs`: answers of a policy to problems of its task, graded, as pairs of a right and a wrong answer to
//! the same problem: what a reward model learns from that shall choose among answers of this policy.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use futures_util::{StreamExt, TryStreamExt, stream};
use indicatif::ProgressBar;

use super::countdown::{self, Problem};
use super::problems::{Draws, Solved, Source};
use super::trees::{Message, PairRow, Rows, parent};
use crate::config::{Config, Overrides};
use crate::error::Result;
use crate::service::best_of_n::{AnswerRule, BestOfRequest, Strategy};
use crate::service::generate::GenerateRequest;
use crate::service::prompt::{Conversation, Prompt};
use crate::service::{Message as ChatMessage, Service};

/// Problems in flight: enough to fill the engine's batch.
const CONCURRENCY: usize = 16;
/// An answer is in this many pairs at most, as in the paper's augmentation (arXiv 2404.02078, appendix B).
const USES_MAX: usize = 3;

/// What to draw.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Policy that answers
    #[arg(long, default_value = "eurus-mini/policy")]
    pub model: String,
    /// Problems to draw
    #[arg(long, default_value_t = 10_000)]
    pub problems: u64,
    /// Answers to each problem
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(2..=1024))]
    pub samples: u64,
    /// Pairs of a problem at most
    #[arg(long, default_value_t = 9)]
    pub pairs: usize,
    /// Seed of problems and answers, below 2^32
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(..1 << 32))]
    pub seed: u64,
    /// Sampling temperature
    #[arg(long, default_value_t = 1.0)]
    pub temperature: f32,
    /// File to write: rows of UltraInteract_pair
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Problems that are never drawn: JSON Lines with `prompt`, `nums` and `target`
    #[arg(long, value_name = "FILE", default_value = "models/eurus-mini/heldout.jsonl")]
    pub exclude: PathBuf,
}

/// What was drawn.
#[derive(Debug, Clone, Copy, Default)]
pub struct Drawn {
    /// Answers.
    pub answers: usize,
    /// Of these, right.
    pub right: usize,
    /// Pairs that were written.
    pub pairs: usize,
}

impl fmt::Display for Drawn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let share = 100.0 * self.right as f64 / self.answers.max(1) as f64;
        write!(f, "{} answers, {share:.1} percent right, {} pairs", self.answers, self.pairs)
    }
}

/// The settings of a process that serves the policy of `options`.
///
/// # Errors
/// If the settings do not load.
pub fn settings(options: &Options) -> Result<Config> {
    let mut overrides = Overrides::default();
    overrides.set("model", Some(options.model.as_str()));
    overrides.set("reward_model", Some("none"));
    overrides.set("limits.best_of_max", Some(options.samples));
    overrides.set("engine.waiting_max", Some(CONCURRENCY * options.samples.max(64) as usize));
    overrides.set("log.level", Some("warn"));
    Config::load(None, &overrides)
}

/// Draws, grades and writes, with a progress bar on a terminal's stderr.
///
/// # Errors
/// A file that cannot be read or written, or a problem that could not be answered.
pub async fn run(options: &Options, service: &Service) -> Result<Drawn> {
    let source = Source::excluding(&options.exclude)?;
    let mut rows = Rows::create(options.out.clone())?;
    let bar = ProgressBar::new(options.problems);
    // The same problem may come again, in which case its answers would too.
    let mut seen = BTreeSet::new();
    let problems = (0..options.problems).filter_map(|index| {
        let mut draws = Draws::new(options.seed, index);
        let Solved { problem, .. } = source.draw(&mut draws);
        seen.insert(problem.prompt.clone()).then_some((index, problem, draws))
    });
    let answers = problems.map(|(index, problem, draws)| async move {
        let answers = answer(options, service, index, &problem).await?;
        Ok::<_, crate::error::Error>((problem, draws, answers))
    });
    let mut answered = stream::iter(answers).buffered(CONCURRENCY);
    let mut drawn = Drawn::default();
    while let Some((problem, mut draws, answers)) = answered.try_next().await? {
        drawn.answers += answers.len();
        drawn.right += answers.iter().filter(|answer| answer.right).count();
        let parent = parent(&problem.prompt);
        let trajectory = [Message::user(problem.prompt)];
        for [right, wrong] in pairs(&answers, options.pairs, &mut draws) {
            rows.write(&PairRow::new(&parent, (1, 1), &trajectory, [right, wrong]))?;
            drawn.pairs += 1;
        }
        bar.inc(1);
    }
    rows.finish()?;
    bar.finish_and_clear();
    Ok(drawn)
}

struct Answer {
    text: String,
    right: bool,
}

async fn answer(options: &Options, service: &Service, index: u64, problem: &Problem) -> Result<Vec<Answer>> {
    let message = ChatMessage { role: "user".into(), content: problem.prompt.clone() };
    let mut generate = GenerateRequest::new(Prompt::Messages(Conversation::new(vec![message])));
    generate.temperature = options.temperature;
    // Two problems, or two calls with different seeds, have no candidate's seed in common.
    generate.seed = Some((options.seed << 21 ^ index) * 1024 % (1 << 53));
    generate.max_tokens = Some(TOKENS_MAX);
    let strategy = Some(Strategy::LogProb);
    let best_of = options.samples as usize;
    let request = BestOfRequest { generate, best_of, strategy, reward_model: None, answer: AnswerRule::Boxed };
    let best = service.best_of_n(request).await?;
    let graded = best.candidates.into_iter().map(|rated| {
        let answer = rated.answer.as_deref();
        let right = answer.is_some_and(|text| countdown::solves(text, &problem.nums, problem.target));
        Answer { text: rated.candidate.text, right }
    });
    Ok(graded.collect())
}

/// Longer than any solution; what is longer still is a wrong answer without an end.
const TOKENS_MAX: usize = 128;

/// At most `count` pairs of a right and a wrong answer, none twice, no answer more than [`USES_MAX`] times.
fn pairs<'a>(answers: &'a [Answer], count: usize, draws: &mut Draws) -> Vec<[&'a str; 2]> {
    let distinct = |right: bool| -> Vec<&str> {
        let texts: BTreeSet<&str> =
            answers.iter().filter(|answer| answer.right == right).map(|answer| answer.text.as_str()).collect();
        texts.into_iter().collect()
    };
    let (right, wrong) = (distinct(true), distinct(false));
    let mut all: Vec<(usize, usize)> =
        (0..right.len()).flat_map(|chosen| (0..wrong.len()).map(move |rejected| (chosen, rejected))).collect();
    for last in (1..all.len()).rev() {
        all.swap(last, draws.below(last + 1));
    }
    let (mut chosen_uses, mut rejected_uses) = (vec![0; right.len()], vec![0; wrong.len()]);
    let mut taken = Vec::new();
    for (chosen, rejected) in all {
        if taken.len() < count && chosen_uses[chosen] < USES_MAX && rejected_uses[rejected] < USES_MAX {
            chosen_uses[chosen] += 1;
            rejected_uses[rejected] += 1;
            taken.push([right[chosen], wrong[rejected]]);
        }
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_of_a_right_and_a_wrong_answer_and_none_comes_twice() {
        let answer = |text: &str, right| Answer { text: text.into(), right };
        let answers = [answer("a", true), answer("x", false), answer("b", true), answer("a", true), answer("y", false)];
        let found = pairs(&answers, 9, &mut Draws::new(1, 0));
        let distinct: BTreeSet<_> = found.iter().collect();
        assert_eq!((found.len(), distinct.len()), (4, 4));
        assert!(found.iter().all(|[right, wrong]| ["a", "b"].contains(right) && ["x", "y"].contains(wrong)));
        assert_eq!(pairs(&answers, 2, &mut Draws::new(1, 0)).len(), 2);
        let many: Vec<Answer> = (0..20).map(|index| answer(&index.to_string(), index == 0)).collect();
        assert_eq!(pairs(&many, 9, &mut Draws::new(1, 0)).len(), USES_MAX);
        assert!(pairs(&many[1..], 9, &mut Draws::new(1, 0)).is_empty());
    }
}
