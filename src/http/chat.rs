//! POST /v1/chat/completions.

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
    choices::{BestOfAccount, Head, Origin, Rating, WireStop, WireUsage, account, best_of_usage},
    error::{ApiError, ApiResult, ErrorResponse},
    logprobs::{self, ChatLogProbs},
    sampling::{GenerationFields, count},
    stream::{self, Chunks, to_json},
    wire::{WireMessage, messages},
};
use crate::service::{
    Conversation, Ending, Prompt, TokenId, Usage,
    best_of_n::BestOfN,
    generate::GenerateRequest,
    updates::{Candidate, Delta, Finished, TokenInfo, Update, total_usage},
};

/// Fields of a chat request besides the shared ones.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct ChatFields {
    /// The conversation, oldest message first.
    pub messages: Vec<WireMessage>,
    /// Tokens of each choice at most; with `max_tokens`, the smaller of the two.
    pub max_completion_tokens: Option<i64>,
    /// Report log-probabilities.
    pub logprobs: Option<bool>,
    /// Alternatives to report with each, 0 to 20.
    pub top_logprobs: Option<i64>,
    /// End the prompt where the assistant's turn begins; on by default.
    pub add_generation_prompt: Option<bool>,
    /// Go on writing the last message instead.
    pub continue_final_message: Option<bool>,
    /// Further variables of the chat template.
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
}

/// A chat request.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct ChatRequest {
    /// Its own fields.
    #[serde(flatten)]
    pub chat: ChatFields,
    /// The shared ones.
    #[serde(flatten)]
    pub generation: GenerationFields,
}

/// A chat response.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChatResponse {
    /// Id, kind, time, model.
    #[serde(flatten)]
    pub head: Head,
    /// The chat template that rendered the conversation.
    pub template: Option<String>,
    /// Seed of choice 0; choice i drew with seed + i.
    pub seed: i64,
    /// The choices; the best first where they were chosen from more.
    pub choices: Vec<ChatChoice>,
    /// Token counts.
    pub usage: WireUsage,
    /// Log-probabilities of the prompt's tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Object>>)]
    pub prompt_logprobs: Option<Vec<Value>>,
    /// Tokens of the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<TokenId>>,
    /// How the choices were chosen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best_of: Option<BestOfAccount>,
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChatChoice {
    /// Place among the choices.
    pub index: usize,
    /// The answer.
    pub message: ChatMessage,
    /// Its log-probabilities.
    pub logprobs: Option<ChatLogProbs>,
    /// `stop` or `length`.
    pub finish_reason: &'static str,
    /// The request's own condition that ended it.
    pub stop_reason: Option<WireStop>,
    /// Its tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<TokenId>>,
    /// What it was chosen by.
    #[serde(flatten)]
    pub rating: Rating,
}

/// The assistant's message.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChatMessage {
    /// Always `assistant`.
    pub role: &'static str,
    /// What was said.
    pub content: String,
    /// Always null: models here do not refuse in a channel of their own.
    pub refusal: Option<String>,
}

/// One event of a streamed chat response.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChatChunk {
    /// Id, kind, time, model.
    #[serde(flatten)]
    pub head: Head,
    /// The chat template; in the first chunk of a choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// Seed of choice 0; in the first chunk of a choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// Pieces of choices; empty in the usage chunk.
    pub choices: Vec<ChatPiece>,
    /// Token counts so far; null where they come at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<WireUsage>)]
    pub usage: Option<Option<WireUsage>>,
}

/// A piece of an answer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct ChatPiece {
    /// Which choice.
    pub index: usize,
    /// What is new.
    pub delta: ChatDelta,
    /// Log-probabilities of the new tokens.
    pub logprobs: Option<ChatLogProbs>,
    /// Why the choice ended, in its last piece.
    pub finish_reason: Option<&'static str>,
    /// The request's own condition that ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<WireStop>,
    /// The new tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<TokenId>>,
}

/// What is new in an answer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct ChatDelta {
    /// In the first piece.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// Text to append.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// Answers a conversation.
#[utoipa::path(post, path = "/v1/chat/completions", request_body = ChatRequest,
    responses((status = 200, body = ChatResponse, description = "or an event stream of ChatChunk"),
              (status = "4XX", body = ErrorResponse), (status = "5XX", body = ErrorResponse)))]
