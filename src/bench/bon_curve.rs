//! Accuracy of best-of-n on verifiable problems, by n and strategy: does the reward model choose better than a vote?
//! Candidates are drawn once for each problem; every n is read from disjoint subsets of them, so all strategies see the same ones.

use std::fmt;
use std::path::PathBuf;

use futures_util::{StreamExt, TryStreamExt, stream};
use indicatif::ProgressBar;
use serde::Serialize;

use super::countdown::{self, Problem};
use crate::config::{Config, Overrides};
use crate::error::Result;
use crate::service::best_of_n::{AnswerRule, BestOfRequest, Strategy};
use crate::service::generate::GenerateRequest;
use crate::service::prompt::{Conversation, Prompt};
use crate::service::select::{Rated, rank};
use crate::service::{Message, Service};
use crate::text::answer::Extractor;

const STRATEGIES: [Strategy; 4] = [Strategy::Reward, Strategy::Majority, Strategy::Weighted, Strategy::LogProb];
/// Problems in flight: enough to fill the batch of both engines.
const CONCURRENCY: usize = 8;

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Problems: JSON Lines with `prompt`, `nums` and `target`
    #[arg(long, default_value = "models/eurus-mini/heldout.jsonl")]
    pub problems: PathBuf,
    /// Policy
    #[arg(long, default_value = "eurus-mini/policy")]
    pub model: String,
    /// Reward model
    #[arg(long, default_value = "eurus-mini/reward")]
    pub reward_model: String,
    /// Values of n; the largest is the number of candidates drawn
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16")]
    pub n: Vec<usize>,
    /// Sampling temperature
    #[arg(long, default_value_t = 1.0)]
    pub temperature: f32,
    /// Seed of the first candidate of the first problem
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// How often candidates are drawn anew; figures are means, with the standard deviation between draws
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100))]
    pub repeats: u64,
    /// Also write the figures to this file, as JSON
    #[arg(long)]
    pub json: Option<PathBuf>,
}

/// Shares of problems solved, in percent.
#[derive(Debug, Clone, Serialize)]
pub struct Curve {
    /// Problems tried.
    pub problems: usize,
    /// How often candidates were drawn.
    pub repeats: u64,
    /// One row for each n.
    pub rows: Vec<CurveRow>,
}

/// One n.
#[derive(Debug, Clone, Serialize)]
pub struct CurveRow {
    /// Candidates to choose from.
    pub n: usize,
    /// Solved if any candidate is right (pass@n).
    pub oracle: Share,
    /// Solved by the chosen candidate, by strategy.
    pub chosen: Vec<(&'static str, Share)>,
}

/// A share in percent, over all draws.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Share {
    /// Mean.
    pub mean: f64,
    /// Standard deviation between draws; 0 for one draw.
    pub deviation: f64,
}

impl Share {
    fn of(shares: &[f64]) -> Self {
        let count = shares.len() as f64;
        let mean = shares.iter().sum::<f64>() / count;
        let squares: f64 = shares.iter().map(|share| (share - mean).powi(2)).sum();
        Self { mean, deviation: (squares / (count - 1.0).max(1.0)).sqrt() }
    }
}

/// A candidate, reduced to what choosing and grading need.
struct Graded {
    reward: Option<f32>,
    mean_logprob: Option<f64>,
    /// Canonical text of the final answer.
    answer: Option<String>,
    correct: bool,
}

/// The settings of a process that serves the two models of `options`.
///
/// # Errors
/// If the settings do not load.
pub fn settings(options: &Options) -> Result<Config> {
    let mut overrides = Overrides::default();
    overrides.set("model", Some(options.model.as_str()));
    overrides.set("reward_model", Some(options.reward_model.as_str()));
    let candidates = options.n.iter().copied().max().unwrap_or(1);
    overrides.set("limits.best_of_max", Some(candidates.max(2)));
    overrides.set("engine.waiting_max", Some(CONCURRENCY * candidates.max(64)));
    overrides.set("log.level", Some("warn"));
    Config::load(None, &overrides)
}

/// Draws, rates and grades the candidates of every problem, with a progress bar on a terminal's stderr.
///
/// # Errors
/// A file that cannot be read, or a problem that could not be answered.
pub async fn run(options: &Options, service: &Service) -> Result<Curve> {
    let problems = Problem::read(&options.problems, "--problems")?;
    let bar = ProgressBar::new(options.repeats * problems.len() as u64);
    let mut draws = Vec::new();
    for repeat in 0..options.repeats {
        let answers = problems.iter().enumerate().map(|(index, problem)| {
            let (bar, place) = (bar.clone(), repeat * problems.len() as u64 + index as u64);
            async move {
                let graded = answer(options, service, place, problem).await;
                bar.inc(1);
                graded
            }
        });
        let graded: Vec<Vec<Graded>> = stream::iter(answers).buffered(CONCURRENCY).try_collect().await?;
        draws.push(graded);
    }
    bar.finish_and_clear();
    let rows = options.n.iter().map(|&n| row(n, &draws)).collect();
    Ok(Curve { problems: problems.len(), repeats: options.repeats, rows })
}

