//! Which examples each step of a run takes, and with KTO which answers it compares with. Follows from data, recipe and seed.

use super::batch::{BatchRecipe, steps};
use super::example::{Example, Text};
use super::reference::References;
use super::step::{Batch, mismatched};

/// All steps of a run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Course {
    /// `[steps]`: the examples of each.
    steps: Vec<Vec<usize>>,
    /// Steps of an epoch.
    epoch_len: usize,
}

impl Course {
    /// `epochs` times through `examples`, or `steps_max` steps if those are fewer.
    pub fn new(examples: &[Example], batch: &BatchRecipe, seed: u64, epochs: u64, steps_max: Option<u64>) -> Self {
        let most = steps_max.map_or(usize::MAX, |steps| usize::try_from(steps).unwrap_or(usize::MAX));
        let epoch_len = examples.len().div_ceil(batch.examples.max(1));
        let mut all = Vec::new();
        for epoch in 0..epochs {
            if all.len() >= most {
                break;
            }
            all.extend(steps(examples, batch, seed, epoch));
        }
        all.truncate(most);
        Self { steps: all, epoch_len }
    }

    /// An evaluation: `examples` in their order.
    pub fn in_order(examples: &[Example], batch: &BatchRecipe) -> Self {
        let indices: Vec<usize> = (0..examples.len()).collect();
        let steps: Vec<Vec<usize>> = indices.chunks(batch.examples.max(1)).map(<[usize]>::to_vec).collect();
        Self { epoch_len: steps.len(), steps }
    }

    /// Steps in all.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// How many times the data have been seen after `step` steps.
    pub fn epoch(&self, step: u64) -> f64 {
        step as f64 / self.epoch_len.max(1) as f64
    }

    /// The examples of each step.
    pub fn steps(&self) -> &[Vec<usize>] {
        &self.steps
    }

    /// The mismatched answers of all steps, one after the other: what the reference is asked about beforehand.
    pub fn mismatched(&self, examples: &[Example]) -> Vec<Text> {
        self.steps.iter().flat_map(|step| mismatched(&texts(examples, step))).collect()
    }
}

fn texts<'a>(examples: &'a [Example], step: &[usize]) -> Vec<&'a Text> {
    step.iter().flat_map(|&index| examples[index].texts()).collect()
}

/// The examples that a course takes and what the reference says of them.
pub struct Lessons<'a> {
    /// Which examples each step takes.
    pub course: &'a Course,
    /// All examples.
    pub examples: &'a [Example],
    /// Of all examples.
    pub references: &'a References,
    /// Mismatched answers of all steps, in order, and the reference's log-probabilities; empty unless the stage is KTO.
    pub mismatched: (&'a [Text], &'a [f64]),
}

impl<'a> Lessons<'a> {
    /// The batch of step `step`.
    pub fn batch(&self, step: usize) -> Batch<'a> {
        let indices = &self.course.steps[step];
        let before: usize = match self.mismatched.0 {
            [] => 0,
            _ => self.course.steps[..step].iter().map(Vec::len).sum(),
        };
        let (texts, values) = self.mismatched;
        let others = texts.iter().zip(values).skip(before).take(indices.len());
        Batch {
            examples: indices.iter().map(|&index| &self.examples[index]).collect(),
            references: indices.iter().map(|&index| self.references.of(index)).collect(),
            mismatched: others.map(|(text, value)| (text, *value)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    fn answers(count: u32) -> Vec<Example> {
        let text = |i| Text { tokens: vec![i, 100 + i, 200 + i], targets: vec![false, true, true] };
        (0..count).map(|i| Example::Answer { text: text(i), desirable: true }).collect()
    }

    #[test]
    fn a_course_sees_everything_once_an_epoch_and_ends_when_told() {
        let examples = answers(10);
        let batch = BatchRecipe { examples: 4, ..BatchRecipe::default() };
        let course = Course::new(&examples, &batch, 1, 2, None);
        assert_eq!((course.len(), course.epoch(3), course.epoch(6)), (6, 1.0, 2.0));
        for epoch in course.steps().chunks(3) {
            let mut seen = epoch.concat();
            seen.sort_unstable();
            assert_eq!(seen, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(course.steps()[..3], course.steps()[3..]);
        let cut = Course::new(&examples, &batch, 1, 2, Some(4));
        assert_eq!(cut.steps(), &course.steps()[..4]);
    }

    #[test]
    fn each_answer_is_compared_with_the_one_before_it_in_its_step() {
        let examples = answers(5);
        let course = Course::in_order(&examples, &BatchRecipe { examples: 3, ..BatchRecipe::default() });
        let others = course.mismatched(&examples);
        let tokens: Vec<&[u32]> = others.iter().map(|text| &text.tokens[..]).collect();
        assert_eq!(tokens, [[0, 102, 202], [1, 100, 200], [2, 101, 201], [3, 104, 204], [4, 103, 203]]);
        assert!(others.iter().all(|text| text.targets == [false, true, true]));
        let values = [0.0, 1.0, 2.0, 3.0, 4.0];
        let none = References::default();
        let lessons =
            Lessons { course: &course, examples: &examples, references: &none, mismatched: (&others, &values) };
        let batch = lessons.batch(1);
        let got: Vec<f64> = batch.mismatched.iter().map(|(_, value)| *value).collect();
        assert_eq!((batch.examples.len(), got), (2, vec![3.0, 4.0]));
    }
}
