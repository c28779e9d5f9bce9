//! Tokens and text: tokenizers, chat templates, streaming, final answers.
