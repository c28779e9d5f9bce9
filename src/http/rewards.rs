//! POST /v1/rewards: conversations, answers to one prompt, or rendered text; raw rewards come back.

use axum::{Json, extract::State};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{
    AppState,
    body::JsonBody,
    choices::WireUsage,
    error::{ApiError, ApiResult, ErrorResponse},
    wire::{Conversations, Prompts, Strings, TextOrIds, TextOrMessages, WireMessage, messages},
};
use crate::service::{
    Message, TokenId,
    score::{Returns, Reward, Rewards, ScoreInput, ScoreRequest, Truncate},
};

/// What to score: `messages`, or `prompt` and `completions`, or `input`.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct RewardRequest {
    /// A reward model; by default the first one served.
    pub model: Option<String>,
    /// Conversations, each ending with the assistant's turn.
    pub messages: Option<Conversations>,
    /// What `completions` answer: a user's text, or a conversation.
    pub prompt: Option<TextOrMessages>,
    /// Answers to `prompt`, which is tokenised once.
    pub completions: Option<Strings>,
    /// Rendered text without BOS, or token ids.
    pub input: Option<Prompts>,
    /// `last` (the default): the reward at the last token. `all`: at every token too.
    pub r#return: Option<WireReturns>,
    /// Whether each sequence ends with end of sequence; by default what the checkpoint says.
    pub append_eos: Option<bool>,
    /// What happens to inputs longer than the context; by default `error`.
    pub truncate: Option<WireTruncate>,
    /// Further variables of the chat template.
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
}

/// Which rewards are returned.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum WireReturns {
    /// At the last token.
    Last,
    /// At every token.
    All,
}

/// What happens to inputs longer than the context.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum WireTruncate {
    /// They are refused.
    Error,
    /// The oldest tokens after BOS are dropped.
    Left,
    /// The end is dropped.
    Right,
}

impl From<WireTruncate> for Truncate {
    fn from(truncate: WireTruncate) -> Self {
        match truncate {
            WireTruncate::Error => Self::Error,
            WireTruncate::Left => Self::Left,
            WireTruncate::Right => Self::Right,
        }
    }
}

/// The rewards, in the order of the inputs.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct RewardResponse {
    /// Always `list`.
    pub object: &'static str,
    /// The reward model.
    pub model: String,
    /// The chat template that rendered the inputs; null for rendered text and ids.
    pub template: Option<String>,
    /// The rewards.
    pub data: Vec<RewardItem>,
    /// Token counts.
    pub usage: WireUsage,
}

/// One reward.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct RewardItem {
    /// Always `reward`.
    pub object: &'static str,
    /// Which input.
    pub index: usize,
    /// Raw value of the head at the last token: no sigmoid, no scale.
    pub reward: f32,
    /// Raw value at every token, where asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rewards: Option<Vec<f32>>,
    /// Tokens read.
    pub tokens: usize,
    /// The token at which the reward was read.
    pub last_token_id: TokenId,
    /// Whether tokens were dropped.
    pub truncated: bool,
}

impl From<Reward> for RewardItem {
    fn from(reward: Reward) -> Self {
        Self {
            object: "reward",
            index: reward.index,
            reward: reward.reward,
            rewards: reward.all,
            tokens: reward.tokens,
            last_token_id: reward.last_token_id,
            truncated: reward.truncated,
        }
    }
}

/// Scores conversations, answers or texts. Rewards are raw.
#[utoipa::path(post, path = "/v1/rewards", request_body = RewardRequest,
    responses((status = 200, body = RewardResponse), (status = "4XX", body = ErrorResponse),
              (status = "5XX", body = ErrorResponse)))]
pub async fn rewards(State(state): State<AppState>, body: JsonBody) -> ApiResult<Json<RewardResponse>> {
    let request = body.decode::<RewardRequest>()?.into_request()?;
    let rewards = score(&state, request, None).await?;
    Ok(Json(RewardResponse {
        object: "list",
        model: rewards.model.name.clone(),
        template: rewards.template,
        usage: rewards.usage.into(),
        data: rewards.data.into_iter().map(RewardItem::from).collect(),
    }))
}

