//! Pairs of question and answer: /score in vLLM's and SGLang's shapes, /rerank in those of Jina, Cohere, vLLM and TEI.
//! A pair is a conversation: the question is the user's turn, the answer the assistant's. Scores are raw.

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    AppState,
    aliases::{Activation, Direction, pair, truncation},
    body::JsonBody,
    choices::{WireUsage, new_id, unix_seconds},
    error::{ApiError, ApiResult, ErrorResponse},
    rewards::score as rewards_of,
    sampling::count,
    wire::Strings,
};
use crate::service::score::{Rewards, ScoreRequest, Truncate};

/// A question and an answer.
type Pair = (String, String);

/// Two lists of texts under one of four pairs of names; one text on the left goes with each on the right.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub struct PairsRequest {
    /// A reward model; by default the first one served.
    pub model: Option<String>,
    /// Questions.
    pub text_1: Option<Strings>,
    /// Answers.
    pub text_2: Option<Strings>,
    /// Questions.
    pub queries: Option<Strings>,
    /// Answers.
    pub documents: Option<Strings>,
    /// Answers to `queries` or `query`.
    pub items: Option<Strings>,
    /// Questions.
    pub data_1: Option<Strings>,
    /// Answers.
    pub data_2: Option<Strings>,
    /// SGLang's name of the question; the answer has SGLang's shape.
    pub query: Option<Strings>,
    /// `true` asks for sigmoid(reward); by default rewards are raw.
    pub use_activation: Option<bool>,
    /// Older name of `use_activation`.
    pub activation: Option<bool>,
    /// Accepted false only: there is one class.
    pub apply_softmax: Option<bool>,
    /// Accepted false only: the question comes first.
    pub item_first: Option<bool>,
}

/// vLLM's score response.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ScoreResponse {
    /// Id of this response.
    pub id: String,
    /// Always `list`.
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// The reward model.
    pub model: String,
    /// One for each pair.
    pub data: Vec<ScoreItem>,
    /// Token counts.
    pub usage: WireUsage,
}

/// SGLang's score response.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct SglangScores {
    /// The reward of each pair, alone in a list.
    pub scores: Vec<[f32; 1]>,
    /// The reward model.
    pub model: String,
    /// Token counts.
    pub usage: WireUsage,
    /// Always `scoring`.
    pub object: &'static str,
}

/// One scored pair.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ScoreItem {
    /// Which pair.
    pub index: usize,
    /// Always `score`.
    pub object: &'static str,
    /// The reward.
    pub score: f32,
}

/// Scores pairs. With SGLang's `query` the response is `{"scores": [[..]], "object": "scoring", ..}`. Rewards are raw.
#[utoipa::path(post, path = "/score", request_body = PairsRequest,
    responses((status = 200, body = ScoreResponse), (status = "4XX", body = ErrorResponse),
              (status = "5XX", body = ErrorResponse)))]
pub async fn score(State(state): State<AppState>, body: JsonBody) -> ApiResult<Response> {
    let request: PairsRequest = body.decode()?;
    let activation = Activation::asked(request.use_activation.or(request.activation));
    let sglang = request.query.is_some();
    let (model, pairs, field) = request.into_pairs(state.service().limits().score_batch_max)?;
    let rewards = score_pairs(&state, model, pairs, Truncate::Error, field).await?;
    let scores = rewards.data.iter().map(|reward| activation.apply(reward.reward));
    let (model, usage) = (rewards.model.name.clone(), WireUsage::from(rewards.usage));
    if sglang {
        let scores: Vec<[f32; 1]> = scores.map(|score| [score]).collect();
        return Ok(Json(SglangScores { scores, model, usage, object: "scoring" }).into_response());
    }
    let data = scores.enumerate().map(|(index, score)| ScoreItem { index, object: "score", score }).collect();
    let response = ScoreResponse { id: new_id("score-"), object: "list", created: unix_seconds(), model, data, usage };
    Ok(Json(response).into_response())
}

