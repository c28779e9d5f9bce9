//! Best of n: candidates are drawn, scored as they finish while others still generate, and the best are chosen.

use std::sync::Arc;

use super::{
    ServedModel, Service, Usage,
    generate::GenerateRequest,
    updates::{Candidate, TokenInfo},
};
use crate::error::{Error, Result};

/// How the best candidates are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// Highest reward.
    Reward,
    /// Highest mean token log-probability.
    LogProb,
    /// Most frequent final answer.
    Majority,
    /// Final answer with the largest sum of sigmoid(reward).
    Weighted,
}

impl Strategy {
    /// `"reward"`, `"logprob"`, `"majority"` or `"weighted"`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reward => "reward",
            Self::LogProb => "logprob",
            Self::Majority => "majority",
            Self::Weighted => "weighted",
        }
    }
}

/// Where the final answer of a candidate stands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum AnswerRule {
    /// In the last `\boxed{..}`.
    #[default]
    Boxed,
    /// The last number.
    LastNumber,
    /// The first group (or the whole) of the last match of this regular expression.
    Regex(String),
}

/// What to generate and how to choose.
#[derive(Debug, Clone, PartialEq)]
pub struct BestOfRequest {
    /// The candidates; its `n` says how many are returned.
    pub generate: GenerateRequest,
    /// How many are drawn; more than `n`.
    pub best_of: usize,
    /// None: by reward where a reward model is served, else by log-probability.
    pub strategy: Option<Strategy>,
    /// A reward model; none means the first one served.
    pub reward_model: Option<String>,
    /// Where final answers stand.
    pub answer: AnswerRule,
}

/// A candidate and what is known about it.
#[derive(Debug, Clone, PartialEq)]
pub struct RatedCandidate {
    /// The candidate; its `mean_logprob` is always there.
    pub candidate: Candidate,
    /// Its raw reward, where a reward model took part.
    pub reward: Option<f32>,
    /// Whether the reward model saw only the newest tokens because its context is shorter.
    pub reward_truncated: bool,
    /// Its final answer, as written.
    pub answer: Option<String>,
    /// Its place, 0 is best.
    pub rank: usize,
}

/// The outcome of a best-of-n request.
#[derive(Debug, Clone)]
pub struct BestOfN {
    /// The policy.
    pub model: Arc<ServedModel>,
    /// The reward model, where one took part.
    pub reward_model: Option<Arc<ServedModel>>,
    /// The strategy used.
    pub strategy: Strategy,
    /// The seed of candidate 0.
    pub seed: u64,
    /// The policy's chat template; none for text and ids.
    pub template: Option<String>,
    /// Every token of the prompt where `prompt_logprobs` was asked for, else empty.
    pub prompt: Vec<TokenInfo>,
    /// The prompt as text.
    pub prompt_text: String,
    /// Indices of the `n` best candidates, best first.
    pub chosen: Vec<usize>,
    /// All candidates, by index.
    pub candidates: Vec<RatedCandidate>,
    /// Tokens of the policy, the prompt counted once.
    pub usage: Usage,
    /// Tokens of the reward model.
    pub reward_usage: Option<Usage>,
}

impl Service {
    /// Draws `best_of` candidates and chooses the `n` best.
    ///
    /// # Errors
    /// As [`Service::generate`] and [`Service::score`].
    pub async fn best_of_n(&self, _request: BestOfRequest) -> Result<BestOfN> {
        Err(Error::internal("not built yet"))
    }
}
