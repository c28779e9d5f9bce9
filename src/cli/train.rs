//! `eurus train`: recipe, plan, resumption, signals and progress; the training itself is in `train`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use indicatif::{ProgressBar, ProgressStyle};

use crate::config::LogConfig;
use crate::error::Result;
use crate::serve::signals::Signals;
use crate::train::plan::Plan;
use crate::train::recipe::{Recipe, Stage};
use crate::train::start::{self, OutputLock, Start, Wish};
use crate::train::trainer::{self, Outcome, StepProgress, Watch};

/// What the help tells beside the flags.
pub(super) const NOTES: &str = "The folder run.output gets recipe.toml (the resolved recipe), metrics.jsonl, tensorboard/, \
report.html, snapshots/ and model/, which `eurus serve` and transformers load. A run goes on from the newest undamaged \
snapshot of the same recipe; a recipe that differs in a key that changes the weights is refused with the keys that differ.\n\
SIGINT and SIGTERM end after the current step with a snapshot, a second one at once. Exit codes beside the usual: 130 after \
SIGINT, 143 after SIGTERM.";

/// Steps between lines of the log where there is no progress bar: a hundredth of all.
const LINES: u64 = 100;

/// Flags of `eurus train`.
#[derive(Debug, Args)]
pub(super) struct TrainArgs {
    /// sft, dpo, kto, nca or reward
    #[arg(value_name = "STAGE", value_parser = stages())]
    stage: Stage,
    /// Recipe: a TOML file such as training/recipes/eurus-7b-sft.toml
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Any key of the recipe, such as optimizer.learning_rate=1e-5 or data.source.0.path=x.jsonl; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Read model and data, print rows, tokens, steps, memory and time, and end
    #[arg(long)]
    dry_run: bool,
    /// Print the resolved recipe and end
    #[arg(long)]
    print_config: bool,
    /// Fail where there is no snapshot to go on from
    #[arg(long)]
    resume: bool,
    /// Remove the snapshots of earlier runs and begin anew
    #[arg(long, conflicts_with = "resume")]
    fresh: bool,
}

fn stages() -> impl TypedValueParser<Value = Stage> {
    let names = PossibleValuesParser::new(Stage::ALL.map(Stage::name));
    names.try_map(|name| Stage::named(&name).ok_or("is no stage"))
}

impl TrainArgs {
    fn wish(&self) -> Wish {
        match (self.resume, self.fresh) {
            (true, _) => Wish::Resume,
            (_, true) => Wish::Fresh,
            _ => Wish::Any,
        }
    }
}

/// Trains, or shows what would be done.
///
/// # Errors
/// A wrong recipe, data or model that cannot be read, snapshots of another recipe, a loss that is no number.
pub(super) fn run(args: &TrainArgs) -> Result<()> {
    let recipe = Recipe::load(args.stage, &args.config, &args.set)?;
    if args.print_config {
        return super::print(&recipe.to_toml());
    }
    super::start_logging(&LogConfig::default())?;
    let mut terminal = Terminal::new();
    if args.dry_run {
        trainer::run(&recipe, &Start::Plan, &mut terminal)?;
        terminal.bar.finish_and_clear();
        return terminal.plan.map_or(Ok(()), |plan| super::print(&plan.to_string()));
    }
    let lock = OutputLock::take(&recipe)?;
    let (start, warnings) = start::decide(&recipe, args.wish())?;
    warnings.iter().for_each(|what| terminal.warned(what));
    if let Start::Resume(snapshot) = &start {
        tracing::info!(step = snapshot.step, "going on from {}", snapshot.path.display());
    }
    // The runtime waits for signals until the end of the run.
    let runtime = super::runtime()?;
    listen(&runtime, Arc::clone(&terminal.exit_code))?;
    let outcome = trainer::run(&recipe, &start, &mut terminal)?;
    terminal.bar.finish_and_clear();
    drop(lock);
    match outcome {
        Outcome::Planned => Ok(()),
        Outcome::Finished { steps } => {
            tracing::info!(steps, "the model is in {}", recipe.run.model().display());
            Ok(())
        }
        Outcome::Stopped { step } => {
            tracing::info!(step, "stopped; the same command goes on from here");
            std::process::exit(terminal.exit_code.load(Ordering::Relaxed))
        }
    }
}

