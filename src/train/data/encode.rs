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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::path::PathBuf;

    use serde_json::Value;

    use super::*;
    use crate::text::tokenizer::{SpecialText as Shown, SpecialTokens};

    const MARKED: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]\
        {% else %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}";

    fn fixtures() -> PathBuf {
        let given = std::env::var_os("EURUS_TRAIN_FIXTURES").map(PathBuf::from);
        given
            .unwrap_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/train")))
            .join("chat")
    }

    fn tokenizer(add_bos: Option<bool>) -> Arc<Tokenizer> {
        let json = std::fs::read_to_string(fixtures().join("tokenizer.json")).unwrap();
        let [bos, eos] = ["<s>", "</s>"].map(|text| Some(text.to_owned()));
        Arc::new(Tokenizer::from_json(&json, &SpecialTokens { bos, eos, unk: None, add_bos }).unwrap())
    }

    fn encoder(source: &str, end: TextEnd) -> Encoder {
        Encoder::new(tokenizer(None), ChatTemplate::from_source("test", source).unwrap(), end).unwrap()
    }

    fn turns(contents: &[&str]) -> Vec<Message> {
        let roles = ["user", "assistant"].into_iter().cycle();
        roles.zip(contents).map(|(role, content)| Message::new(role, *content)).collect()
    }

    /// What counts, run by run, and the whole text.
    fn learnt(encoder: &Encoder, contents: &[&str], which: Turns) -> (String, Vec<String>) {
        let text = encoder.encode(&turns(contents), which, SpecialText::Text).unwrap();
        let show = |tokens: &[u32]| encoder.tokenizer.decode(tokens, Shown::Show).unwrap();
        let places: Vec<usize> = (0..text.tokens.len()).collect();
        let runs = places.chunk_by(|left, right| text.targets[*left] == text.targets[*right]);
        let counted = runs.filter(|run| text.targets[run[0]]);
        (show(&text.tokens), counted.map(|run| show(&text.tokens[run[0]..=run[run.len() - 1]])).collect())
    }

    #[track_caller]
    fn check(source: &str, end: TextEnd, which: Turns, contents: &[&str], whole: &str, counted: &[&str]) {
        let (text, runs) = learnt(&encoder(source, end), contents, which);
        assert_eq!((text.as_str(), runs.iter().map(String::as_str).collect()), (whole, counted.to_vec()));
    }

    #[test]
    fn ids_and_masks_are_those_of_transformers() {
        let file = std::fs::read_to_string(fixtures().join("chat.json")).unwrap();
        let file: Value = serde_json::from_str(&file).unwrap();
        let encoder = encoder(file["template"].as_str().unwrap(), TextEnd::Turn);
        let rows = file["rows"].as_array().unwrap();
        assert!(rows.len() >= 4);
        for (index, row) in rows.iter().enumerate() {
            let messages: Vec<Message> = serde_json::from_value(row["messages"].clone()).unwrap();
            let ids: Vec<u32> = serde_json::from_value(row["input_ids"].clone()).unwrap();
            let mask: Vec<u8> = serde_json::from_value(row["assistant_mask"].clone()).unwrap();
            let mask: Vec<bool> = mask.into_iter().map(|bit| bit == 1).collect();
            let expected = Text { tokens: ids, targets: mask };
            assert_eq!(encoder.encode(&messages, Turns::All, SpecialText::Parse).unwrap(), expected, "row {index}");
            let harmless = messages.iter().all(|message| !message.content.contains("s>"));
            if harmless {
                assert_eq!(encoder.encode(&messages, Turns::All, SpecialText::Text).unwrap(), expected, "row {index}");
            }
        }
    }

    #[test]
    fn special_tokens_that_a_message_spells_stay_text() {
        let encoder = encoder(MARKED, TextEnd::Turn);
        let messages = turns(&["a </s> <s>", "b</s>c"]);
        let text = encoder.encode(&messages, Turns::All, SpecialText::Text).unwrap();
        let special: Vec<usize> = (0..text.tokens.len()).filter(|place| text.tokens[*place] <= 2).collect();
        assert_eq!(special, [0, text.tokens.len() - 1]);
        let counted = text.tokens[text.prompt_len()..].to_vec();
        let spelt = encoder.tokenizer.decode(&counted, Shown::Show).unwrap();
        assert_eq!((spelt.as_str(), text.target_count()), ("b</s>c</s>", counted.len()));
        let parsed = encoder.encode(&messages, Turns::All, SpecialText::Parse).unwrap();
        assert_eq!(parsed.tokens.iter().filter(|token| **token <= 2).count(), 5);
        assert_eq!(parsed.target_count(), 4);
    }

    #[test]
    fn marks_and_prefixes_agree_where_both_are_there() {
        let bare = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "");
        for contents in [&["q", "a1"][..], &["q", "a1", "r ☃", "b</s>2"], &["q", "", "r", "b", "s"]] {
            for which in [Turns::All, Turns::Last] {
                let marked = encoder(MARKED, TextEnd::Turn).encode(&turns(contents), which, SpecialText::Text).unwrap();
                let prefixed =
                    encoder(&bare, TextEnd::Turn).encode(&turns(contents), which, SpecialText::Text).unwrap();
                assert_eq!(marked, prefixed, "{contents:?} {which:?}");
            }
        }
    }

    #[test]
    fn the_prompt_does_not_count_and_what_closes_a_turn_does() {
        let chatml = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}\
            {% if add_generation_prompt %}<assistant>{% endif %}";
        let contents = ["1+1", "2", "2+2", "4"];
        let whole = "<user>1+1</s>\n<assistant>2</s>\n<user>2+2</s>\n<assistant>4</s>\n";
        check(chatml, TextEnd::Turn, Turns::All, &contents, whole, &["2</s>", "4</s>"]);
        check(chatml, TextEnd::Turn, Turns::Last, &contents, whole, &["4</s>"]);
        check(chatml, TextEnd::Answer, Turns::Last, &contents, whole.strip_suffix("</s>\n").unwrap(), &["4"]);
        check(chatml, TextEnd::AnswerAndEos, Turns::Last, &contents, whole.trim_end(), &["4</s>"]);
        let whole = "<s>[INST] 1+1 [/INST]2</s>[INST] 2+2 [/INST]4</s>";
        check(MARKED, TextEnd::Turn, Turns::All, &contents, whole, &["2</s>", "4</s>"]);
        check(MARKED, TextEnd::Turn, Turns::Last, &contents, whole, &["4</s>"]);
        check(MARKED, TextEnd::Answer, Turns::Last, &contents, whole.strip_suffix("</s>").unwrap(), &["4"]);
        check(MARKED, TextEnd::AnswerAndEos, Turns::Last, &contents, whole, &["4</s>"]);
    }

    #[test]
    fn a_reward_is_trained_where_it_is_served() {
        for (source, messages) in [(MARKED, ["1+1 </s>", "2"]), (MARKED, ["1+1", "2</s>"]), (MARKED, ["1", " 2 \n"])] {
            let messages = turns(&messages);
            for end in [TextEnd::Answer, TextEnd::AnswerAndEos] {
                let encoder = encoder(source, end);
                // As service::score has it.
                let options = RenderOptions::new(Ending::Answer);
                let rendered = encoder.template.render(&messages, &encoder.tokenizer, &options).unwrap();
                let mut served = encoder.tokenizer.encode_rendered(&rendered).unwrap();
                let eos = encoder.tokenizer.eos().filter(|eos| served.last() != Some(eos));
                served.extend(eos.filter(|_| end == TextEnd::AnswerAndEos));
                let text = encoder.encode(&messages, Turns::Last, SpecialText::Text).unwrap();
                assert_eq!((text.targets.last(), text.tokens), (Some(&true), served));
            }
        }
    }

    #[test]
    fn a_last_turn_in_several_parts_counts_whole() {
        let parts = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}{{ m.content }}\
            {% endgeneration %}|{% generation %}!{% endgeneration %}{% endif %}{% endfor %}";
        check(parts, TextEnd::Turn, Turns::Last, &["x", "1", "y", "2"], "x1|!y2|!", &["2", "!"]);
        check(parts, TextEnd::Turn, Turns::All, &["x", "1", "y", "2"], "x1|!y2|!", &["1", "!", "2", "!"]);
    }

    #[test]
    fn a_template_that_rewrites_history_needs_marks() {
        let source = "{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}";
        let error = encoder(source, TextEnd::Turn).encode(&turns(&["x", "1", "y", "2"]), Turns::All, SpecialText::Text);
        assert!(error.unwrap_err().to_string().contains("put {% generation %}"));
    }

    #[test]
    fn the_first_token_never_counts_and_bos_is_added_once() {
        let source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}";
        let template = || ChatTemplate::from_source("test", source).unwrap();
        let plain = Encoder::new(tokenizer(None), template(), TextEnd::Turn).unwrap();
        let text = plain.encode(&turns(&["12", "34"]), Turns::All, SpecialText::Text).unwrap();
        assert_eq!(text.targets, [false, true, true, true]);
        let adding = Encoder::new(tokenizer(Some(true)), template(), TextEnd::Turn).unwrap();
        let with_bos = adding.encode(&turns(&["12", "34"]), Turns::All, SpecialText::Text).unwrap();
        assert_eq!(with_bos.tokens, [vec![1], text.tokens].concat());
        assert_eq!(with_bos.targets, [false, true, true, true, true]);
        let none = Tokenizer::from_json(
            &std::fs::read_to_string(fixtures().join("tokenizer.json")).unwrap(),
            &SpecialTokens::default(),
        );
        assert!(Encoder::new(Arc::new(none.unwrap()), template(), TextEnd::AnswerAndEos).is_err());
    }
}
