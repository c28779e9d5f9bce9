//! `eurus best-of-n`: the best of n answers for a file of prompts, without a server.

use std::sync::Arc;

use clap::Args;
use serde_json::{Value, json};

use super::jsonl::{self, Files, Row};
use super::settings::{Models, SamplingArgs, SettingArgs};
use crate::error::Result;
use crate::service::best_of_n::{AnswerRule, BestOfN, BestOfRequest, RatedCandidate, Strategy};
use crate::service::generate::GenerateRequest;
use crate::service::{Conversation, Prompt, Service};

/// What rows look like, for the help.
pub(super) const ROWS: &str = "Each row is {\"prompt\": text or messages} or {\"messages\": [..]}. \
The chosen completion and all candidates are added to it; its other fields are kept.";

/// Flags of `eurus best-of-n`.
#[derive(Debug, Args)]
pub(super) struct BestOfNArgs {
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    settings: SettingArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Candidates drawn for each prompt
    #[arg(short = 'n', long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(2..))]
    best_of: u32,
    /// How the best is chosen; by default by reward where there is a reward model, else by log-probability
    #[arg(long, value_enum)]
    strategy: Option<StrategyArg>,
    /// Where the final answer of a candidate is: boxed, last-number, or a regular expression
    #[arg(long, default_value = "boxed", value_name = "RULE")]
    answer: String,
}

/// How the best candidate is chosen.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum StrategyArg {
    /// Highest reward.
    Reward,
    /// Highest mean log-probability.
    Logprob,
    /// Most frequent final answer.
    Majority,
    /// Final answer with the largest sum of sigmoid(reward).
    Weighted,
}

impl From<StrategyArg> for Strategy {
    fn from(strategy: StrategyArg) -> Self {
        match strategy {
            StrategyArg::Reward => Self::Reward,
            StrategyArg::Logprob => Self::LogProb,
            StrategyArg::Majority => Self::Majority,
            StrategyArg::Weighted => Self::Weighted,
        }
    }
}

/// Answers all rows.
///
/// # Errors
/// Names the file and line that could not be answered.
pub(super) fn run(args: &BestOfNArgs) -> Result<()> {
    super::runtime()?.block_on(async {
        let service = args.settings.start(Models::Both)?;
        let count = jsonl::process(&args.files, |row| answer(Arc::clone(&service), args, row)).await?;
        tracing::info!(rows = count, "answered");
        Ok(())
    })
}

async fn answer(service: Arc<Service>, args: &BestOfNArgs, mut row: Row) -> Result<Row> {
    let field = if row.contains_key("messages") { "messages" } else { "prompt" };
    let messages = jsonl::conversation(&row, field)?;
    let mut generate = GenerateRequest::new(Prompt::Messages(Conversation::new(messages)));
    args.sampling.apply(&mut generate);
    let answer = match args.answer.as_str() {
        "boxed" => AnswerRule::Boxed,
        "last-number" => AnswerRule::LastNumber,
        pattern => AnswerRule::Regex(pattern.to_string()),
    };
    let strategy = args.strategy.map(Strategy::from);
    let request = BestOfRequest { generate, best_of: args.best_of as usize, strategy, reward_model: None, answer };
    let best = service.best_of_n(request).await?;
    row.insert("strategy".into(), json!(best.strategy.as_str()));
    row.insert("seed".into(), json!(best.seed));
    row.insert("choice".into(), json!(best.chosen.first()));
    row.insert("completion".into(), json!(chosen(&best).map(|rated| &rated.candidate.text)));
    row.insert("candidates".into(), best.candidates.iter().map(candidate).collect());
    Ok(row)
}

fn chosen(best: &BestOfN) -> Option<&RatedCandidate> {
    best.candidates.iter().find(|rated| Some(&rated.candidate.index) == best.chosen.first())
}

fn candidate(rated: &RatedCandidate) -> Value {
    json!({
        "index": rated.candidate.index, "rank": rated.rank, "reward": rated.reward, "answer": rated.answer,
        "mean_logprob": rated.candidate.mean_logprob, "text": rated.candidate.text, "seed": rated.candidate.seed,
        "completion_tokens": rated.candidate.usage.completion_tokens, "finish_reason": rated.candidate.finish.as_str(),
    })
}
