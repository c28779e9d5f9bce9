//! POST /tokenize and /detokenize, GET /tokenizer_info, in vLLM's shapes.

use axum::{
    Json,
    extract::{Query, State, rejection::QueryRejection},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::{IntoParams, ToSchema};

use super::{
    AppState,
    body::JsonBody,
    error::{ApiError, ApiResult, ErrorResponse},
    wire::{WireMessage, messages},
};
use crate::service::{Conversation, Ending, Prompt, TokenId, tokens::SpecialTokens};

/// What to tokenise: `prompt` or `messages`.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct TokenizeRequest {
    /// Whose tokenizer; by default that of the first model served.
    pub model: Option<String>,
    /// Text.
    pub prompt: Option<String>,
    /// Or a conversation, rendered by the chat template.
    pub messages: Option<Vec<WireMessage>>,
    /// Whether BOS stands before text; on by default. Conversations have theirs from the template.
    pub add_special_tokens: Option<bool>,
    /// End the conversation where the assistant's turn begins; on by default.
    pub add_generation_prompt: Option<bool>,
    /// End it inside its last message.
    pub continue_final_message: Option<bool>,
    /// Further variables of the chat template.
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// Return the text of each token.
    pub return_token_strs: Option<bool>,
}

/// The tokens.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct TokenizeResponse {
    /// How many.
    pub count: usize,
    /// Tokens of the model's context.
    pub max_model_len: usize,
    /// Their ids.
    pub tokens: Vec<TokenId>,
    /// The text of each, where asked for.
    pub token_strs: Option<Vec<String>>,
}

/// Tokens to turn back.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct DetokenizeRequest {
    /// Whose tokenizer; by default that of the first model served.
    pub model: Option<String>,
    /// Token ids.
    pub tokens: Vec<TokenId>,
}

/// The text.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct DetokenizeResponse {
    /// The text, special tokens included.
    pub prompt: String,
}

/// Which tokenizer.
#[derive(Debug, Clone, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct InfoQuery {
    /// By default that of the first model served.
    pub model: Option<String>,
}

/// What a client needs to know about a tokenizer.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct InfoResponse {
    /// Always `eurus`.
    pub tokenizer_class: &'static str,
    /// Text of the beginning-of-sequence token.
    pub bos_token: Option<String>,
    /// Text of the end-of-sequence token.
    pub eos_token: Option<String>,
    /// Text of the padding token; nothing is ever padded here.
    pub pad_token: Option<String>,
    /// Whether BOS is put in front of text.
    pub add_bos_token: bool,
    /// Name of the chat template.
    pub template: String,
    /// Ids it can give.
    pub vocab_size: usize,
    /// Tokens of the model's context.
    pub model_max_length: usize,
}

/// The tokens of a text or a conversation.
#[utoipa::path(post, path = "/tokenize", request_body = TokenizeRequest,
    responses((status = 200, body = TokenizeResponse), (status = "4XX", body = ErrorResponse)))]
pub async fn tokenize(State(state): State<AppState>, body: JsonBody) -> ApiResult<Json<TokenizeResponse>> {
    let request: TokenizeRequest = body.decode()?;
    let (model, with_texts) = (request.model.clone(), request.return_token_strs == Some(true));
    let special = match request.add_special_tokens {
        Some(false) => SpecialTokens::Omit,
        _ => SpecialTokens::Add,
    };
    let prompt = request.into_prompt()?;
    let tokens = state.service().tokenize(model.as_deref(), prompt, special).await?;
    Ok(Json(TokenizeResponse {
        count: tokens.ids.len(),
        max_model_len: tokens.model.len_max,
        tokens: tokens.ids,
        token_strs: with_texts.then_some(tokens.texts),
    }))
}

impl TokenizeRequest {
    fn into_prompt(self) -> ApiResult<Prompt> {
        match (self.prompt, self.messages) {
            (Some(text), None) => Ok(Prompt::Text(text)),
            (None, Some(wire)) => {
                let ending = match (self.continue_final_message, self.add_generation_prompt) {
                    (Some(true), _) => Ending::Continue,
                    (_, Some(false)) => Ending::Complete,
                    _ => Ending::Prompt,
                };
                let kwargs = self.chat_template_kwargs.unwrap_or_default();
                Ok(Prompt::Messages(Conversation { messages: messages(wire, "messages")?, ending, kwargs }))
            }
            _ => Err(ApiError::invalid("prompt", "give either `prompt` or `messages`")),
        }
    }
}

/// The text of tokens.
#[utoipa::path(post, path = "/detokenize", request_body = DetokenizeRequest,
    responses((status = 200, body = DetokenizeResponse), (status = "4XX", body = ErrorResponse)))]
pub async fn detokenize(State(state): State<AppState>, body: JsonBody) -> ApiResult<Json<DetokenizeResponse>> {
    let request: DetokenizeRequest = body.decode()?;
    let prompt = state.service().detokenize(request.model.as_deref(), &request.tokens)?;
    Ok(Json(DetokenizeResponse { prompt }))
}

/// What a client needs to know about a tokenizer.
#[utoipa::path(get, path = "/tokenizer_info", params(InfoQuery),
    responses((status = 200, body = InfoResponse), (status = "4XX", body = ErrorResponse)))]
pub async fn info(
    State(state): State<AppState>,
    query: Result<Query<InfoQuery>, QueryRejection>,
) -> ApiResult<Json<InfoResponse>> {
    let Query(query) = query.map_err(|_| ApiError::invalid("model", "the query takes `model` only"))?;
    let info = state.service().tokenizer_info(query.model.as_deref())?;
    Ok(Json(InfoResponse {
        tokenizer_class: "eurus",
        bos_token: info.bos_token,
        eos_token: info.eos_token,
        pad_token: None,
        add_bos_token: info.adds_bos,
        template: info.template,
        vocab_size: info.vocab_size,
        model_max_length: info.len_max,
    }))
}
