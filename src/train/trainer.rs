//! The loop of training: prepares model, data and references, then steps, records, evaluates, saves, and writes the model.
//! Everything that decides a weight follows from the recipe and the data, so that a resumed run gives the same bits.

use std::time::Instant;

use candle_core::Device;

use super::card::Card;
use super::course::{Course, Lessons};
use super::data::{self, Dataset, Form};
use super::example::{Example, Text};
use super::export::{self, Adapter, Export};
use super::initial;
use super::learner::Learner;
use super::optimizer::{AdamWOptions, Optimizer};
use super::plan::Plan;
use super::recipe::{Recipe, Stage};
use super::record::{self, Kind, Record, Recorder};
use super::reference::{Cache, Question, ask};
use super::report::Report;
use super::schedule::LearningRate;
use super::snapshot::Snapshots;
use super::start::Start;
use super::state::{self, Place};
use super::step::{Objective, Pass, Tally};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::model::tape::Keep;
use crate::ops::parallel;

mod estimate;

/// What a run tells while it goes on, and how it is told to stop. Implemented by the command line and by tests.
pub trait Watch {
    /// What is going on before the first step: loading, reading data, reference log-probabilities. `total` is 0 where unknown.
    fn preparing(&mut self, what: &str, done: u64, total: u64);
    /// Everything is read; training begins, or ends here for a dry run.
    fn planned(&mut self, plan: &Plan);
    /// A step is done.
    fn stepped(&mut self, progress: &StepProgress);
    /// Something that a user should know and that stops nothing: a full disk, a bad step, a damaged snapshot.
    fn warned(&mut self, what: &str);
    /// Asked after every step. Once true, the trainer saves a snapshot and returns [`Outcome::Stopped`].
    fn is_stopping(&self) -> bool;
}

/// Where a run is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepProgress {
    /// Steps that are done.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// Of the last step.
    pub loss: f64,
    /// Tokens of the last steps for each second.
    pub tokens_per_second: f64,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Only planned.
    Planned,
    /// All steps are done and the model is written.
    Finished {
        /// Steps that were done.
        steps: u64,
    },
    /// Told to stop; a snapshot is saved.
    Stopped {
        /// Steps that were done.
        step: u64,
    },
}

/// Trains as `recipe` says and writes records, snapshots, report and model into its output folder.
///
/// # Errors
/// What is wrong with the recipe, the checkpoint or the data; [`Error::Internal`] if too many steps have a loss or gradient that
/// is not finite.
pub fn run(recipe: &Recipe, start: &Start, watch: &mut dyn Watch) -> Result<Outcome> {
    if let Some(threads) = recipe.run.threads {
        parallel::set_threads(threads);
    }
    let prepared = Prepared::new(recipe, start, watch)?;
    if *start == Start::Plan {
        let plan = prepared.plan(recipe, &prepared.course)?;
        watch.planned(&plan);
        return Ok(Outcome::Planned);
    }
    Run::new(recipe, prepared, start, watch)?.go(start)
}

/// What the steps work with.
struct Prepared {
    checkpoint: Checkpoint,
    dataset: Dataset,
    course: Course,
    test: Course,
    learner: Learner,
    references: Cache,
    /// Mismatched answers: of the course, then of the evaluation.
    mismatched: Vec<Text>,
    /// The chat template that texts were encoded with, in Jinja.
    template: String,
}

