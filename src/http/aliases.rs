//! Scoring routes of other servers, onto the one use case: vLLM and SGLang (/classify, /pooling), TEI (/predict),
//! OpenRLHF (/get_reward), LLaMA-Factory (/v1/score/evaluation). Scores are raw unless an activation is asked for.

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{
    AppState,
    body::JsonBody,
    choices::{WireUsage, new_id, unix_seconds},
    error::{ApiError, ApiResult, ErrorResponse},
    rewards::{blamed, conversation_inputs, score, text_inputs},
    wire::{Conversations, Prompts, Strings, WireMessage},
};
use crate::service::{
    Message, Prompt, Service,
    score::{Reward, Rewards, ScoreInput, ScoreRequest, Truncate},
    tokens::SpecialTokens,
};

/// What to classify or pool: `input`, or one conversation in `messages`; or SGLang's `text` or `input_ids`.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct ClassifyRequest {
    /// A reward model; by default the first one served.
    pub model: Option<String>,
    /// Rendered text without BOS, or token ids.
    pub input: Option<Prompts>,
    /// One conversation, ending with the assistant's turn.
    pub messages: Option<Vec<WireMessage>>,
    /// SGLang's name of `input`; the answer has SGLang's shape.
    pub text: Option<Strings>,
    /// SGLang's name of `input` as ids; the answer has SGLang's shape.
    pub input_ids: Option<Prompts>,
    /// Whether BOS stands before text; on by default.
    pub add_special_tokens: Option<bool>,
    /// Accepted false only: a scored conversation ends with the assistant's turn.
    pub add_generation_prompt: Option<bool>,
    /// `true` asks for sigmoid(reward); by default rewards are raw.
    pub use_activation: Option<bool>,
    /// Older name of `use_activation`.
    pub activation: Option<bool>,
    /// Of /pooling: `classify` (the default). Rewards are not embeddings.
    pub task: Option<String>,
    /// Further variables of the chat template.
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
}

/// vLLM's classification response: the reward is the only entry of `probs`.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ClassifyResponse {
    /// Id of this response.
    pub id: String,
    /// Always `list`.
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// The reward model.
    pub model: String,
    /// One for each input.
    pub data: Vec<ClassifyItem>,
    /// Token counts.
    pub usage: WireUsage,
}

/// One classified input.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ClassifyItem {
    /// Which input.
    pub index: usize,
    /// Always `reward`.
    pub label: &'static str,
    /// The reward.
    pub probs: [f32; 1],
    /// Always 1.
    pub num_classes: usize,
}

/// vLLM's pooling response.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct PoolingResponse {
    /// Id of this response.
    pub id: String,
    /// Always `list`.
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// The reward model.
    pub model: String,
    /// One for each input.
    pub data: Vec<PoolingItem>,
    /// Token counts.
    pub usage: WireUsage,
}

/// One pooled input.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct PoolingItem {
    /// Which input.
    pub index: usize,
    /// Always `pooling`.
    pub object: &'static str,
    /// The reward.
    pub data: [f32; 1],
}

/// Rewards in vLLM's classification shape, or in SGLang's where its field names are used. Rewards are raw.
#[utoipa::path(post, path = "/classify", request_body = ClassifyRequest,
    responses((status = 200, body = ClassifyResponse), (status = "4XX", body = ErrorResponse),
              (status = "5XX", body = ErrorResponse)))]
pub async fn classify(State(state): State<AppState>, body: JsonBody) -> ApiResult<Response> {
    let request: ClassifyRequest = body.decode()?;
    if request.task.is_some() {
        return Err(ApiError::unsupported("task"));
    }
    let sglang = request.text.is_some() || request.input_ids.is_some();
    let activation = request.activation();
    let field = request.field();
    let rewards = score(&state, request.into_request(state.service()).await?, Some(field)).await?;
    if sglang {
        return Ok(Json(embeddings(&rewards, activation)).into_response());
    }
    let data = rewards.data.iter().map(|reward| ClassifyItem {
        index: reward.index,
        label: "reward",
        probs: [activation.apply(reward.reward)],
        num_classes: 1,
    });
    Ok(Json(ClassifyResponse {
        id: new_id("classify-"),
        object: "list",
        created: unix_seconds(),
        model: rewards.model.name.clone(),
        data: data.collect(),
        usage: rewards.usage.into(),
    })
    .into_response())
}

