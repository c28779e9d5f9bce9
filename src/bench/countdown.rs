//! Grades answers to the task that eurus-mini was made for: "Use the numbers 3, 5, 8 to make 29.", each number once,
//! with + - * and brackets, the expression in `\boxed{}`. Reads files of problems.

use std::path::Path;

use serde::Deserialize;

use crate::error::{Error, Result};

/// Whether `expression` uses exactly the numbers `nums` and is worth `target`.
pub fn solves(expression: &str, nums: &[i64], target: i64) -> bool {
    evaluate(expression).is_some_and(|(value, used)| value == target && used == sorted(nums))
}

/// What `expression` is worth and the numbers it uses, in ascending order; none where it is no expression.
pub fn evaluate(expression: &str) -> Option<(i64, Vec<i64>)> {
    let mut parser = Parser { rest: expression.as_bytes(), used: Vec::new(), depth: 0 };
    let value = parser.sum()?;
    let whole = parser.peek().is_none();
    whole.then(|| (value, sorted(&parser.used)))
}

/// `nums` in ascending order.
pub fn sorted(nums: &[i64]) -> Vec<i64> {
    let mut nums = nums.to_vec();
    nums.sort_unstable();
    nums
}

/// A problem as it stands in a file of JSON Lines.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Problem {
    /// What the user says.
    pub prompt: String,
    /// The numbers to use.
    pub nums: Vec<i64>,
    /// What the expression must be worth.
    pub target: i64,
}

impl Problem {
    /// The problems of `path`, at least one; `flag` is what named the file.
    ///
    /// # Errors
    /// A file that cannot be read, a line that is no problem, no line.
    pub fn read(path: &Path, flag: &str) -> Result<Vec<Self>> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::file(path, error))?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let problems: Vec<Self> = lines
            .map(|(index, line)| {
                let place = |error| Error::invalid(flag, format!("{}:{}: {error}", path.display(), index + 1));
                serde_json::from_str(line).map_err(place)
            })
            .collect::<Result<_>>()?;
        match problems.is_empty() {
            true => Err(Error::invalid(flag, format!("{} holds no problem", path.display()))),
            false => Ok(problems),
        }
    }

    /// The same for problems that ask for the same: the order of the numbers does not count.
    pub fn key(&self) -> (Vec<i64>, i64) {
        (sorted(&self.nums), self.target)
    }
}

/// Brackets nest no deeper in any answer of this task.
const DEPTH_MAX: usize = 32;

struct Parser<'a> {
    rest: &'a [u8],
    used: Vec<i64>,
    depth: usize,
}

impl Parser<'_> {
    /// The next character that is not a space.
    fn peek(&mut self) -> Option<u8> {
        self.rest = self.rest.trim_ascii_start();
        self.rest.first().copied()
    }

    fn take(&mut self, wanted: u8) -> bool {
        let found = self.peek() == Some(wanted);
        if found {
            self.rest = &self.rest[1..];
        }
        found
    }

    fn sum(&mut self) -> Option<i64> {
        let mut value = self.product()?;
        loop {
            if self.take(b'+') {
                value = value.checked_add(self.product()?)?;
            } else if self.take(b'-') {
                value = value.checked_sub(self.product()?)?;
            } else {
                return Some(value);
            }
        }
    }

    fn product(&mut self) -> Option<i64> {
        let mut value = self.atom()?;
        while self.take(b'*') {
            value = value.checked_mul(self.atom()?)?;
        }
        Some(value)
    }

    fn atom(&mut self) -> Option<i64> {
        if self.take(b'(') {
            self.depth += 1;
            let value = if self.depth <= DEPTH_MAX { self.sum()? } else { return None };
            self.depth -= 1;
            return self.take(b')').then_some(value);
        }
        self.peek()?;
        let count = self.rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let number = std::str::from_utf8(&self.rest[..count]).ok()?.parse().ok()?;
        self.rest = &self.rest[count..];
        self.used.push(number);
        Some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(expression: &str, nums: &[i64], target: i64, expected: bool) {
        assert_eq!(solves(expression, nums, target), expected, "{expression}");
    }

    #[test]
    fn an_expression_must_use_every_number_once_and_hit_the_target() {
        check("2*6-1", &[2, 1, 6], 11, true);
        check("(9+1) * 2", &[1, 2, 9], 20, true);
        check("9-(2-1)", &[1, 2, 9], 8, true);
        check("6*6-1", &[2, 1, 6], 35, false);
        check("2*6-1", &[2, 1, 6], 12, false);
        check("2*6", &[2, 1, 6], 12, false);
        check("2*6-1-", &[2, 1, 6], 11, false);
        check("2*6-1)", &[2, 1, 6], 11, false);
        check("", &[1], 1, false);
        check("11", &[11], 11, true);
        check(&"(".repeat(10_000), &[1], 1, false);
        check("99999999999999999999", &[1], 1, false);
    }
}
