//! POST /v1/completions: one or several prompts, as text or ids, echoed or not.

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::task::JoinSet;
use utoipa::ToSchema;

use super::{
    AppState,
    body::JsonBody,
    choices::{BestOfAccount, Head, Origin, Rating, WireStop, WireUsage, account, add, best_of_usage},
    completion_stream::CompletionChunks,
    error::{ApiError, ApiResult, ErrorResponse},
    logprobs::{self, CompletionLogProbs},
    sampling::{GenerationFields, count},
    stream,
    wire::{Prompts, TextOrIds},
};
use crate::service::{
    Prompt, Service, TokenId, Usage,
    best_of_n::BestOfN,
    generate::{GenerateRequest, Generation},
    tokens::SpecialTokens,
    updates::{Candidate, Completed, TokenInfo, total_usage},
};

/// Tokens of a completion where the request does not say, as OpenAI has it.
const MAX_TOKENS: usize = 16;

/// Fields of a completions request besides the shared ones.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct CompletionFields {
    /// What to go on from.
    pub prompt: Prompts,
    /// Put the prompt before the text; with `logprobs` its log-probabilities too. Allows `max_tokens` 0.
    pub echo: Option<bool>,
    /// Report log-probabilities and this many alternatives.
    pub logprobs: Option<i64>,
    /// Whether BOS stands before text prompts; on by default.
    pub add_special_tokens: Option<bool>,
}

/// A completions request.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct CompletionRequest {
    /// Its own fields.
    #[serde(flatten)]
    pub completion: CompletionFields,
    /// The shared ones.
    #[serde(flatten)]
    pub generation: GenerationFields,
}

/// A completions response.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct CompletionResponse {
    /// Id, kind, time, model.
    #[serde(flatten)]
    pub head: Head,
    /// Seed of choice 0 of each prompt; choice i drew with seed + i.
    pub seed: i64,
    /// The choices: all of the first prompt, then all of the second.
    pub choices: Vec<CompletionChoice>,
    /// Token counts.
    pub usage: WireUsage,
    /// How the choices were chosen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best_of: Option<BestOfAccount>,
}

/// One completion.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct CompletionChoice {
    /// Place among the choices.
    pub index: usize,
    /// The text.
    pub text: String,
    /// Its log-probabilities.
    pub logprobs: Option<CompletionLogProbs>,
    /// `stop` or `length`.
    pub finish_reason: &'static str,
    /// The request's own condition that ended it.
    pub stop_reason: Option<WireStop>,
    /// Log-probabilities of the prompt's tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Object>>)]
    pub prompt_logprobs: Option<Vec<Value>>,
    /// Tokens of the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<TokenId>>,
    /// Its tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<TokenId>>,
    /// What it was chosen by.
    #[serde(flatten)]
    pub rating: Rating,
}

/// What a choice reports besides its text.
#[derive(Debug, Clone, Copy)]
pub(super) struct Report {
    /// The prompt stands before the text.
    pub(super) echo: bool,
    /// Alternatives for each token, where log-probabilities are reported.
    pub(super) logprobs: Option<usize>,
    /// The same for the prompt, in vLLM's shape.
    pub(super) prompt_logprobs: Option<usize>,
    /// Token ids.
    pub(super) ids: bool,
}

/// Completes prompts.
#[utoipa::path(post, path = "/v1/completions", request_body = CompletionRequest,
    responses((status = 200, body = CompletionResponse, description = "or an event stream of CompletionChunk"),
              (status = "4XX", body = ErrorResponse), (status = "5XX", body = ErrorResponse)))]
pub async fn completions(State(state): State<AppState>, body: JsonBody) -> ApiResult<Response> {
    let (own, fields): (CompletionFields, GenerationFields) = body.decode_pair()?;
    fields.check_stream()?;
    let report = own.report(&fields)?;
    let best_of = fields.best_of()?;
    let mut requests = own.into_requests(&state, &fields, report).await?;
    if let Some(best_of) = best_of {
        let (Some(request), true) = (requests.pop(), requests.is_empty()) else {
            return Err(ApiError::invalid("prompt", "with `best_of` above `n` there can be only one prompt"));
        };
        let outcome = state.service().best_of_n(fields.best_of_request(request, best_of)).await?;
        return Ok(Json(best_response(&outcome, report, account(&outcome, &fields))).into_response());
    }
    let generations = start(state.service(), requests).await?;
    if fields.streams() {
        let origins = generations.iter().map(Origin::from).collect();
        let chunks = CompletionChunks::new(origins, report, &fields);
        return Ok(stream::respond(&state, generations, chunks));
    }
    let completed = collect(generations).await?;
    Ok(Json(plain_response(completed, report)).into_response())
}

impl CompletionFields {
    fn report(&self, fields: &GenerationFields) -> ApiResult<Report> {
        let report = Report {
            echo: self.echo == Some(true),
            logprobs: count("logprobs", self.logprobs)?,
            prompt_logprobs: count("prompt_logprobs", fields.prompt_logprobs)?,
            ids: fields.returns_ids(),
        };
        if fields.streams() && report.prompt_logprobs.is_some() {
            return Err(ApiError::invalid("prompt_logprobs", "`prompt_logprobs` cannot be streamed"));
        }
        Ok(report)
    }

