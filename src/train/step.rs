//! One step over a batch of examples: packed micro-batches read and learnt under an objective, normalised over the whole step.
//! How examples were chosen and what becomes of the gradients is decided elsewhere.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::batch::{Packed, micro_batches};
use super::example::{Example, Text};
use super::learner::{Learner, Reading, Slopes};
use super::objective::{self, AnswerLoss, KtoTerms, Likelihood, PairLoss, RewardTerms, kto_baseline};
use crate::error::{Error, Result};

/// What a stage minimises.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Objective {
    /// The mean negative log-probability of all targets of the step.
    Sft,
    /// [`objective::dpo`], mean over pairs.
    Dpo {
        /// Scale of the implicit rewards.
        beta: f64,
        /// How often labels are believed to be wrong.
        label_smoothing: f64,
    },
    /// [`objective::kto`], mean over answers; z0 from the mismatched answers of the whole step.
    Kto {
        /// Scale of the implicit rewards.
        beta: f64,
        /// Weight of desirable answers.
        desirable: f64,
        /// Weight of undesirable answers.
        undesirable: f64,
    },
    /// [`objective::nca`], mean over pairs.
    Nca {
        /// Scale of the implicit rewards.
        beta: f64,
    },
    /// [`objective::reward`], mean over pairs; L_DR where the pair says so.
    Reward {
        /// Whether L_BT counts.
        bradley_terry: bool,
        /// Whether the margins of the pairs count.
        margin: bool,
        /// The factor of the term that keeps rewards around zero.
        centre: f64,
    },
}

/// The examples of one step and what the reference model says of them.
#[derive(Debug, Clone, Default)]
pub struct Batch<'a> {
    /// What to learn.
    pub examples: Vec<&'a Example>,
    /// The reference's log-probability of each text, a list for each example; empty where the objective has no reference.
    pub references: Vec<&'a [f64]>,
    /// KTO: for each example its prompt with the answer of another ([`mismatched`]), and the reference's log-probability.
    pub mismatched: Vec<(&'a Text, f64)>,
}

/// Whether gradients are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// They are added to those of the trained weights.
    Learn,
    /// Evaluation.
    Read,
}

/// Sums that become the metrics of one or several steps, under the names of TRL's trainers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Tally {
    /// The sum and the weights, by name.
    sums: BTreeMap<String, (Bits, Bits)>,
    extremes: BTreeMap<String, Bits>,
    /// Tokens that went through the model, those of prompts included.
    pub tokens: u64,
}

/// A number whose JSON keeps every bit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "u64", into = "u64")]
struct Bits(f64);

impl From<u64> for Bits {
    fn from(bits: u64) -> Self {
        Self(f64::from_bits(bits))
    }
}

impl From<Bits> for u64 {
    fn from(number: Bits) -> Self {
        number.0.to_bits()
    }
}

impl Tally {
    /// Counts `value` `weight` times in the mean of `name`.
    pub fn add(&mut self, name: &str, value: f64, weight: f64) {
        if !self.sums.contains_key(name) {
            self.sums.insert(name.to_owned(), (Bits(0.0), Bits(0.0)));
        }
        if let Some((sum, weights)) = self.sums.get_mut(name) {
            sum.0 += value * weight;
            weights.0 += weight;
        }
    }

    fn extreme(&mut self, name: &str, value: f64) {
        let pick = if name.starts_with("min") { f64::min } else { f64::max };
        match self.extremes.get_mut(name) {
            Some(kept) => kept.0 = pick(kept.0, value),
            None => drop(self.extremes.insert(name.to_owned(), Bits(value))),
        }
    }

    /// Takes in what `other` counted.
    pub fn merge(&mut self, other: &Self) {
        for (name, (sum, weights)) in &other.sums {
            let (all, count) = self.sums.entry(name.clone()).or_default();
            all.0 += sum.0;
            count.0 += weights.0;
        }
        for (name, value) in &other.extremes {
            self.extreme(name, value.0);
        }
        self.tokens += other.tokens;
    }

    /// The metric `name`: a mean, or an extreme.
    pub fn get(&self, name: &str) -> Option<f64> {
        let mean = self.sums.get(name).map(|(sum, weights)| sum.0 / weights.0);
        mean.or_else(|| self.extremes.get(name).map(|value| value.0))
    }

    /// All metrics, by name.
    pub fn values(&self) -> Vec<(String, f64)> {
        let means = self.sums.iter().map(|(name, (sum, weights))| (name.clone(), sum.0 / weights.0));
        let extremes = self.extremes.iter().map(|(name, value)| (name.clone(), value.0));
        means.chain(extremes).collect()
    }
}

