//! Ranges of a recipe's values, and keys that exclude each other. All problems in one error.

use super::{Init, LORA_TARGETS, LoraRecipe, Recipe, Schedule, Stage};
use crate::config::layers::nearest;
use crate::error::{Error, Result};

/// Collects what is wrong.
#[derive(Default)]
struct Problems(Vec<String>);

impl Problems {
    fn unless(&mut self, holds: bool, problem: impl FnOnce() -> String) {
        if !holds {
            self.0.push(problem());
        }
    }

    /// `value` is to be finite and above 0.
    fn positive(&mut self, key: &str, value: f64) {
        self.unless(value.is_finite() && value > 0.0, || format!("{key} = {value} must be above 0"));
    }

    /// `value` is to be finite and not below 0.
    fn not_negative(&mut self, key: &str, value: f64) {
        self.unless(value.is_finite() && value >= 0.0, || format!("{key} = {value} must be 0 or more"));
    }

    /// `value` is to lie in `0..1`, or `0..=1` with `Bound::Included`.
    fn share(&mut self, key: &str, value: f64, one: Bound) {
        let (below, range) = match one {
            Bound::Included => (value <= 1.0, "0..=1"),
            Bound::Excluded => (value < 1.0, "0..1, 1 excluded"),
        };
        self.unless(value >= 0.0 && below, || format!("{key} = {value} is outside {range}"));
    }
}

#[derive(Clone, Copy)]
enum Bound {
    Included,
    Excluded,
}

impl Recipe {
    /// # Errors
    /// [`Error::Invalid`] naming every key that is wrong.
    pub(super) fn validate(&self) -> Result<()> {
        let mut problems = Problems::default();
        self.validate_model(&mut problems);
        for outcome in [self.data.check(), self.batch.check()] {
            problems.0.extend(outcome.err().map(|error| error.to_string()));
        }
        self.validate_objective(&mut problems);
        self.validate_optimizer(&mut problems);
        self.validate_run(&mut problems);
        if let Some(lora) = &self.lora {
            validate_lora(lora, self.model.init, &mut problems);
        }
        let Problems(problems) = problems;
        if problems.is_empty() { Ok(()) } else { Err(Error::Invalid { message: problems.join("; "), field: None }) }
    }

    fn validate_model(&self, problems: &mut Problems) {
        let (model, stage) = (&self.model, self.stage);
        problems.unless(!model.from.trim().is_empty(), || {
            "model.from is not set: name a folder, a hub id or a built-in model to begin with".into()
        });
        problems.unless(stage.has_reference() || model.reference.is_none(), || {
            format!("model.reference is a key of dpo, kto, nca; {} compares with no reference", stage.name())
        });
        problems.unless(model.reference.as_ref().is_none_or(|name| !name.trim().is_empty()), || {
            "model.reference is empty".into()
        });
        problems.unless(!(stage.has_reference() && model.init == Init::Random), || {
            format!("model.init = \"random\": {} moves away from a trained model", stage.name())
        });
        problems.unless(stage == Stage::Reward || model.append_eos.is_none(), || {
            format!("model.append_eos is a key of reward, not of {}", stage.name())
        });
    }

    fn validate_objective(&self, problems: &mut Problems) {
        let objective = &self.objective;
        problems.positive("objective.beta", objective.beta);
        // At one half both answers are equally good, and nothing can be learnt.
        problems.unless((0.0..0.5).contains(&objective.label_smoothing), || {
            format!("objective.label_smoothing = {} is outside 0..0.5, 0.5 excluded", objective.label_smoothing)
        });
        problems.not_negative("objective.desirable_weight", objective.desirable_weight);
        problems.not_negative("objective.undesirable_weight", objective.undesirable_weight);
        let weighs = objective.desirable_weight + objective.undesirable_weight != 0.0;
        problems.unless(weighs, || "objective.desirable_weight and objective.undesirable_weight are both 0".into());
        problems.not_negative("objective.centre", objective.centre);
        problems.unless(objective.bradley_terry || !objective.margin, || {
            "objective.margin belongs to the Bradley-Terry term, which objective.bradley_terry = false leaves out"
                .into()
        });
    }