pub async fn chat(State(state): State<AppState>, body: JsonBody) -> ApiResult<Response> {
    let (chat, fields): (ChatFields, GenerationFields) = body.decode_pair()?;
    fields.check_stream()?;
    let names = Names { max_tokens: chat.max_completion_tokens.is_some() };
    let report = Report { ids: fields.returns_ids(), prompt: count("prompt_logprobs", fields.prompt_logprobs)? };
    let best_of = fields.best_of()?;
    let request = chat.into_request(&fields)?;
    if let Some(best_of) = best_of {
        let request = fields.best_of_request(request, best_of);
        let outcome = state.service().best_of_n(request).await.map_err(|error| names.restore(error.into()))?;
        return Ok(Json(best_response(&outcome, report, account(&outcome, &fields))).into_response());
    }
    let generation = state.service().generate(request).await.map_err(|error| names.restore(error.into()))?;
    let mut origin = Origin::from(&generation);
    if fields.streams() {
        let chunks = ChatChunks::new(origin, &fields);
        return Ok(stream::respond(&state, vec![generation], chunks));
    }
    let completed = generation.collect().await?;
    origin.prompt = completed.prompt;
    Ok(Json(plain_response(origin, completed.candidates, report)).into_response())
}

/// Which request fields stand behind the service's names.
#[derive(Clone, Copy)]
struct Names {
    max_tokens: bool,
}

impl Names {
    /// Blames the field that the caller used.
    fn restore(self, error: ApiError) -> ApiError {
        let error = error.renamed("logprobs", "top_logprobs");
        if self.max_tokens { error.renamed("max_tokens", "max_completion_tokens") } else { error }
    }
}

/// What a response reports besides the answer.
#[derive(Debug, Clone, Copy)]
struct Report {
    ids: bool,
    prompt: Option<usize>,
}

impl ChatFields {
    fn into_request(self, fields: &GenerationFields) -> ApiResult<GenerateRequest> {
        if fields.streams() && fields.prompt_logprobs.is_some() {
            return Err(ApiError::invalid("prompt_logprobs", "`prompt_logprobs` cannot be streamed"));
        }
        let top = count("top_logprobs", self.top_logprobs)?;
        let reports = self.logprobs == Some(true);
        if top.is_some_and(|top| top > 0) && !reports {
            return Err(ApiError::invalid("top_logprobs", "`top_logprobs` needs `logprobs`: true"));
        }
        let limit = count("max_completion_tokens", self.max_completion_tokens)?;
        let ending = self.ending()?;
        let conversation = Conversation {
            messages: messages(self.messages, "messages")?,
            ending,
            kwargs: self.chat_template_kwargs.unwrap_or_default(),
        };
        let mut request = fields.request(Prompt::Messages(conversation))?;
        request.max_tokens = match (request.max_tokens, limit) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        if request.max_tokens == Some(0) {
            let name = if limit == Some(0) { "max_completion_tokens" } else { "max_tokens" };
            return Err(ApiError::invalid(name, format!("`{name}` must be at least 1")));
        }
        request.logprobs = reports.then(|| top.unwrap_or(0));
        Ok(request)
    }

    fn ending(&self) -> ApiResult<Ending> {
        match (self.add_generation_prompt, self.continue_final_message) {
            (Some(true), Some(true)) => {
                let message = "`continue_final_message` and `add_generation_prompt` exclude each other";
                Err(ApiError::invalid("continue_final_message", message))
            }
            (_, Some(true)) => Ok(Ending::Continue),
            (Some(false), _) => Ok(Ending::Complete),
            _ => Ok(Ending::Prompt),
        }
    }
}

fn choice(index: usize, candidate: Candidate, with_ids: bool, rating: Rating) -> ChatChoice {
    ChatChoice {
        index,
        message: ChatMessage { role: "assistant", content: candidate.text, refusal: None },
        logprobs: (!candidate.logprobs.is_empty()).then(|| logprobs::chat(candidate.logprobs)),
        finish_reason: candidate.finish.as_str(),
        stop_reason: candidate.stop_reason.map(Into::into),
        token_ids: with_ids.then_some(candidate.ids),
        rating,
    }
}

fn prompt_logprobs(prompt: &[TokenInfo], report: Report) -> Option<Vec<Value>> {
    report.prompt.map(|top| logprobs::prompt(prompt, top))
}

fn plain_response(origin: Origin, candidates: Vec<Candidate>, report: Report) -> ChatResponse {
    let usage = total_usage(&candidates).into();
    let numbered = candidates.into_iter().enumerate();
    ChatResponse {
        head: Head::new("chatcmpl-", "chat.completion", &origin.model),
        seed: origin.seed,
        choices: numbered.map(|(at, candidate)| choice(at, candidate, report.ids, Rating::default())).collect(),
        usage,
        prompt_logprobs: prompt_logprobs(&origin.prompt, report),
        prompt_token_ids: report.ids.then_some(origin.prompt_ids),
        template: origin.template,
        best_of: None,
    }
}

