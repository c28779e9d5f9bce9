//! Chat templates: messages to text through minijinja, with the settings that Hugging Face gives to jinja2.
//! Text to ids is the tokenizer's.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, Value};
use regex::Regex;
use serde::{Deserialize, Serialize};

use super::tokenizer::{PRIVATE, Tokenizer, no_character_left, unused_characters};
use crate::error::{Error, Result};

/// Steps (and 64-byte pieces of text) a template may use: 2 million end a runaway loop in some 50 ms, and a thousand
/// messages use less than a tenth.
const FUEL: u64 = 2_000_000;

/// Turns of `[INST] question [/INST] answer</s>` with one BOS: what Eurus 7B and its reward model were trained on, after
/// Mistral's instruct models. One space stands before an answer, as in the reward model's card.
const MISTRAL_INSTRUCT: &str = "\
{{ bos_token }}
{%- for message in messages %}
    {%- if message.role != ('assistant' if loop.index0 % 2 else 'user') %}
        {{- raise_exception('roles must alternate, user first: user, assistant, user, ... (no system role)') }}
    {%- elif message.role == 'user' %}
        {{- '[INST] ' + message.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}";

/// Only marks which text is the assistant's, for training. A condition in its place keeps the effect on white space.
static GENERATION: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").ok());

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `user`, `assistant`, and `system` where the template knows it.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// Where the rendered text ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// With whatever opens the assistant's turn (`add_generation_prompt`): an answer is to be generated.
    Prompt,
    /// Inside the last message, right after its text (`continue_final_message`): more of it is to be generated.
    Continue,
    /// Right after the text of the last message, which must be the assistant's: the answer is to be scored. No EOS.
    Answer,
    /// After the last turn, closed as the template closes it.
    Complete,
}

/// How to render.
#[derive(Debug, Clone)]
pub struct RenderOptions {
    /// Where the text ends.
    pub ending: Ending,
    /// Further variables for the template (`chat_template_kwargs`).
    pub kwargs: serde_json::Map<String, serde_json::Value>,
}

impl RenderOptions {
    /// No further variables.
    pub fn new(ending: Ending) -> Self {
        Self { ending, kwargs: serde_json::Map::new() }
    }
}

/// A conversation as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The text, special tokens written out.
    pub text: String,
    /// Byte ranges of `text`, ascending, that spell a special token but came from a message: they stay text.
    pub as_text: Vec<Range<usize>>,
}

/// A conversation as text, and which of it is the assistant's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marked {
    /// The text, that of [`ChatTemplate::render`].
    pub rendered: Rendered,
    /// Byte ranges of the text, ascending, that the template prints between `{% generation %}` and `{% endgeneration %}`.
    pub generated: Vec<Range<usize>>,
}

/// A compiled chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    name: String,
    source: String,
    marks: bool,
    environment: Environment<'static>,
}

