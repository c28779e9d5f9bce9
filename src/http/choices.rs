//! Parts that chat and text responses share: head, usage, ratings, and the account of a best-of-n choice.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::sampling::GenerationFields;
use crate::service::{
    TokenId, Usage,
    best_of_n::{BestOfN, RatedCandidate},
    generate::Generation,
    updates::{StopReason, TokenInfo},
};

/// Names the program that answered.
pub const FINGERPRINT: &str = concat!("eurus-", env!("CARGO_PKG_VERSION"));

/// What stands at the top of every response and chunk.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Head {
    /// Id of this response.
    pub id: String,
    /// Kind of object.
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// The policy that answered.
    pub model: String,
    /// The program that answered.
    pub system_fingerprint: &'static str,
}

impl Head {
    /// A new id, now.
    pub fn new(prefix: &str, object: &'static str, model: &str) -> Self {
        let id = new_id(prefix);
        Self { id, object, created: unix_seconds(), model: model.to_string(), system_fingerprint: FINGERPRINT }
    }
}

/// A new id that begins with `prefix`.
pub fn new_id(prefix: &str) -> String {
    format!("{prefix}{}", Uuid::new_v4().simple())
}

/// Unix time in whole seconds.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Token counts of a response.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, ToSchema)]
pub struct WireUsage {
    /// Tokens of the prompts.
    pub prompt_tokens: usize,
    /// Tokens drawn, those of candidates that were not chosen included.
    pub completion_tokens: usize,
    /// Both.
    pub total_tokens: usize,
    /// Where prompt tokens came from.
    pub prompt_tokens_details: PromptTokensDetails,
    /// Tokens the reward model read, where one took part; not in the total.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reward_tokens: Option<usize>,
}

/// Where prompt tokens came from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Taken from the cache of earlier requests.
    pub cached_tokens: usize,
}

impl From<Usage> for WireUsage {
    fn from(usage: Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens: usage.cached_tokens },
            reward_tokens: None,
        }
    }
}

/// The counts of two prompts together.
pub fn add(left: Usage, right: Usage) -> Usage {
    Usage {
        prompt_tokens: left.prompt_tokens + right.prompt_tokens,
        cached_tokens: left.cached_tokens + right.cached_tokens,
        completion_tokens: left.completion_tokens + right.completion_tokens,
    }
}

/// The request's own condition that ended a choice: a stop string, or the id of a stop token.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum WireStop {
    /// One of `stop`.
    Text(String),
    /// One of `stop_token_ids`.
    Token(TokenId),
}

impl From<StopReason> for WireStop {
    fn from(reason: StopReason) -> Self {
        match reason {
            StopReason::Text(text) => Self::Text(text),
            StopReason::Token(id) => Self::Token(id),
        }
    }
}

/// What a best-of-n choice was chosen by.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct Rating {
    /// Raw reward.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reward: Option<f32>,
    /// Final answer, as written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// Place among the candidates, 0 is best.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
}

impl From<&RatedCandidate> for Rating {
    fn from(rated: &RatedCandidate) -> Self {
        Self { reward: rated.reward, answer: rated.answer.clone(), rank: Some(rated.rank) }
    }
}

/// The account of a best-of-n choice.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct BestOfAccount {
    /// How the best were chosen.
    pub strategy: &'static str,
    /// The reward model, where one took part.
    pub model: Option<String>,
    /// All candidates, in the order of their seeds.
    pub candidates: Vec<CandidateAccount>,
}

/// One candidate.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct CandidateAccount {
    /// Which one.
    pub index: usize,
    /// The seed that draws it again.
    pub seed: i64,
    /// Place among the candidates, 0 is best.
    pub rank: usize,
    /// Raw reward.
    pub reward: Option<f32>,
    /// Whether the reward model saw the newest tokens only.
    pub reward_truncated: bool,
    /// Mean log-probability of its tokens.
    pub mean_logprob: Option<f64>,
    /// Final answer, as written.
    pub answer: Option<String>,
    /// Why it ended.
    pub finish_reason: &'static str,
    /// Tokens drawn.
    pub completion_tokens: usize,
    /// Its text, where asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

impl BestOfAccount {
    /// The account of `outcome`, without the texts of the candidates.
    pub fn new(outcome: &BestOfN) -> Self {
        let account = |rated: &RatedCandidate| CandidateAccount {
            index: rated.candidate.index,
            seed: rated.candidate.seed.cast_signed(),
            rank: rated.rank,
            reward: rated.reward,
            reward_truncated: rated.reward_truncated,
            mean_logprob: rated.candidate.mean_logprob.filter(|mean| mean.is_finite()),
            answer: rated.answer.clone(),
            finish_reason: rated.candidate.finish.as_str(),
            completion_tokens: rated.candidate.usage.completion_tokens,
            text: None,
        };
        Self {
            strategy: outcome.strategy.as_str(),
            model: outcome.reward_model.as_ref().map(|model| model.name.clone()),
            candidates: outcome.candidates.iter().map(account).collect(),
        }
    }
}

/// The account of `outcome` as `fields` ask for it.
pub(super) fn account(outcome: &BestOfN, fields: &GenerationFields) -> BestOfAccount {
    let mut account = BestOfAccount::new(outcome);
    if fields.returns_candidates() {
        for (entry, rated) in account.candidates.iter_mut().zip(&outcome.candidates) {
            entry.text = Some(rated.candidate.text.clone());
        }
    }
    account
}

/// Usage of a best-of-n request.
pub fn best_of_usage(outcome: &BestOfN) -> WireUsage {
    let reward_tokens = outcome.reward_usage.map(|usage| usage.prompt_tokens);
    WireUsage { reward_tokens, ..outcome.usage.into() }
}

/// What is known about a generation before its first token, kept while the generation itself is consumed.
#[derive(Debug, Clone, PartialEq)]
pub struct Origin {
    /// Name of the policy.
    pub model: String,
    /// Seed of choice 0.
    pub seed: i64,
    /// The prompt as text.
    pub prompt_text: String,
    /// The prompt as tokens.
    pub prompt_ids: Vec<TokenId>,
    /// The chat template that rendered it.
    pub template: Option<String>,
    /// The prompt's log-probabilities, once known.
    pub prompt: Vec<TokenInfo>,
}

impl From<&Generation> for Origin {
    fn from(generation: &Generation) -> Self {
        Self {
            model: generation.model().name.clone(),
            seed: generation.seed().cast_signed(),
            prompt_text: generation.prompt_text().to_string(),
            prompt_ids: generation.prompt_ids().to_vec(),
            template: generation.template().map(str::to_string),
            prompt: Vec::new(),
        }
    }
}
