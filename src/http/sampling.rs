//! The fields that chat and text completions share, and what they mean to the service.
//! Ranges are the service's; here only what its types cannot hold is refused.

use std::collections::HashMap;

use serde::Deserialize;
use utoipa::ToSchema;

use super::{
    error::{ApiError, ApiResult},
    wire::Strings,
};
use crate::service::{
    Prompt, TokenId,
    best_of_n::{AnswerRule, BestOfRequest, Strategy},
    generate::{Eos, GenerateRequest, StopText},
};

/// Fields of every generation request. `null` means absent.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub struct GenerationFields {
    /// Which model; by default the first policy served.
    pub model: Option<String>,
    /// Choices to return. Choice i draws with seed + i.
    pub n: Option<i64>,
    /// Candidates to draw. Above `n`, the best `n` are returned.
    pub best_of: Option<i64>,
    /// How the best are chosen.
    pub rerank: Option<Rerank>,
    /// Tokens of each choice at most.
    pub max_tokens: Option<i64>,
    /// Tokens before which nothing stops a choice.
    pub min_tokens: Option<i64>,
    /// 0 to 2; 0 is greedy.
    pub temperature: Option<f64>,
    /// Above 0, at most 1.
    pub top_p: Option<f64>,
    /// 0 and -1 are off.
    pub top_k: Option<i64>,
    /// 0 to 1.
    pub min_p: Option<f64>,
    /// -2 to 2.
    pub presence_penalty: Option<f64>,
    /// -2 to 2.
    pub frequency_penalty: Option<f64>,
    /// Above 0; 1 is off.
    pub repetition_penalty: Option<f64>,
    /// Token id to bias, -100 to 100.
    pub logit_bias: Option<HashMap<String, f64>>,
    /// Makes the answer reproducible; the response tells the one used.
    pub seed: Option<i64>,
    /// Texts that end a choice.
    pub stop: Option<Strings>,
    /// Tokens that end a choice.
    pub stop_token_ids: Option<Vec<TokenId>>,
    /// Keep the text that ended a choice.
    pub include_stop_str_in_output: Option<bool>,
    /// Go on after end of sequence.
    pub ignore_eos: Option<bool>,
    /// Report log-probabilities of the prompt's tokens and this many alternatives.
    pub prompt_logprobs: Option<i64>,
    /// Send the answer as it is made.
    pub stream: Option<bool>,
    /// What a stream carries besides.
    pub stream_options: Option<StreamOptions>,
    /// Report token ids.
    pub return_token_ids: Option<bool>,
}

/// Options of a stream.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StreamOptions {
    /// A last chunk with the usage.
    pub include_usage: Option<bool>,
    /// Usage so far in every chunk.
    pub continuous_usage_stats: Option<bool>,
    /// Accepted and ignored: chunks are never padded.
    pub include_obfuscation: Option<bool>,
}

/// How the best candidates are chosen.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rerank {
    /// By default `reward` where a reward model is served, else `logprob`.
    pub strategy: Option<WireStrategy>,
    /// Reward model; by default the first one served.
    pub model: Option<String>,
    /// Where final answers stand, for `majority` and `weighted`; by default `boxed`.
    pub answer: Option<WireAnswer>,
    /// Return the text of all candidates.
    pub return_candidates: Option<bool>,
}

/// How candidates are compared.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum WireStrategy {
    /// Highest reward.
    Reward,
    /// Highest mean token log-probability.
    LogProb,
    /// Most frequent final answer.
    Majority,
    /// Final answer with the largest sum of sigmoid(reward).
    Weighted,
}

/// `"boxed"`, `"last_number"` or `{"regex": ".."}`.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WireAnswer {
    /// The last `\boxed{..}`.
    Boxed,
    /// The last number.
    LastNumber,
    /// The first group, or the whole, of the last match.
    Regex(String),
}