impl ChatTemplate {
    /// Compiles `source`; `name` is for people.
    ///
    /// # Errors
    /// `source` is not a template.
    pub fn from_source(name: impl Into<String>, source: &str) -> Result<Self> {
        let name = name.into();
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(Error::internal)?);
        environment.set_fuel(Some(FUEL));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_filter("tojson", to_json);
        let marks = GENERATION.as_ref().is_some_and(|tag| tag.is_match(source));
        for (template, is_marked) in [(PLAIN, false), (MARKED, true)].into_iter().take(1 + usize::from(marks)) {
            environment
                .add_template_owned(template, without_generation(source, is_marked))
                .map_err(|error| Error::Checkpoint(format!("chat template {name}: {error}")))?;
        }
        Ok(Self { name, source: source.to_owned(), marks, environment })
    }

    /// The template named `mistral-instruct`, for Eurus checkpoints that carry none.
    ///
    /// # Errors
    /// None that a caller could cause.
    pub fn built_in() -> Result<Self> {
        Self::from_source("mistral-instruct", MISTRAL_INSTRUCT)
    }

    /// What it was compiled from.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it says which text is the assistant's, by `{% generation %}`.
    pub fn marks_answers(&self) -> bool {
        self.marks
    }

    /// The conversation as text.
    ///
    /// # Errors
    /// No messages, roles that the template or the ending refuses, or a template that fails or takes too long.
    pub fn render(&self, messages: &[Message], tokenizer: &Tokenizer, options: &RenderOptions) -> Result<Rendered> {
        Ok(self.render_as(PLAIN, messages, tokenizer, options)?.rendered)
    }

    /// The conversation as text with the parts that the template marks as the assistant's; none where it marks nothing.
    ///
    /// # Errors
    /// As [`Self::render`].
    pub fn render_marked(
        &self,
        messages: &[Message],
        tokenizer: &Tokenizer,
        options: &RenderOptions,
    ) -> Result<Marked> {
        self.render_as(if self.marks { MARKED } else { PLAIN }, messages, tokenizer, options)
    }

    fn render_as(
        &self,
        template: &str,
        messages: &[Message],
        tokenizer: &Tokenizer,
        options: &RenderOptions,
    ) -> Result<Marked> {
        let Some(last) = messages.last() else {
            return Err(Error::invalid("messages", "at least one message is needed"));
        };
        if options.ending == Ending::Answer && last.role != "assistant" {
            return Err(Error::invalid("messages", "the last message must be the assistant's answer"));
        }
        let mut escape = Escape::new(tokenizer, &self.source, messages, &options.kwargs);
        let mut turns = Vec::with_capacity(messages.len());
        for message in messages {
            turns.push(Message { role: escape.text(&message.role)?, content: escape.text(&message.content)? });
        }
        let mut variables = serde_json::Map::new();
        for (name, value) in &options.kwargs {
            if RESERVED.contains(&name.as_str()) {
                return Err(Error::invalid("chat_template_kwargs", format!("{name} cannot be set here")));
            }
            variables.insert(name.clone(), escape.value(value)?);
        }
        let open = matches!(options.ending, Ending::Continue | Ending::Answer);
        let mark = escape.free.next().ok_or_else(no_character_left)?;
        let mut answer = String::new();
        if let (true, Some(turn)) = (open, turns.last_mut()) {
            answer = turn.content.trim().to_owned();
            turn.content.push(mark);
            turn.content.push(' ');
        }
        let mut context = self.context(tokenizer, &turns, variables);
        context.insert("add_generation_prompt".to_owned(), Value::from(options.ending == Ending::Prompt));
        let mut borders = None;
        if template == MARKED {
            let mut border = || escape.free.next().ok_or_else(no_character_left);
            let (opens, closes) = (border()?, border()?);
            context.insert(OPENS.to_owned(), Value::from(opens.to_string()));
            context.insert(CLOSES.to_owned(), Value::from(closes.to_string()));
            borders = Some((opens, closes));
        }
        let compiled = self.environment.get_template(template).map_err(Error::internal)?;
        let mut text = compiled.render(context).map_err(|error| failure(&self.name, &error))?;
        if open {
            text.truncate(cut(&text, mark, &answer)?);
        }
        Ok(escape.undo(&text, borders))
    }

    fn context(
        &self,
        tokenizer: &Tokenizer,
        turns: &[Message],
        variables: serde_json::Map<String, serde_json::Value>,
    ) -> HashMap<String, Value> {
        let mut context: HashMap<String, Value> = HashMap::new();
        // Hugging Face always passes these two; templates test them with `is not none`.
        context.insert("tools".to_owned(), Value::from(()));
        context.insert("documents".to_owned(), Value::from(()));
        context.extend(variables.into_iter().map(|(name, value)| (name, Value::from(Serde(value)))));
        context.insert("messages".to_owned(), Value::from(Serde(turns)));
        let names = [
            ("bos_token", tokenizer.bos_text()),
            ("eos_token", tokenizer.eos_text()),
            ("unk_token", tokenizer.unk_text()),
        ];
        for (name, text) in names {
            context.extend(text.map(|text| (name.to_owned(), Value::from(text))));
        }
        context
    }
}

/// The template without a trace of `{% generation %}`.
const PLAIN: &str = "chat";
/// The template that prints a character at either border of what is generated.
const MARKED: &str = "marked";
/// The variables with these characters.
const OPENS: &str = "__generation_opens";
const CLOSES: &str = "__generation_closes";

/// `source` with conditions in the place of the tags that minijinja does not know. A border's character stands between
/// two tags, so that white space is cut on both sides as the one tag would.
fn without_generation(source: &str, is_marked: bool) -> String {
    let Some(tag) = GENERATION.as_ref() else { return source.to_owned() };
    let replaced = tag.replace_all(source, |found: &regex::Captures<'_>| {
        let closes = found.get(2).is_some();
        let (body, border) = if closes { ("endif", CLOSES) } else { ("if true", OPENS) };
        let (before, after) = (&found[1], &found[3]);
        match (is_marked, closes) {
            (false, _) => format!("{{%{before} {body} {after}%}}"),
            (true, false) => format!("{{%{before} if true %}}{{{{ {border} }}}}{{% if true {after}%}}"),
            (true, true) => format!("{{%{before} endif %}}{{{{ {border} }}}}{{% endif {after}%}}"),
        }
    });
    replaced.into_owned()
}