/// Scores, and refuses to pass on what JSON cannot hold. `field` is how the route calls its inputs, where not as here.
///
/// # Errors
/// As the service; 500 for a reward that is no number.
pub async fn score(state: &AppState, request: ScoreRequest, field: Option<&str>) -> ApiResult<Rewards> {
    let rewards = state.service().score(request).await.map_err(|error| blamed(error.into(), field))?;
    let finite = |reward: &Reward| reward.reward.is_finite() && reward.all.iter().flatten().all(|one| one.is_finite());
    if rewards.data.iter().all(finite) {
        return Ok(rewards);
    }
    tracing::error!(model = rewards.model.name, "a reward is not a number");
    Err(ApiError::internal())
}

/// Blames `field`, which holds the inputs, instead of the service's names for them.
pub fn blamed(error: ApiError, field: Option<&str>) -> ApiError {
    let Some(field) = field else { return error };
    ["input", "messages", "prompt", "completions"].iter().fold(error, |error, name| error.renamed(name, field))
}

impl RewardRequest {
    fn into_request(self) -> ApiResult<ScoreRequest> {
        let inputs = match (self.messages, self.prompt, self.completions, self.input) {
            (Some(conversations), None, None, None) => conversation_inputs(conversations)?,
            (None, Some(prompt), Some(completions), None) => answers(prompt, completions.into_vec())?,
            (None, None, None, Some(input)) => text_inputs(input),
            (None, Some(_), None, None) => return Err(ApiError::invalid("completions", "`completions` is required")),
            (None, None, Some(_), None) => return Err(ApiError::invalid("prompt", "`prompt` is required")),
            _ => {
                let message = "give exactly one of `messages`, `prompt` with `completions`, and `input`";
                return Err(ApiError::invalid("messages", message));
            }
        };
        Ok(ScoreRequest {
            model: self.model,
            inputs,
            kwargs: self.chat_template_kwargs.unwrap_or_default(),
            append_eos: self.append_eos,
            returns: match self.r#return {
                Some(WireReturns::All) => Returns::All,
                Some(WireReturns::Last) | None => Returns::Last,
            },
            truncate: self.truncate.map_or(Truncate::Error, Truncate::from),
        })
    }
}

/// One input for each conversation.
///
/// # Errors
/// 400 for messages that are not supported.
pub fn conversation_inputs(conversations: Conversations) -> ApiResult<Vec<ScoreInput>> {
    let input = |wire: Vec<WireMessage>, path: &str| messages(wire, path).map(ScoreInput::Messages);
    match conversations {
        Conversations::One(one) => Ok(vec![input(one, "messages")?]),
        Conversations::Many(many) => {
            many.into_iter().enumerate().map(|(at, wire)| input(wire, &format!("messages[{at}]"))).collect()
        }
    }
}

/// One input for each text or list of ids, taken as rendered.
pub fn text_inputs(input: Prompts) -> Vec<ScoreInput> {
    let one = |item| match item {
        TextOrIds::Text(text) => ScoreInput::Text(text),
        TextOrIds::Ids(ids) => ScoreInput::Ids(ids),
    };
    input.into_vec().into_iter().map(one).collect()
}

fn answers(prompt: TextOrMessages, completions: Vec<String>) -> ApiResult<Vec<ScoreInput>> {
    let prompt = match prompt {
        TextOrMessages::Text(content) => vec![user(content)],
        TextOrMessages::Messages(wire) => messages(wire, "prompt")?,
    };
    let answer = |completion| ScoreInput::PromptAndCompletion { prompt: prompt.clone(), completion };
    Ok(completions.into_iter().map(answer).collect())
}

/// What a user said.
pub fn user(content: String) -> Message {
    Message { role: "user".into(), content }
}
