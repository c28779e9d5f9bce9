//! What `serve` would do with some settings, found out from headers alone: sizes, memory plan, and all problems at once.

use std::fmt::Write;

use super::{load, memory::MemoryPlan};
use crate::{
    checkpoint::{Checkpoint, Rounding},
    config::{Config, NONE},
    device,
    error::{Error, Result},
    service::Kind,
};

/// A report for people, and an error that tells every problem where there is one.
pub fn check(config: &Config) -> (String, Result<()>) {
    let (mut report, mut problems) = (String::new(), Vec::new());
    // The second model has what the first one leaves.
    let mut available = device::memory_available();
    for (kind, source) in [(Kind::Policy, &config.model), (Kind::Reward, &config.reward_model)] {
        if source == NONE {
            continue;
        }
        match load::open(kind, config) {
            Err(error) => problems.push(format!("{source}: {error}")),
            Ok(checkpoint) => {
                let mut note = |outcome: Result<()>| {
                    if let Err(error) = outcome {
                        problems.push(format!("{source}: {error}"));
                    }
                };
                note(load::check_kind(kind, &checkpoint));
                note(checkpoint.check_tensors());
                let rounding = load::rounding(kind, config);
                if rounding.is_some() {
                    note(checkpoint.check_roundable());
                }
                note(checkpoint.tokenizer().map(drop));
                note(describe(&checkpoint, rounding, config, &mut available, &mut report));
            }
        }
    }
    let outcome = match problems.is_empty() {
        true => Ok(()),
        false => Err(Error::Checkpoint(problems.join("\n       "))),
    };
    (report, outcome)
}

/// Adds a paragraph on `checkpoint` to `report` and takes what it needs from `available`.
fn describe(
    checkpoint: &Checkpoint,
    rounding: Option<Rounding>,
    config: &Config,
    available: &mut Option<u64>,
    report: &mut String,
) -> Result<()> {
    let headers = checkpoint.headers();
    let bytes = checkpoint.weight_bytes(rounding);
    let model = &checkpoint.config;
    // Writing to a String cannot fail.
    let _ = writeln!(report, "{}", checkpoint.name);
    let _ = writeln!(
        report,
        "  parameters  {:.1} million in {} tensors",
        model.parameter_count() as f64 / 1e6,
        headers.len()
    );
    let _ = writeln!(
        report,
        "  shape       {} layers, hidden {}, {} heads of {}, {} key/value heads, vocabulary {}",
        model.layers, model.hidden, model.heads, model.head_dim, model.kv_heads, model.vocab
    );
    if let Some(rounding) = rounding {
        let stored = checkpoint.weight_bytes(None) as f64 / f64::from(1 << 20);
        let _ = writeln!(report, "  quantised   to {rounding} while loading, from {stored:.1} MiB");
    }
    let template = checkpoint.chat_template()?;
    let _ = writeln!(report, "  template    {}", template.name());
    let plan = MemoryPlan::new(model, bytes, &config.engine, *available)?;
    let _ = writeln!(report, "  memory      {plan}");
    *available = available.map(|free| free.saturating_sub(bytes + plan.cache_bytes()));
    Ok(())
}
