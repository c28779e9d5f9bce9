//! Log-probabilities of one row of logits: log-softmax with one order of summation, and the best entries.
//! Works on numbers already on the host; which rows are read is the runner's business.

use std::cmp::Ordering;

use crate::error::{Error, Result};

/// The natural logarithm of a softmax: `x[t] - max - ln(sum of exp(x[i] - max))`. The terms are f32, their sum is
/// f64 in id order, so the bits depend on the row alone.
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
        let max = logits[argmax(logits)? as usize];
        let sum: f64 = logits.iter().map(|&logit| f64::from((logit - max).exp())).sum();
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
}

/// The id of the largest of `logits` `[vocab]`, the lowest one of equals.
///
/// # Errors
/// [`Error::Internal`] if an entry is not a number or plus infinity, or if none is finite.
pub fn argmax(logits: &[f32]) -> Result<u32> {
    let mut max = f32::NEG_INFINITY;
    let mut token = None;
    for (id, &logit) in logits.iter().enumerate() {
        if logit.is_nan() || logit == f32::INFINITY {
            return Err(Error::Internal(format!("the model gave {logit} as the logit of token {id}")));
        }
        if logit > max {
            max = logit;
            token = Some(id as u32);
        }
    }
    token.ok_or_else(|| Error::Internal("no token is possible: every logit is minus infinity".to_owned()))
}

/// The ids of the `count` largest of `logits`, best first, ties by lower id. No entry may be NaN.
pub(super) fn best(logits: &[f32], count: usize) -> Vec<u32> {
    let order = |a: &u32, b: &u32| better(logits[*a as usize], *a, logits[*b as usize], *b);
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    if count == 0 {
        return Vec::new();
    }
    if count < ids.len() {
        // Only the selected ones are sorted: the vocabulary is large and `count` small.
        ids.select_nth_unstable_by(count - 1, order);
        ids.truncate(count);
    }
    ids.sort_unstable_by(order);
    ids
}

/// `Less` if entry `a` with logit `x` comes before entry `b` with logit `y`: larger first, then the lower id.
pub(super) fn better(x: f32, a: u32, y: f32, b: u32) -> Ordering {
    y.partial_cmp(&x).unwrap_or(Ordering::Equal).then(a.cmp(&b))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

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