impl GenerationFields {
    /// Whether the answer is streamed.
    pub fn streams(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// Usage at the end of a stream, and in each chunk.
    pub fn stream_usage(&self) -> (bool, bool) {
        let options = self.stream_options.clone().unwrap_or_default();
        let each = options.continuous_usage_stats.unwrap_or(false);
        (options.include_usage.unwrap_or(false), each)
    }

    /// The request for one prompt.
    ///
    /// # Errors
    /// 400 naming the field.
    pub fn request(&self, prompt: Prompt) -> ApiResult<GenerateRequest> {
        let neutral = GenerateRequest::new(prompt);
        Ok(GenerateRequest {
            model: self.model.clone(),
            n: count("n", self.n)?.unwrap_or(1),
            max_tokens: count("max_tokens", self.max_tokens)?,
            min_tokens: count("min_tokens", self.min_tokens)?.unwrap_or(0),
            temperature: number(self.temperature).unwrap_or(neutral.temperature),
            top_p: number(self.top_p).unwrap_or(neutral.top_p),
            top_k: count("top_k", self.top_k.filter(|k| *k != -1))?.unwrap_or(0),
            min_p: number(self.min_p).unwrap_or(neutral.min_p),
            repetition_penalty: number(self.repetition_penalty).unwrap_or(neutral.repetition_penalty),
            presence_penalty: number(self.presence_penalty).unwrap_or(neutral.presence_penalty),
            frequency_penalty: number(self.frequency_penalty).unwrap_or(neutral.frequency_penalty),
            logit_bias: self.bias()?,
            seed: self.seed.map(i64::cast_unsigned),
            stop: self.stop.clone().map_or(Vec::new(), Strings::into_vec),
            stop_token_ids: self.stop_token_ids.clone().unwrap_or_default(),
            stop_text: if self.include_stop_str_in_output == Some(true) { StopText::Keep } else { StopText::Cut },
            eos: if self.ignore_eos == Some(true) { Eos::Ignored } else { Eos::Stops },
            prompt_logprobs: count("prompt_logprobs", self.prompt_logprobs)?,
            ..neutral
        })
    }

    /// Candidates to draw, where more than `n`.
    ///
    /// # Errors
    /// 400 for fewer than `n`, for a stream, and for `rerank` without anything to choose from.
    pub fn best_of(&self) -> ApiResult<Option<usize>> {
        let n = count("n", self.n)?.unwrap_or(1);
        match count("best_of", self.best_of)? {
            Some(best_of) if best_of < n && best_of != 1 => {
                Err(ApiError::invalid("best_of", format!("`best_of` must be at least `n`, which is {n}")))
            }
            Some(best_of) if best_of > n && self.streams() => {
                Err(ApiError::invalid("stream", "with `best_of` above `n` the answer cannot be streamed"))
            }
            Some(best_of) if best_of > n => Ok(Some(best_of)),
            _ if self.rerank.is_some() => {
                Err(ApiError::invalid("rerank", "`rerank` needs `best_of` above `n`: there is nothing to choose from"))
            }
            _ => Ok(None),
        }
    }

    /// The best-of-n request around `generate`.
    pub fn best_of_request(&self, generate: GenerateRequest, best_of: usize) -> BestOfRequest {
        let rerank = self.rerank.clone().unwrap_or_default();
        BestOfRequest {
            generate,
            best_of,
            strategy: rerank.strategy.map(strategy),
            reward_model: rerank.model,
            answer: rerank.answer.map_or(AnswerRule::Boxed, answer),
        }
    }

    /// Whether a best-of-n response holds the text of every candidate.
    pub fn returns_candidates(&self) -> bool {
        self.rerank.as_ref().is_some_and(|rerank| rerank.return_candidates == Some(true))
    }

    /// Whether token ids are reported.
    pub fn returns_ids(&self) -> bool {
        self.return_token_ids == Some(true)
    }

    fn bias(&self) -> ApiResult<Vec<(TokenId, f32)>> {
        let mut bias = Vec::new();
        for (token, value) in self.logit_bias.iter().flatten() {
            let id = token.parse::<TokenId>();
            let id = id.map_err(|_| ApiError::invalid("logit_bias", "the keys of `logit_bias` are token ids"))?;
            bias.push((id, *value as f32));
        }
        bias.sort_unstable_by_key(|(id, _)| *id);
        if let Some(twice) = bias.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(ApiError::invalid("logit_bias", format!("token {} is given twice", twice[0].0)));
        }
        Ok(bias)
    }