/// Rewards in vLLM's pooling shape. Rewards are raw.
#[utoipa::path(post, path = "/pooling", request_body = ClassifyRequest,
    responses((status = 200, body = PoolingResponse), (status = "4XX", body = ErrorResponse),
              (status = "5XX", body = ErrorResponse)))]
pub async fn pooling(State(state): State<AppState>, body: JsonBody) -> ApiResult<Json<PoolingResponse>> {
    let request: ClassifyRequest = body.decode()?;
    if request.task.as_deref().is_some_and(|task| task != "classify") {
        return Err(ApiError::invalid("task", "only `classify` is supported here: a reward model has no embeddings"));
    }
    let activation = request.activation();
    let field = request.field();
    let rewards = score(&state, request.into_request(state.service()).await?, Some(field)).await?;
    let item = |(index, reward): (usize, f32)| PoolingItem { index, object: "pooling", data: [reward] };
    let values = rewards.data.iter().map(|reward| activation.apply(reward.reward)).enumerate();
    Ok(Json(PoolingResponse {
        id: new_id("pool-"),
        object: "list",
        created: unix_seconds(),
        model: rewards.model.name.clone(),
        data: values.map(item).collect(),
        usage: rewards.usage.into(),
    }))
}

/// What a reward is passed through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    Raw,
    /// 1 / (1 + exp(-reward)).
    Sigmoid,
}

impl Activation {
    /// Sigmoid only where it is asked for.
    pub fn asked(use_activation: Option<bool>) -> Self {
        if use_activation == Some(true) { Self::Sigmoid } else { Self::Raw }
    }

    /// The value to report.
    pub fn apply(self, reward: f32) -> f32 {
        match self {
            Self::Raw => reward,
            Self::Sigmoid => 1.0 / (1.0 + (-reward).exp()),
        }
    }
}

impl ClassifyRequest {
    fn activation(&self) -> Activation {
        Activation::asked(self.use_activation.or(self.activation))
    }

    /// The field that holds the inputs.
    fn field(&self) -> &'static str {
        match self {
            Self { messages: Some(_), .. } => "messages",
            Self { text: Some(_), .. } => "text",
            Self { input_ids: Some(_), .. } => "input_ids",
            _ => "input",
        }
    }

    async fn into_request(self, service: &Service) -> ApiResult<ScoreRequest> {
        let field = self.field();
        if self.add_generation_prompt == Some(true) {
            return Err(ApiError::unsupported("add_generation_prompt"));
        }
        let mut inputs = match (self.input, self.messages, self.text, self.input_ids) {
            (Some(input), None, None, None) | (None, None, None, Some(input)) => text_inputs(input),
            (None, Some(wire), None, None) => conversation_inputs(Conversations::One(wire))?,
            (None, None, Some(texts), None) => texts.into_vec().into_iter().map(ScoreInput::Text).collect(),
            _ => return Err(ApiError::invalid("input", "give either `input` or `messages`")),
        };
        if self.add_special_tokens == Some(false) {
            inputs = as_they_are(service, self.model.as_deref(), inputs, field).await?;
        }
        let kwargs = self.chat_template_kwargs.unwrap_or_default();
        Ok(ScoreRequest { model: self.model, inputs, kwargs, ..ScoreRequest::default() })
    }
}

/// Tokenises texts without putting BOS before them; what the text itself holds stays.
async fn as_they_are(
    service: &Service,
    model: Option<&str>,
    inputs: Vec<ScoreInput>,
    field: &str,
) -> ApiResult<Vec<ScoreInput>> {
    let model = service.reward_model(model)?.name.clone();
    let batch_max = service.limits().score_batch_max;
    if inputs.len() > batch_max {
        return Err(ApiError::invalid(field, format!("at most {batch_max} texts can be scored at once")));
    }
    let mut bare = Vec::with_capacity(inputs.len());
    for input in inputs {
        bare.push(match input {
            ScoreInput::Text(text) => {
                let tokens = service.tokenize(Some(&model), Prompt::Text(text), SpecialTokens::Omit).await;
                ScoreInput::Ids(tokens.map_err(|error| blamed(error.into(), Some(field)))?.ids)
            }
            other => other,
        });
    }
    Ok(bare)
}