/// Writes the exit code that the first signal asks for into `exit_code`; the second signal ends the process.
fn listen(runtime: &tokio::runtime::Runtime, exit_code: Arc<AtomicI32>) -> Result<()> {
    let _context = runtime.enter();
    let mut signals = Signals::listen()?;
    runtime.spawn(async move {
        let signal = signals.next().await;
        exit_code.store(signal.exit_code(), Ordering::Relaxed);
        tracing::info!("{signal}: ending after this step; a second signal ends at once, without a snapshot");
        signals.next().await.leave();
    });
    Ok(())
}

/// Shows the run on stderr: a bar where there is a terminal, else lines of the log.
struct Terminal {
    bar: ProgressBar,
    plan: Option<Plan>,
    /// What is going on before the first step.
    preparing: String,
    /// Not 0 once a signal came.
    exit_code: Arc<AtomicI32>,
}

impl Terminal {
    fn new() -> Self {
        let bar = ProgressBar::no_length();
        bar.enable_steady_tick(Duration::from_millis(250));
        Self { bar, plan: None, preparing: String::new(), exit_code: Arc::default() }
    }

    fn style(&self, template: &str) {
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
    }
}

impl Watch for Terminal {
    fn preparing(&mut self, what: &str, done: u64, total: u64) {
        if self.preparing != what {
            what.clone_into(&mut self.preparing);
            self.style("{msg} {bar:40} {percent}%, {eta} left");
            self.bar.set_message(what.to_owned());
            self.bar.reset();
            if self.bar.is_hidden() {
                tracing::info!("{what}");
            }
        }
        if total > 0 {
            self.bar.set_length(total);
        }
        self.bar.set_position(done);
    }

    fn planned(&mut self, plan: &Plan) {
        self.style("{bar:40} {pos}/{len} steps, {msg}, {eta} left");
        self.bar.reset();
        self.bar.set_length(plan.steps);
        self.bar.set_message("");
        tracing::info!(steps = plan.steps, tokens = plan.tokens, rows = plan.train_rows, "training begins");
        self.plan = Some(plan.clone());
    }

    fn stepped(&mut self, progress: &StepProgress) {
        let StepProgress { step, steps, loss, tokens_per_second } = *progress;
        self.bar.set_position(step);
        self.bar.set_message(format!("loss {loss:.4}, {tokens_per_second:.0} tokens/s"));
        if self.bar.is_hidden() && (step == steps || step.is_multiple_of(steps.div_ceil(LINES).max(1))) {
            tracing::info!(step, steps, loss, tokens_per_second, "step");
        }
    }

    fn warned(&mut self, what: &str) {
        self.bar.suspend(|| tracing::warn!("{what}"));
    }

    fn is_stopping(&self) -> bool {
        self.exit_code.load(Ordering::Relaxed) != 0
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Alone {
        #[command(flatten)]
        train: TrainArgs,
    }

    fn parse(text: &str) -> std::result::Result<TrainArgs, clap::Error> {
        Alone::try_parse_from(["eurus"].into_iter().chain(text.split(' '))).map(|alone| alone.train)
    }

    #[test]
    fn every_stage_is_a_word_and_flags_are_wishes() {
        for stage in Stage::ALL {
            assert_eq!(parse(&format!("{} --config x", stage.name())).unwrap().stage, stage);
        }
        assert_eq!(parse("sft --config x").unwrap().wish(), Wish::Any);
        assert_eq!(parse("sft --config x --resume").unwrap().wish(), Wish::Resume);
        assert_eq!(parse("sft --config x --fresh").unwrap().wish(), Wish::Fresh);
        assert_eq!(parse("sft --config x --set a=1 --set b=2").unwrap().set, ["a=1", "b=2"]);
        for wrong in ["sft --config x --fresh --resume", "rm --config x", "sft"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_signal_asks_the_trainer_to_stop() {
        let terminal = Terminal::new();
        assert!(!terminal.is_stopping());
        terminal.exit_code.store(143, Ordering::Relaxed);
        assert!(terminal.is_stopping());
    }
}
