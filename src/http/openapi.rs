//! The description of the surface, made from the handlers themselves, and its page.

use std::sync::OnceLock;

use axum::{Json, Router, http::Method};
use utoipa::{
    Modify, OpenApi,
    openapi::{
        OpenApi as Document,
        path::Operation,
        security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme},
    },
};
use utoipa_swagger_ui::{Config, SwaggerUi};

use super::{
    AppState, aliases,
    auth::OPEN_ROUTES,
    chat, completion_stream, completions,
    fields::IGNORED,
    models, operations, rerank, rewards,
    routes::{self, Route},
    tokenize,
};

const DESCRIPTION: &str = "Generation, rewards and best-of-n in one process. \
    A field that would change the result and is not supported is refused with 400 and named in `error.param`; \
    `null` means absent. Scores are raw rewards everywhere: no sigmoid unless `use_activation` asks for it. \
    Every error has the body `{\"error\": {\"message\", \"type\", \"param\", \"code\"}}`.";

#[derive(OpenApi)]
#[openapi(
    info(title = "eurus"),
    paths(
        chat::chat,
        completions::completions,
        models::list,
        models::retrieve,
        tokenize::tokenize,
        tokenize::detokenize,
        tokenize::info,
        rewards::rewards,
        aliases::classify,
        aliases::pooling,
        aliases::predict,
        aliases::get_reward,
        aliases::evaluation,
        rerank::score,
        rerank::rerank,
        operations::health,
        operations::ready,
        operations::live,
        operations::version,
        operations::metrics,
        operations::home,
        document
    ),
    components(schemas(chat::ChatChunk, completion_stream::CompletionChunk)),
    modifiers(&Keys)
)]
struct Api;

/// Says which routes need a key where keys are set.
struct Keys;

impl Modify for Keys {
    fn modify(&self, document: &mut Document) {
        let scheme = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
        document.components.get_or_insert_default().add_security_scheme("key", scheme);
    }
}

/// The description, aliases included.
pub fn api() -> &'static Document {
    static DOCUMENT: OnceLock<Document> = OnceLock::new();
    DOCUMENT.get_or_init(|| {
        let mut document = Api::openapi();
        let ignored = IGNORED.join("`, `");
        document.info.description = Some(format!("{DESCRIPTION} Accepted and ignored everywhere: `{ignored}`."));
        for route in routes::table() {
            describe(&mut document, &route);
        }
        document
    })
}

fn describe(document: &mut Document, route: &Route) {
    let Some(like) = document.paths.paths.get(route.like) else { return };
    let mut item = like.clone();
    let operation = if route.method == Method::GET { &mut item.get } else { &mut item.post };
    if let Some(operation) = operation {
        finish(operation, route);
    }
    document.paths.paths.insert(route.documented_path(), item);
}

fn finish(operation: &mut Operation, route: &Route) {
    let words = route.path.split(|character: char| !character.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    let name: Vec<&str> = std::iter::once(route.method.as_str()).chain(words).collect();
    operation.operation_id = Some(name.join("_").to_ascii_lowercase());
    if !OPEN_ROUTES.contains(&route.path) {
        operation.security = Some(vec![SecurityRequirement::new("key", Vec::<String>::new())]);
    }
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, body = Object)))]
pub async fn document() -> Json<&'static Document> {
    Json(api())
}

/// The page at /docs, served from the binary.
pub fn docs() -> Router<AppState> {
    SwaggerUi::new("/docs").config(Config::from("/openapi.json")).into()
}
