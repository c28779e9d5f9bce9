//! The learning rate of each step, as transformers' schedules give it.

use super::recipe::{OptimizerRecipe, Schedule};

/// The course of a run's learning rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearningRate {
    peak: f64,
    schedule: Schedule,
    /// Steps of all.
    steps: u64,
    warmup: u64,
    /// Steps in which WSD falls, at the end.
    decay: u64,
    /// Where it ends, as a share of the peak.
    min_ratio: f64,
}

impl LearningRate {
    /// The course that `recipe` asks for over `steps` steps. A ratio is rounded up to whole steps.
    pub fn new(recipe: &OptimizerRecipe, steps: u64) -> Self {
        let share = |ratio: Option<f64>| (steps as f64 * ratio.unwrap_or(0.0)).ceil() as u64;
        Self {
            peak: recipe.learning_rate,
            schedule: recipe.schedule,
            steps,
            warmup: recipe.warmup_steps.unwrap_or_else(|| share(recipe.warmup_ratio)).min(steps),
            decay: share(recipe.decay_ratio),
            min_ratio: recipe.min_ratio,
        }
    }

    /// Of the step after `done` steps. With a warm-up the first one is 0: weights stay, moments begin.
    pub fn at(&self, done: u64) -> f64 {
        if done < self.warmup {
            return self.peak * done as f64 / self.warmup as f64;
        }
        let progress = |from: u64| {
            let len = self.steps.saturating_sub(from).max(1);
            (done.saturating_sub(from) as f64 / len as f64).min(1.0)
        };
        let share = match self.schedule {
            Schedule::Constant => return self.peak,
            Schedule::Linear => 1.0 - progress(self.warmup),
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress(self.warmup)).cos()),
            Schedule::Wsd => 1.0 - progress(self.steps.saturating_sub(self.decay).max(self.warmup)),
        };
        self.peak * (self.min_ratio + (1.0 - self.min_ratio) * share.max(0.0))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    fn course(schedule: Schedule, steps: u64) -> Vec<f64> {
        let recipe = OptimizerRecipe {
            learning_rate: 2e-3,
            schedule,
            warmup_ratio: Some(0.2),
            decay_ratio: Some(0.4),
            ..OptimizerRecipe::default()
        };
        let rate = LearningRate::new(&recipe, steps);
        (0..steps).map(|step| rate.at(step)).collect()
    }

    #[track_caller]
    fn check(got: &[f64], expected: &[f64]) {
        assert_eq!(got.len(), expected.len());
        for (got, expected) in got.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-15, "{got} and {expected}");
        }
    }

    /// What transformers 5.23 gave for eight steps (tests/reference/train_reference.py).
    #[test]
    fn cosine_is_that_of_transformers() {
        let expected = [0.0, 1e-3, 2e-3, 0.001_866_025_403_784_439, 1.5e-3, 1e-3, 5e-4, 0.000_133_974_596_215_561_3];
        check(&course(Schedule::Cosine, 8), &expected);
    }

    #[test]
    fn the_others_rise_and_fall_in_straight_lines() {
        check(&course(Schedule::Constant, 5), &[0.0, 2e-3, 2e-3, 2e-3, 2e-3]);
        check(&course(Schedule::Linear, 6), &[0.0, 1e-3, 2e-3, 1.5e-3, 1e-3, 5e-4]);
        check(&course(Schedule::Wsd, 5), &[0.0, 2e-3, 2e-3, 2e-3, 1e-3]);
        let recipe = OptimizerRecipe { learning_rate: 1.0, min_ratio: 0.1, ..OptimizerRecipe::default() };
        let rate = LearningRate::new(&recipe, 10);
        assert!((rate.at(10) - 0.1).abs() < 1e-12 && (rate.at(0) - 1.0).abs() < 1e-12);
        assert_eq!(LearningRate::new(&recipe, 0).at(0), 0.1 + 0.9);
    }
}