impl PairsRequest {
    fn into_pairs(self, pairs_max: usize) -> ApiResult<(Option<String>, Vec<Pair>, &'static str)> {
        for (name, value) in [("apply_softmax", self.apply_softmax), ("item_first", self.item_first)] {
            if value == Some(true) {
                return Err(ApiError::unsupported(name));
            }
        }
        let mut left =
            [("text_1", self.text_1), ("queries", self.queries), ("data_1", self.data_1), ("query", self.query)]
                .into_iter()
                .filter_map(|(name, list)| list.map(|list| (name, list.into_vec())));
        let mut right =
            [("text_2", self.text_2), ("documents", self.documents), ("items", self.items), ("data_2", self.data_2)]
                .into_iter()
                .filter_map(|(name, list)| list.map(|list| (name, list.into_vec())));
        let (Some((left_name, left)), Some((right_name, right)), None, None) =
            (left.next(), right.next(), left.next(), right.next())
        else {
            return Err(ApiError::invalid(
                "text_1",
                "give one list of questions and one of answers, such as `text_1` and `text_2`",
            ));
        };
        if !matched(left_name, right_name) {
            return Err(ApiError::invalid(right_name, format!("`{right_name}` does not go with `{left_name}`")));
        }
        Ok((self.model, zip(left, right, right_name, pairs_max)?, right_name))
    }
}

fn matched(left: &str, right: &str) -> bool {
    matches!(
        (left, right),
        ("text_1", "text_2") | ("queries", "documents" | "items") | ("data_1", "data_2") | ("query", "items")
    )
}

/// One to many, or one to one. Counted before questions are copied.
fn zip(left: Vec<String>, right: Vec<String>, name: &str, pairs_max: usize) -> ApiResult<Vec<Pair>> {
    if right.len() > pairs_max || left.len() > pairs_max {
        return Err(ApiError::invalid(name, format!("at most {pairs_max} pairs can be scored at once")));
    }
    match left.len() {
        1 => Ok(right.into_iter().map(|answer| (left[0].clone(), answer)).collect()),
        len if len == right.len() => Ok(left.into_iter().zip(right).collect()),
        len => {
            let message =
                format!("there are {len} questions and {} answers: give one question, or as many", right.len());
            Err(ApiError::invalid(name, message))
        }
    }
}

async fn score_pairs(
    state: &AppState,
    model: Option<String>,
    pairs: Vec<Pair>,
    truncate: Truncate,
    field: &str,
) -> ApiResult<Rewards> {
    let inputs = pairs.into_iter().map(|(question, answer)| pair(question, answer)).collect();
    rewards_of(state, ScoreRequest { model, inputs, truncate, ..ScoreRequest::default() }, Some(field)).await
}

/// A question and answers to rank: `documents` as Jina, Cohere and vLLM have it, `texts` as TEI has it.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct RerankRequest {
    /// A reward model; by default the first one served.
    pub model: Option<String>,
    /// The question.
    pub query: String,
    /// Answers.
    pub documents: Option<Vec<Document>>,
    /// TEI's name of `documents`; the answer has TEI's shape, a bare list.
    pub texts: Option<Vec<String>>,
    /// How many of the best to return; by default, and with 0, all.
    pub top_n: Option<i64>,
    /// Whether results hold the documents; on by default.
    pub return_documents: Option<bool>,
    /// TEI's name of `return_documents`; off by default.
    pub return_text: Option<bool>,
    /// TEI: scores are raw whether this is set or not.
    pub raw_scores: Option<bool>,
    /// TEI: cut inputs that are too long.
    pub truncate: Option<bool>,
    /// TEI: which end is cut; by default `Right`.
    pub truncation_direction: Option<Direction>,
    /// vLLM: `true` asks for sigmoid(reward); by default rewards are raw.
    pub use_activation: Option<bool>,
    /// Older name of `use_activation`.
    pub activation: Option<bool>,
    /// Cohere: accepted where no document is longer, counted in bytes.
    pub max_tokens_per_doc: Option<i64>,
}

/// A text, or an object that holds one.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Document {
    /// The text.
    Text(String),
    /// An object that holds it.
    Object {
        /// The text.
        text: String,
    },
}

