//! From one row of raw logits and a [`Draw`] to a token: biases, masks and penalties, then `ops::sample`.
//! Reported log-probabilities are those of the raw row.

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::engine::request::{SamplingParams, TokenId, TokenLogProb};
use crate::engine::step::Draw;
use crate::error::{Error, Result};
use crate::ops::logprobs::LogSoftmax;
use crate::ops::sample::{Filters, pick, uniform};

/// The next token for `logits` `[vocab]`, and its log-probability if the parameters ask for it.
///
/// # Errors
/// [`Error::Internal`] if the logits are no distribution; [`Error::Invalid`] if a parameter is out of range.
pub fn draw(logits: &[f32], draw: &Draw) -> Result<(TokenId, Option<TokenLogProb>)> {
    let params = draw.params.as_ref();
    let filters = Filters {
        temperature: params.temperature,
        top_k: params.top_k,
        top_p: params.top_p,
        min_p: params.min_p,
    };
    let token = pick(&adjusted(logits, draw)?, &filters, uniform(params.seed, draw.position as u64))?;
    let logprob = params.logprobs.map(|top| logprob(logits, token, top)).transpose()?;
    Ok((token, logprob))
}

/// The log-probability of `token` under raw `logits` `[vocab]`, with the `top` best tokens.
///
/// # Errors
/// [`Error::Internal`] if the logits are no distribution; [`Error::Invalid`] if `token` is outside the vocabulary.
pub fn logprob(logits: &[f32], token: TokenId, top: usize) -> Result<TokenLogProb> {
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
        *logit =
            if *logit > 0.0 { *logit / params.repetition_penalty } else { *logit * params.repetition_penalty };
        if count > 0 {
            *logit -= params.presence_penalty + params.frequency_penalty * count as f32;
        }
    }
}
