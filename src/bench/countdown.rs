//! Grades answers to the task that eurus-mini was made for: "Use the numbers 3, 5, 8 to make 29.", each number once,
//! with + - * and brackets, the expression in `\boxed{}`.

/// Whether `expression` uses exactly the numbers `nums` and is worth `target`.
pub fn solves(expression: &str, nums: &[i64], target: i64) -> bool {
    let mut parser = Parser { rest: expression.as_bytes(), used: Vec::new(), depth: 0 };
    if parser.sum() != Some(target) || parser.peek().is_some() {
        return false;
    }
    let mut expected = nums.to_vec();
    expected.sort_unstable();
    parser.used.sort_unstable();
    parser.used == expected
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
