//! Log-probabilities of one row of logits: log-softmax with one order of summation, and the best entries.
//! Which rows are read is the caller's business. Training reads the same numbers, and their gradients.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, DType};

use super::host;
use super::lanes::{Body, Isa, Kernel, LANES, store_part, widen_part};
use super::parallel::filled;
use super::select::{best, between};
use super::storage::slice;
#[cfg(feature = "cuda")]
use super::{cuda, kernels};
use crate::error::{Error, Result};

/// The natural logarithm of a softmax: `x[t] - max - ln(sum of exp(x[i] - max))`. The terms are f32, summed in f64 in sixteen
/// lanes (id mod 16) that are added up in order, so the bits depend on the row alone.
#[derive(Debug, Clone, Copy)]
pub struct LogSoftmax<'a> {
    logits: &'a [f32],
    max: f32,
    log_sum: f64,
}

impl<'a> LogSoftmax<'a> {
    /// Normalises `logits` `[vocab]`; entries of minus infinity have no probability.
    ///
    /// # Errors
    /// [`Error::Internal`] if an entry is not a number or plus infinity, or if none is finite.
    pub fn new(logits: &'a [f32]) -> Result<Self> {
        let max = largest(logits)?;
        let sum = Body::best().run(SumOfExp { logits, max });
        Ok(Self { logits, max, log_sum: sum.ln() })
    }

    /// The log-probability of `token`: at most 0, minus infinity for an impossible one, never NaN.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `token` is outside the vocabulary.
    pub fn at(&self, token: u32) -> Result<f32> {
        let logit = self.logits.get(token as usize).ok_or_else(|| {
            Error::invalid("prompt", format!("token {token} is outside the vocabulary of {}", self.logits.len()))
        })?;
        Ok(self.of(*logit))
    }

    /// The `count` most probable tokens (all of them if there are fewer), best first, ties by lower id.
    pub fn top(&self, count: usize) -> Vec<(u32, f32)> {
        best(self.logits, count).into_iter().map(|token| (token, self.of(self.logits[token as usize]))).collect()
    }

    fn of(&self, logit: f32) -> f32 {
        (f64::from(logit - self.max) - self.log_sum) as f32
    }

    /// Minus the mean log-probability of the distribution, in nats.
    fn entropy(&self) -> f64 {
        let sum = Body::best().run(SumOfProducts { logits: self.logits, max: self.max });
        self.log_sum - sum / self.log_sum.exp()
    }
}

/// What a training step reads off its logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TargetScore {
    /// The log-probability of the target, as serving gives it.
    pub logprob: f32,
    /// The entropy of the distribution, in nats.
    pub entropy: f32,
    /// Whether the target is the most probable token.
    pub correct: bool,
}

/// Scores each row of `logits` `[R, vocab]` f32 for its target token, `[R]`.
///
/// # Errors
/// If a logit is not a number, or a target is outside the vocabulary.
pub fn target_scores(logits: &Tensor, targets: &[u32]) -> Result<Vec<TargetScore>> {
    let rows = logits.apply_op1_no_bwd(&Score { targets })?.to_vec2::<f32>()?;
    if let Some(row) = rows.iter().position(|row| row[0].is_nan()) {
        return Err(Error::Internal(format!("target scores: row {row}: the logits are no distribution")));
    }
    Ok(rows.iter().map(|row| TargetScore { logprob: row[0], entropy: row[1], correct: row[2] == 1.0 }).collect())
}

/// The gradient of `logits` `[R, vocab]` f32 from those of the targets' log-probabilities, `[R]`:
/// d logits = d logprob * (1 at the target - softmax).
///
/// # Errors
/// As [`target_scores`].
pub fn target_scores_backward(logits: &Tensor, targets: &[u32], slopes: &[f32]) -> Result<Tensor> {
    Ok(logits.apply_op1_no_bwd(&ScoreGradient { targets, slopes })?)
}

/// For each row of `logits` `[R, vocab]` the log-probability of its token, on the device of the logits, which do not leave it. None for
/// rows without a token, and for those that [`LogSoftmax`] has an error for.
///
/// # Errors
/// If a tensor operation fails.
pub fn logprobs(logits: &Tensor, tokens: &[Option<u32>]) -> Result<Vec<Option<f32>>> {
    let vocab = logits.dim(1)?;
    let tokens: Vec<_> = tokens.iter().map(|token| token.filter(|&token| (token as usize) < vocab)).collect();
    if tokens.iter().all(Option::is_none) {
        return Ok(vec![None; tokens.len()]);
    }
    let found = host::floats(&logits.apply_op1_no_bwd(&LogProbs { tokens: &tokens })?)?;
    let each = found.len() / tokens.len();
    let first = found.chunks(each).zip(&tokens).map(|(found, token)| token.map(|_| found[0]));
    Ok(first.map(|logprob| logprob.filter(|logprob| !logprob.is_nan())).collect())
}

