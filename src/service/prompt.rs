//! What a request starts from: a conversation, text or token ids.

use serde_json::{Map, Value};

use super::TokenId;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// How a rendered conversation ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ending {
    /// Ready for the assistant's turn (`add_generation_prompt`).
    #[default]
    Prompt,
    /// Inside the last message, which the model goes on writing (`continue_final_message`).
    Continue,
    /// After the last message, all turns closed.
    Complete,
}

/// A conversation and how to render it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conversation {
    /// The turns, oldest first.
    pub messages: Vec<Message>,
    /// How the rendered text ends.
    pub ending: Ending,
    /// `chat_template_kwargs`: further variables of the template.
    pub kwargs: Map<String, Value>,
}

/// What a generation starts from.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// A conversation, rendered by the model's chat template.
    Messages(Conversation),
    /// Text; special tokens in it are parsed and one BOS stands before it.
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
