//! Final answers in texts, and when two of them are equal: by exact value where both are numbers, else by normalised text.

use std::sync::LazyLock;

use regex::{Regex, RegexBuilder};

use super::number;
use crate::error::{Error, Result};

/// Longest pattern of [`Extractor::regex`], in bytes.
const PATTERN_BYTES_MAX: usize = 1024;
/// Memory of a compiled pattern, in bytes.
const PATTERN_MEMORY_MAX: usize = 1 << 20;
/// A pattern sees this much of the end of a text, in bytes: finding every match of a pattern may take quadratic time.
const PATTERN_TEXT_MAX: usize = 16 << 10;

/// Where in a text its final answer is.
#[derive(Debug, Clone)]
pub enum Extractor {
    /// In the last complete `\boxed{..}` or `\fbox{..}`.
    Boxed,
    /// The last number.
    LastNumber,
    /// The last match of a pattern in the last 16 KiB: its first capture group, or all of it.
    Regex(Regex),
}

impl Extractor {
    /// An extractor for a pattern from outside, within bounds on length and memory.
    ///
    /// # Errors
    /// The pattern is no regular expression or too large.
    pub fn regex(pattern: &str) -> Result<Self> {
        if pattern.len() > PATTERN_BYTES_MAX {
            let message = format!("the pattern has {} bytes, at most {PATTERN_BYTES_MAX} are allowed", pattern.len());
            return Err(Error::Invalid { message, field: None });
        }
        let mut builder = RegexBuilder::new(pattern);
        let built = builder.size_limit(PATTERN_MEMORY_MAX).dfa_size_limit(PATTERN_MEMORY_MAX).build();
        built.map(Self::Regex).map_err(|error| Error::Invalid { message: error.to_string(), field: None })
    }

    /// The answer in `text`; None without one, or with an empty one.
    pub fn extract(&self, text: &str) -> Option<Answer> {
        let found = match self {
            Self::Boxed => last_box(text)?,
            Self::LastNumber => &text[number::last(text)?],
            Self::Regex(pattern) => {
                let start = text.ceil_char_boundary(text.len().saturating_sub(PATTERN_TEXT_MAX));
                let found = pattern.captures_iter(&text[start..]).last()?;
                found.get(1).or_else(|| found.get(0))?.as_str()
            }
        };
        Some(found.trim()).filter(|found| !found.is_empty()).map(Answer::new)
    }
}

/// An answer as it was written, and what it is compared by.
#[derive(Debug, Clone)]
pub struct Answer {
    text: String,
    key: String,
}

impl Answer {
    /// The answer that `text` is.
    pub fn new(text: &str) -> Self {
        let plain = normalised(text);
        let key = number::value(&plain).map_or_else(|| plain.to_lowercase(), |value| value.to_string());
        Self { text: text.to_owned(), key }
    }

    /// As it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Equal for equal answers and for no others: a fraction in lowest terms for a number, else normalised text.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Whether two answers are equal.
    pub fn same(&self, other: &Self) -> bool {
        self.key == other.key
    }
}

impl PartialEq for Answer {
    fn eq(&self, other: &Self) -> bool {
        self.same(other)
    }
}

impl Eq for Answer {}

/// What stands in the box that opens last, among those that are closed. One pass: every brace is looked at once.
fn last_box(text: &str) -> Option<&str> {
    let mut open: Vec<(usize, bool)> = Vec::new();
    let mut best: Option<(usize, usize)> = None;
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => {}
            b'{' => {
                let before = text[..at].trim_end();
                open.push((at + 1, before.ends_with("\\boxed") || before.ends_with("\\fbox")));
            }
            b'}' => {
                if let Some((start, true)) = open.pop()
                    && best.is_none_or(|(known, _)| known < start)
                    && !text[start..at].trim().is_empty()
                {
                    best = Some((start, at));
                }
            }
            _ => {}
        }
        escaped = byte == b'\\' && !escaped;
    }
    best.map(|(start, end)| &text[start..end])
}

/// LaTeX spellings of the same thing, longest first where one begins another.
const SPELLINGS: [(&str, &str); 18] = [
    ("\\dfrac", "\\frac"),
    ("\\tfrac", "\\frac"),
    ("\\cfrac", "\\frac"),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("{,}", ","),
    ("\\$", ""),
    ("$", ""),
    ("\\%", "%"),
    ("\\(", ""),
    ("\\)", ""),
    ("\\[", ""),
    ("\\]", ""),
    ("\\!", ""),
    ("\\,", ""),
    ("\\;", ""),
    ("~", " "),
    ("−", "-"),
];

static WORDING: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}").ok()
});
static SIZING: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\\(?:left|right|big|Big)\b").ok());
static NAME: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^[A-Za-z][A-Za-z0-9]?\s*=([^=]+)$").ok());
static SHORT_FRACTION: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\\frac\s*(\d)\s*(\d)").ok());
static SHORT_ROOT: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\\sqrt\s*(\d|[A-Za-z])").ok());

fn normalised(text: &str) -> String {
    let replace = |pattern: &LazyLock<Option<Regex>>, text: &str, with: &str| match pattern.as_ref() {
        Some(pattern) => pattern.replace_all(text, with).into_owned(),
        None => text.to_owned(),
    };
    let mut plain = SPELLINGS.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to));
    plain = replace(&SIZING, &plain, "");
    plain = replace(&WORDING, &plain, "$1");
    plain = replace(&NAME, plain.trim(), "$1");
    plain = replace(&SHORT_FRACTION, &plain, "\\frac{$1}{$2}");
    plain = replace(&SHORT_ROOT, &plain, "\\sqrt{$1}");
    squeezed(plain.trim_end_matches(|last: char| last.is_whitespace() || ".,;:".contains(last)))
}

/// Without white space, but for one space between two digits: `3 4` is not 34.
fn squeezed(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        let digits = |last: Option<char>| last.is_some_and(|character| character.is_ascii_digit());
        if digits(out.chars().next_back()) && digits(word.chars().next()) {
            out.push(' ');
        }
        out.push_str(word);
    }
    out
}