struct LogProbs<'a> {
    tokens: &'a [Option<u32>],
}

impl CustomOp1 for LogProbs<'_> {
    fn name(&self) -> &'static str {
        "log-probabilities"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        map_rows(self.name(), (logits, layout), self.tokens.len(), 1, |row, logits, out| {
            let logprob = |token| LogSoftmax::new(logits).and_then(|softmax| softmax.at(token)).ok();
            out[0] = self.tokens[row].and_then(logprob).unwrap_or(f32::NAN);
            Ok(())
        })
    }

    /// With two more numbers for each row.
    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, logits: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let targets: Vec<u32> = self.tokens.iter().map(|token| token.unwrap_or(0)).collect();
        Score { targets: &targets }.cuda_fwd(logits, layout)
    }
}

struct Score<'a> {
    targets: &'a [u32],
}

impl CustomOp1 for Score<'_> {
    fn name(&self) -> &'static str {
        "target scores"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let rows = self.targets.len();
        map_rows(self.name(), (logits, layout), rows, 3, |row, logits, out| {
            let softmax = LogSoftmax::new(logits)?;
            let logprob = softmax.at(self.targets[row])?;
            let correct = logits[self.targets[row] as usize] == softmax.max;
            out.copy_from_slice(&[logprob, softmax.entropy() as f32, f32::from(correct)]);
            Ok(())
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, logits: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let (rows, vocab) = layout.shape().dims2()?;
        if let Some(target) = self.targets.iter().find(|&&target| target as usize >= vocab) {
            candle_core::bail!("target scores: token {target} is outside the vocabulary of {vocab}");
        }
        if rows != self.targets.len() {
            candle_core::bail!("target scores: {rows} rows of logits for {} targets", self.targets.len());
        }
        let (device, dtype) = (&logits.device, cuda::dtype(self.name(), logits)?);
        let (out, targets) = (cuda::output(device, DType::F32, rows * 3)?, cuda::upload(device, self.targets)?);
        let addresses = [
            cuda::base(self.name(), &out)?,
            cuda::address(self.name(), logits, layout, dtype)?,
            cuda::base(self.name(), &targets)?,
        ];
        cuda::launch(device, &kernels::target_scores(dtype, addresses, [rows, vocab]))?;
        Ok((out, Shape::from((rows, 3))))
    }
}

struct ScoreGradient<'a> {
    targets: &'a [u32],
    slopes: &'a [f32],
}

impl CustomOp1 for ScoreGradient<'_> {
    fn name(&self) -> &'static str {
        "target scores gradient"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let width = layout.dims().last().copied().unwrap_or(0);
        map_rows(self.name(), (logits, layout), self.targets.len(), width, |row, logits, out| {
            let softmax = LogSoftmax::new(logits)?;
            softmax.at(self.targets[row])?;
            let scale = -f64::from(self.slopes[row]) / softmax.log_sum.exp();
            Body::best().run(Scaled { logits, max: softmax.max, scale: scale as f32, out });
            out[self.targets[row] as usize] += self.slopes[row];
            Ok(())
        })
    }
}

/// Computes `[rows, width]` from `[rows, vocab]` row by row, in parallel; the error of the first row that fails.
fn map_rows(
    op: &str,
    (logits, layout): (&CpuStorage, &Layout),
    rows: usize,
    width: usize,
    of_row: impl Fn(usize, &[f32], &mut [f32]) -> Result<()> + Sync,
) -> candle_core::Result<(CpuStorage, Shape)> {
    let (count, vocab) = layout.shape().dims2()?;
    if count != rows {
        candle_core::bail!("{op}: {count} rows of logits for {rows} targets");
    }
    let logits: &[f32] = slice(op, logits, layout)?;
    let failed = Mutex::new(BTreeMap::new());
    let out = filled(rows * width, width, |row, out| {
        if let Err(error) = of_row(row, &logits[row * vocab..][..vocab], out) {
            failed.lock().unwrap_or_else(PoisonError::into_inner).insert(row, error);
        }
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner).pop_first() {
        Some((row, error)) => candle_core::bail!("{op}: row {row}: {error}"),
        None => Ok((CpuStorage::F32(out), Shape::from((rows, width)))),
    }
}

/// Sixteen running sums in f64, added up in order.
struct Sums([f64; LANES]);

impl Sums {
    #[inline(always)]
    fn add(&mut self, terms: &[f32; LANES]) {
        self.0.iter_mut().zip(terms).for_each(|(sum, term)| *sum += f64::from(*term));
    }

    fn total(&self) -> f64 {
        self.0.iter().sum()
    }
}

/// The sum of e^(logit - max).
struct SumOfExp<'a> {
    logits: &'a [f32],
    max: f32,
}