/// Variables that only the conversation and the tokenizer decide.
const RESERVED: [&str; 5] = ["messages", "add_generation_prompt", "bos_token", "eos_token", "unk_token"];

/// The message of a template's own `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

fn failure(name: &str, error: &minijinja::Error) -> Error {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref() {
            return Error::invalid("messages", message.clone());
        }
        source = cause.source();
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return Error::invalid("messages", format!("the chat template {name} takes too long on these messages"));
    }
    Error::invalid("messages", format!("the chat template {name} fails on these messages: {error}"))
}

/// Where the text of the last message ends: at `mark`, or before it where the template trims what it prints.
fn cut(text: &str, mark: char, answer: &str) -> Result<usize> {
    let at = text.rfind(mark).filter(|at| text[..*at].contains(answer));
    let Some(at) = at else {
        return Err(Error::invalid("messages", "the chat template does not print the last message as it is"));
    };
    let spaced = text[at + mark.len_utf8()..].starts_with(' ');
    Ok(if spaced { at } else { text[..at].trim_end().len() })
}

/// `json.dumps` with Hugging Face's settings: nothing escaped for HTML, a space after `:` and `,`.
fn to_json(value: &Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: (Option<bool>, Option<Value>) = (options.get("ensure_ascii")?, options.get("separators")?);
    let sorted: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let fail = |error: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut json = serde_json::to_value(value).map_err(fail)?;
    if sorted == Some(true) {
        json.sort_all_objects();
    }
    let mut out = String::new();
    write_json(&json, indent.map(|width| (width.min(16), 0)), &mut out);
    Ok(out)
}

fn write_json(value: &serde_json::Value, indent: Option<(usize, usize)>, out: &mut String) {
    let deeper = indent.map(|(width, depth)| (width, depth + 1));
    let line = |level: Option<(usize, usize)>, out: &mut String| {
        if let Some((width, depth)) = level {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', width * depth));
        }
    };
    let separator = if indent.is_some() { "," } else { ", " };
    match value {
        serde_json::Value::Array(items) if !items.is_empty() => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                out.push_str(if index > 0 { separator } else { "" });
                line(deeper, out);
                write_json(item, deeper, out);
            }
            line(indent, out);
            out.push(']');
        }
        serde_json::Value::Object(entries) if !entries.is_empty() => {
            out.push('{');
            for (index, (key, item)) in entries.iter().enumerate() {
                out.push_str(if index > 0 { separator } else { "" });
                line(deeper, out);
                out.push_str(&serde_json::Value::from(key.as_str()).to_string());
                out.push_str(": ");
                write_json(item, deeper, out);
            }
            line(indent, out);
            out.push('}');
        }
        plain => out.push_str(&plain.to_string()),
    }
}

/// Special tokens in what users write: each is one stand-in character while the template runs, its own text afterwards.
struct Escape<'a> {
    tokenizer: &'a Tokenizer,
    free: Box<dyn Iterator<Item = char>>,
    /// Token id, its text, its stand-in.
    swapped: Vec<(u32, String, char)>,
}

impl<'a> Escape<'a> {
    fn new(
        tokenizer: &'a Tokenizer,
        source: &str,
        messages: &[Message],
        kwargs: &serde_json::Map<String, serde_json::Value>,
    ) -> Self {
        let mut texts: Vec<&str> = messages.iter().flat_map(|turn| [turn.role.as_str(), &turn.content]).collect();
        texts.push(source);
        kwargs.values().for_each(|value| strings(value, &mut texts));
        Self { tokenizer, free: Box::new(unused_characters(texts)), swapped: Vec::new() }
    }

    fn text(&mut self, text: &str) -> Result<String> {
        let mut out = String::with_capacity(text.len());
        let mut end = 0;
        for (range, id) in self.tokenizer.specials_in(text) {
            out.push_str(&text[end..range.start]);
            out.push(self.stand_in(id, &text[range.clone()])?);
            end = range.end;
        }
        out.push_str(&text[end..]);
        Ok(out)
    }

    fn value(&mut self, value: &serde_json::Value) -> Result<serde_json::Value> {
        Ok(match value {
            serde_json::Value::String(text) => self.text(text)?.into(),
            serde_json::Value::Array(items) => {
                items.iter().map(|item| self.value(item)).collect::<Result<Vec<_>>>()?.into()
            }
            serde_json::Value::Object(entries) => {
                let mut out = serde_json::Map::new();
                for (key, item) in entries {
                    out.insert(self.text(key)?, self.value(item)?);
                }
                out.into()
            }
            plain => plain.clone(),
        })
    }

