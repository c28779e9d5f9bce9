//! From one row of raw logits and a [`Draw`] to a token: biases, masks and penalties, then `ops::sample`.
//! Reported log-probabilities are those of the raw row.

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::engine::request::{SamplingParams, TokenId, TokenLogProb};
use crate::engine::step::Draw;
use crate::error::{Error, Result};
use crate::ops::kernels::SAMPLE_VOCAB_MAX;
use crate::ops::logprobs::LogSoftmax;
use crate::ops::sample::{self, Filters, pick, uniform};

/// The same draw for `ops::sample::draw`, if a row of `vocab` logits is drawn from as it is, and needed for nothing else than the
/// log-probability of the drawn token.
pub(super) fn plain(draw: &Draw, vocab: usize) -> Option<sample::Draw> {
    let (params, filters) = (draw.params.as_ref(), filters(&draw.params));
    let masked = draw.generated_count < params.min_tokens && !params.stop_token_ids.is_empty();
    let changed = masked || !params.logit_bias.is_empty() || params.needs_history();
    let possible = filters.are_possible() && vocab <= SAMPLE_VOCAB_MAX;
    (possible && !changed && params.logprobs.unwrap_or(0) == 0).then(|| sample::Draw {
        filters,
        seed: params.seed,
        counter: draw.position as u64,
        logprob: params.logprobs.is_some(),
    })
}

fn filters(params: &SamplingParams) -> Filters {
    Filters { temperature: params.temperature, top_k: params.top_k, top_p: params.top_p, min_p: params.min_p }
}

/// The next token for `logits` `[vocab]`, and its log-probability if the parameters ask for it.
///
/// # Errors
/// [`Error::Internal`] if the logits are no distribution; [`Error::Invalid`] if a parameter is out of range.
pub(super) fn draw(logits: &[f32], draw: &Draw) -> Result<(TokenId, Option<TokenLogProb>)> {
    let params = draw.params.as_ref();
    let token = pick(&adjusted(logits, draw)?, &filters(params), uniform(params.seed, draw.position as u64))?;
    let logprob = params.logprobs.map(|top| logprob(logits, token, top)).transpose()?;
    Ok((token, logprob))
}

/// The log-probability of `token` under raw `logits` `[vocab]`, with the `top` best tokens.
///
/// # Errors
/// [`Error::Internal`] if the logits are no distribution; [`Error::Invalid`] if `token` is outside the vocabulary.
pub(super) fn logprob(logits: &[f32], token: TokenId, top: usize) -> Result<TokenLogProb> {
    let log_softmax = LogSoftmax::new(logits)?;
    Ok(TokenLogProb { token, logprob: log_softmax.at(token)?, top: log_softmax.top(top) })
}