impl Kernel for SumOfExp<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> f64 {
        let mut sums = Sums([0.0; LANES]);
        let mut terms = [0.0; LANES];
        let (full, tail) = self.logits.as_chunks();
        for logits in full {
            isa.store(isa.exp(isa.sub(isa.load(logits), isa.splat(self.max))), &mut terms);
            sums.add(&terms);
        }
        isa.store(isa.exp(isa.sub(widen_part(isa, tail), isa.splat(self.max))), &mut terms);
        terms[tail.len()..].fill(0.0);
        sums.add(&terms);
        sums.total()
    }
}

/// The sum of (logit - max) e^(logit - max).
struct SumOfProducts<'a> {
    logits: &'a [f32],
    max: f32,
}

impl Kernel for SumOfProducts<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> f64 {
        let mut sums = Sums([0.0; LANES]);
        let mut terms = [0.0; LANES];
        for logits in self.logits.chunks(LANES) {
            let shifted = isa.sub(widen_part(isa, logits), isa.splat(self.max));
            // Far below, the product is nothing; minus infinity times zero would not be a number.
            let shifted = isa.max(shifted, isa.splat(-88.0));
            isa.store(isa.mul(shifted, isa.exp(shifted)), &mut terms);
            terms[logits.len()..].fill(0.0);
            sums.add(&terms);
        }
        sums.total()
    }
}

/// `out` = scale * e^(logit - max).
struct Scaled<'a> {
    logits: &'a [f32],
    max: f32,
    scale: f32,
    out: &'a mut [f32],
}

impl Kernel for Scaled<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for (logits, out) in self.logits.chunks(LANES).zip(self.out.chunks_mut(LANES)) {
            let exp = isa.exp(isa.sub(widen_part(isa, logits), isa.splat(self.max)));
            store_part(isa, isa.mul(exp, isa.splat(self.scale)), out);
        }
    }
}

/// The id of the largest of `logits` `[vocab]`, the lowest one of equals.
///
/// # Errors
/// [`Error::Internal`] if an entry is not a number or plus infinity, or if none is finite.
pub fn argmax(logits: &[f32]) -> Result<u32> {
    let max = largest(logits)?;
    Ok(between(logits, max, f32::INFINITY).first().copied().unwrap_or_default())
}

/// The largest of `logits`; errors are those of [`argmax`].
pub(super) fn largest(logits: &[f32]) -> Result<f32> {
    match Body::best().run(Largest(logits)) {
        Some(f32::NEG_INFINITY) => {
            Err(Error::Internal("no token is possible: every logit is minus infinity".to_owned()))
        }
        Some(max) => Ok(max),
        None => {
            let (id, logit) = logits.iter().enumerate().find(|(_, x)| !is_logit(**x)).unwrap_or((0, &f32::NAN));
            Err(Error::Internal(format!("the model gave {logit} as the logit of token {id}")))
        }
    }
}

/// Whether `x` is a number below plus infinity.
fn is_logit(x: f32) -> bool {
    x < f32::INFINITY
}

/// The largest logit, minus infinity of none; nothing where one is not a logit.
struct Largest<'a>(&'a [f32]);