impl Prepared {
    fn new(recipe: &Recipe, start: &Start, watch: &mut dyn Watch) -> Result<Self> {
        let device = Device::Cpu;
        let mut prepare = |what: &str, done, total| watch.preparing(what, done, total);
        let checkpoint = initial::open(&recipe.model.from, &mut prepare)?;
        initial::check_trainable(&checkpoint)?;
        let encoder = initial::encoder(recipe, &checkpoint)?;
        let form = match recipe.stage {
            Stage::Sft => Form::Text,
            Stage::Kto => Form::Answer,
            Stage::Dpo | Stage::Nca | Stage::Reward => Form::Pair,
        };
        let mut reading = |done| prepare("reading data", done as u64, 0);
        let dataset = data::load(&recipe.data, form, recipe.run.seed, &encoder, &mut reading)?;
        let (run, batch) = (&recipe.run, &recipe.batch);
        let course = Course::new(&dataset.train, batch, run.seed, run.epochs, run.steps_max);
        let test = Course::in_order(&dataset.test, batch);
        let mut mismatched = Vec::new();
        if recipe.stage == Stage::Kto {
            mismatched.extend(course.mismatched(&dataset.train));
            mismatched.extend(test.mismatched(&dataset.test));
        }
        let mut references = Cache::default();
        if recipe.stage.has_reference() && *start != Start::Plan {
            let from = recipe.model.reference.as_ref().unwrap_or(&recipe.model.from);
            let model = initial::frozen(&initial::open(from, &mut prepare)?, &device, &mut prepare)?;
            let question =
                Question { train: &dataset.train, test: &dataset.test, further: &mismatched, tokens_max: batch.tokens };
            std::fs::create_dir_all(&run.output).map_err(|error| Error::file(&run.output, error))?;
            let mut asking = |done, total| prepare("reference log-probabilities", done, total);
            references = ask(&run.output, model, &question, &mut asking)?;
        }
        let model = initial::trained(recipe, &checkpoint, &device, &mut prepare)?;
        let longest =
            dataset.train.iter().chain(&dataset.test).flat_map(Example::texts).map(|text| text.tokens.len()).max();
        if let Some(longest) = longest.filter(|longest| *longest > model.config.positions_max) {
            let message = format!(
                "data.max_length lets through {longest} tokens; {} takes {}",
                checkpoint.name, model.config.positions_max
            );
            return Err(Error::invalid("data.max_length", message));
        }
        let keep = if run.recompute { Keep::Inputs } else { Keep::Everything };
        let learner = Learner { model, keep, device };
        let template = encoder.template().source().to_owned();
        Ok(Self { checkpoint, dataset, course, test, learner, references, mismatched, template })
    }

    fn lessons(&self, pass: Pass) -> Lessons<'_> {
        let split = if self.mismatched.is_empty() { 0 } else { self.course.steps().iter().map(Vec::len).sum() };
        let (train, test) = self.mismatched.split_at(split);
        let (train_values, test_values) = self.references.further.split_at(split);
        match pass {
            Pass::Learn => Lessons {
                course: &self.course,
                examples: &self.dataset.train,
                references: &self.references.train,
                mismatched: (train, train_values),
            },
            Pass::Read => Lessons {
                course: &self.test,
                examples: &self.dataset.test,
                references: &self.references.test,
                mismatched: (test, test_values),
            },
        }
    }
}

impl Objective {
    /// What `recipe` asks for.
    fn of(recipe: &Recipe) -> Self {
        let o = &recipe.objective;
        match recipe.stage {
            Stage::Sft => Self::Sft,
            Stage::Dpo => Self::Dpo { beta: o.beta, label_smoothing: o.label_smoothing },
            Stage::Kto => Self::Kto { beta: o.beta, desirable: o.desirable_weight, undesirable: o.undesirable_weight },
            Stage::Nca => Self::Nca { beta: o.beta },
            Stage::Reward => Self::Reward { bradley_terry: o.bradley_terry, margin: o.margin, centre: o.centre },
        }
    }
}

/// A run under way.
struct Run<'a> {
    recipe: &'a Recipe,
    prepared: Prepared,
    optimizer: Optimizer,
    rate: LearningRate,
    snapshots: Snapshots,
    recorder: Recorder,
    place: Place,
    /// When the metrics in `place.tally` began to be counted, and the tokens then.
    since: (Instant, u64),
    /// The metrics of the last evaluation.
    evaluated: Vec<(String, f64)>,
    watch: &'a mut dyn Watch,
}

