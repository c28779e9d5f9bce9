//! `eurus score`: rewards for a file of answers, without a server.

use std::sync::Arc;

use clap::Args;
use serde_json::{Value, json};

use super::jsonl::{self, Files, Row};
use super::settings::{Models, SettingArgs};
use crate::error::{Error, Result};
use crate::service::Service;
use crate::service::score::{ScoreInput, ScoreRequest, Truncate};

/// What rows look like, for the help.
pub(super) const ROWS: &str = "Each row is one of {\"messages\": [..]} ending in an assistant turn, \
{\"prompt\": text or messages, \"completion\": text}, {\"prompt\": .., \"completions\": [text, ..]} or {\"text\": rendered text}. \
The reward is added to it; its other fields are kept.";

/// Flags of `eurus score`.
#[derive(Debug, Args)]
pub(super) struct ScoreArgs {
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    settings: SettingArgs,
    /// End each sequence with the end-of-sequence token; by default as the checkpoint says
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    append_eos: Option<bool>,
    /// What happens to rows that are longer than the context
    #[arg(long, value_enum, default_value_t = TooLong::Error)]
    truncate: TooLong,
}

/// What happens to a row that is longer than the context.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum TooLong {
    /// Stop with an error.
    Error,
    /// Drop the oldest tokens.
    Left,
    /// Drop the end.
    Right,
}

/// Scores all rows.
///
/// # Errors
/// Names the file and line that could not be scored.
pub(super) fn run(args: &ScoreArgs) -> Result<()> {
    super::runtime()?.block_on(async {
        let service = args.settings.start(Models::Reward)?;
        let count = jsonl::process(&args.files, |row| score(Arc::clone(&service), args, row)).await?;
        tracing::info!(rows = count, "scored");
        Ok(())
    })
}

async fn score(service: Arc<Service>, args: &ScoreArgs, mut row: Row) -> Result<Row> {
    let (inputs, single) = inputs(&row)?;
    let truncate = match args.truncate {
        TooLong::Error => Truncate::Error,
        TooLong::Left => Truncate::Left,
        TooLong::Right => Truncate::Right,
    };
    let request = ScoreRequest { inputs, append_eos: args.append_eos, truncate, ..ScoreRequest::default() };
    let rewards = service.score(request).await?.data;
    let column = |value: &dyn Fn(&crate::service::score::Reward) -> Value| -> Value {
        if single { value(&rewards[0]) } else { rewards.iter().map(value).collect() }
    };
    let suffix = if single { "" } else { "s" };
    row.insert(format!("reward{suffix}"), column(&|reward| json!(reward.reward)));
    row.insert("reward_tokens".into(), column(&|reward| json!(reward.tokens)));
    if rewards.iter().any(|reward| reward.truncated) {
        row.insert("truncated".into(), column(&|reward| json!(reward.truncated)));
    }
    Ok(row)
}

/// What a row asks to be scored, and whether it is a single text.
pub(super) fn inputs(row: &Row) -> Result<(Vec<ScoreInput>, bool)> {
    if row.contains_key("messages") {
        return Ok((vec![ScoreInput::Messages(jsonl::conversation(row, "messages")?)], true));
    }
    if row.contains_key("text") {
        return Ok((vec![ScoreInput::Text(jsonl::text(row, "text")?)], true));
    }
    let prompt = jsonl::conversation(row, "prompt")?;
    let pair = |completion: String| ScoreInput::PromptAndCompletion { prompt: prompt.clone(), completion };
    match row.get("completions") {
        None => Ok((vec![pair(jsonl::text(row, "completion")?)], true)),
        Some(Value::Array(list)) if !list.is_empty() => {
            let completions = list.iter().map(|item| item.as_str().map(|text| pair(text.to_string())));
            let wrong = || Error::invalid("completions", "`completions` must hold strings");
            Ok((completions.collect::<Option<_>>().ok_or_else(wrong)?, false))
        }
        Some(_) => Err(Error::invalid("completions", "`completions` must be a list of strings, at least one")),
    }
}
