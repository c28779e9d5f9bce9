//! Whole runs of training on a tiny model in a temporary folder: the same bits after any crash and with any number of threads,
//! and a model that a server loads.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use eurus::bench::make_model::{self, Kind, WeightType};
use eurus::checkpoint::{self, HubOptions, Source};
use eurus::error::{Error, Result};
use eurus::train::plan::Plan;
use eurus::train::recipe::{Recipe, Stage};
use eurus::train::start::{self, Wish};
use eurus::train::trainer::{self, Outcome, StepProgress, Watch};
use serde_json::{Value, json};

/// What is to happen after a step.
#[derive(Clone, Copy, PartialEq)]
enum Event {
    /// The process is killed: nothing is saved.
    Crash,
    /// It is asked to stop.
    Stop,
}

/// Lets a run come to `event` after step `at`.
struct Interrupt {
    at: Option<(u64, Event)>,
    done: u64,
    warnings: Vec<String>,
}

impl Watch for Interrupt {
    fn preparing(&mut self, _: &str, _: u64, _: u64) {}
    fn planned(&mut self, _: &Plan) {}
    fn stepped(&mut self, progress: &StepProgress) {
        self.done = progress.step;
        assert!(self.at != Some((progress.step, Event::Crash)), "the process is killed");
    }
    fn warned(&mut self, what: &str) {
        self.warnings.push(what.to_owned());
    }
    fn is_stopping(&self) -> bool {
        self.at == Some((self.done, Event::Stop))
    }
}

/// A folder with a model, data, and recipes for every stage.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        place.make_model("model", None);
        let row = |index: usize| {
            json!({
                "id": format!("{index:x}_1_1"), "parent_id": format!("{index:x}"), "task": "Math_CoT", "dataset": "test",
                "trajectory": [{"from": "user", "value": format!("What is {index} + {index}?")}],
                "chosen": format!("It is {}.", 2 * index), "rejected": format!("It may be {} or so.", 3 * index + 1),
            })
        };
        let rows: String = (0..14).map(|index| format!("{}\n", row(index))).collect();
        fs::write(place.path("pairs.jsonl"), rows).unwrap();
        place
    }

    fn make_model(&self, name: &str, experts: Option<u16>) {
        let options = make_model::Options {
            out: self.path(name),
            hidden: 16,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            intermediate: 24,
            experts,
            vocab: 300,
            positions: 256,
            dtype: WeightType::F32,
            kind: Kind::Policy,
            seed: 1,
        };
        make_model::run(&options).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn recipe(&self, stage: Stage, output: &str, more: &[&str]) -> Recipe {
        let quoted = |path: PathBuf| format!("{:?}", path.display().to_string());
        let text = format!(
            "[model]\nfrom = {}\n[data]\ntest_fraction = 0.2\n[[data.source]]\npath = {}\n[batch]\nexamples = 4\ntokens = 128\n\
             [optimizer]\nlearning_rate = 1e-2\n[run]\noutput = {}\nepochs = 3\nlog_every = 2\neval_every = 3\nsave_every = 2\n",
            quoted(self.path("model")),
            quoted(self.path("pairs.jsonl")),
            quoted(self.path(output)),
        );
        let file = self.path(&format!("{output}.toml"));
        fs::write(&file, text).unwrap();
        Recipe::load(stage, &file, &more.iter().map(|one| (*one).to_owned()).collect::<Vec<_>>()).unwrap()
    }
}

/// Runs `recipe` to its end or to what is to happen.
fn run(recipe: &Recipe, at: Option<(u64, Event)>) -> Result<Outcome> {
    let (start, _) = start::decide(recipe, Wish::Any)?;
    trainer::run(recipe, &start, &mut Interrupt { at, done: 0, warnings: Vec::new() })
}

/// The weights of the written model, and all metrics but those of the clock.
fn results(output: &Path) -> (Vec<u8>, Vec<Value>) {
    let metrics = fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    let rows = metrics.lines().map(|line| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        row.as_object_mut().unwrap().remove("tokens_per_second");
        row
    });
    (fs::read(output.join("model/model.safetensors")).unwrap(), rows.collect())
}

