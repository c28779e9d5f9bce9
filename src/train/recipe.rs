//! Recipes: everything a training run may be told, with units and defaults, one struct for each section of the TOML file.
//! Owns names, defaults, ranges, and which keys belong to which stage; what they do is decided where they are used.

mod resume;
mod validate;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::layers::{self, Layer};
use crate::config::{ComputeDtype, byte_count, render};
use crate::error::{Error, Result};
use crate::train::batch::BatchRecipe;
use crate::train::data::DataRecipe;

pub use resume::Difference;

/// What a run trains, and by which loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Supervised fine-tuning of a policy.
    Sft,
    /// Direct preference optimisation of a policy.
    Dpo,
    /// Kahneman-Tversky optimisation of a policy.
    Kto,
    /// Noise-contrastive alignment of a policy, pairwise.
    Nca,
    /// A reward model.
    Reward,
}

impl Stage {
    /// All there are.
    pub const ALL: [Self; 5] = [Self::Sft, Self::Dpo, Self::Kto, Self::Nca, Self::Reward];

    /// As commands and recipes spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sft => "sft",
            Self::Dpo => "dpo",
            Self::Kto => "kto",
            Self::Nca => "nca",
            Self::Reward => "reward",
        }
    }

    /// The stage of that name, if there is one.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|stage| stage.name() == name)
    }

    /// Whether the loss compares the model with a reference.
    pub fn has_reference(self) -> bool {
        matches!(self, Self::Dpo | Self::Kto | Self::Nca)
    }

    /// Learning rate of the Eurus paper (arXiv 2404.02078, appendix B).
    fn learning_rate(self) -> f64 {
        match self {
            Self::Sft => 2e-5,
            Self::Dpo | Self::Kto | Self::Nca => 5e-7,
            Self::Reward => 1e-5,
        }
    }
}

/// One training run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The stage; a file that names none is taken for the one of the command.
    pub stage: Stage,
    /// What is trained.
    #[serde(default)]
    pub model: ModelRecipe,
    /// What it learns from.
    #[serde(default)]
    pub data: DataRecipe,
    /// How examples are put together.
    #[serde(default)]
    pub batch: BatchRecipe,
    /// The loss.
    #[serde(default)]
    pub objective: ObjectiveRecipe,
    /// How weights move.
    #[serde(default)]
    pub optimizer: OptimizerRecipe,
    /// How long, where to, and what is written meanwhile.
    #[serde(default)]
    pub run: RunRecipe,
    /// Adapters that are trained in place of the weights.
    pub lora: Option<LoraRecipe>,
}

/// Section `model`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelRecipe {
    /// The checkpoint to begin with: a built-in name, a folder, or a hub id `org/name[@revision]`.
    pub from: String,
    /// What `dpo`, `kto` and `nca` compare with; by default `from`.
    pub reference: Option<String>,
    /// Which weights to begin with.
    pub init: Init,
    /// File with a chat template that takes the place of the checkpoint's own.
    pub chat_template: Option<PathBuf>,
    /// Whether a reward is read after an end-of-sequence token (`reward` only); by default as the checkpoint says.
    pub append_eos: Option<bool>,
}

/// Which weights a run begins with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// Those of `from`.
    #[default]
    Checkpoint,
    /// New ones from `run.seed`, in the shape that the config.json of `from` gives.
    Random,
}

/// Section `objective`. The keys of other stages than the run's are refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ObjectiveRecipe {
    /// How strongly the model is held to the reference (`dpo`, `kto`, `nca`).
    pub beta: f64,
    /// Probability that the two answers of a pair are swapped (`dpo`).
    pub label_smoothing: f64,
    /// Weight of good answers (`kto`).
    pub desirable_weight: f64,
    /// Weight of bad answers (`kto`).
    pub undesirable_weight: f64,
    /// Whether the loss has the Bradley-Terry term L_BT (`reward`).
    pub bradley_terry: bool,
    /// Whether the reward of the chosen answer must be ahead by the margin of the row (`reward`).
    pub margin: bool,
    /// Weight of the square of the sum of two rewards, which holds them around zero (`reward`).
    pub centre: f64,
}

impl Default for ObjectiveRecipe {
    fn default() -> Self {
        Self {
            // beta and the weights: arXiv 2404.02078, appendix B.
            beta: 0.1,
            label_smoothing: 0.0,
            desirable_weight: 1.33,
            undesirable_weight: 1.0,
            bradley_terry: true,
            margin: false,
            centre: 0.0,
        }
    }
}

/// The keys of `objective` that mean something to `stage`.
fn objective_keys(stage: Stage) -> &'static [&'static str] {
    match stage {
        Stage::Sft => &[],
        Stage::Dpo => &["beta", "label_smoothing"],
        Stage::Kto => &["beta", "desirable_weight", "undesirable_weight"],
        Stage::Nca => &["beta"],
        Stage::Reward => &["bradley_terry", "margin", "centre"],
    }
}

