//! Draws problems of the task that eurus-mini is made for, right solutions and wrong ones. Everything follows from a seed.
//! What becomes of them, and files, is not decided here.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::Path;

use super::countdown::{self, Problem};
use crate::error::Result;
use crate::ops::sample::uniform;

/// Results of steps stay within 1 to this.
const VALUE_MAX: i64 = 99;
/// Targets begin here: smaller ones have too many solutions.
const TARGET_MIN: i64 = 10;
/// Share of problems with four numbers; the others have three.
const FOUR_NUMBERS: f64 = 0.4;
/// Draws of a step, or of a whole walk, before another way is taken.
const TRIES_MAX: usize = 30;

/// Careless ways of which the nearest to the target is taken, at most.
const NEAR_MAX: usize = 6;

/// Random numbers that depend on a seed and the number of the thing that is drawn, not on what was drawn before it.
pub(super) struct Draws {
    seed: u64,
    counter: u64,
}

impl Draws {
    /// Things draw less than this many numbers.
    const APART: u64 = 1 << 24;

    /// The numbers of thing `index`.
    pub(super) fn new(seed: u64, index: u64) -> Self {
        Self { seed, counter: index * Self::APART }
    }

    /// Whether something happens that does so with this probability.
    pub(super) fn chance(&mut self, probability: f64) -> bool {
        self.counter += 1;
        uniform(self.seed, self.counter) < probability
    }

    /// One of `0..count`.
    pub(super) fn below(&mut self, count: usize) -> usize {
        self.counter += 1;
        (uniform(self.seed, self.counter) * count as f64) as usize
    }
}

/// A problem and one right solution.
pub(super) struct Solved {
    /// The problem.
    pub(super) problem: Problem,
    /// Steps and answer.
    pub(super) solution: String,
}

/// A solution that misses the target by so much.
struct WrongWay {
    miss: u64,
    text: String,
}

/// Where problems come from.
pub(super) struct Source {
    excluded: HashSet<(Vec<i64>, i64)>,
}

impl Source {
    /// Never draws a problem of the file `exclude`.
    pub(super) fn excluding(exclude: &Path) -> Result<Self> {
        let problems = Problem::read(exclude, "--exclude")?;
        Ok(Self { excluded: problems.iter().map(Problem::key).collect() })
    }

    /// A problem that a random way through three or four random numbers solves.
    pub(super) fn draw(&self, draws: &mut Draws) -> Solved {
        loop {
            let count = if draws.chance(FOUR_NUMBERS) { 4 } else { 3 };
            let nums: Vec<i64> = (0..count).map(|_| 1 + draws.below(9) as i64).collect();
            let Some(walk) = walk(draws, &nums, Care::Right) else { continue };
            let list: Vec<String> = nums.iter().map(i64::to_string).collect();
            let prompt = format!("Use the numbers {} to make {}.", list.join(", "), walk.value);
            let problem = Problem { prompt, nums, target: walk.value };
            if walk.value >= TARGET_MIN && !self.excluded.contains(&problem.key()) {
                return Solved { problem, solution: walk.text() };
            }
        }
    }
}

impl Solved {
    /// Another right solution if chance finds one, else the known one.
    pub(super) fn another(&self, draws: &mut Draws) -> String {
        let found = (0..TRIES_MAX).find_map(|_| {
            let walk = walk(draws, &self.problem.nums, Care::Right)?;
            (walk.value == self.problem.target).then(|| walk.text())
        });
        found.unwrap_or_else(|| self.solution.clone())
    }

    /// A wrong solution with a well-formed answer, as a model writes them: a way that leads near the target at best, with
    /// slips in its arithmetic and mostly with a last step that claims the target; or a right way and another number in the box.
    pub(super) fn wrong(&self, draws: &mut Draws) -> String {
        if draws.chance(0.1) {
            let text = misnumbered(draws, &self.solution);
            if !self.is_right(&text) {
                return text;
            }
        }
        // A model that fails mostly comes near: of a few careless ways, the nearest is the likeliest.
        let tries = 1 + draws.below(NEAR_MAX);
        let careless = (0..tries).filter_map(|_| self.careless_way(draws));
        careless.min_by_key(|way| way.miss).map_or_else(|| self.unfinished(), |way| way.text)
    }

