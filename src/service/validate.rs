//! Ranges of a generation's parameters, checked before anything is tokenised or queued.
//! Every message names the field, the bound and what was given.

use super::{ServiceLimits, TokenId, generate::GenerateRequest};
use crate::error::{Error, Result};

/// Seeds drawn here stay below this, so that JSON readers with doubles keep them exactly.
pub(super) const SEED_END: u64 = 1 << 53;

/// Checks everything that does not need the prompt's tokens.
pub(super) fn check(request: &GenerateRequest, limits: &ServiceLimits, vocab_size: usize) -> Result<()> {
    numbers(request)?;
    lists(request, limits, vocab_size)?;
    for (field, asked) in [("logprobs", request.logprobs), ("prompt_logprobs", request.prompt_logprobs)] {
        at_most(field, asked.unwrap_or(0), limits.top_logprobs_max)?;
    }
    Ok(())
}

/// Checks a number of candidates: at least one, at most `max`.
pub(super) fn count(field: &str, count: usize, max: usize) -> Result<()> {
    if count == 0 {
        return Err(Error::invalid(field, format!("{field} must be at least 1")));
    }
    at_most(field, count, max)
}

/// Checks the length of a list that must not be empty.
pub(super) fn count_of(field: &str, what: &str, count: usize, max: usize) -> Result<()> {
    if count == 0 {
        return Err(Error::invalid(field, format!("{field}: at least one of {what} is needed")));
    }
    if count > max {
        let message = format!("{field} holds {count} {what}, but at most {max} are allowed");
        return Err(Error::invalid(field, message));
    }
    Ok(())
}

/// Refuses token ids that the model does not have.
pub(super) fn ids(field: &str, ids: impl IntoIterator<Item = TokenId>, vocab_size: usize) -> Result<()> {
    match ids.into_iter().find(|&id| id as usize >= vocab_size) {
        Some(id) => {
            let message = format!("{field}: token id {id} is outside the vocabulary of {vocab_size} tokens");
            Err(Error::invalid(field, message))
        }
        None => Ok(()),
    }
}

/// Tokens that each candidate may draw.
pub(super) fn max_tokens(request: &GenerateRequest, prompt_len: usize, len_max: usize) -> Result<usize> {
    let field = request.prompt.field();
    let context = format!("the context of this model holds {len_max} tokens");
    if prompt_len > len_max {
        return Err(Error::invalid(field, format!("{field} is {prompt_len} tokens long, but {context}")));
    }
    let room = len_max - prompt_len;
    let max_tokens = match request.max_tokens {
        None if room == 0 => {
            return Err(Error::invalid(
                field,
                format!("{field} is {prompt_len} tokens long, which leaves none to generate: {context}"),
            ));
        }
        None => room,
        Some(asked) if asked > room => {
            let message = format!(
                "max_tokens is {asked} and {field} is {prompt_len} tokens long, together {}, but {context}",
                asked.saturating_add(prompt_len)
            );
            return Err(Error::invalid("max_tokens", message));
        }
        Some(asked) => asked,
    };
    if request.min_tokens > max_tokens {
        let message = format!("min_tokens is {}, but at most {max_tokens} tokens can be generated", request.min_tokens);
        return Err(Error::invalid("min_tokens", message));
    }
    Ok(max_tokens)
}

fn numbers(request: &GenerateRequest) -> Result<()> {
    between("temperature", request.temperature, 0.0, 2.0)?;
    between("min_p", request.min_p, 0.0, 1.0)?;
    between("presence_penalty", request.presence_penalty, -2.0, 2.0)?;
    between("frequency_penalty", request.frequency_penalty, -2.0, 2.0)?;
    above_zero("top_p", request.top_p, 1.0)?;
    above_zero("repetition_penalty", request.repetition_penalty, 10.0)
}