/// Bias, then the mask of stop tokens, then penalties. Copies the row only if one of them is on.
fn adjusted<'a>(logits: &'a [f32], draw: &Draw) -> Result<Cow<'a, [f32]>> {
    let params = draw.params.as_ref();
    let mut row = Cow::Borrowed(logits);
    for &(token, bias) in &params.logit_bias {
        let logit = row.to_mut().get_mut(token as usize).ok_or_else(|| {
            let message = format!("token {token} is outside the vocabulary of {}", logits.len());
            Error::invalid("logit_bias", message)
        })?;
        if bias.is_nan() || bias == f32::INFINITY {
            return Err(Error::invalid("logit_bias", format!("the bias of token {token} cannot be {bias}")));
        }
        *logit += bias;
    }
    if draw.generated_count < params.min_tokens {
        for &token in &params.stop_token_ids {
            // A stop token outside the vocabulary is never drawn anyway.
            if let Some(logit) = row.to_mut().get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    if params.needs_history() {
        penalise(row.to_mut(), params, draw);
    }
    Ok(row)
}

/// Repetition over prompt and output, presence and frequency over the output.
fn penalise(row: &mut [f32], params: &SamplingParams, draw: &Draw) {
    let mut counts: BTreeMap<TokenId, u32> = BTreeMap::new();
    for (position, &token) in draw.history.iter().enumerate() {
        *counts.entry(token).or_default() += u32::from(position >= draw.prompt_len);
    }
    for (token, count) in counts {
        let Some(logit) = row.get_mut(token as usize) else { continue };
        // Dividing a negative logit would make the token more probable.
        *logit = if *logit > 0.0 { *logit / params.repetition_penalty } else { *logit * params.repetition_penalty };
        if count > 0 {
            *logit -= params.presence_penalty + params.frequency_penalty * count as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::sync::Arc;

    use super::*;
    use crate::ops::sample::Drawn;

    const NEVER: f32 = f32::NEG_INFINITY;

    fn drawing(params: SamplingParams, generated_count: usize, history: &[TokenId], prompt_len: usize) -> Draw {
        Draw { params: Arc::new(params), position: 9, generated_count, history: history.to_vec(), prompt_len }
    }

    #[track_caller]
    fn check(logits: &[f32], draw: &Draw, expected: &[f32]) {
        assert_eq!(adjusted(logits, draw).unwrap().as_ref(), expected);
    }

    #[test]
    fn neutral_parameters_leave_the_row_alone() {
        let draw = drawing(SamplingParams { stop_token_ids: vec![1], ..SamplingParams::default() }, 0, &[], 0);
        assert!(matches!(adjusted(&[1.0, 2.0], &draw).unwrap(), Cow::Borrowed(_)));
    }

    #[test]
    fn bias_is_added_and_its_tokens_must_exist() {
        let biased = |logit_bias| drawing(SamplingParams { logit_bias, ..SamplingParams::default() }, 0, &[], 0);
        check(&[1.0, 2.0, 3.0], &biased(vec![(0, 5.0), (2, NEVER), (0, -1.0)]), &[5.0, 2.0, NEVER]);
        for logit_bias in [vec![(3, 1.0)], vec![(0, f32::NAN)], vec![(0, f32::INFINITY)]] {
            let error = adjusted(&[1.0, 2.0, 3.0], &biased(logit_bias)).unwrap_err();
            assert!(matches!(error, Error::Invalid { field: Some(field), .. } if field == "logit_bias"));
        }
    }

    #[test]
    fn stop_tokens_are_masked_until_enough_is_generated_even_against_a_bias() {
        let params = SamplingParams {
            min_tokens: 2,
            stop_token_ids: vec![1, 77],
            logit_bias: vec![(1, 100.0)],
            ..SamplingParams::default()
        };
        check(&[1.0, 2.0, 3.0], &drawing(params.clone(), 1, &[], 0), &[1.0, NEVER, 3.0]);
        check(&[1.0, 2.0, 3.0], &drawing(params, 2, &[], 0), &[1.0, 102.0, 3.0]);
    }

    #[test]
    fn repetition_covers_the_prompt_and_the_other_penalties_do_not() {
        let history = [0, 3, 1, 2, 2];
        let params = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::default() };
        check(&[4.0, -4.0, 0.0, NEVER, 8.0], &drawing(params, 2, &history, 3), &[2.0, -8.0, 0.0, NEVER, 8.0]);
        let params = SamplingParams { presence_penalty: 0.5, ..SamplingParams::default() };
        check(&[4.0, -4.0, 1.0, 3.0], &drawing(params, 2, &history, 3), &[4.0, -4.0, 0.5, 3.0]);
        let params = SamplingParams { frequency_penalty: 0.5, ..SamplingParams::default() };
        check(&[4.0, -4.0, 1.0, 3.0], &drawing(params, 2, &history, 3), &[4.0, -4.0, 0.0, 3.0]);
        let params = SamplingParams { repetition_penalty: 2.0, frequency_penalty: 0.25, ..SamplingParams::default() };
        check(&[4.0, -4.0, 1.0, 3.0], &drawing(params, 2, &history, 3), &[2.0, -8.0, 0.0, 1.5]);
    }

    #[test]
    fn a_plain_draw_is_the_same_draw() {
        let params = SamplingParams {
            temperature: 0.8,
            top_k: 7,
            top_p: 0.9,
            min_p: 0.01,
            seed: 5,
            stop_token_ids: vec![1],
            ..SamplingParams::default()
        };
        let logits: Vec<f32> = (0..50).map(|i| (i * i % 37) as f32 * 0.25).collect();
        let device = candle_core::Device::Cpu;
        let row = candle_core::Tensor::from_slice(&logits, (1, 50), &device).unwrap();
        for (position, logprobs) in (0..20).zip([None, Some(0)].into_iter().cycle()) {
            let params = SamplingParams { logprobs, ..params.clone() };
            let drawn = Draw { position, ..drawing(params, 0, &[], 0) };
            let rows = [plain(&drawn, 50)];
            let found = sample::read(&sample::draw(&row, &sample::Draws::new(&rows, &device).unwrap()).unwrap(), &rows);
            let (token, logprob) = draw(&logits, &drawn).unwrap();
            let logprob = logprob.map(|logprob| logprob.logprob);
            assert_eq!((logprobs.is_some(), found.unwrap()), (logprob.is_some(), vec![Some(Drawn { token, logprob })]));
        }
        let not = |change: &dyn Fn(&mut SamplingParams)| {
            let mut params = params.clone();
            change(&mut params);
            assert!(plain(&drawing(params, 0, &[], 0), 50).is_none());
        };
        not(&|params| params.logit_bias = vec![(1, 1.0)]);
        not(&|params| params.min_tokens = 1);
        not(&|params| params.presence_penalty = 0.5);
        not(&|params| params.logprobs = Some(1));
        not(&|params| params.top_p = 1.5);
        assert!(plain(&drawing(params.clone(), 0, &[], 0), SAMPLE_VOCAB_MAX + 1).is_none());
    }

    #[test]
    fn reported_log_probabilities_are_those_of_the_model() {
        let params = SamplingParams {
            temperature: 0.1,
            top_k: 1,
            logit_bias: vec![(2, 50.0)],
            logprobs: Some(2),
            ..SamplingParams::default()
        };
        let logits = [0.0, 4.0f32.ln(), 3.0f32.ln()];
        let (token, logprob) = draw(&logits, &drawing(params, 0, &[], 0)).unwrap();
        let logprob = logprob.unwrap();
        assert_eq!((token, logprob.token), (2, 2));
        assert!((logprob.logprob - (3.0f32 / 8.0).ln()).abs() < 1e-6);
        assert_eq!(logprob.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 2]);
        assert!((logprob.top[0].1 - 0.5f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn the_seed_and_the_position_decide_the_token() {
        let params = |seed| SamplingParams { temperature: 1.0, seed, ..SamplingParams::default() };
        let logits = [0.0; 50];
        let at = |seed, position| draw(&logits, &Draw { position, ..drawing(params(seed), 0, &[], 0) }).unwrap().0;
        let tokens: Vec<u32> = (0..40).map(|position| at(3, position)).collect();
        assert_eq!(tokens, (0..40).map(|position| at(3, position)).collect::<Vec<_>>());
        assert_ne!(tokens, (0..40).map(|position| at(4, position)).collect::<Vec<_>>());
        let distinct: std::collections::BTreeSet<u32> = tokens.into_iter().collect();
        assert!(distinct.len() > 20, "{distinct:?}");
    }
}