impl Kernel for Largest<'_> {
    type Output = Option<f32>;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> Option<f32> {
        let (full, tail) = self.0.as_chunks();
        let mut max = isa.splat(f32::NEG_INFINITY);
        let mut all = true;
        for logits in full {
            all &= logits.iter().fold(true, |all, x| all & is_logit(*x));
            max = isa.max(max, isa.load(logits));
        }
        let mut lanes = [0.0; LANES];
        isa.store(max, &mut lanes);
        all &= tail.iter().all(|x| is_logit(*x));
        all.then(|| lanes.iter().chain(tail).fold(f32::NEG_INFINITY, |max, x| max.max(*x)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::ops::samples::{check_close, differences, floats, numbers, tensor};

    #[test]
    fn matches_a_sum_in_double_precision() {
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 1009) as f32 * 0.03 - 11.0).collect();
        let total: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        let log_softmax = LogSoftmax::new(&logits).unwrap();
        for (token, &logit) in logits.iter().enumerate() {
            let expected = f64::from(logit) - total.ln();
            assert!((f64::from(log_softmax.at(token as u32).unwrap()) - expected).abs() < 2e-6);
        }
    }

    #[test]
    fn tokens_of_rows_have_the_log_probability_of_their_row() {
        let logits = (tensor(3, (4, 20)) * 4.0).unwrap();
        let mut rows = logits.to_vec2::<f32>().unwrap();
        let expected = LogSoftmax::new(&rows[0]).unwrap().at(7).unwrap();
        rows[2][3] = f32::NAN;
        let logits = Tensor::new(rows, logits.device()).unwrap();
        assert_eq!(logprobs(&logits, &[Some(7), None, Some(7), Some(20)]).unwrap(), [Some(expected), None, None, None]);
        assert_eq!(logprobs(&logits, &[None; 4]).unwrap(), [None; 4]);
        assert!(logprobs(&logits, &[Some(1); 3]).is_err());
    }

    #[test]
    fn targets_score_as_in_serving_and_their_gradients_are_those_of_differences() {
        for vocab in [1, 5, 16, 100] {
            let logits = (tensor(1, (7, vocab)) * 4.0).unwrap();
            let targets: Vec<u32> = (0..7).map(|row| (row * 31) % vocab as u32).collect();
            let rows = logits.to_vec2::<f32>().unwrap();
            let scores = target_scores(&logits, &targets).unwrap();
            for ((row, score), &target) in rows.iter().zip(&scores).zip(&targets) {
                let softmax = LogSoftmax::new(row).unwrap();
                assert_eq!(score.logprob, softmax.at(target).unwrap());
                assert_eq!(score.correct, argmax(row).unwrap() == target);
                let total: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
                let entropy: f64 = row.iter().map(|&x| (total.ln() - f64::from(x)) * f64::from(x).exp() / total).sum();
                assert!((f64::from(score.entropy) - entropy).abs() < 1e-5, "{} and {entropy}", score.entropy);
            }
            let slopes = numbers(2, 7);
            let naive = |logits: &Tensor| {
                let logprob = |(row, target): (Vec<f32>, &u32)| {
                    f64::from(row[*target as usize]) - row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln()
                };
                logits.to_vec2().unwrap().into_iter().zip(&targets).map(logprob).collect()
            };
            let got = target_scores_backward(&logits, &targets, &slopes).unwrap();
            check_close("gradient", &floats(&got), &differences(&logits, naive, &slopes), 1e-4);
        }
        let broken = Tensor::new(&[[0.0f32, f32::NAN]], &candle_core::Device::Cpu).unwrap();
        assert!(target_scores(&broken, &[0]).unwrap_err().to_string().contains("row 0"));
        assert!(target_scores(&tensor(1, (1, 4)), &[4]).is_err());
        assert!(target_scores(&tensor(1, (2, 4)), &[1]).is_err());
    }

    #[test]
    fn survives_huge_logits_and_impossible_tokens() {
        let logits = [f32::NEG_INFINITY, 1e30, f32::NEG_INFINITY, 1e30, -1e30];
        let log_softmax = LogSoftmax::new(&logits).unwrap();
        assert_eq!(log_softmax.at(0).unwrap(), f32::NEG_INFINITY);
        assert!((log_softmax.at(1).unwrap() + std::f32::consts::LN_2).abs() < 1e-7);
        assert_eq!(log_softmax.at(4).unwrap(), -2e30);
        assert!(LogSoftmax::new(&[3.0]).unwrap().at(0).unwrap() == 0.0);
    }

    #[test]
    fn best_come_first_and_ties_go_to_the_lower_id() {
        let logits = [1.0, 3.0, -0.0, 3.0, 0.0, f32::NEG_INFINITY];
        let ids = |count| LogSoftmax::new(&logits).unwrap().top(count).iter().map(|(id, _)| *id).collect::<Vec<_>>();
        assert_eq!(ids(0), Vec::<u32>::new());
        assert_eq!(ids(1), [1]);
        assert_eq!(ids(2), [1, 3]);
        assert_eq!(ids(4), [1, 3, 0, 2]);
        assert_eq!(ids(9), [1, 3, 0, 2, 4, 5]);
    }

    #[test]
    fn what_is_not_a_distribution_is_an_error() {
        for logits in [&[0.0, f32::NAN][..], &[f32::INFINITY, 0.0], &[f32::NEG_INFINITY; 3], &[]] {
            assert!(matches!(LogSoftmax::new(logits).unwrap_err(), Error::Internal(_)));
        }
        assert!(matches!(LogSoftmax::new(&[0.0]).unwrap().at(1).unwrap_err(), Error::Invalid { .. }));
    }
}
