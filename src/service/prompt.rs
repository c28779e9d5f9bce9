//! What a request starts from: a conversation, text or token ids, and how it becomes the tokens a model sees.

use serde_json::{Map, Value};

use super::{ServedModel, ServiceLimits, TokenId, validate};
pub use crate::text::chat::{Ending, Message};
use crate::{
    error::{Error, Result},
    text::{
        chat::RenderOptions,
        tokenizer::{Bos, Special, SpecialText},
    },
};

/// A conversation and how to render it.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    /// The turns, oldest first.
    pub messages: Vec<Message>,
    /// How the rendered text ends.
    pub ending: Ending,
    /// `chat_template_kwargs`: further variables of the template.
    pub kwargs: Map<String, Value>,
}

impl Conversation {
    /// Turns that the assistant is to answer.
    pub fn new(messages: Vec<Message>) -> Self {
        Self { messages, ending: Ending::Prompt, kwargs: Map::new() }
    }

    /// Whether it ends inside the last message, so that a model goes on writing that.
    pub(super) fn is_begun(&self) -> bool {
        matches!(self.ending, Ending::Continue | Ending::Answer)
    }
}

/// What a generation starts from.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// A conversation, rendered by the model's chat template. Special tokens that a message spells out are text.
    Messages(Conversation),
    /// Text. Special tokens in it are parsed; where the model wants BOS it stands in front once, the text's own or ours.
    Text(String),
    /// Token ids, taken as they are.
    Ids(Vec<TokenId>),
}

impl Prompt {
    /// The request field that carries it: `messages` or `prompt`.
    pub fn field(&self) -> &'static str {
        match self {
            Self::Messages(_) => "messages",
            Self::Text(_) | Self::Ids(_) => "prompt",
        }
    }
}

/// A prompt as a model sees it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Prepared {
    /// Its tokens, at least one.
    pub(super) ids: Vec<TokenId>,
    /// Its text: as given, as rendered, or decoded.
    pub(super) text: String,
    /// The chat template that rendered it.
    pub(super) template: Option<String>,
}

/// Renders and tokenises. Takes time in proportion to the text: not for an async thread.
pub(super) fn prepare(model: &ServedModel, prompt: &Prompt, limits: &ServiceLimits) -> Result<Prepared> {
    let field = prompt.field();
    let prepared = match prompt {
        Prompt::Messages(conversation) => render(model, conversation, limits, field)?,
        Prompt::Text(text) => {
            bytes(field, text.len(), limits)?;
            let ids = if text.is_empty() { Vec::new() } else { encode(model, text, field)? };
            Prepared { ids, text: text.clone(), template: None }
        }
        Prompt::Ids(ids) => {
            // Every token is at least a byte of the text it came from.
            bytes(field, ids.len(), limits)?;
            validate::ids(field, ids.iter().copied(), model.vocab_size)?;
            let text = model.tokenizer.decode(ids, SpecialText::Show).map_err(|error| blame(error, field))?;
            Prepared { ids: ids.clone(), text, template: None }
        }
    };
    if prepared.ids.is_empty() {
        return Err(Error::invalid(field, format!("{field} is empty")));
    }
    Ok(prepared)
}

/// Renders a conversation with the model's template and tokenises it; `field` is blamed.
pub(super) fn render(
    model: &ServedModel,
    conversation: &Conversation,
    limits: &ServiceLimits,
    field: &str,
) -> Result<Prepared> {
    let messages = &conversation.messages;
    validate::count_of(field, "messages", messages.len(), limits.messages_max)?;
    bytes(field, messages.iter().map(|message| message.content.len() + message.role.len()).sum(), limits)?;
    let options = RenderOptions { ending: conversation.ending, kwargs: conversation.kwargs.clone() };
    let rendered = model
        .template
        .render(messages, &model.tokenizer, &options)
        .map_err(|error| reblame(error, "messages", field))?;
    let ids = model.tokenizer.encode_rendered(&rendered).map_err(|error| blame(error, field))?;
    Ok(Prepared { ids, text: rendered.text, template: Some(model.template.name().to_string()) })
}

/// Tokens of a text, special ones parsed, BOS in front once where the model wants it; `field` is blamed.
pub(super) fn encode(model: &ServedModel, text: &str, field: &str) -> Result<Vec<TokenId>> {
    model.tokenizer.encode(text, Special::Parse, Bos::Add).map_err(|error| blame(error, field))
}

/// Refuses what is too long to be tokenised at all.
pub(super) fn bytes(field: &str, len: usize, limits: &ServiceLimits) -> Result<()> {
    if len <= limits.prompt_bytes_max {
        return Ok(());
    }
    let message = format!("{field} holds {len} bytes, but at most {} are allowed", limits.prompt_bytes_max);
    Err(Error::invalid(field, message))
}

/// Names the field of an error that names none.
pub(super) fn blame(error: Error, field: &str) -> Error {
    match error {
        Error::Invalid { message, field: None } => Error::invalid(field, format!("{field}: {message}")),
        other => other,
    }
}

/// Names `to` instead of `from`.
fn reblame(error: Error, from: &str, to: &str) -> Error {
    match error {
        Error::Invalid { message, field: Some(field) } if field == from => Error::invalid(to, message),
        other => other,
    }
}