impl Document {
    fn into_text(self) -> String {
        match self {
            Self::Text(text) | Self::Object { text } => text,
        }
    }
}

/// The answers, best first.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct RerankResponse {
    /// Id of this response.
    pub id: String,
    /// The reward model.
    pub model: String,
    /// Token counts.
    pub usage: WireUsage,
    /// The answers, best first.
    pub results: Vec<RerankItem>,
}

/// One ranked answer.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct RerankItem {
    /// Which document.
    pub index: usize,
    /// The document.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub document: Option<RankedDocument>,
    /// The reward.
    pub relevance_score: f32,
}

/// TEI's shape of one ranked answer.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct TeiRank {
    /// Which text.
    pub index: usize,
    /// The reward.
    pub score: f32,
    /// The text, where asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

/// A ranked document.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct RankedDocument {
    /// Its text.
    pub text: String,
}

/// Ranks answers to a question, best first. With TEI's `texts` the response is a list of `{"index", "score", "text"}`.
/// Rewards are raw, not between 0 and 1.
#[utoipa::path(post, path = "/rerank", request_body = RerankRequest,
    responses((status = 200, body = RerankResponse), (status = "4XX", body = ErrorResponse),
              (status = "5XX", body = ErrorResponse)))]
pub async fn rerank(State(state): State<AppState>, body: JsonBody) -> ApiResult<Response> {
    let request: RerankRequest = body.decode()?;
    let top_n = count("top_n", request.top_n)?.filter(|top| *top > 0).unwrap_or(usize::MAX);
    let activation = Activation::asked(request.use_activation.or(request.activation));
    let truncate = truncation(request.truncate, request.truncation_direction);
    let (tei, name, texts) = match (request.documents, request.texts) {
        (Some(documents), None) => {
            (false, "documents", documents.into_iter().map(Document::into_text).collect::<Vec<_>>())
        }
        (None, Some(texts)) => (true, "texts", texts),
        _ => return Err(ApiError::invalid("documents", "give either `documents` or `texts`")),
    };
    let longest = texts.iter().map(String::len).max().unwrap_or(0);
    if count("max_tokens_per_doc", request.max_tokens_per_doc)?.is_some_and(|max| max < longest) {
        return Err(ApiError::unsupported("max_tokens_per_doc"));
    }
    let pairs = zip(vec![request.query], texts.clone(), name, state.service().limits().score_batch_max)?;
    let rewards = score_pairs(&state, request.model, pairs, truncate, name).await?;
    let mut ranked: Vec<(usize, f32)> =
        rewards.data.iter().map(|reward| activation.apply(reward.reward)).enumerate().collect();
    ranked.sort_by(|left, right| right.1.total_cmp(&left.1));
    ranked.truncate(top_n);
    if tei {
        let texts = texts.into_iter().map(|text| (request.return_text == Some(true)).then_some(text)).collect();
        return Ok(Json(tei_shape(&ranked, texts)).into_response());
    }
    let texts = texts.into_iter().map(|text| (request.return_documents != Some(false)).then_some(text)).collect();
    Ok(Json(jina_shape(&rewards, &ranked, texts)).into_response())
}

fn tei_shape(ranked: &[(usize, f32)], mut texts: Vec<Option<String>>) -> Vec<TeiRank> {
    let item = |(index, score): &(usize, f32)| TeiRank { index: *index, score: *score, text: texts[*index].take() };
    ranked.iter().map(item).collect()
}

fn jina_shape(rewards: &Rewards, ranked: &[(usize, f32)], mut texts: Vec<Option<String>>) -> RerankResponse {
    let item = |(index, score): &(usize, f32)| RerankItem {
        index: *index,
        document: texts[*index].take().map(|text| RankedDocument { text }),
        relevance_score: *score,
    };
    RerankResponse {
        id: new_id("rerank-"),
        model: rewards.model.name.clone(),
        usage: rewards.usage.into(),
        results: ranked.iter().map(item).collect(),
    }
}