/// SGLang's shape of one reward.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Embedding {
    /// The reward.
    pub embedding: [f32; 1],
    /// What else is known.
    pub meta_info: EmbeddingInfo,
}

/// What else SGLang tells.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct EmbeddingInfo {
    /// Tokens read.
    pub prompt_tokens: usize,
}

fn embeddings(rewards: &Rewards, activation: Activation) -> Vec<Embedding> {
    let item = |reward: &Reward| Embedding {
        embedding: [activation.apply(reward.reward)],
        meta_info: EmbeddingInfo { prompt_tokens: reward.tokens },
    };
    rewards.data.iter().map(item).collect()
}

/// TEI's request.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct PredictRequest {
    /// One text, one pair (question, answer), or a list of such lists.
    pub inputs: PredictInputs,
    /// Cut inputs that are too long.
    pub truncate: Option<bool>,
    /// Which end is cut; by default `Right`.
    pub truncation_direction: Option<Direction>,
    /// Rewards are raw whether this is set or not.
    pub raw_scores: Option<bool>,
}

/// `"text"`, `["text"]`, `["question", "answer"]`, or a list of the latter two.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum PredictInputs {
    /// One text.
    Text(String),
    /// A text alone or a pair.
    Single(Vec<String>),
    /// Several.
    Batch(Vec<Vec<String>>),
}

/// Which end of an input is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "PascalCase")]
pub enum Direction {
    /// The beginning.
    #[serde(alias = "left")]
    Left,
    /// The end.
    #[serde(alias = "right")]
    Right,
}

/// TEI's `truncate` and `truncation_direction`.
pub fn truncation(truncate: Option<bool>, direction: Option<Direction>) -> Truncate {
    match (truncate, direction) {
        (Some(true), Some(Direction::Left)) => Truncate::Left,
        (Some(true), _) => Truncate::Right,
        _ => Truncate::Error,
    }
}

/// TEI's shape of one reward.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Prediction {
    /// The reward.
    pub score: f32,
    /// Always `reward`.
    pub label: &'static str,
}

/// Rewards in TEI's prediction shape; for a batch, a list of such lists. Rewards are raw.
#[utoipa::path(post, path = "/predict", request_body = PredictRequest,
    responses((status = 200, body = Vec<Prediction>), (status = "4XX", body = ErrorResponse),
              (status = "5XX", body = ErrorResponse)))]
pub async fn predict(State(state): State<AppState>, body: JsonBody) -> ApiResult<Response> {
    let request: PredictRequest = body.decode()?;
    let truncate = truncation(request.truncate, request.truncation_direction);
    let (sequences, single) = match request.inputs {
        PredictInputs::Text(text) => (vec![vec![text]], true),
        PredictInputs::Single(texts) => (vec![texts], true),
        PredictInputs::Batch(batch) => (batch, false),
    };
    let inputs = sequences.into_iter().map(sequence).collect::<ApiResult<_>>()?;
    let rewards = score(&state, ScoreRequest { inputs, truncate, ..ScoreRequest::default() }, Some("inputs")).await?;
    let mut answers: Vec<[Prediction; 1]> =
        rewards.data.iter().map(|reward| [Prediction { score: reward.reward, label: "reward" }]).collect();
    match answers.pop() {
        Some(only) if single => Ok(Json(only).into_response()),
        last => {
            answers.extend(last);
            Ok(Json(answers).into_response())
        }
    }
}

fn sequence(texts: Vec<String>) -> ApiResult<ScoreInput> {
    match <[String; 2]>::try_from(texts) {
        Ok([question, answer]) => Ok(pair(question, answer)),
        Err(mut texts) => match (texts.pop(), texts.is_empty()) {
            (Some(text), true) => Ok(ScoreInput::Text(text)),
            _ => Err(ApiError::invalid("inputs", "an input is one text or a pair of texts")),
        },
    }
}