fn lists(request: &GenerateRequest, limits: &ServiceLimits, vocab_size: usize) -> Result<()> {
    entries("stop", request.stop.len(), limits.stop_max)?;
    for stop in &request.stop {
        if stop.is_empty() {
            return Err(Error::invalid("stop", "stop: an empty string would stop at once; leave it out"));
        }
        if stop.len() > limits.stop_bytes_max {
            let message =
                format!("stop: a string of {} bytes; at most {} are allowed", stop.len(), limits.stop_bytes_max);
            return Err(Error::invalid("stop", message));
        }
    }
    entries("stop_token_ids", request.stop_token_ids.len(), limits.stop_max)?;
    ids("stop_token_ids", request.stop_token_ids.iter().copied(), vocab_size)?;
    entries("logit_bias", request.logit_bias.len(), limits.logit_bias_max)?;
    ids("logit_bias", request.logit_bias.iter().map(|(id, _)| *id), vocab_size)?;
    request.logit_bias.iter().try_for_each(|(_, bias)| between("logit_bias", *bias, -100.0, 100.0))
}

fn between(field: &str, value: f32, low: f32, high: f32) -> Result<()> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(Error::invalid(field, format!("{field} must be between {low} and {high}, not {value}")))
}

fn above_zero(field: &str, value: f32, high: f32) -> Result<()> {
    if value > 0.0 && value <= high {
        return Ok(());
    }
    Err(Error::invalid(field, format!("{field} must be above 0 and at most {high}, not {value}")))
}

fn at_most(field: &str, value: usize, max: usize) -> Result<()> {
    if value <= max {
        return Ok(());
    }
    Err(Error::invalid(field, format!("{field} is {value}, but at most {max} is allowed")))
}