    fn careless_way(&self, draws: &mut Draws) -> Option<WrongWay> {
        let target = self.problem.target;
        let walk = (0..TRIES_MAX).find_map(|_| walk(draws, &self.problem.nums, Care::Careless { target }))?;
        let (value, _) = countdown::evaluate(&walk.expression)?;
        (value != target).then(|| WrongWay { miss: value.abs_diff(target), text: walk.text() })
    }

    /// The right steps with one of the given numbers as the answer, which is always wrong.
    fn unfinished(&self) -> String {
        let steps = self.solution.split_inclusive('\n').filter(|line| line.starts_with("Step"));
        format!("{}Answer: \\boxed{{{}}}", steps.collect::<String>(), self.problem.nums[0])
    }

    fn is_right(&self, text: &str) -> bool {
        boxed(text).is_some_and(|answer| countdown::solves(answer, &self.problem.nums, self.problem.target))
    }

    /// What the environment and the critique say about a wrong solution.
    pub(super) fn observation(&self, text: &str) -> String {
        let Problem { nums, target, .. } = &self.problem;
        match boxed(text).and_then(countdown::evaluate) {
            None => "Out: SyntaxError\nYour answer is wrong. Put one expression in the box.".to_owned(),
            Some((value, used)) if used != countdown::sorted(nums) => {
                format!("Out: {value}\nYour answer is wrong. Use each number exactly once.")
            }
            Some((value, _)) => format!("Out: {value}\nYour answer is wrong. {value} is not {target}."),
        }
    }
}

/// The text of the last box.
fn boxed(text: &str) -> Option<&str> {
    let (_, rest) = text.rsplit_once("\\boxed{")?;
    rest.split_once('}').map(|(inside, _)| inside)
}

/// `solution` with another digit in its box.
fn misnumbered(draws: &mut Draws, solution: &str) -> String {
    let start = solution.rfind('{').map_or(0, |brace| brace + 1);
    let places: Vec<usize> = (start..solution.len()).filter(|&at| solution.as_bytes()[at].is_ascii_digit()).collect();
    let Some(&place) = places.get(draws.below(places.len())) else { return solution.to_owned() };
    format!("{}{}{}", &solution[..place], 1 + draws.below(9), &solution[place + 1..])
}

/// How well a walk calculates.
#[derive(Clone, Copy)]
enum Care {
    /// Every step is right, and none multiplies by one.
    Right,
    /// Some steps slip, and the last one mostly claims the target.
    Careless { target: i64 },
}

/// A number and how it came about.
#[derive(Clone)]
struct Term {
    value: i64,
    text: String,
    /// The operation that was done last; none for a given number.
    op: Option<u8>,
}

impl Term {
    fn given(value: i64) -> Self {
        Self { value, text: value.to_string(), op: None }
    }

    /// Its text as an operand of `outer`, in brackets where they are needed.
    fn operand(&self, outer: u8, side: Side) -> Cow<'_, str> {
        let loose = matches!(self.op, Some(b'+' | b'-'));
        let needed = loose && (outer == b'*' || (outer == b'-' && side == Side::Right));
        if needed { format!("({})", self.text).into() } else { self.text.as_str().into() }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Left,
    Right,
}

/// Steps from the given numbers to one.
struct Walk {
    steps: String,
    expression: String,
    /// What the last step says, right or not.
    value: i64,
}

impl Walk {
    fn text(&self) -> String {
        format!("{}Answer: \\boxed{{{}}}", self.steps, self.expression)
    }
}