    /// Refuses combinations of streaming options that mean nothing.
    ///
    /// # Errors
    /// 400 for `stream_options` without `stream`.
    pub fn check_stream(&self) -> ApiResult<()> {
        if self.stream_options.is_some() && !self.streams() {
            return Err(ApiError::invalid("stream_options", "`stream_options` needs `stream`: true"));
        }
        Ok(())
    }
}

fn strategy(strategy: WireStrategy) -> Strategy {
    match strategy {
        WireStrategy::Reward => Strategy::Reward,
        WireStrategy::LogProb => Strategy::LogProb,
        WireStrategy::Majority => Strategy::Majority,
        WireStrategy::Weighted => Strategy::Weighted,
    }
}

fn answer(answer: WireAnswer) -> AnswerRule {
    match answer {
        WireAnswer::Boxed => AnswerRule::Boxed,
        WireAnswer::LastNumber => AnswerRule::LastNumber,
        WireAnswer::Regex(regex) => AnswerRule::Regex(regex),
    }
}

/// A count that may not be negative.
///
/// # Errors
/// 400 naming the field.
pub fn count(field: &str, value: Option<i64>) -> ApiResult<Option<usize>> {
    let refuse = |_| ApiError::invalid(field, format!("`{field}` must not be negative"));
    value.map(|value| usize::try_from(value).map_err(refuse)).transpose()
}

/// Single precision; what overflows becomes infinite, which the service's ranges refuse.
fn number(value: Option<f64>) -> Option<f32> {
    value.map(|value| value as f32)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn fields(json: &str) -> GenerationFields {
        serde_json::from_str(json).unwrap()
    }

    #[track_caller]
    fn check_best_of(json: &str, want: Result<Option<usize>, &str>) {
        let got = fields(json).best_of().map_err(|error| error.body.param.unwrap());
        assert_eq!(got, want.map_err(str::to_string), "{json}");
    }

    #[test]
    fn best_of_is_a_choice_only_above_n() {
        check_best_of("{}", Ok(None));
        check_best_of(r#"{"best_of":null}"#, Ok(None));
        check_best_of(r#"{"best_of":1}"#, Ok(None));
        check_best_of(r#"{"n":2,"best_of":2}"#, Ok(None));
        check_best_of(r#"{"n":2,"best_of":4}"#, Ok(Some(4)));
        check_best_of(r#"{"n":2,"best_of":1}"#, Ok(None));
        check_best_of(r#"{"n":3,"best_of":2}"#, Err("best_of"));
        check_best_of(r#"{"best_of":0}"#, Err("best_of"));
        check_best_of(r#"{"best_of":-1}"#, Err("best_of"));
        check_best_of(r#"{"best_of":2,"stream":true}"#, Err("stream"));
        check_best_of(r#"{"rerank":{}}"#, Err("rerank"));
    }

    #[test]
    fn fields_reach_the_service() {
        let json = r#"{"n":3,"max_tokens":7,"top_k":-1,"temperature":0.5,"seed":-1,"stop":"x",
                       "logit_bias":{"7":-100,"2":1.5},"ignore_eos":true,"include_stop_str_in_output":true}"#;
        let request = fields(json).request(Prompt::Text("a".into())).unwrap();
        assert_eq!((request.n, request.max_tokens, request.top_k), (3, Some(7), 0));
        assert_eq!((request.temperature, request.seed), (0.5, Some(u64::MAX)));
        assert_eq!(request.logit_bias, [(2, 1.5), (7, -100.0)]);
        assert_eq!((request.stop_text, request.eos), (StopText::Keep, Eos::Ignored));
        assert_eq!(request.stop, ["x"]);
    }

    #[test]
    fn what_types_cannot_hold_is_refused() {
        for json in [r#"{"n":-1}"#, r#"{"top_k":-2}"#, r#"{"max_tokens":-1}"#, r#"{"logit_bias":{"x":1}}"#] {
            assert!(fields(json).request(Prompt::Text("a".into())).is_err(), "{json}");
        }
        let huge = fields(r#"{"temperature":1e39}"#).request(Prompt::Text("a".into())).unwrap();
        assert!(huge.temperature.is_infinite());
        let twice = fields(r#"{"logit_bias":{"1":1,"01":2}}"#).request(Prompt::Text("a".into()));
        assert!(twice.is_err());
    }
}
