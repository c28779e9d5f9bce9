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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[track_caller]
    fn same(answers: &[&str], key: &str) {
        for answer in answers {
            assert_eq!(Answer::new(answer).key(), key, "{answer:?}");
        }
    }

    #[track_caller]
    fn found(extractor: &Extractor, text: &str, answer: Option<&str>) {
        assert_eq!(extractor.extract(text).as_ref().map(Answer::text), answer, "{text:?}");
    }

    #[test]
    fn equal_numbers_have_one_key() {
        same(
            &[
                "1/2",
                "0.5",
                ".50",
                "0.500",
                "\\frac{1}{2}",
                "\\dfrac12",
                "\\tfrac{1}2",
                "50\\%",
                "50%",
                " $\\frac 12$. ",
            ],
            "1/2",
        );
        same(
            &["2/4", "+0.5", "x = 0.5", "x=\\frac{1}{2}", "5e-1", "\\text{0.5}", "\\left\\frac12\\right", "-1/-2"],
            "1/2",
        );
        same(&["1000", "1,000", "1{,}000", "$1,000$", "\\$1,000.00", "1e3", "1000.", "1\\,000", "1,000,"], "1000");
        same(&["-3/4", "-0.75", "\\frac{-3}{4}", "-\\frac{3}{4}", "\u{2212}0.75", "- 0.75", "-75\\%"], "-3/4");
        same(&["3/2", "1\\frac{1}{2}", "1 1/2", "1.5", "150%"], "3/2");
        same(&["-3/2", "-1\\frac12", "-1 1/2"], "-3/2");
        same(&["0", "-0", "0.0", "0/7", "00", "+0"], "0");
        same(&["90", "90^\\circ", "90^{\\circ}"], "90");
        same(&["170141183460469231731687303715884105727"], "170141183460469231731687303715884105727");
    }

    #[test]
    fn other_answers_are_compared_as_text() {
        same(&["2*6-1", "2 * 6 - 1", "$2*6 - 1$", "2*6-1."], "2*6-1");
        same(&["\\text{(A)}", "(a)", "\\mathrm{(A)} "], "(a)");
        same(&["\\frac12\\pi", "\\dfrac{1}{2}\\pi"], "\\frac{1}{2}\\pi");
        same(&["\\sqrt2", "\\sqrt{2}"], "\\sqrt{2}");
        same(&["(1, 2)", "\\left(1,2\\right)"], "(1,2)");
        let apart = [
            "11",
            "2*6-1",
            "3 4",
            "34",
            "1/0",
            "1,2",
            "12",
            "1.2.3",
            "5!",
            "5",
            "\\leftarrow",
            "\\rightarrow",
            "x=y=5",
            "7 3/4",
            "73/4",
            "0x10",
            "1e999",
            "1e998",
            "--5",
            "1,00",
            "100",
            "1,0000",
            "e5",
            "%",
            ".",
            "1/2/3",
            "3\\%\\%",
        ];
        for (index, left) in apart.iter().enumerate() {
            for right in &apart[index + 1..] {
                assert!(!Answer::new(left).same(&Answer::new(right)), "{left:?} {right:?}");
            }
        }
    }

    #[test]
    fn numbers_too_large_are_text() {
        same(&["340282366920938463463374607431768211456"], "340282366920938463463374607431768211456");
        same(&["1e400"], "1e400");
        same(&["1/340282366920938463463374607431768211456"], "1/340282366920938463463374607431768211456");
        let tiny = format!("0.{}1", "0".repeat(60));
        same(&[&tiny], &tiny);
        same(&[&format!("0.5{}", "0".repeat(60))], "1/2");
    }

    #[test]
    fn the_box_that_opens_last_and_is_closed_holds_the_answer() {
        let boxed = Extractor::Boxed;
        found(&boxed, "so \\boxed{3} or \\boxed{\\frac{1}{2}}.", Some("\\frac{1}{2}"));
        found(&boxed, "\\fbox{ 7 } then \\boxed{8", Some("7"));
        found(&boxed, "\\boxed {a{b}c} }{", Some("a{b}c"));
        found(&boxed, "\\boxed{\\boxed{4}}", Some("4"));
        found(&boxed, "\\boxed{\\{1, 2\\}}", Some("\\{1, 2\\}"));
        found(&boxed, "\\boxed{x \\left\\{ 1 \\right.}", Some("x \\left\\{ 1 \\right."));
        found(&boxed, "\\boxed{5} \\boxed{}", Some("5"));
        found(&boxed, "boxed{5} {6} \\unboxed{7}", None);
        found(&boxed, "", None);
        let long = "\\boxed{".repeat(50_000);
        found(&boxed, &long, None);
    }

    #[test]
    fn the_last_number_is_found_whole() {
        let number = Extractor::LastNumber;
        found(&number, "We get 12 and then 1,234.50 dollars.", Some("1,234.50"));
        found(&number, "5-3", Some("3"));
        found(&number, "it is -3.", Some("-3"));
        found(&number, "(-3)", Some("-3"));
        found(&number, "x=-.5 %", Some("-.5"));
        found(&number, "half, 1/2!", Some("1/2"));
        found(&number, "so \\dfrac{-3}{4}$ of it", Some("\\dfrac{-3}{4}"));
        found(&number, "about 50\\% of it", Some("50\\%"));
        found(&number, "2.5e-3 m", Some("2.5e-3"));
        found(&number, "1, 2, 3,4", Some("4"));
        found(&number, "2,0000", Some("0000"));
        found(&number, "数 7 数", Some("7"));
        found(&number, "none . , - /", None);
    }

    #[test]
    fn a_pattern_gives_its_first_group_in_the_last_match() {
        let pattern = Extractor::regex(r"answer is (\w+)").unwrap();
        found(&pattern, "the answer is one, no, the answer is two.", Some("two"));
        found(&Extractor::regex(r"\d+").unwrap(), "1 22 333 x", Some("333"));
        found(&Extractor::regex(r"(a)|b").unwrap(), "a b", Some("b"));
        found(&Extractor::regex(r"x*").unwrap(), "", None);
        let far = format!("answer is one {}", "数".repeat(6000));
        found(&pattern, &far, None);
        for pattern in ["(", "(?:a{1000}){1000}", &"a".repeat(1025)] {
            assert!(matches!(Extractor::regex(pattern), Err(Error::Invalid { .. })), "{}", pattern.len());
        }
    }
}
