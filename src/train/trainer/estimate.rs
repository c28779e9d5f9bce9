//! What a run is going to take, reckoned before it begins.

use std::time::Instant;

use super::Prepared;
use crate::device;
use crate::error::Result;
use crate::model::Model;
use crate::model::tape::Keep;
use crate::train::batch::Packed;
use crate::train::course::Course;
use crate::train::example::Example;
use crate::train::plan::Plan;
use crate::train::recipe::Recipe;

/// Tokens that are enough to judge a machine by.
const PROBE_TOKENS: usize = 512;
const F32_BYTES: u64 = 4;
/// Two moments of every trained weight.
const MOMENTS: u64 = 2;

impl Prepared {
    /// The plan of `recipe` over `course`.
    pub(super) fn plan(&self, recipe: &Recipe, course: &Course) -> Result<Plan> {
        let model = &self.learner.model;
        let parameters = model.parameters();
        let count = |trained_only: bool| -> u64 {
            let counted = parameters.iter().filter(|named| !trained_only || named.parameter.gradient().is_some());
            counted.map(|named| named.parameter.value().elem_count() as u64).sum()
        };
        let weight_bytes = parameters.iter().map(|named| {
            let value = named.parameter.value();
            value.elem_count() as u64 * value.dtype().size_in_bytes() as u64
        });
        let trainable = count(true);
        let (tokens, targets) = tokens(&self.dataset.train);
        let longest = course.steps().iter().map(|step| step.iter().map(|&i| self.dataset.train[i].token_count()).sum());
        let micro_tokens = recipe.batch.tokens.min(longest.max().unwrap_or(0)) as u64;
        let memory = vec![
            ("weights".to_owned(), weight_bytes.sum()),
            ("gradients".to_owned(), trainable * F32_BYTES),
            ("moments".to_owned(), trainable * MOMENTS * F32_BYTES),
            ("activations".to_owned(), micro_tokens * activation_bytes(model, self.learner.keep)),
        ];
        let dropped = &self.dataset.counts.dropped;
        Ok(Plan {
            stage: recipe.stage,
            parameters: count(false),
            trainable,
            files: self.dataset.files.iter().map(|file| (file.path.display().to_string(), file.rows as u64)).collect(),
            dropped: dropped.iter().map(|(reason, count)| (reason.text().to_owned(), *count as u64)).collect(),
            train_rows: self.dataset.train.len() as u64,
            test_rows: self.dataset.test.len() as u64,
            tokens,
            target_tokens: targets,
            steps: course.len() as u64,
            epochs: recipe.run.epochs,
            memory,
            memory_free: device::host_memory_available(),
            snapshot_bytes: trainable * (1 + MOMENTS) * F32_BYTES,
            seconds: self.seconds(recipe, course)?,
        })
    }

    /// How long all steps take, judged by a forward pass over a few texts; a backward pass takes twice as long.
    fn seconds(&self, recipe: &Recipe, course: &Course) -> Result<Option<f64>> {
        let mut texts = Vec::new();
        let mut tokens = 0;
        for text in self.dataset.train.iter().flat_map(Example::texts) {
            tokens += text.tokens.len();
            texts.push(text);
            if tokens >= PROBE_TOKENS {
                break;
            }
        }
        if tokens == 0 {
            return Ok(None);
        }
        let started = Instant::now();
        self.learner.read(&Packed::new(&texts))?;
        let second = started.elapsed().as_secs_f64() / tokens as f64;
        let passes = match self.learner.keep {
            Keep::Everything => 3.0,
            Keep::Inputs => 4.0,
        };
        let of_step =
            |step: &Vec<usize>| step.iter().map(|&index| self.dataset.train[index].token_count()).sum::<usize>();
        let trained: usize = course.steps().iter().map(of_step).sum();
        let reference = if recipe.stage.has_reference() { trained } else { 0 };
        Ok(Some(second * (passes * trained as f64 + reference as f64)))
    }
}

/// Tokens of all texts, and those that count.
fn tokens(examples: &[Example]) -> (u64, u64) {
    let texts = || examples.iter().flat_map(Example::texts);
    let all = texts().map(|text| text.tokens.len() as u64).sum();
    (all, texts().map(|text| text.target_count() as u64).sum())
}

/// What one token of a micro-batch takes, at most: the kept tensors of all layers, and one layer at work.
fn activation_bytes(model: &Model, keep: Keep) -> u64 {
    let config = &model.config;
    let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    // x, its norm, the sum after attention, its norm; queries and what was attended; keys and values; gate and up.
    let layer = 4 * config.hidden + 2 * queries + 2 * keys + 2 * config.intermediate;
    let at_work = 2 * layer;
    let kept = match keep {
        Keep::Everything => config.layers * layer,
        Keep::Inputs => config.layers * config.hidden,
    };
    (kept + at_work) as u64 * F32_BYTES
}