impl<'a> Run<'a> {
    fn new(recipe: &'a Recipe, prepared: Prepared, start: &Start, watch: &'a mut dyn Watch) -> Result<Self> {
        let o = &recipe.optimizer;
        let options = AdamWOptions {
            betas: o.betas,
            eps: o.eps,
            weight_decay: o.weight_decay,
            clip_norm: (o.clip_norm > 0.0).then_some(o.clip_norm),
        };
        let mut optimizer = Optimizer::new(&prepared.learner.model, options)?;
        let (place, resumed) = match start {
            Start::Resume(snapshot) => {
                let place = state::restore(&snapshot.path, &mut optimizer)?;
                place.check_data(&prepared.dataset.files)?;
                (place, Some(snapshot.step))
            }
            Start::Plan | Start::Fresh => (Place::first(&prepared.dataset.files), None),
        };
        Ok(Self {
            rate: LearningRate::new(o, prepared.course.len() as u64),
            snapshots: Snapshots::new(recipe.run.snapshots(), recipe.run.keep),
            recorder: Recorder::new(&recipe.run.output, resumed)?,
            since: (Instant::now(), place.tokens),
            recipe,
            prepared,
            optimizer,
            place,
            evaluated: Vec::new(),
            watch,
        })
    }

    fn go(mut self, start: &Start) -> Result<Outcome> {
        let steps = self.prepared.course.len() as u64;
        let plan = self.prepared.plan(self.recipe, &self.prepared.course)?;
        self.watch.planned(&plan);
        if *start == Start::Fresh {
            self.evaluate()?;
        }
        let run = &self.recipe.run;
        let every = |period: u64, step: u64| period > 0 && step.is_multiple_of(period);
        while self.place.step < steps {
            self.step()?;
            let step = self.place.step;
            if every(run.log_every, step) || step == steps {
                self.record()?;
            }
            if every(run.eval_every, step) || step == steps {
                self.evaluate()?;
            }
            if step < steps && self.watch.is_stopping() {
                self.save()?;
                return Ok(Outcome::Stopped { step });
            }
            if every(run.save_every, step) && step < steps {
                // Training goes on: what is lost is time, if it has to be resumed from an earlier snapshot.
                if let Err(error) = self.save() {
                    self.watch.warned(&format!("no snapshot of step {step}: {error}"));
                }
            }
        }
        self.save()?;
        self.report()?;
        self.finish()?;
        Ok(Outcome::Finished { steps })
    }

    /// One step of the optimiser.
    fn step(&mut self) -> Result<()> {
        let done = self.place.step;
        let lessons = self.prepared.lessons(Pass::Learn);
        let batch = lessons.batch(done as usize);
        let objective = Objective::of(self.recipe);
        let mut tally = objective.step(&self.prepared.learner, &batch, self.recipe.batch.tokens, Pass::Learn)?;
        let norm = self.optimizer.gradient_norm()?;
        let loss = tally.get("loss").unwrap_or(f64::NAN);
        self.place.step += 1;
        self.place.tokens += tally.tokens;
        if loss.is_finite() && norm.is_finite() {
            if self.place.moves == 0 {
                self.optimizer.check_gradients()?;
            }
            let rate = self.rate.at(done);
            self.optimizer.step(rate, norm)?;
            self.place.moves += 1;
            tally.add("grad_norm", norm, 1.0);
            tally.add("learning_rate", rate, 1.0);
            self.place.tally.merge(&tally);
        } else {
            self.pass_over(loss, norm)?;
        }
        let seconds = self.since.0.elapsed().as_secs_f64();
        self.watch.stepped(&StepProgress {
            step: self.place.step,
            steps: self.prepared.course.len() as u64,
            loss,
            tokens_per_second: (self.place.tokens - self.since.1) as f64 / seconds,
        });
        Ok(())
    }

    /// A step whose loss or gradient is not finite moves nothing.
    fn pass_over(&mut self, loss: f64, norm: f64) -> Result<()> {
        self.optimizer.clear()?;
        self.place.bad_steps += 1;
        let step = self.place.step;
        let what = format!("step {step} has loss {loss} and gradient norm {norm}");
        if self.place.bad_steps > self.recipe.run.bad_steps_max {
            let most = self.recipe.run.bad_steps_max;
            return Err(Error::internal(format!("{what}; run.bad_steps_max allows {most} such steps")));
        }
        self.watch.warned(&format!("{what}: passed over"));
        Ok(())
    }