/// The prompt of each answer with the answer before it, the first with the last: what KTO estimates its baseline from, as
/// TRL pairs them.
pub fn mismatched(texts: &[&Text]) -> Vec<Text> {
    let pair = |(index, text): (usize, &&Text)| {
        let other = texts[(index + texts.len() - 1) % texts.len()];
        let prompt = text.prompt_len();
        let (tokens, targets) = (&other.tokens[other.prompt_len()..], &other.targets[other.prompt_len()..]);
        let targets = std::iter::repeat_n(false, prompt).chain(targets.iter().copied()).collect();
        Text { tokens: text.tokens[..prompt].iter().chain(tokens).copied().collect(), targets }
    };
    texts.iter().enumerate().map(pair).collect()
}

/// What `learner` says of each of `texts`, in micro-batches of at most `tokens_max` tokens.
///
/// # Errors
/// As [`Learner::read`].
pub fn read(learner: &Learner, texts: &[&Text], tokens_max: usize) -> Result<Vec<Reading>> {
    let lengths: Vec<usize> = texts.iter().map(|text| text.tokens.len()).collect();
    let mut readings = vec![Reading::default(); texts.len()];
    for micro in micro_batches(&lengths, tokens_max) {
        let packed = Packed::new(&micro.iter().map(|&index| texts[index]).collect::<Vec<_>>());
        for (index, reading) in micro.into_iter().zip(learner.read(&packed)?) {
            readings[index] = reading;
        }
    }
    Ok(readings)
}

impl Objective {
    /// Computes the loss of `batch` and its metrics, and for [`Pass::Learn`] adds its gradient to those of the trained weights.
    /// No micro-batch has more than `tokens_max` tokens, unless one example has.
    ///
    /// # Errors
    /// As [`Learner::read`], or [`Error::Internal`] if an example is not of the kind that the stage learns from.
    pub fn step(&self, learner: &Learner, batch: &Batch<'_>, tokens_max: usize, pass: Pass) -> Result<Tally> {
        let mut tally = Tally::default();
        let step = Step { objective: *self, count: self.count(batch), z0: self.baseline(learner, batch, tokens_max)? };
        if let Self::Kto { beta, .. } = self {
            tally.add("kl", beta * step.z0, 1.0);
        }
        let lengths: Vec<usize> = batch.examples.iter().map(|example| example.token_count()).collect();
        for micro in micro_batches(&lengths, tokens_max) {
            let texts: Vec<&Text> = micro.iter().flat_map(|&index| batch.examples[index].texts()).collect();
            let packed = Packed::new(&texts);
            tally.tokens += packed.tokens.len() as u64;
            let mut failed = None;
            let mut slopes = |readings: &[Reading]| match step.slopes(batch, &micro, readings, &mut tally) {
                Ok(slopes) => slopes,
                Err(error) => {
                    failed = Some(error);
                    vec![0.0; readings.len()]
                }
            };
            match (pass, self) {
                (Pass::Learn, Self::Sft) => {
                    drop(slopes(&learner.learn(&packed, Slopes::Same(-1.0 / step.count))?));
                }
                (Pass::Learn, _) => drop(learner.learn(&packed, Slopes::Of(&mut slopes))?),
                (Pass::Read, _) => drop(slopes(&learner.read(&packed)?)),
            }
            if let Some(error) = failed {
                return Err(error);
            }
        }
        Ok(tally)
    }

    /// What the sum of losses of `batch` is divided by.
    fn count(&self, batch: &Batch<'_>) -> f64 {
        let texts = || batch.examples.iter().flat_map(|example| example.texts());
        match self {
            Self::Sft => texts().map(Text::target_count).sum::<usize>() as f64,
            _ => batch.examples.len() as f64,
        }
    }

    /// KTO's z0 over all mismatched answers of the step.
    fn baseline(&self, learner: &Learner, batch: &Batch<'_>, tokens_max: usize) -> Result<f64> {
        if !matches!(self, Self::Kto { .. }) {
            return Ok(0.0);
        }
        let texts: Vec<&Text> = batch.mismatched.iter().map(|(text, _)| *text).collect();
        let readings = read(learner, &texts, tokens_max)?;
        let likelihood = |(reading, (_, reference)): (&Reading, &(&Text, f64))| Likelihood {
            policy: reading.value,
            reference: *reference,
        };
        Ok(kto_baseline(&readings.iter().zip(&batch.mismatched).map(likelihood).collect::<Vec<_>>()))
    }
}

/// An objective and what all micro-batches of a step share.
struct Step {
    objective: Objective,
    /// Targets or examples of the step.
    count: f64,
    z0: f64,
}

