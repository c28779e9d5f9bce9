//! `eurus quantize`: a checkpoint rounded to fewer bits, and what that does to the rewards of a reward model.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use futures_util::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};

use super::fidelity::{Fidelity, Item};
use super::{jsonl, score};
use crate::checkpoint::{HubOptions, write_rounded};
use crate::config::{Config, LogConfig, NONE, Quantization};
use crate::error::{Error, Result};
use crate::model::config::HeadKind;
use crate::serve::{self, ProgressLine};
use crate::service::Service;
use crate::service::score::{ScoreInput, ScoreRequest};

/// Rows that are scored at the same time.
const CONCURRENCY: usize = 64;
const MIB: f64 = (1 << 20) as f64;

/// What is done, for the help.
pub(super) const NOTES: &str = "OUT must not exist. q4_k_m and q5_k_m give the same tensors more bits as llama.cpp's files. \
Vectors and reward heads stay in float32. Rows that are no multiple of 256 become Q8_0 where a format of 256 was asked for; rows \
that are no multiple of 32 stay as they are.\n\n\
--report reads the rows that `eurus score` reads, and pairs: {\"prompt\": .., \"chosen\": text or messages, \"rejected\": ..}, \
or UltraInteract's with a trajectory. \
Texts of one row, and rows of one prompt, are compared with each other.";

/// Flags of `eurus quantize`.
#[derive(Debug, Args)]
pub(super) struct QuantizeArgs {
    /// Checkpoint in bf16, f16 or f32: a built-in name, a folder, a .gguf file, or a hub id
    #[arg(value_name = "IN")]
    input: String,
    /// What to write: a file whose name ends with .gguf, or, in bf16 and f16, a folder with safetensors
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// What matrices are rounded to
    #[arg(long, value_name = "FORMAT", value_enum)]
    format: Quantization,
    /// Safetensors file with one row: the reward head that is written, in place of the one of IN
    #[arg(long, value_name = "FILE")]
    reward_head: Option<PathBuf>,
    /// JSON Lines with texts: prints how far their rewards are off, and whether pairs keep their order
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// Writes OUT, then compares rewards where that is asked for.
///
/// # Errors
/// A checkpoint that cannot be had or is quantised already, or a file that cannot be written or read.
pub(super) fn run(args: &QuantizeArgs) -> Result<()> {
    super::start_logging(&LogConfig::default())?;
    // Read first: a row that is wrong should not be found after an hour.
    let items = args.report.as_deref().map(items).transpose()?;
    let mut checkpoint = serve::open_source(&args.input, &HubOptions::from_env())?;
    if let Some(path) = &args.reward_head {
        checkpoint = checkpoint.with_reward_head(path)?;
    }
    if items.is_some() && checkpoint.config.head != HeadKind::Reward {
        return Err(Error::invalid("--report", format!("{} is no reward model: it has no rewards", checkpoint.name)));
    }
    let mut line = ProgressLine::start();
    let rounded = write_rounded(&checkpoint, args.format.into(), &args.output, &mut |progress| line.show(progress));
    line.end();
    let rounded = rounded?;
    let (before, after) = (checkpoint.weight_bytes() as f64, rounded.bytes as f64);
    let kept: Vec<String> = rounded.kept.iter().map(|(storage, count)| format!("{count} in {storage}")).collect();
    super::print(&format!(
        "{}: {:.1} MiB of tensors, {:.0}% of {:.1} MiB: {}\n",
        args.output.display(),
        after / MIB,
        100.0 * after / before,
        before / MIB,
        kept.join(", ")
    ))?;
    let Some(items) = items else { return Ok(()) };
    let before = rewards(&args.input, args.reward_head.as_deref(), &items)?;
    let after = rewards(&args.output.to_string_lossy(), None, &items)?;
    super::print(&format!("{}\n", Fidelity::of(&items, &before, &after)))
}

/// The rows of the file at `path`.
fn items(path: &Path) -> Result<Vec<Item<ScoreInput>>> {
    let text = std::fs::read_to_string(path).map_err(|error| Error::file(path, error))?;
    let mut items = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = format!("{}:{}", path.display(), index + 1);
        let item = jsonl::parse(line).and_then(|row| item(&row, place.clone()));
        items.push(item.map_err(|error| jsonl::located(&place, error))?);
    }
    if items.is_empty() {
        return Err(Error::file(path, "has no rows"));
    }
    Ok(items)
}

fn item(row: &jsonl::Row, place: String) -> Result<Item<ScoreInput>> {
    let Some(trajectory) = row.get("trajectory").and_then(Value::as_array) else { return plain_item(row, place) };
    // UltraInteract's name for the turns before the answers, and its names for theirs.
    let turns = trajectory.iter().map(|turn| json!({"role": turn["from"], "content": turn["value"]}));
    let mut row = row.clone();
    row.insert("prompt".to_owned(), turns.collect());
    plain_item(&row, place)
}

fn plain_item(row: &jsonl::Row, place: String) -> Result<Item<ScoreInput>> {
    // Answers to one prompt are compared; a conversation is its last turn, the answer, to all before it.
    let prompt = match (row.get("prompt"), row.get("messages").and_then(Value::as_array)) {
        (Some(prompt), _) => Some(prompt.to_string()),
        (None, Some(turns)) => turns.split_last().map(|(_, prompt)| format!("{prompt:?}")),
        (None, None) => None,
    };
    if !row.contains_key("chosen") {
        return Ok(Item { texts: score::inputs(row)?.0, is_pair: false, prompt, place });
    }
    let text = |field: &str| -> Result<ScoreInput> {
        if row.get(field).is_some_and(Value::is_array) {
            let mut turns = jsonl::conversation(row, field)?;
            // The answer alone follows the prompt; a conversation has it already.
            if turns.iter().all(|turn| turn.role == "assistant") && row.contains_key("prompt") {
                turns.splice(0..0, jsonl::conversation(row, "prompt")?);
            }
            return Ok(ScoreInput::Messages(turns));
        }
        let completion = jsonl::text(row, field)?;
        match row.contains_key("prompt") {
            true => Ok(ScoreInput::PromptAndCompletion { prompt: jsonl::conversation(row, "prompt")?, completion }),
            false => Ok(ScoreInput::Text(completion)),
        }
    };
    // Pairs of other rows are no pairs of this one.
    Ok(Item { texts: vec![text("chosen")?, text("rejected")?], is_pair: true, prompt: None, place })
}

/// The rewards of all texts of all items, one after the other.
fn rewards(model: &str, head: Option<&Path>, items: &[Item<ScoreInput>]) -> Result<Vec<f32>> {
    let mut config = Config { model: NONE.into(), reward_model: model.into(), ..Config::default() };
    config.reward_head = head.map(Path::to_owned);
    config.limits.score_batch_max = items.iter().map(|item| item.texts.len()).max().unwrap_or(1);
    let runtime = super::runtime()?;
    serve::with_service(&config, |service| {
        runtime.block_on(async {
            let scored = stream::iter(items).map(|item| score_item(Arc::clone(&service), item));
            let rewards: Vec<Vec<f32>> = scored.buffered(CONCURRENCY).try_collect().await?;
            Ok(rewards.concat())
        })
    })
}

async fn score_item(service: Arc<Service>, item: &Item<ScoreInput>) -> Result<Vec<f32>> {
    let request = ScoreRequest { inputs: item.texts.clone(), ..ScoreRequest::default() };
    let scored = service.score(request).await.map_err(|error| jsonl::located(&item.place, error))?;
    Ok(scored.data.iter().map(|reward| reward.reward).collect())
}