/// A question and an answer to it, as a conversation.
pub fn pair(question: String, answer: String) -> ScoreInput {
    let user = Message { role: "user".into(), content: question };
    ScoreInput::PromptAndCompletion { prompt: vec![user], completion: answer }
}

/// OpenRLHF's request; `prompts` and `labels` are accepted and not needed.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct GetRewardRequest {
    /// Rendered texts, used as they are: BOS is not added.
    pub query: Strings,
}

/// OpenRLHF's response.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct GetRewardResponse {
    /// Raw rewards, in the order of `query`.
    pub rewards: Vec<f32>,
    /// The same.
    pub scores: Vec<f32>,
    /// What the trainer logs.
    pub extra_logs: ExtraLogs,
}

/// What OpenRLHF's trainer logs.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ExtraLogs {
    /// The rewards again.
    pub dummy_scores: Vec<f32>,
}

/// Rewards in OpenRLHF's shape. Rewards are raw.
#[utoipa::path(post, path = "/get_reward", request_body = GetRewardRequest,
    responses((status = 200, body = GetRewardResponse), (status = "4XX", body = ErrorResponse),
              (status = "5XX", body = ErrorResponse)))]
pub async fn get_reward(State(state): State<AppState>, body: JsonBody) -> ApiResult<Json<GetRewardResponse>> {
    let request: GetRewardRequest = body.decode()?;
    let rewards = score_as_they_are(&state, None, request.query.into_vec(), "query").await?;
    let values: Vec<f32> = rewards.data.iter().map(|reward| reward.reward).collect();
    let extra_logs = ExtraLogs { dummy_scores: values.clone() };
    Ok(Json(GetRewardResponse { rewards: values.clone(), scores: values, extra_logs }))
}

async fn score_as_they_are(
    state: &AppState,
    model: Option<String>,
    texts: Vec<String>,
    field: &str,
) -> ApiResult<Rewards> {
    let inputs = texts.into_iter().map(ScoreInput::Text).collect();
    let inputs = as_they_are(state.service(), model.as_deref(), inputs, field).await?;
    score(state, ScoreRequest { model, inputs, ..ScoreRequest::default() }, Some(field)).await
}

/// LLaMA-Factory's request.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct EvaluationRequest {
    /// A reward model; by default the first one served.
    pub model: Option<String>,
    /// Rendered texts, used as they are: BOS is not added.
    pub messages: Vec<String>,
    /// Accepted where it is at least the model's context: nothing is cut here.
    pub max_length: Option<i64>,
}

/// LLaMA-Factory's response.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct EvaluationResponse {
    /// Id of this response.
    pub id: String,
    /// Always `score.evaluation`.
    pub object: &'static str,
    /// The reward model.
    pub model: String,
    /// Raw rewards, in the order of `messages`.
    pub scores: Vec<f32>,
}

/// Rewards in LLaMA-Factory's shape. Rewards are raw.
#[utoipa::path(post, path = "/v1/score/evaluation", request_body = EvaluationRequest,
    responses((status = 200, body = EvaluationResponse), (status = "4XX", body = ErrorResponse),
              (status = "5XX", body = ErrorResponse)))]
pub async fn evaluation(State(state): State<AppState>, body: JsonBody) -> ApiResult<Json<EvaluationResponse>> {
    let request: EvaluationRequest = body.decode()?;
    let model = state.service().reward_model(request.model.as_deref())?;
    if request.max_length.is_some_and(|len| usize::try_from(len).is_ok_and(|len| len < model.len_max) || len < 0) {
        return Err(ApiError::unsupported("max_length"));
    }
    let model = model.name.clone();
    let rewards = score_as_they_are(&state, Some(model.clone()), request.messages, "messages").await?;
    Ok(Json(EvaluationResponse {
        id: new_id("scoreval-"),
        object: "score.evaluation",
        model,
        scores: rewards.data.iter().map(|reward| reward.reward).collect(),
    }))
}