    /// Records what was measured since the last record.
    fn record(&mut self) -> Result<()> {
        let tally = std::mem::take(&mut self.place.tally);
        let seconds = self.since.0.elapsed().as_secs_f64();
        let mut values = vec![
            ("epoch".to_owned(), self.prepared.course.epoch(self.place.step)),
            ("num_tokens".to_owned(), self.place.tokens as f64),
            ("tokens_per_second".to_owned(), (self.place.tokens - self.since.1) as f64 / seconds),
        ];
        values.extend(with_margins(tally.values()));
        self.since = (Instant::now(), self.place.tokens);
        self.recorder.write(&Record { step: self.place.step, kind: Kind::Train, values })
    }

    /// Measures the held-out examples, if there are any.
    fn evaluate(&mut self) -> Result<()> {
        if self.prepared.test.is_empty() {
            return Ok(());
        }
        let lessons = self.prepared.lessons(Pass::Read);
        let objective = Objective::of(self.recipe);
        let mut tally = Tally::default();
        for step in 0..self.prepared.test.len() {
            let batch = lessons.batch(step);
            tally.merge(&objective.step(&self.prepared.learner, &batch, self.recipe.batch.tokens, Pass::Read)?);
        }
        let mut values = vec![("epoch".to_owned(), self.prepared.course.epoch(self.place.step))];
        values.extend(with_margins(tally.values()));
        self.evaluated.clone_from(&values);
        self.recorder.write(&Record { step: self.place.step, kind: Kind::Eval("eval".to_owned()), values })?;
        // What follows is not slow because of this.
        self.since = (Instant::now(), self.place.tokens);
        self.report()
    }

    fn save(&mut self) -> Result<()> {
        self.recorder.sync()?;
        let (optimizer, place) = (&self.optimizer, &self.place);
        self.snapshots.save(place.step, &mut |folder| state::save(folder, optimizer, place))
    }

    /// Writes the model.
    fn finish(mut self) -> Result<()> {
        let (recipe, checkpoint) = (self.recipe, &self.prepared.checkpoint);
        let metrics: Vec<(String, f64)> =
            self.evaluated.iter().map(|(name, value)| (format!("eval/{name}"), *value)).collect();
        let card = Card { recipe, files: &self.prepared.dataset.files, steps: self.place.step, metrics: &metrics };
        let model = &mut self.prepared.learner.model;
        if let Some(lora) = &recipe.lora {
            let tensors = state::adapters(model);
            let from = &recipe.model.from;
            let folder = std::fs::canonicalize(from).map(|path| path.display().to_string());
            let base = &folder.unwrap_or_else(|_| from.clone());
            let adapter = Adapter { base, head: model.config.head, lora, tensors: &tensors };
            export::export_adapter(&recipe.run.adapter(), &adapter)?;
        }
        model.merge()?;
        // Where the checkpoint has none, the one that it was trained with.
        let own = recipe.model.chat_template.is_none() && checkpoint.tokenizer_config.chat_template.is_some();
        let template = (!own).then_some(self.prepared.template.as_str());
        let parts = Export {
            source: checkpoint,
            head: model.config.head,
            append_eos: recipe.model.append_eos,
            tensors: &state::tensors(model)?,
            dtype: recipe.run.save_dtype,
            max_shard_bytes: recipe.run.max_shard_bytes,
            chat_template: template,
            card: &card,
        };
        export::export(&recipe.run.model(), &parts)?;
        self.recorder.finish()
    }

    /// Draws the page of curves anew.
    fn report(&self) -> Result<()> {
        let records = record::read(&self.recipe.run.output)?;
        let report = Report { recipe: self.recipe, files: &self.prepared.dataset.files, records: &records };
        report.write(&self.recipe.run.report())
    }
}

/// With the margin and the accuracy that follow from the rewards of single answers (KTO), where they are not counted by pair.
fn with_margins(mut values: Vec<(String, f64)>) -> Vec<(String, f64)> {
    let of = |name: &str| values.iter().find(|(known, _)| known == name).map(|(_, value)| *value);
    if let (Some(chosen), Some(rejected), None) = (of("rewards/chosen"), of("rewards/rejected"), of("rewards/margins"))
    {
        values.push(("rewards/margins".to_owned(), chosen - rejected));
    }
    values
}
