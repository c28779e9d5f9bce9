//! GET /v1/models and /v1/models/{id}: a fixed map of names; nothing is looked up anywhere else.

use axum::{
    Json,
    extract::{Path, State},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    AppState,
    error::{ApiError, ApiResult, ErrorResponse},
};
use crate::service::{Kind, ServedModel};

/// The models of this server.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ModelList {
    /// Always `list`.
    pub object: &'static str,
    /// The models, policies and reward models alike.
    pub data: Vec<ModelCard>,
}

/// One model.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ModelCard {
    /// The name requests use.
    pub id: String,
    /// Always `model`.
    pub object: &'static str,
    /// When it was loaded, in unix seconds.
    pub created: u64,
    /// Always `eurus`.
    pub owned_by: &'static str,
    /// `policy` or `reward`.
    pub kind: &'static str,
    /// Tokens of prompt and answer together.
    pub max_model_len: usize,
    /// Other names for it.
    pub aliases: Vec<String>,
}

impl From<&ServedModel> for ModelCard {
    fn from(model: &ServedModel) -> Self {
        Self {
            id: model.name.clone(),
            object: "model",
            created: model.created,
            owned_by: "eurus",
            kind: match model.kind {
                Kind::Policy => "policy",
                Kind::Reward => "reward",
            },
            max_model_len: model.len_max,
            aliases: model.aliases.clone(),
        }
    }
}

/// Lists what is served.
#[utoipa::path(get, path = "/v1/models", responses((status = 200, body = ModelList)))]
pub async fn list(State(state): State<AppState>) -> Json<ModelList> {
    let data = state.service().models().iter().map(|model| ModelCard::from(&**model)).collect();
    Json(ModelList { object: "list", data })
}

/// One model by its name, which may hold slashes.
#[utoipa::path(get, path = "/v1/models/{id}", params(("id" = String, Path, description = "name of the model")),
    responses((status = 200, body = ModelCard), (status = 404, body = ErrorResponse)))]
pub async fn retrieve(
    State(state): State<AppState>,
    id: Result<Path<String>, axum::extract::rejection::PathRejection>,
) -> ApiResult<Json<ModelCard>> {
    let Path(id) = id.map_err(|_| ApiError::no_model())?;
    let model = state.service().models().iter().find(|model| model.name == id || model.aliases.contains(&id));
    model.map(|model| Json(ModelCard::from(&**model))).ok_or_else(ApiError::no_model)
}
