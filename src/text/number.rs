//! Exact numbers as answers write them: decimals with thousands separators, fractions, percentages, exponents, LaTeX
//! fractions. Expressions are not evaluated.

use std::fmt;
use std::ops::Range;

/// A fraction in lowest terms with a positive denominator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rational {
    numerator: i128,
    denominator: i128,
}

impl Rational {
    fn new(numerator: i128, denominator: i128) -> Option<Self> {
        let divisor = gcd(numerator.unsigned_abs(), denominator.unsigned_abs());
        let divisor = i128::try_from(divisor).ok().filter(|divisor| *divisor != 0)?;
        let sign = if denominator < 0 { -1 } else { 1 };
        let numerator = (numerator / divisor).checked_mul(sign)?;
        let denominator = (denominator / divisor).checked_mul(sign)?;
        (denominator != 0).then_some(Self { numerator, denominator })
    }

    fn negated(self) -> Option<Self> {
        Some(Self { numerator: self.numerator.checked_neg()?, ..self })
    }

    fn plus(self, other: Self) -> Option<Self> {
        let left = self.numerator.checked_mul(other.denominator)?;
        let right = other.numerator.checked_mul(self.denominator)?;
        Self::new(left.checked_add(right)?, self.denominator.checked_mul(other.denominator)?)
    }

    fn over(self, other: Self) -> Option<Self> {
        let numerator = self.numerator.checked_mul(other.denominator)?;
        Self::new(numerator, self.denominator.checked_mul(other.numerator)?)
    }
}

impl fmt::Display for Rational {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.denominator {
            1 => write!(formatter, "{}", self.numerator),
            denominator => write!(formatter, "{}/{denominator}", self.numerator),
        }
    }
}

fn gcd(mut left: u128, mut right: u128) -> u128 {
    while right != 0 {
        (left, right) = (right, left % right);
    }
    left
}

/// The value of a text that is one number and nothing else. None also where it does not fit.
pub(super) fn value(text: &str) -> Option<Rational> {
    let mut reader = Reader { text, at: 0 };
    let number = reader.number(Mixed::Allowed)?;
    if reader.at == text.len() { number } else { None }
}

/// Where the last number of `text` is.
pub(super) fn last(text: &str) -> Option<Range<usize>> {
    let mut reader = Reader { text, at: 0 };
    let mut found = None;
    while reader.at < text.len() {
        let start = reader.at;
        let binary =
            text[..start].chars().next_back().is_some_and(|before| before.is_alphanumeric() || ")]}".contains(before));
        let signed = text[start..].starts_with(SIGNS);
        if !(binary && signed) && reader.number(Mixed::Refused).is_some() {
            found = Some(start..reader.at);
        } else {
            reader.at = start + text[start..].chars().next().map_or(1, char::len_utf8);
        }
    }
    found
}

const SIGNS: [char; 3] = ['-', '+', '−'];

/// Whether a whole number and a fraction side by side are one number.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mixed {
    Allowed,
    Refused,
}