impl Step {
    /// The slopes of the texts of the examples `micro` from what the model says of them, `[texts]`; counts the metrics.
    fn slopes(
        &self,
        batch: &Batch<'_>,
        micro: &[usize],
        mut readings: &[Reading],
        tally: &mut Tally,
    ) -> Result<Vec<f64>> {
        let mut slopes = Vec::with_capacity(readings.len());
        for &index in micro {
            let example = batch.examples[index];
            let (mine, rest) = readings.split_at(example.texts().count());
            readings = rest;
            let references = batch.references.get(index).copied().unwrap_or_default();
            self.example(example, mine, references, tally, &mut slopes)?;
        }
        Ok(slopes.into_iter().map(|slope| slope / self.count).collect())
    }

    fn example(
        &self,
        example: &Example,
        readings: &[Reading],
        references: &[f64],
        tally: &mut Tally,
        slopes: &mut Vec<f64>,
    ) -> Result<()> {
        let likelihood = |text: usize| -> Result<Likelihood> {
            let reference = references.get(text).copied();
            let reference = reference.ok_or_else(|| Error::internal("a text without a reference log-probability"))?;
            Ok(Likelihood { policy: readings[text].value, reference })
        };
        match (self.objective, example) {
            (Objective::Sft, Example::Text(_)) => {
                count_targets(&readings[0], tally);
                slopes.push(-1.0);
            }
            (Objective::Kto { beta, desirable, undesirable }, Example::Answer { desirable: good, .. }) => {
                let terms = KtoTerms { beta, desirable, undesirable, z0: self.z0 };
                let loss = objective::kto(likelihood(0)?, *good, terms);
                count_answer(&loss, *good, &readings[0], tally);
                slopes.push(loss.slope);
            }
            (_, Example::Pair { absolute, margin, .. }) => {
                let loss = match self.objective {
                    Objective::Dpo { beta, label_smoothing } => {
                        objective::dpo(likelihood(0)?, likelihood(1)?, beta, label_smoothing)
                    }
                    Objective::Nca { beta } => objective::nca(likelihood(0)?, likelihood(1)?, beta),
                    Objective::Reward { bradley_terry, margin: margins, centre } => {
                        let margin = margin.filter(|_| margins).map_or(0.0, f64::from);
                        let terms = RewardTerms { bradley_terry, absolute: *absolute, margin, centre };
                        objective::reward(readings[0].value, readings[1].value, terms)
                    }
                    _ => return Err(Error::internal("a pair where the stage learns from single texts")),
                };
                match self.objective {
                    Objective::Reward { .. } => count_rewards(&loss, tally),
                    _ => count_pair(&loss, readings, tally),
                }
                slopes.extend([loss.d_chosen, loss.d_rejected]);
            }
            _ => return Err(Error::internal("an example of another stage")),
        }
        Ok(())
    }
}

fn count_targets(reading: &Reading, tally: &mut Tally) {
    let targets = reading.targets as f64;
    tally.add("loss", -reading.value / targets, targets);
    tally.add("entropy", reading.entropy / targets, targets);
    tally.add("mean_token_accuracy", reading.correct as f64 / targets, targets);
}

fn count_pair(loss: &PairLoss, readings: &[Reading], tally: &mut Tally) {
    tally.add("loss", loss.loss, 1.0);
    tally.add("rewards/chosen", loss.chosen, 1.0);
    tally.add("rewards/rejected", loss.rejected, 1.0);
    tally.add("rewards/margins", loss.chosen - loss.rejected, 1.0);
    tally.add("rewards/accuracies", f64::from(loss.chosen > loss.rejected), 1.0);
    tally.add("logps/chosen", readings[0].value, 1.0);
    tally.add("logps/rejected", readings[1].value, 1.0);
}

fn count_rewards(loss: &PairLoss, tally: &mut Tally) {
    tally.add("loss", loss.loss, 1.0);
    tally.add("accuracy", f64::from(loss.chosen > loss.rejected), 1.0);
    tally.add("margin", loss.chosen - loss.rejected, 1.0);
    tally.add("mean_reward", (loss.chosen + loss.rejected) / 2.0, 1.0);
    for reward in [loss.chosen, loss.rejected] {
        tally.extreme("min_reward", reward);
        tally.extreme("max_reward", reward);
    }
}

fn count_answer(loss: &AnswerLoss, desirable: bool, reading: &Reading, tally: &mut Tally) {
    tally.add("loss", loss.loss, 1.0);
    let [reward, logps] =
        if desirable { ["rewards/chosen", "logps/chosen"] } else { ["rewards/rejected", "logps/rejected"] };
    tally.add(reward, loss.reward, 1.0);
    tally.add(logps, reading.value, 1.0);
}