fn entries(field: &str, count: usize, max: usize) -> Result<()> {
    if count <= max {
        return Ok(());
    }
    Err(Error::invalid(field, format!("{field} has {count} entries, but at most {max} are allowed")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use crate::service::Prompt;

    fn plain() -> GenerateRequest {
        GenerateRequest::new(Prompt::Text("1".into()))
    }

    fn refusal(result: Result<impl std::fmt::Debug>) -> (String, String) {
        match result {
            Err(Error::Invalid { message, field }) => (field.expect("a field"), message),
            other => panic!("not refused: {other:?}"),
        }
    }

    #[track_caller]
    fn check_refused(change: impl FnOnce(&mut GenerateRequest), field: &str, message: &str) {
        let mut request = plain();
        change(&mut request);
        let limits = ServiceLimits { stop_max: 2, stop_bytes_max: 4, logit_bias_max: 2, ..ServiceLimits::default() };
        assert_eq!(refusal(check(&request, &limits, 320)), (field.to_string(), message.to_string()));
    }

    #[track_caller]
    fn check_allowed(change: impl FnOnce(&mut GenerateRequest)) {
        let mut request = plain();
        change(&mut request);
        check(&request, &ServiceLimits::default(), 320).unwrap();
    }

    #[test]
    fn numbers_are_bounded_and_finite() {
        check_refused(|r| r.temperature = -0.1, "temperature", "temperature must be between 0 and 2, not -0.1");
        check_refused(|r| r.temperature = 2.1, "temperature", "temperature must be between 0 and 2, not 2.1");
        check_refused(|r| r.temperature = f32::NAN, "temperature", "temperature must be between 0 and 2, not NaN");
        check_refused(|r| r.temperature = f32::INFINITY, "temperature", "temperature must be between 0 and 2, not inf");
        check_refused(|r| r.top_p = 0.0, "top_p", "top_p must be above 0 and at most 1, not 0");
        check_refused(|r| r.top_p = f32::NAN, "top_p", "top_p must be above 0 and at most 1, not NaN");
        check_refused(|r| r.min_p = 1.5, "min_p", "min_p must be between 0 and 1, not 1.5");
        check_refused(
            |r| r.presence_penalty = 3.0,
            "presence_penalty",
            "presence_penalty must be between -2 and 2, not 3",
        );
        check_refused(
            |r| r.frequency_penalty = -3.0,
            "frequency_penalty",
            "frequency_penalty must be between -2 and 2, not -3",
        );
        check_refused(
            |r| r.repetition_penalty = 0.0,
            "repetition_penalty",
            "repetition_penalty must be above 0 and at most 10, not 0",
        );
        check_refused(|r| r.logprobs = Some(21), "logprobs", "logprobs is 21, but at most 20 is allowed");
        check_refused(
            |r| r.prompt_logprobs = Some(21),
            "prompt_logprobs",
            "prompt_logprobs is 21, but at most 20 is allowed",
        );
    }

    #[test]
    fn lists_are_bounded() {
        let two_many = "stop has 3 entries, but at most 2 are allowed";
        check_refused(|r| r.stop = vec!["a".into(); 3], "stop", two_many);
        check_refused(|r| r.stop = vec!["abcde".into()], "stop", "stop: a string of 5 bytes; at most 4 are allowed");
        let empty = "stop: an empty string would stop at once; leave it out";
        check_refused(|r| r.stop = vec![String::new()], "stop", empty);
        check_refused(
            |r| r.stop_token_ids = vec![1; 3],
            "stop_token_ids",
            "stop_token_ids has 3 entries, but at most 2 are allowed",
        );
        check_refused(
            |r| r.stop_token_ids = vec![320],
            "stop_token_ids",
            "stop_token_ids: token id 320 is outside the vocabulary of 320 tokens",
        );
        check_refused(
            |r| r.logit_bias = vec![(1, 0.0); 3],
            "logit_bias",
            "logit_bias has 3 entries, but at most 2 are allowed",
        );
        check_refused(
            |r| r.logit_bias = vec![(u32::MAX, 0.0)],
            "logit_bias",
            "logit_bias: token id 4294967295 is outside the vocabulary of 320 tokens",
        );
        check_refused(
            |r| r.logit_bias = vec![(1, 101.0)],
            "logit_bias",
            "logit_bias must be between -100 and 100, not 101",
        );
    }

    #[test]
    fn bounds_themselves_are_allowed() {
        check_allowed(|r| (r.temperature, r.top_p, r.min_p) = (2.0, 1.0, 1.0));
        check_allowed(|r| (r.temperature, r.top_p, r.min_p) = (-0.0, f32::MIN_POSITIVE, 0.0));
        check_allowed(|r| (r.presence_penalty, r.frequency_penalty, r.repetition_penalty) = (-2.0, 2.0, 10.0));
        check_allowed(|r| (r.logprobs, r.prompt_logprobs) = (Some(20), Some(0)));
        check_allowed(|r| r.logit_bias = vec![(319, -100.0), (0, 100.0)]);
        check_allowed(|r| r.stop = vec!["x".repeat(256); 16]);
    }

    #[test]
    fn candidates_are_counted() {
        assert_eq!(refusal(count("n", 0, 4)).1, "n must be at least 1");
        assert_eq!(refusal(count("best_of", 5, 4)).1, "best_of is 5, but at most 4 is allowed");
        count("n", 4, 4).unwrap();
    }

    #[test]
    fn lengths_name_both_numbers() {
        let mut request = plain();
        assert_eq!(max_tokens(&request, 24, 1024).unwrap(), 1000);
        assert_eq!(
            refusal(max_tokens(&request, 1025, 1024)),
            ("prompt".into(), "prompt is 1025 tokens long, but the context of this model holds 1024 tokens".into())
        );
        let full =
            "prompt is 1024 tokens long, which leaves none to generate: the context of this model holds 1024 tokens";
        assert_eq!(refusal(max_tokens(&request, 1024, 1024)), ("prompt".into(), full.into()));
        request.max_tokens = Some(0);
        assert_eq!(max_tokens(&request, 1024, 1024).unwrap(), 0);
        request.max_tokens = Some(1000);
        assert_eq!(max_tokens(&request, 24, 1024).unwrap(), 1000);
        let together = "max_tokens is 1000 and prompt is 25 tokens long, together 1025, but the context of this model \
                        holds 1024 tokens";
        assert_eq!(refusal(max_tokens(&request, 25, 1024)), ("max_tokens".into(), together.into()));
        request.max_tokens = Some(usize::MAX);
        assert_eq!(refusal(max_tokens(&request, 25, 1024)).0, "max_tokens");
        (request.max_tokens, request.min_tokens) = (Some(5), 6);
        let least = "min_tokens is 6, but at most 5 tokens can be generated";
        assert_eq!(refusal(max_tokens(&request, 25, 1024)), ("min_tokens".into(), least.into()));
    }
}