/// Candidates of problem `place`, counted over all draws.
async fn answer(options: &Options, service: &Service, place: u64, problem: &Problem) -> Result<Vec<Graded>> {
    let count = options.n.iter().copied().max().unwrap_or(1).max(2);
    let message = Message { role: "user".into(), content: problem.prompt.clone() };
    let mut generate = GenerateRequest::new(Prompt::Messages(Conversation::new(vec![message])));
    generate.temperature = options.temperature;
    generate.seed = Some(options.seed + place * count as u64);
    let strategy = Some(Strategy::Reward);
    let request = BestOfRequest { generate, best_of: count, strategy, reward_model: None, answer: AnswerRule::Boxed };
    let best = service.best_of_n(request).await?;
    let graded = best.candidates.into_iter().map(|rated| {
        let correct =
            rated.answer.as_deref().is_some_and(|text| countdown::solves(text, &problem.nums, problem.target));
        let answer = Extractor::Boxed.extract(&rated.candidate.text).map(|answer| answer.key().to_string());
        Graded { reward: rated.reward, mean_logprob: rated.candidate.mean_logprob, answer, correct }
    });
    Ok(graded.collect())
}

/// Averages over the disjoint subsets of `n` candidates of every problem, for each draw.
fn row(n: usize, draws: &[Vec<Vec<Graded>>]) -> CurveRow {
    let share = |solved: &dyn Fn(&[Graded]) -> bool| {
        let shares = draws.iter().map(|problems| {
            let subsets: Vec<&[Graded]> = problems.iter().flat_map(|graded| graded.chunks_exact(n)).collect();
            100.0 * subsets.iter().filter(|subset| solved(subset)).count() as f64 / subsets.len() as f64
        });
        Share::of(&shares.collect::<Vec<_>>())
    };
    CurveRow {
        n,
        oracle: share(&|subset| subset.iter().any(|one| one.correct)),
        chosen: STRATEGIES
            .iter()
            .map(|&strategy| (strategy.as_str(), share(&|subset| subset[rank(strategy, &rated(subset))[0]].correct)))
            .collect(),
    }
}

/// Numbers the answers of a subset by first appearance.
fn rated(subset: &[Graded]) -> Vec<Rated> {
    let mut answers: Vec<&str> = Vec::new();
    subset
        .iter()
        .map(|one| {
            let answer = one.answer.as_deref().map(|answer| {
                answers.iter().position(|known| *known == answer).unwrap_or_else(|| {
                    answers.push(answer);
                    answers.len() - 1
                })
            });
            Rated { reward: one.reward, mean_logprob: one.mean_logprob, answer }
        })
        .collect()
}

impl fmt::Display for Curve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |share: &Share| match self.repeats {
            1 => format!("{:.1}", share.mean),
            _ => format!("{:.1} ±{:.1}", share.mean, share.deviation),
        };
        write!(f, "{} problems, percent solved", self.problems)?;
        if self.repeats > 1 {
            write!(f, ", mean and standard deviation of {} draws", self.repeats)?;
        }
        write!(f, "\n    n {:>10}", "oracle")?;
        for strategy in STRATEGIES {
            write!(f, " {:>10}", strategy.as_str())?;
        }
        for row in &self.rows {
            write!(f, "\n{:>5} {:>10}", row.n, text(&row.oracle))?;
            for (_, share) in &row.chosen {
                write!(f, " {:>10}", text(share))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graded(reward: f32, answer: &str, correct: bool) -> Graded {
        Graded { reward: Some(reward), mean_logprob: Some(-f64::from(reward)), answer: Some(answer.into()), correct }
    }

    #[test]
    fn every_strategy_is_read_from_the_same_subsets() {
        // First pair: the reward is right, the log-probability wrong. Second pair: both wrong, though one candidate is right.
        let problem =
            vec![graded(2.0, "a", true), graded(1.0, "b", false), graded(0.0, "a", true), graded(3.0, "c", false)];
        let curve = row(2, &[vec![problem]]);
        let share = |mean| Share { mean, deviation: 0.0 };
        assert_eq!(curve.oracle, share(100.0));
        assert_eq!(curve.chosen[0], ("reward", share(50.0)));
        assert_eq!(curve.chosen[3], ("logprob", share(50.0)));
        let problem = vec![graded(-1.0, "a", true), graded(9.0, "b", false), graded(-1.0, "a", true)];
        let curve = row(3, &[vec![problem]]);
        let expected = [("reward", 0.0), ("majority", 100.0), ("weighted", 0.0), ("logprob", 100.0)];
        assert_eq!(curve.chosen, expected.map(|(name, mean)| (name, share(mean))));
    }

    #[test]
    fn deviations_are_those_between_draws() {
        assert_eq!(Share::of(&[1.0, 2.0, 3.0]), Share { mean: 2.0, deviation: 1.0 });
        assert_eq!(Share::of(&[5.0]), Share { mean: 5.0, deviation: 0.0 });
    }
}