/// A random way through `nums`; none where it ended in numbers out of range.
fn walk(draws: &mut Draws, nums: &[i64], care: Care) -> Option<Walk> {
    let mut terms: Vec<Term> = nums.iter().copied().map(Term::given).collect();
    let mut steps = String::new();
    while terms.len() > 1 {
        let (left, op, right, mut value) = step(draws, &terms, care)?;
        let (a, b) = (terms[left].clone(), terms[right].clone());
        let mut places = [left, right];
        places.sort_unstable();
        terms.remove(places[1]);
        terms.remove(places[0]);
        if let Care::Careless { target } = care {
            value = careless(draws, value, target, terms.is_empty());
        }
        let text = format!("{}{}{}", a.operand(op, Side::Left), char::from(op), b.operand(op, Side::Right));
        terms.push(Term { value, text, op: Some(op) });
        let number = nums.len() - terms.len();
        let list: Vec<String> = terms.iter().map(|term| term.value.to_string()).collect();
        // Writing to a String cannot fail.
        let _ =
            writeln!(steps, "Step {number}: {}{}{}={value}, left {}", a.value, char::from(op), b.value, list.join(" "));
    }
    let last = terms.pop()?;
    Some(Walk { steps, expression: last.text, value: last.value })
}

/// Two places, an operation and its result within range.
fn step(draws: &mut Draws, terms: &[Term], care: Care) -> Option<(usize, u8, usize, i64)> {
    (0..TRIES_MAX).find_map(|_| {
        let left = draws.below(terms.len());
        let right = (left + 1 + draws.below(terms.len() - 1)) % terms.len();
        let op = b"+-*"[draws.below(3)];
        let (a, b) = (terms[left].value, terms[right].value);
        let value = match op {
            b'+' => a + b,
            b'-' => a - b,
            _ => a * b,
        };
        let idle = matches!(care, Care::Right) && op == b'*' && (a == 1 || b == 1);
        ((1..=VALUE_MAX).contains(&value) && !idle).then_some((left, op, right, value))
    })
}

/// What someone careless writes for `value`.
fn careless(draws: &mut Draws, value: i64, target: i64, is_last: bool) -> i64 {
    if is_last && draws.chance(0.7) {
        return target;
    }
    if draws.chance(0.25) {
        let slip = [-10, -2, -1, 1, 2, 10][draws.below(6)];
        return (value + slip).clamp(1, VALUE_MAX);
    }
    value
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn source() -> Source {
        Source { excluded: HashSet::new() }
    }

    #[test]
    fn solutions_are_right_and_wrong_ones_are_wrong() {
        for index in 0..500 {
            let mut draws = Draws::new(3, index);
            let solved = source().draw(&mut draws);
            assert!(solved.is_right(&solved.solution), "{}", solved.solution);
            let another = solved.another(&mut draws);
            assert!(solved.is_right(&another), "{} {another}", solved.problem.prompt);
            let wrong = solved.wrong(&mut draws);
            assert!(!solved.is_right(&wrong) && boxed(&wrong).is_some(), "{} {wrong}", solved.problem.prompt);
            assert!(solved.observation(&wrong).contains("Your answer is wrong."));
        }
    }

    #[test]
    fn texts_have_the_form_of_the_task() {
        let solved = source().draw(&mut Draws::new(1, 0));
        let steps = solved.problem.nums.len() - 1;
        let lines: Vec<&str> = solved.solution.lines().collect();
        assert_eq!(lines.len(), steps + 1);
        assert!(lines[0].starts_with("Step 1: ") && lines[0].contains(", left "));
        assert!(lines[steps - 1].ends_with(&format!("={0}, left {0}", solved.problem.target)));
        assert!(lines[steps].starts_with("Answer: \\boxed{") && lines[steps].ends_with('}'));
    }

    #[test]
    fn excluded_problems_never_come_in_any_order_of_their_numbers() {
        let mut source = source();
        let all: HashSet<_> = (0..300).map(|index| source.draw(&mut Draws::new(2, index)).problem.key()).collect();
        source.excluded = all.clone();
        assert!((0..300).all(|index| !all.contains(&source.draw(&mut Draws::new(2, index)).problem.key())));
    }

    #[test]
    fn things_are_drawn_alike_whatever_came_before() {
        let first = source().draw(&mut Draws::new(5, 7));
        let _ = source().draw(&mut Draws::new(5, 6));
        let second = source().draw(&mut Draws::new(5, 7));
        assert_eq!((first.problem, first.solution), (second.problem, second.solution));
    }
}