    /// One request for each prompt.
    async fn into_requests(
        self,
        state: &AppState,
        fields: &GenerationFields,
        report: Report,
    ) -> ApiResult<Vec<GenerateRequest>> {
        let prompts = self.prompt.into_vec();
        let prompts_max = state.options().prompts_max;
        if prompts.is_empty() || prompts.len() > prompts_max {
            return Err(ApiError::invalid("prompt", format!("`prompt` must hold 1 to {prompts_max} prompts")));
        }
        let bare = self.add_special_tokens == Some(false);
        let mut requests = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let prompt = match prompt {
                TextOrIds::Text(text) if bare => Prompt::Ids(bare_ids(state.service(), fields, text).await?),
                TextOrIds::Text(text) => Prompt::Text(text),
                TextOrIds::Ids(ids) => Prompt::Ids(ids),
            };
            requests.push(request(fields, prompt, report)?);
        }
        Ok(requests)
    }
}

async fn bare_ids(service: &Service, fields: &GenerationFields, text: String) -> ApiResult<Vec<TokenId>> {
    let tokens = service.tokenize(fields.model.as_deref(), Prompt::Text(text), SpecialTokens::Omit).await?;
    Ok(tokens.ids)
}

fn request(fields: &GenerationFields, prompt: Prompt, report: Report) -> ApiResult<GenerateRequest> {
    let mut request = fields.request(prompt)?;
    let reads_prompt = report.echo || report.prompt_logprobs.is_some();
    if request.max_tokens == Some(0) && !reads_prompt {
        return Err(ApiError::invalid("max_tokens", "`max_tokens` must be at least 1, or 0 with `echo`"));
    }
    request.max_tokens = request.max_tokens.or(Some(MAX_TOKENS));
    request.logprobs = report.logprobs;
    let echoed = report.logprobs.filter(|_| report.echo);
    request.prompt_logprobs = report.prompt_logprobs.max(echoed);
    Ok(request)
}

/// Submits all prompts; without a seed all of them use the one drawn for the first, so one number tells them all.
async fn start(service: &Service, requests: Vec<GenerateRequest>) -> ApiResult<Vec<Generation>> {
    let mut generations: Vec<Generation> = Vec::with_capacity(requests.len());
    for mut request in requests {
        request.seed = request.seed.or(generations.first().map(Generation::seed));
        generations.push(service.generate(request).await?);
    }
    Ok(generations)
}

/// Reads all generations at once: one that nobody reads would pause. Dropping this future cancels them.
async fn collect(generations: Vec<Generation>) -> ApiResult<Vec<(Origin, Completed)>> {
    let mut tasks = JoinSet::new();
    for (at, generation) in generations.into_iter().enumerate() {
        let origin = Origin::from(&generation);
        tasks.spawn(async move { generation.collect().await.map(|completed| (at, origin, completed)) });
    }
    let mut finished = Vec::with_capacity(tasks.len());
    while let Some(task) = tasks.join_next().await {
        finished.push(task.map_err(|_| ApiError::internal())??);
    }
    finished.sort_by_key(|(at, ..)| *at);
    Ok(finished.into_iter().map(|(_, origin, completed)| (origin, completed)).collect())
}

fn plain_response(completed: Vec<(Origin, Completed)>, report: Report) -> CompletionResponse {
    let (model, seed) = completed.first().map(|(origin, _)| (origin.model.clone(), origin.seed)).unwrap_or_default();
    let mut usage = Usage::default();
    let mut choices = Vec::new();
    for (mut origin, completed) in completed {
        origin.prompt = completed.prompt;
        usage = add(usage, total_usage(&completed.candidates));
        for candidate in completed.candidates {
            choices.push(choice(choices.len(), &origin, candidate, report));
        }
    }
    let head = Head::new("cmpl-", "text_completion", &model);
    CompletionResponse { head, seed, choices, usage: usage.into(), best_of: None }
}

fn best_response(outcome: &BestOfN, report: Report, account: BestOfAccount) -> CompletionResponse {
    let origin = Origin {
        model: outcome.model.name.clone(),
        seed: outcome.seed.cast_signed(),
        prompt_text: outcome.prompt_text.clone(),
        prompt_ids: Vec::new(),
        template: outcome.template.clone(),
        prompt: outcome.prompt.clone(),
    };
    let choose = |(at, chosen): (usize, &usize)| {
        let rated = outcome.candidates.get(*chosen)?;
        let choice = choice(at, &origin, rated.candidate.clone(), report);
        Some(CompletionChoice { rating: rated.into(), prompt_token_ids: None, ..choice })
    };
    CompletionResponse {
        head: Head::new("cmpl-", "text_completion", &origin.model),
        seed: origin.seed,
        choices: outcome.chosen.iter().enumerate().filter_map(choose).collect(),
        usage: best_of_usage(outcome),
        best_of: Some(account),
    }
}

fn choice(index: usize, origin: &Origin, candidate: Candidate, report: Report) -> CompletionChoice {
    let mut text = String::new();
    if report.echo {
        text.push_str(&origin.prompt_text);
    }
    text.push_str(&candidate.text);
    let echoed: &[TokenInfo] = if report.echo { &origin.prompt } else { &[] };
    let lists = report.logprobs.map(|top| {
        let mut lists = CompletionLogProbs::default();
        lists.extend(echoed.iter().chain(&candidate.logprobs), top, &mut 0);
        lists
    });
    CompletionChoice {
        index,
        text,
        logprobs: lists,
        finish_reason: candidate.finish.as_str(),
        stop_reason: candidate.stop_reason.map(Into::into),
        prompt_logprobs: report.prompt_logprobs.map(|top| logprobs::prompt(&origin.prompt, top)),
        prompt_token_ids: report.ids.then(|| origin.prompt_ids.clone()),
        token_ids: report.ids.then_some(candidate.ids),
        rating: Rating::default(),
    }
}