    fn stand_in(&mut self, id: u32, text: &str) -> Result<char> {
        if let Some((_, _, character)) = self.swapped.iter().find(|(known, _, _)| *known == id) {
            return Ok(*character);
        }
        let character = self.free.next().ok_or_else(no_character_left)?;
        self.swapped.push((id, text.to_owned(), character));
        Ok(character)
    }

    /// `text` with every token in the place of its stand-in, and what lies between `borders`.
    fn undo(&self, text: &str, borders: Option<(char, char)>) -> Marked {
        let mut rendered = Rendered { text: String::with_capacity(text.len()), as_text: Vec::new() };
        let (mut generated, mut opened) = (Vec::new(), None);
        for character in text.chars() {
            let at = rendered.text.len();
            if !PRIVATE.contains(&character) {
                rendered.text.push(character);
            } else if let Some((_, token, _)) = self.swapped.iter().find(|(_, _, stand_in)| *stand_in == character) {
                rendered.text.push_str(token);
                rendered.as_text.push(at..rendered.text.len());
            } else if borders.is_some_and(|(opens, _)| opens == character) {
                opened = Some(at);
            } else if borders.is_some_and(|(_, closes)| closes == character) {
                generated.extend(opened.take().map(|start| start..at));
            } else {
                rendered.text.push(character);
            }
        }
        generated.extend(opened.map(|start| start..rendered.text.len()));
        Marked { rendered, generated }
    }
}