    fn validate_optimizer(&self, problems: &mut Problems) {
        let optimizer = &self.optimizer;
        problems.positive("optimizer.learning_rate", optimizer.learning_rate);
        for (index, beta) in optimizer.betas.into_iter().enumerate() {
            problems.share(&format!("optimizer.betas[{index}]"), beta, Bound::Excluded);
        }
        problems.positive("optimizer.eps", optimizer.eps);
        problems.not_negative("optimizer.weight_decay", optimizer.weight_decay);
        problems.not_negative("optimizer.clip_norm", optimizer.clip_norm);
        problems.unless(optimizer.warmup_ratio.is_none() || optimizer.warmup_steps.is_none(), || {
            "optimizer.warmup_ratio and optimizer.warmup_steps are both set: keep one".into()
        });
        if let Some(ratio) = optimizer.warmup_ratio {
            problems.share("optimizer.warmup_ratio", ratio, Bound::Included);
        }
        if let Some(ratio) = optimizer.decay_ratio {
            problems.share("optimizer.decay_ratio", ratio, Bound::Included);
            problems.unless(optimizer.schedule == Schedule::Wsd, || {
                "optimizer.decay_ratio needs optimizer.schedule = \"wsd\"".into()
            });
            problems.unless(ratio + optimizer.warmup_ratio.unwrap_or(0.0) <= 1.0, || {
                "optimizer.warmup_ratio and optimizer.decay_ratio are more than 1 together".into()
            });
        }
        problems.share("optimizer.min_ratio", optimizer.min_ratio, Bound::Included);
    }

    fn validate_run(&self, problems: &mut Problems) {
        let run = &self.run;
        problems.unless(!run.output.as_os_str().is_empty(), || "run.output is not set: name a folder to write".into());
        let counts = [
            ("run.epochs", run.epochs, 1, 1 << 20),
            ("run.steps_max", run.steps_max.unwrap_or(1), 1, 1 << 40),
            ("run.keep", run.keep as u64, 1, 1 << 20),
            ("run.log_every", run.log_every, 1, 1 << 40),
            ("run.threads", run.threads.unwrap_or(1) as u64, 1, 4096),
            // Smaller files than this would be thousands for a model of 7 billion parameters.
            ("run.max_shard_bytes", run.max_shard_bytes, 1 << 16, 1 << 50),
        ];
        for (key, value, least, most) in counts {
            problems.unless((least..=most).contains(&value), || format!("{key} = {value} is outside {least}..={most}"));
        }
        // z0 comes from the answers of other rows of the step: one row alone has none.
        problems.unless(self.stage != Stage::Kto || self.batch.examples >= 2, || {
            "batch.examples = 1: kto needs at least 2 rows in a step, because it pairs each prompt with another's answer".into()
        });
    }
}

fn validate_lora(lora: &LoraRecipe, init: Init, problems: &mut Problems) {
    problems.unless((1..=4096).contains(&lora.rank), || format!("lora.rank = {} is outside 1..=4096", lora.rank));
    problems.positive("lora.alpha", lora.alpha);
    problems.unless(init == Init::Checkpoint, || {
        "model.init = \"random\" with [lora]: adapters stand beside trained weights".into()
    });
    problems
        .unless(!lora.targets.is_empty(), || format!("lora.targets is empty; known are {}", LORA_TARGETS.join(", ")));
    for (index, name) in lora.targets.iter().enumerate() {
        problems.unless(LORA_TARGETS.contains(&name.as_str()), || {
            let hint = nearest(name, &LORA_TARGETS).map_or_else(String::new, |near| format!("; did you mean {near}?"));
            format!("lora.targets[{index}] = \"{name}\" is none of {}{hint}", LORA_TARGETS.join(", "))
        });
        problems.unless(!lora.targets[..index].contains(name), || format!("lora.targets names {name} twice"));
    }
}
