//! Conversations to tokens with the assistant's part marked, through the chat template that serving uses.

use std::ops::Range;
use std::sync::Arc;

use super::recipe::SpecialText;
use crate::error::{Error, Result};
use crate::text::chat::{Ending, Message, RenderOptions};
use crate::text::{ChatTemplate, Tokenizer};
use crate::train::example::Text;

/// Where a text ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextEnd {
    /// With the last turn, closed as the template closes it: what a policy is to write.
    Turn,
    /// Right after the answer, where a reward model without `append_eos` is read.
    Answer,
    /// After the answer and end of sequence, never doubled: where a reward model with `append_eos` is read.
    AnswerAndEos,
}

/// Which turns of the assistant count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turns {
    /// Each.
    All,
    /// The last one.
    Last,
}

/// What turns conversations into texts.
#[derive(Debug, Clone)]
pub struct Encoder {
    tokenizer: Arc<Tokenizer>,
    template: ChatTemplate,
    end: TextEnd,
}

impl Encoder {
    /// Encodes by the tokenizer and the template of a checkpoint.
    ///
    /// # Errors
    /// End of sequence is wanted and the tokenizer has none.
    pub fn new(tokenizer: Arc<Tokenizer>, template: ChatTemplate, end: TextEnd) -> Result<Self> {
        if end == TextEnd::AnswerAndEos && tokenizer.eos().is_none() {
            return Err(Error::Checkpoint(
                "append_eos is set, but the tokenizer has no end-of-sequence token".to_owned(),
            ));
        }
        Ok(Self { tokenizer, template, end })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The chat template.
    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// Where texts end.
    pub fn end(&self) -> TextEnd {
        self.end
    }

    /// The tokens of `messages`; those of the assistant's `turns`, and what closes them, count. What the template prints to
    /// open a turn does not count, unless it marks the turn itself, by `{% generation %}`.
    ///
    /// # Errors
    /// The template refuses the messages, or cannot tell the assistant's part; the tokenizer gives up.
    pub fn encode(&self, messages: &[Message], turns: Turns, special: SpecialText) -> Result<Text> {
        let marked = self.template.render_marked(messages, &self.tokenizer, &RenderOptions::new(self.ending()))?;
        let spans = if self.template.marks_answers() {
            self.last_marked(messages, marked.generated, turns)?
        } else {
            self.by_prefixes(messages, &marked.rendered.text, turns)?
        };
        let mut rendered = marked.rendered;
        if special == SpecialText::Parse {
            rendered.as_text.clear();
        }
        let located = self.tokenizer.locate_rendered(&rendered)?;
        let mut text =
            Text { tokens: Vec::with_capacity(located.len() + 1), targets: Vec::with_capacity(located.len() + 1) };
        let mut ahead = spans.iter().peekable();
        for token in &located {
            while ahead.next_if(|span| span.end <= token.bytes.start).is_some() {}
            // As transformers: a token that holds any character of the span counts.
            let counts = ahead.peek().is_some_and(|span| token.bytes.start < span.end && token.bytes.end > span.start);
            text.tokens.push(token.id);
            text.targets.push(counts);
        }
        let eos =
            self.tokenizer.eos().filter(|eos| self.end == TextEnd::AnswerAndEos && text.tokens.last() != Some(eos));
        text.tokens.extend(eos);
        text.targets.extend(eos.map(|_| true));
        if let Some(first) = text.targets.first_mut() {
            *first = false;
        }
        Ok(text)
    }

    fn ending(&self) -> Ending {
        if self.end == TextEnd::Turn { Ending::Complete } else { Ending::Answer }
    }

    /// The spans of `turns` among those that the template marks.
    fn last_marked(
        &self,
        messages: &[Message],
        mut spans: Vec<Range<usize>>,
        turns: Turns,
    ) -> Result<Vec<Range<usize>>> {
        let answers = messages.iter().filter(|message| message.role == "assistant").count();
        if turns == Turns::All || spans.is_empty() {
            return Ok(spans);
        }
        let earlier = if spans.len() == answers || messages.len() < 2 {
            answers.saturating_sub(1).min(spans.len() - 1)
        } else {
            // A turn may be marked in several parts, or not at all: those before the last turn are there without it.
            let before = &messages[..messages.len() - 1];
            let options = RenderOptions::new(Ending::Complete);
            self.template.render_marked(before, &self.tokenizer, &options)?.generated.len()
        };
        Ok(spans.split_off(earlier.min(spans.len())))
    }

    /// The spans of `turns` in `whole`: from the end of the prompt to the end of the turn, as shorter conversations print them.
    fn by_prefixes(&self, messages: &[Message], whole: &str, turns: Turns) -> Result<Vec<Range<usize>>> {
        let mut answers: Vec<usize> =
            (0..messages.len()).filter(|index| messages[*index].role == "assistant").collect();
        if turns == Turns::Last {
            answers.drain(..answers.len().saturating_sub(1));
        }
        let mut spans = Vec::with_capacity(answers.len());
        for index in answers {
            let print = |messages: &[Message], ending| {
                let rendered = self.template.render(messages, &self.tokenizer, &RenderOptions::new(ending));
                rendered.map(|rendered| rendered.text)
            };
            let start = if index == 0 { String::new() } else { print(&messages[..index], Ending::Prompt)? };
            let last = index + 1 == messages.len();
            let end = if last { whole.to_owned() } else { print(&messages[..=index], Ending::Complete)? };
            if !end.starts_with(&start) || !whole.starts_with(&end) {
                let message = format!(
                    "the chat template {} does not print a conversation as the beginning of a longer one; \
                     put {{% generation %}} and {{% endgeneration %}} around what the assistant says",
                    self.template.name()
                );
                return Err(Error::invalid("messages", message));
            }
            spans.push(start.len()..self.closed(&end));
        }
        Ok(spans)
    }

    /// Where a turn ends that `text` ends with: white space after end of sequence is between turns.
    fn closed(&self, text: &str) -> usize {
        let trimmed = text.trim_end();
        let closes = self.tokenizer.eos_text().is_some_and(|eos| trimmed.ends_with(eos));
        if closes { trimmed.len() } else { text.len() }
    }
}