fn strings<'a>(value: &'a serde_json::Value, out: &mut Vec<&'a str>) {
    match value {
        serde_json::Value::String(text) => out.push(text),
        serde_json::Value::Array(items) => items.iter().for_each(|item| strings(item, out)),
        serde_json::Value::Object(entries) => entries.iter().for_each(|(key, item)| {
            out.push(key);
            strings(item, out);
        }),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::text::tokenizer::SpecialTokens;

    fn tokenizer() -> Tokenizer {
        let json = include_str!("../../models/eurus-mini/policy/tokenizer.json");
        let special =
            SpecialTokens { bos: Some("<s>".to_owned()), eos: Some("</s>".to_owned()), unk: None, add_bos: None };
        Tokenizer::from_json(json, &special).unwrap()
    }

    fn turns(contents: &[&str]) -> Vec<Message> {
        let roles = ["user", "assistant"].into_iter().cycle();
        roles.zip(contents).map(|(role, content)| Message::new(role, *content)).collect()
    }

    fn rendered(source: &str, contents: &[&str], ending: Ending) -> Result<String> {
        let template = ChatTemplate::from_source("test", source)?;
        Ok(template.render(&turns(contents), &tokenizer(), &RenderOptions::new(ending))?.text)
    }

    #[track_caller]
    fn refused(source: &str, contents: &[&str], ending: Ending, expected: &str) {
        match rendered(source, contents, ending) {
            Err(Error::Invalid { message, field }) => {
                assert_eq!(field.as_deref(), Some("messages"));
                assert!(message.contains(expected), "{message}");
            }
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn built_in(messages: &[Message], ending: Ending, expected: &str) {
        let template = ChatTemplate::built_in().unwrap();
        let rendered = template.render(messages, &tokenizer(), &RenderOptions::new(ending)).unwrap();
        assert_eq!(rendered, Rendered { text: expected.to_owned(), as_text: Vec::new() });
    }

    #[test]
    fn the_built_in_template_prints_mistral_turns() {
        built_in(&turns(&["q"]), Ending::Prompt, "<s>[INST] q [/INST]");
        built_in(&turns(&["q", "a", " r\n"]), Ending::Prompt, "<s>[INST] q [/INST] a</s>[INST]  r\n [/INST]");
        built_in(&turns(&["q", "a"]), Ending::Complete, "<s>[INST] q [/INST] a</s>");
        built_in(&turns(&["q", "a"]), Ending::Answer, "<s>[INST] q [/INST] a");
        built_in(&turns(&["q", " a "]), Ending::Continue, "<s>[INST] q [/INST]  a ");
        built_in(&turns(&["q"]), Ending::Continue, "<s>[INST] q");
        let template = ChatTemplate::built_in().unwrap();
        let options = RenderOptions::new(Ending::Prompt);
        let wrong = [
            vec![Message::new("assistant", "a")],
            vec![Message::new("system", "s"), Message::new("user", "q")],
            vec![Message::new("user", "q"), Message::new("user", "q")],
            vec![Message::new("user", "q"), Message::new("tool", "q")],
        ];
        for messages in wrong {
            let message = "roles must alternate, user first: user, assistant, user, ... (no system role)";
            assert_eq!(template.render(&messages, &tokenizer(), &options), Err(Error::invalid("messages", message)));
        }
    }

    #[test]
    fn a_template_that_trims_loses_trailing_space_where_the_answer_stays_open() {
        let source = "{% for m in messages %}<{{ m.content | trim }}>{% endfor %}";
        assert_eq!(rendered(source, &["q", " a \n"], Ending::Continue).unwrap(), "<q><a");
        let upper = "{% for m in messages %}{{ m.content | upper }}{% endfor %}";
        refused(upper, &["q", "a"], Ending::Answer, "does not print the last message");
        refused("{{ messages[0].content }}", &["q", "a"], Ending::Continue, "does not print the last message");
    }

    #[test]
    fn a_template_cannot_run_away_or_reach_out() {
        let long = "{% for a in range(300) %}{% for b in range(300) %}{% for c in range(300) %}x{% endfor %}{% endfor %}{% endfor %}";
        refused(long, &["q"], Ending::Prompt, "takes too long");
        let doubling =
            "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}";
        refused(doubling, &["q"], Ending::Prompt, "takes too long");
        for outside in ["{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{{ ''.__class__.__mro__ }}"] {
            refused(outside, &["q"], Ending::Prompt, "fails on these messages");
        }
        refused("{{ raise_exception('no ' ~ messages[0].content) }}", &["q"], Ending::Prompt, "no q");
        refused("{{ strftime_now('%Y') }}", &["q"], Ending::Prompt, "fails");
        assert!(matches!(ChatTemplate::from_source("t", "{% if %}"), Err(Error::Checkpoint(_))));
        let template = ChatTemplate::built_in().unwrap();
        let none = template.render(&[], &tokenizer(), &RenderOptions::new(Ending::Prompt));
        assert_eq!(none, Err(Error::invalid("messages", "at least one message is needed")));
    }

    #[test]
    fn contents_are_data() {
        let source = "{% for m in messages %}{{ m.content }}|{% endfor %}";
        let contents = ["{{ 7*7 }}", "{% endfor %}<b>&\"'", "{# c #}[INST]"];
        assert_eq!(
            rendered(source, &contents, Ending::Prompt).unwrap(),
            "{{ 7*7 }}|{% endfor %}<b>&\"'|{# c #}[INST]|"
        );
    }

    #[test]
    fn the_conversation_and_the_tokens_cannot_be_overridden() {
        let template = ChatTemplate::from_source("t", "{{ bos_token }}{{ extra }}{{ tools is none }}").unwrap();
        for name in RESERVED {
            let mut options = RenderOptions::new(Ending::Prompt);
            options.kwargs.insert(name.to_owned(), "x".into());
            let refused = template.render(&turns(&["q"]), &tokenizer(), &options);
            assert!(
                matches!(&refused, Err(Error::Invalid { field: Some(field), .. }) if field == "chat_template_kwargs")
            );
        }
        let mut options = RenderOptions::new(Ending::Prompt);
        options.kwargs.insert("extra".to_owned(), serde_json::json!("a</s>"));
        let rendered = template.render(&turns(&["q"]), &tokenizer(), &options).unwrap();
        assert_eq!((rendered.text.as_str(), rendered.as_text.first()), ("<s>a</s>True", Some(&(4..8))));
    }

    #[test]
    fn white_space_around_blocks_is_that_of_hugging_face() {
        let source =
            "a\n  {% if true %}\n  b\n  {%- generation %}\n c\n  {%+ endgeneration -%}\n\n d\n  {% endif %}\ne\n\n";
        assert_eq!(rendered(source, &["q"], Ending::Prompt).unwrap(), "a\n  b c\n  d\ne\n");
        let template = ChatTemplate::from_source("t", source).unwrap();
        let marked = template.render_marked(&turns(&["q"]), &tokenizer(), &RenderOptions::new(Ending::Prompt)).unwrap();
        assert_eq!(
            (marked.rendered.text.as_str(), marked.generated.as_slice()),
            ("a\n  b c\n  d\ne\n", std::slice::from_ref(&(5..10)))
        );
        let template = ChatTemplate::from_source("t", "a {%- generation -%} b {%- endgeneration -%} c").unwrap();
        let marked = template.render_marked(&turns(&["q"]), &tokenizer(), &RenderOptions::new(Ending::Prompt)).unwrap();
        assert_eq!(
            (marked.rendered.text.as_str(), marked.generated.as_slice()),
            ("abc", std::slice::from_ref(&(1..2)))
        );
    }
}