#[track_caller]
fn check_course(stage: Stage, more: &[&str]) {
    let place = Place::new();
    let whole = place.recipe(stage, "whole", more);
    assert!(matches!(run(&whole, None).unwrap(), Outcome::Finished { .. }));
    let expected = results(&whole.run.output);
    let broken = place.recipe(stage, "broken", more);
    for (step, event) in [(1, Event::Crash), (3, Event::Crash), (4, Event::Stop), (5, Event::Crash), (7, Event::Stop)] {
        let outcome = catch_unwind(AssertUnwindSafe(|| run(&broken, Some((step, event)))));
        match event {
            Event::Crash => assert!(outcome.is_err(), "the run went on after step {step}"),
            Event::Stop => assert_eq!(outcome.unwrap().unwrap(), Outcome::Stopped { step }),
        }
    }
    assert!(matches!(run(&broken, None).unwrap(), Outcome::Finished { .. }));
    let (weights, metrics) = results(&broken.run.output);
    assert_eq!(metrics, expected.1, "{stage:?}: metrics after crashes");
    assert!(weights == expected.0, "{stage:?}: weights after crashes");
    let mut one = more.to_vec();
    one.extend(["run.threads=1", "run.recompute=true", "run.save_every=0"]);
    let alone = place.recipe(stage, "alone", &one);
    run(&alone, None).unwrap();
    eurus::ops::parallel::set_threads(2);
    assert!(results(&alone.run.output) == expected, "{stage:?}: one thread, recomputed");
}

#[test]
fn sft_goes_on_after_crashes_to_the_same_bits() {
    check_course(Stage::Sft, &[]);
}

#[test]
fn kto_goes_on_after_crashes_to_the_same_bits() {
    check_course(Stage::Kto, &[]);
}

#[test]
fn adapters_go_on_after_crashes_to_the_same_bits() {
    check_course(Stage::Dpo, &["lora.rank=4"]);
}

#[test]
fn a_run_does_not_go_on_with_other_data() {
    let place = Place::new();
    let recipe = place.recipe(Stage::Sft, "changed", &[]);
    assert_eq!(run(&recipe, Some((3, Event::Stop))).unwrap(), Outcome::Stopped { step: 3 });
    let (path, rows) = (place.path("pairs.jsonl"), fs::read_to_string(place.path("pairs.jsonl")).unwrap());
    fs::write(&path, rows.replace("It is 4.", "It is 5.")).unwrap();
    let text = run(&recipe, None).unwrap_err().to_string();
    assert!(text.contains("pairs.jsonl has changed since this run began") && text.contains("--fresh"), "{text}");
    fs::write(&path, rows).unwrap();
    assert!(matches!(run(&recipe, None).unwrap(), Outcome::Finished { .. }));
}

#[test]
fn a_reward_model_learns_its_pairs_and_opens_as_a_checkpoint() {
    let place = Place::new();
    let recipe = place.recipe(Stage::Reward, "reward", &["run.epochs=40", "run.eval_every=0"]);
    run(&recipe, None).unwrap();
    let rows = results(&recipe.run.output).1;
    let train: Vec<&Value> = rows.iter().filter(|row| row["split"] == "train").collect();
    assert_eq!(train.last().unwrap()["accuracy"], 1.0, "pairs that were seen 40 times are in the right order");
    let source = Source::parse(recipe.run.model().to_str().unwrap()).unwrap();
    let checkpoint = checkpoint::open(&source, &HubOptions::default(), &mut |_| {}).unwrap();
    assert_eq!(checkpoint.config.head, eurus::model::config::HeadKind::Reward);
    checkpoint.check_tensors().unwrap();
}

#[test]
fn a_loss_that_is_no_number_ends_the_run_or_is_passed_over() {
    let place = Place::new();
    let wild =
        ["optimizer.learning_rate=1e30", "optimizer.warmup_steps=0", "optimizer.clip_norm=0", "run.eval_every=0"];
    let error = run(&place.recipe(Stage::Dpo, "wild", &wild), None).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("bad_steps_max") || text.contains("gave"), "{text}");
}

#[test]
fn a_mixture_of_experts_is_refused_by_name() {
    let place = Place::new();
    place.make_model("experts", Some(4));
    let from = format!("model.from={}", place.path("experts").display());
    match run(&place.recipe(Stage::Sft, "out", &[&from]), None) {
        Err(Error::Invalid { field, message }) => {
            assert_eq!(field.as_deref(), Some("model.from"));
            assert!(message.contains("experts is a mixture of experts"), "{message}");
        }
        other => panic!("{other:?}"),
    }
}