fn best_response(outcome: &BestOfN, report: Report, account: BestOfAccount) -> ChatResponse {
    let choose = |(at, chosen): (usize, &usize)| {
        let rated = outcome.candidates.get(*chosen)?;
        Some(choice(at, rated.candidate.clone(), report.ids, rated.into()))
    };
    ChatResponse {
        head: Head::new("chatcmpl-", "chat.completion", &outcome.model.name),
        template: outcome.template.clone(),
        seed: outcome.seed.cast_signed(),
        choices: outcome.chosen.iter().enumerate().filter_map(choose).collect(),
        usage: best_of_usage(outcome),
        prompt_logprobs: prompt_logprobs(&outcome.prompt, report),
        prompt_token_ids: None,
        best_of: Some(account),
    }
}

/// Makes chunks of one generation's updates.
struct ChatChunks {
    head: Head,
    origin: Origin,
    with_ids: bool,
    usage_last: bool,
    usage_each: bool,
    begun: Vec<bool>,
    usage: Usage,
}

impl ChatChunks {
    fn new(origin: Origin, fields: &GenerationFields) -> Self {
        let (usage_last, usage_each) = fields.stream_usage();
        let prompt_tokens = origin.prompt_ids.len();
        Self {
            head: Head::new("chatcmpl-", "chat.completion.chunk", &origin.model),
            origin,
            with_ids: fields.returns_ids(),
            usage_last,
            usage_each,
            begun: Vec::new(),
            usage: Usage { prompt_tokens, ..Usage::default() },
        }
    }

    fn chunk(&self, pieces: Vec<ChatPiece>) -> ChatChunk {
        let usage = match (self.usage_each, self.usage_last) {
            (true, _) => Some(Some(self.usage.into())),
            (false, true) => Some(None),
            (false, false) => None,
        };
        ChatChunk { head: self.head.clone(), template: None, seed: None, choices: pieces, usage }
    }

    /// The chunk with the role, before the first other chunk of a choice.
    fn begin(&mut self, index: usize) -> Option<String> {
        if self.begun.len() <= index {
            self.begun.resize(index + 1, false);
        }
        if std::mem::replace(&mut self.begun[index], true) {
            return None;
        }
        let delta = ChatDelta { role: Some("assistant"), content: Some(String::new()) };
        let mut chunk = self.chunk(vec![ChatPiece { index, delta, ..ChatPiece::default() }]);
        chunk.template = self.origin.template.clone();
        chunk.seed = Some(self.origin.seed);
        Some(to_json(&chunk))
    }

    fn delta(&mut self, delta: Delta) -> Option<String> {
        self.usage.completion_tokens += delta.ids.len();
        if delta.text.is_empty() && delta.logprobs.is_empty() && !self.with_ids {
            return None;
        }
        Some(to_json(&self.chunk(vec![ChatPiece {
            index: delta.index,
            delta: ChatDelta { role: None, content: Some(delta.text) },
            logprobs: (!delta.logprobs.is_empty()).then(|| logprobs::chat(delta.logprobs)),
            token_ids: self.with_ids.then_some(delta.ids),
            ..ChatPiece::default()
        }])))
    }

    fn finish(&mut self, finished: Finished) -> String {
        self.usage.cached_tokens = self.usage.cached_tokens.max(finished.usage.cached_tokens);
        to_json(&self.chunk(vec![ChatPiece {
            index: finished.index,
            finish_reason: Some(finished.reason.as_str()),
            stop_reason: finished.stop_reason.map(Into::into),
            ..ChatPiece::default()
        }]))
    }
}

impl Chunks for ChatChunks {
    fn update(&mut self, _prompt: usize, update: Update) -> Vec<String> {
        match update {
            Update::Prompt(_) => Vec::new(),
            Update::Delta(delta) => self.begin(delta.index).into_iter().chain(self.delta(delta)).collect(),
            Update::Finished(finished) => {
                self.begin(finished.index).into_iter().chain([self.finish(finished)]).collect()
            }
        }
    }

    fn closing(&mut self) -> Vec<String> {
        if !self.usage_last {
            return Vec::new();
        }
        let mut chunk = self.chunk(Vec::new());
        chunk.usage = Some(Some(self.usage.into()));
        vec![to_json(&chunk)]
    }
}