/// Reads numbers. The outer option of a result is syntax, the inner one is None where the number does not fit.
struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    /// `[sign] decimal`, `[sign] decimal/decimal`, `[sign] \frac{..}{..}` or a mixed number, and perhaps a percent sign.
    fn number(&mut self, mixed: Mixed) -> Option<Option<Rational>> {
        let start = self.at;
        let negative = self.sign();
        let Some(mut number) = self.unsigned(mixed) else {
            self.at = start;
            return None;
        };
        if self.eat("%") || self.eat("\\%") {
            number = number.and_then(|number| number.over(Rational { numerator: 100, denominator: 1 }));
        }
        Some(if negative { number.and_then(Rational::negated) } else { number })
    }

    fn unsigned(&mut self, mixed: Mixed) -> Option<Option<Rational>> {
        if let Some(fraction) = self.latex_fraction() {
            return Some(fraction);
        }
        let whole = self.decimal()?;
        let end = self.at;
        if self.eat("/") {
            if let Some(denominator) = self.signed_decimal() {
                return Some(whole.zip(denominator).and_then(|(whole, below)| whole.over(below)));
            }
        } else if mixed == Mixed::Allowed
            && self.text[..end].ends_with(|last: char| last.is_ascii_digit())
            && let Some(fraction) = self.fraction_after_whole()
        {
            return Some(whole.zip(fraction).and_then(|(whole, fraction)| whole.plus(fraction)));
        }
        self.at = end;
        Some(whole)
    }

    /// `\frac{3}{4}` or ` 3/4`.
    fn fraction_after_whole(&mut self) -> Option<Option<Rational>> {
        if let Some(fraction) = self.latex_fraction() {
            return Some(fraction);
        }
        self.eat(" ").then_some(())?;
        let above = self.decimal()?;
        self.eat("/").then_some(())?;
        let below = self.decimal()?;
        Some(above.zip(below).and_then(|(above, below)| above.over(below)))
    }

    fn latex_fraction(&mut self) -> Option<Option<Rational>> {
        let start = self.at;
        let command = ["\\frac", "\\dfrac", "\\tfrac", "\\cfrac"].into_iter().any(|command| self.eat(command));
        let read = |reader: &mut Self| {
            let above = reader.argument()?;
            let below = reader.argument()?;
            Some(above.zip(below).and_then(|(above, below)| above.over(below)))
        };
        let fraction = if command { read(self) } else { None };
        if fraction.is_none() {
            self.at = start;
        }
        fraction
    }

    /// `{12}` or a single digit.
    fn argument(&mut self) -> Option<Option<Rational>> {
        if self.eat("{") {
            let number = self.signed_decimal()?;
            return self.eat("}").then_some(number);
        }
        let digit = self.text[self.at..].bytes().next().filter(u8::is_ascii_digit)?;
        self.at += 1;
        Some(Rational::new(i128::from(digit - b'0'), 1))
    }

    fn signed_decimal(&mut self) -> Option<Option<Rational>> {
        let negative = self.sign();
        let number = self.decimal()?;
        Some(if negative { number.and_then(Rational::negated) } else { number })
    }

    fn sign(&mut self) -> bool {
        !self.eat("+") && (self.eat("-") || self.eat("−"))
    }

    /// `1`, `1,234`, `1.5`, `.5`, `1.5e-3`.
    fn decimal(&mut self) -> Option<Option<Rational>> {
        let mut digits = self.grouped_digits().to_owned();
        let point = self.at;
        let mut fraction = "";
        if self.eat(".") {
            fraction = self.digits();
            if fraction.is_empty() {
                self.at = point;
            }
        }
        if digits.is_empty() && fraction.is_empty() {
            return None;
        }
        digits.retain(|digit| digit != ',');
        let fraction = fraction.trim_end_matches('0');
        digits.push_str(fraction);
        let exponent = self.exponent();
        let scale = exponent.and_then(|exponent| exponent.checked_sub(i32::try_from(fraction.len()).ok()?));
        Some(scaled(&digits, scale))
    }

    /// Digits, with a comma before every three if there are commas: `1,2` is two numbers.
    fn grouped_digits(&mut self) -> &'a str {
        let start = self.at;
        let first = self.digits().len();
        if (1..=3).contains(&first) {
            loop {
                let comma = self.at;
                if !(self.eat(",") && self.digits().len() == 3) {
                    self.at = comma;
                    break;
                }
            }
        }
        &self.text[start..self.at]
    }

    fn digits(&mut self) -> &'a str {
        let rest = &self.text[self.at..];
        let length = rest.bytes().take_while(u8::is_ascii_digit).count();
        self.at += length;
        &rest[..length]
    }

    /// The power of ten after an `e`: 0 without one, None where it is too large.
    fn exponent(&mut self) -> Option<i32> {
        let start = self.at;
        if self.eat("e") || self.eat("E") {
            let negative = self.sign();
            let digits = self.digits();
            if !digits.is_empty() {
                let power: Option<i32> = digits.parse().ok();
                return power.map(|power| if negative { -power } else { power });
            }
            self.at = start;
        }
        Some(0)
    }

    fn eat(&mut self, expected: &str) -> bool {
        let found = self.text[self.at..].starts_with(expected);
        self.at += if found { expected.len() } else { 0 };
        found
    }
}

fn scaled(digits: &str, scale: Option<i32>) -> Option<Rational> {
    let number: i128 = digits.parse().ok().or_else(|| digits.is_empty().then_some(0))?;
    let scale = scale?;
    let power = 10i128.checked_pow(scale.unsigned_abs())?;
    if scale < 0 { Rational::new(number, power) } else { Rational::new(number.checked_mul(power)?, 1) }
}
