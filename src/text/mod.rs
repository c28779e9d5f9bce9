//! Tokens and text: tokenizers, chat templates, streaming, final answers.
//! Knows nothing of tensors, scheduling or HTTP.

pub mod answer;
pub mod chat;
mod detokenize;
mod number;
pub mod stream;
pub mod tokenizer;

pub use chat::ChatTemplate;
pub use stream::TextStream;
pub use tokenizer::Tokenizer;