/// Section `optimizer`: AdamW.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerRecipe {
    /// Largest learning rate; by default the paper's for the stage.
    pub learning_rate: f64,
    /// Decay of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decay of all weights but norms, for each step and unit of learning rate.
    pub weight_decay: f64,
    /// Largest norm of all gradients together; 0 leaves them as they are.
    pub clip_norm: f64,
    /// How the learning rate goes on after the warm-up.
    pub schedule: Schedule,
    /// Share of all steps in which the learning rate rises from 0; excludes `warmup_steps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_ratio: Option<f64>,
    /// Steps in which the learning rate rises from 0; excludes `warmup_ratio`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<u64>,
    /// Share of all steps in which the learning rate falls at the end (`wsd` only).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_ratio: Option<f64>,
    /// Where the learning rate ends, as a share of the largest.
    pub min_ratio: f64,
}

impl Default for OptimizerRecipe {
    fn default() -> Self {
        Self {
            learning_rate: Stage::Sft.learning_rate(),
            // betas, eps, weight decay and clipping are those of transformers' Trainer: the paper gives none.
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.0,
            clip_norm: 1.0,
            schedule: Schedule::Cosine,
            warmup_ratio: None,
            warmup_steps: None,
            decay_ratio: None,
            min_ratio: 0.0,
        }
    }
}

/// Share of steps that warm up where a recipe does not say (arXiv 2404.02078, appendix B).
const WARMUP_RATIO: f64 = 0.1;
/// Share of steps in which `wsd` decays where a recipe does not say.
const DECAY_RATIO: f64 = 0.1;

/// Course of the learning rate after the warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Half a cosine wave.
    #[default]
    Cosine,
    /// A straight line.
    Linear,
    /// The same to the end.
    Constant,
    /// Warm-up, stable, then a straight line down.
    Wsd,
}

/// Section `run`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunRecipe {
    /// Folder for everything the run writes.
    pub output: PathBuf,
    /// Times every example is seen.
    pub epochs: u64,
    /// Steps after which to end, whatever `epochs` says.
    pub steps_max: Option<u64>,
    /// Seed of order, splits and new weights.
    pub seed: u64,
    /// Steps between evaluations; 0 evaluates at the start and the end only.
    pub eval_every: u64,
    /// Steps between snapshots; 0 takes one at the end only.
    pub save_every: u64,
    /// Snapshots that are kept.
    pub keep: usize,
    /// Steps between records of metrics.
    pub log_every: u64,
    /// Whether activations are computed again in the backward pass, which takes time and saves memory.
    pub recompute: bool,
    /// Threads for arithmetic; by default one for each core.
    pub threads: Option<usize>,
    /// Element type of the arithmetic; weights and moments of the optimiser are float32 in either case.
    pub compute_dtype: ComputeDtype,
    /// Element type of the written checkpoint; by default the one of `model.from`.
    pub save_dtype: Option<SaveDtype>,
    /// Largest file of tensors, in bytes; units such as `5GB` may be written.
    #[serde(deserialize_with = "byte_count")]
    pub max_shard_bytes: u64,
    /// Steps with a loss or gradient that is not finite that are passed over before the run ends with an error.
    pub bad_steps_max: u64,
}

impl Default for RunRecipe {
    fn default() -> Self {
        Self {
            output: PathBuf::new(),
            epochs: 1,
            steps_max: None,
            seed: 0,
            eval_every: 0,
            save_every: 500,
            keep: 2,
            log_every: 1,
            recompute: false,
            threads: None,
            compute_dtype: ComputeDtype::F32,
            save_dtype: None,
            // transformers' own default.
            max_shard_bytes: 5_000_000_000,
            bad_steps_max: 0,
        }
    }
}

impl RunRecipe {
    /// The recipe as it was resolved.
    pub fn recipe_file(&self) -> PathBuf {
        self.output.join("recipe.toml")
    }

    /// Folder of the snapshots that a run is resumed from.
    pub fn snapshots(&self) -> PathBuf {
        self.output.join("snapshots")
    }

    /// Folder of the trained checkpoint, for `eurus serve` and transformers.
    pub fn model(&self) -> PathBuf {
        self.output.join("model")
    }

    /// Folder of the adapters alone, in PEFT's layout; the checkpoint in [`RunRecipe::model`] has them merged.
    pub fn adapter(&self) -> PathBuf {
        self.output.join("adapter")
    }

    /// The page with curves.
    pub fn report(&self) -> PathBuf {
        self.output.join("report.html")
    }
}

/// Element type of a written checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SaveDtype {
    /// 32 bits.
    F32,
    /// 16 bits, of which 8 are exponent.
    Bf16,
    /// 16 bits, of which 5 are exponent.
    F16,
}

