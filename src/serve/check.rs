//! What `serve` would do with some settings, found out from headers alone: sizes, memory plan, and all problems at once.

use std::fmt::Write;

use super::load;
use super::memory::{Memory, Needs, Numbers};
use crate::{
    checkpoint::{Checkpoint, Rounding},
    config::{Config, NONE},
    device,
    error::{Error, Result},
    model::config::Experts,
    service::Kind,
};

/// A report for people, and an error that tells every problem where there is one.
pub fn check(config: &Config) -> (String, Result<()>) {
    let device = match device::open(config.device) {
        Ok(device) => device,
        Err(error) => return (String::new(), Err(error)),
    };
    let mut report = format!("device        {}\n", device::describe(&device));
    let (mut checkpoints, mut problems) = (Vec::new(), Vec::new());
    for (kind, source) in [(Kind::Policy, &config.model), (Kind::Reward, &config.reward_model)] {
        if source == NONE {
            continue;
        }
        match load::open(kind, config) {
            Err(error) => problems.push(format!("{source}: {error}")),
            Ok(checkpoint) => checkpoints.push((kind, source, checkpoint)),
        }
    }
    let needs = checkpoints
        .iter()
        .map(|(kind, _, checkpoint)| Needs::new(checkpoint, Numbers::of(*kind, config), &device, &config.engine));
    let needs = match needs.collect::<Result<Vec<_>>>() {
        Ok(needs) => needs,
        Err(error) => return (report, Err(error)),
    };
    let mut memory = Memory::new(&device, needs);
    for (kind, source, checkpoint) in &checkpoints {
        let mut note = |outcome: Result<()>| {
            if let Err(error) = outcome {
                problems.push(format!("{source}: {error}"));
            }
        };
        note(load::check_kind(*kind, checkpoint));
        note(checkpoint.check_tensors());
        let rounding = Numbers::of(*kind, config).rounding;
        if rounding.is_some() {
            note(checkpoint.check_roundable());
        }
        note(checkpoint.tokenizer().map(drop));
        note(describe(checkpoint, rounding, config, &mut memory, &mut report));
    }
    let outcome = match problems.is_empty() {
        true => Ok(()),
        false => Err(Error::Checkpoint(problems.join("\n       "))),
    };
    (report, outcome)
}

/// Adds a paragraph on `checkpoint`, the next to be planned in `memory`, to `report`.
fn describe(
    checkpoint: &Checkpoint,
    rounding: Option<Rounding>,
    config: &Config,
    memory: &mut Memory,
    report: &mut String,
) -> Result<()> {
    let headers = checkpoint.headers();
    let model = &checkpoint.config;
    let plan = memory.plan(model, &config.engine);
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
    if let Some(Experts { count, per_token }) = model.experts {
        let _ = writeln!(report, "  experts     {count} in a layer, of which {per_token} compute each token");
    }
    if let Some(rounding) = rounding {
        let stored = checkpoint.weight_bytes() as f64 / f64::from(1 << 20);
        let _ = writeln!(report, "  quantised   to {rounding} while loading, from {stored:.1} MiB");
    }
    let template = checkpoint.chat_template()?;
    let _ = writeln!(report, "  template    {}", template.name());
    let _ = writeln!(report, "  memory      {}", plan?);
    Ok(())
}