/// The linear layers of a block that adapters may stand beside.
pub const LORA_TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Section `lora`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraRecipe {
    /// Columns of the two factors.
    pub rank: usize,
    /// The product of the factors is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Layers that get an adapter: some of [`LORA_TARGETS`].
    pub targets: Vec<String>,
    /// Whether the scale is `alpha / sqrt(rank)`.
    pub rslora: bool,
}

impl Default for LoraRecipe {
    fn default() -> Self {
        Self { rank: 16, alpha: 32.0, targets: LORA_TARGETS.map(String::from).to_vec(), rslora: false }
    }
}

impl Recipe {
    /// Defaults of `stage`, then the file, then `assignments` of the form `key=value` (see `--set`).
    ///
    /// # Errors
    /// [`Error::Invalid`] naming every unknown key, wrong type, key of another stage and value out of range.
    pub fn load(stage: Stage, file: &Path, assignments: &[String]) -> Result<Self> {
        let mut file = Layer::read(file)?;
        let flags = Layer::command_line(assignments, &file)?;
        for layer in [&file, &flags] {
            check_stage(stage, layer)?;
        }
        // A flag that says how long to warm up takes back what the file says about it.
        for (key, other) in [("warmup_ratio", "warmup_steps"), ("warmup_steps", "warmup_ratio")] {
            if flags.get(&format!("optimizer.{key}")).is_some() && flags.get(&format!("optimizer.{other}")).is_none() {
                file.remove("optimizer", other);
            }
        }
        let paper = Layer::of("the paper", [("optimizer.learning_rate", stage.learning_rate())]);
        let named = Layer::of("the command", [("stage", stage.name())]);
        let mut recipe: Self = layers::extract([paper, named, file, flags])?;
        let optimizer = &mut recipe.optimizer;
        if optimizer.warmup_ratio.is_none() && optimizer.warmup_steps.is_none() {
            optimizer.warmup_ratio = Some(WARMUP_RATIO);
        }
        if optimizer.schedule == Schedule::Wsd {
            optimizer.decay_ratio.get_or_insert(DECAY_RATIO);
        }
        recipe.validate()?;
        Ok(recipe)
    }

    /// [`Recipe::load`] for the stage that the file names.
    ///
    /// # Errors
    /// As [`Recipe::load`], and if the file names no stage.
    pub fn load_any(file: &Path, assignments: &[String]) -> Result<Self> {
        let layer = Layer::read(file)?;
        let name = layer.get("stage").and_then(|value| value.as_str());
        let stage = name.and_then(Stage::named);
        let missing = || Error::invalid("stage", format!("{}: `stage` is none of {}", layer.name(), stage_names()));
        Self::load(stage.ok_or_else(missing)?, file, assignments)
    }

    /// The recipe as TOML that [`Recipe::load`] reads again, every default written out.
    pub fn to_toml(&self) -> String {
        let Ok(serde_json::Value::Object(mut root)) = serde_json::to_value(self) else { return String::new() };
        if let Some(serde_json::Value::Object(objective)) = root.get_mut("objective") {
            objective.retain(|key, _| objective_keys(self.stage).contains(&key.as_str()));
        }
        render::value_to_toml(&root)
    }
}

fn stage_names() -> String {
    Stage::ALL.map(Stage::name).join(", ")
}

/// The stage of `layer`, where it names one, is `stage`, and so are the keys of its objective.
fn check_stage(stage: Stage, layer: &Layer) -> Result<()> {
    if let Some(named) = layer.get("stage").and_then(|value| value.as_str())
        && named != stage.name()
    {
        let what = format!("`stage` in {} is \"{named}\", the command is `eurus train {}`", layer.name(), stage.name());
        return Err(Error::invalid("stage", what));
    }
    let foreign = |key: &String| {
        let mut others = Stage::ALL.into_iter().filter(|other| objective_keys(*other).contains(&key.as_str()));
        !objective_keys(stage).contains(&key.as_str()) && others.next().is_some()
    };
    let problems: Vec<String> = layer
        .keys("objective")
        .into_iter()
        .filter(foreign)
        .map(|key| {
            let of = Stage::ALL.into_iter().filter(|other| objective_keys(*other).contains(&key.as_str()));
            let of: Vec<&str> = of.map(Stage::name).collect();
            let place = layer.name();
            let own = match objective_keys(stage) {
                [] => "has no keys".to_owned(),
                keys => format!("has {}", keys.join(", ")),
            };
            let stage = stage.name();
            format!("`objective.{key}` in {place} is a key of {}; the objective of {stage} {own}", of.join(", "))
        })
        .collect();
    if problems.is_empty() { Ok(()) } else { Err(Error::invalid("objective", problems.join("; "))) }
}

#[cfg(test)]
mod tests;
