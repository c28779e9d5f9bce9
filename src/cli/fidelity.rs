//! How well a rounded reward model keeps rewards and their order: a badly quantised one is worse than a vote. Numbers in, text out.

use std::collections::HashMap;
use std::fmt;

/// At most this many pairs that changed sides are shown.
const SHOWN_MAX: usize = 5;

/// Texts that belong together.
#[derive(Debug, Clone)]
pub(super) struct Item<T> {
    pub(super) texts: Vec<T>,
    /// The texts are two, the better one first.
    pub(super) is_pair: bool,
    /// Items of the same prompt are compared, too.
    pub(super) prompt: Option<String>,
    /// File and line.
    pub(super) place: String,
}

/// A pair whose rewards are the other way round.
#[derive(Debug, Clone, PartialEq)]
struct Turned {
    places: [String; 2],
    before: [f32; 2],
    after: [f32; 2],
}

/// What rounding changed.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Fidelity {
    texts: usize,
    /// Root of the mean squared difference.
    rms: f64,
    /// Largest difference.
    max: f64,
    /// Standard deviation of the rewards before.
    spread: f64,
    /// Pearson's; 1 where rewards do not differ at all.
    correlation: f64,
    /// Pairs with different rewards before.
    pairs: usize,
    turned: Vec<Turned>,
    /// Pairs with a better text, and how many of them had the greater reward there, before and after.
    preferred: [usize; 3],
}

impl Fidelity {
    /// Compares the rewards `before` and `after`, of all texts of `items` in order.
    pub(super) fn of<T>(items: &[Item<T>], before: &[f32], after: &[f32]) -> Self {
        let wide = |all: &[f32]| all.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
        let (b, a) = (wide(before), wide(after));
        let off = || b.iter().zip(&a).map(|(b, a)| (a - b).abs());
        let mut fidelity = Self {
            texts: b.len(),
            rms: (off().map(|off| off * off).sum::<f64>() / b.len() as f64).sqrt(),
            max: off().fold(0.0, f64::max),
            spread: covariance(&b, &b).sqrt(),
            correlation: correlation(&b, &a),
            pairs: 0,
            turned: Vec::new(),
            preferred: [0; 3],
        };
        let groups = groups(items);
        for group in &groups {
            for (index, (i, place)) in group.iter().enumerate() {
                for (j, other) in &group[index + 1..] {
                    let pair = |all: &[f32]| [all[*i], all[*j]];
                    fidelity.compare([place, other], pair(before), pair(after));
                }
            }
        }
        let mut first = 0;
        for item in items {
            if item.is_pair {
                let right = |all: &[f32]| usize::from(all[first] > all[first + 1]);
                let counts = [1, right(before), right(after)];
                fidelity.preferred.iter_mut().zip(counts).for_each(|(all, one)| *all += one);
            }
            first += item.texts.len();
        }
        fidelity
    }

    fn compare(&mut self, places: [&str; 2], before: [f32; 2], after: [f32; 2]) {
        if before[0] == before[1] {
            return;
        }
        self.pairs += 1;
        if (before[0] > before[1]) != (after[0] > after[1]) || after[0] == after[1] {
            self.turned.push(Turned { places: places.map(str::to_owned), before, after });
        }
    }
}

/// Texts to be compared with each other: their numbers in all, and places.
fn groups<T>(items: &[Item<T>]) -> Vec<Vec<(usize, &str)>> {
    let mut groups: Vec<Vec<(usize, &str)>> = Vec::new();
    let mut known: HashMap<&str, usize> = HashMap::new();
    let mut first = 0;
    for item in items {
        let texts = (first..first + item.texts.len()).map(|index| (index, item.place.as_str()));
        first += item.texts.len();
        let group = item.prompt.as_deref().map(|prompt| *known.entry(prompt).or_insert(groups.len()));
        match group.and_then(|group| groups.get_mut(group)) {
            Some(group) => group.extend(texts),
            None => groups.push(texts.collect()),
        }
    }
    groups
}

fn covariance(x: &[f64], y: &[f64]) -> f64 {
    let mean = |all: &[f64]| all.iter().sum::<f64>() / all.len() as f64;
    let (mean_x, mean_y) = (mean(x), mean(y));
    x.iter().zip(y).map(|(x, y)| (x - mean_x) * (y - mean_y)).sum::<f64>() / x.len() as f64
}

fn correlation(x: &[f64], y: &[f64]) -> f64 {
    let deviations = (covariance(x, x) * covariance(y, y)).sqrt();
    if deviations > 0.0 { covariance(x, y) / deviations } else { 1.0 }
}

impl fmt::Display for Fidelity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { texts, rms, max, spread, correlation, pairs, turned, preferred } = self;
        write!(f, "rewards of {texts} texts: off by {rms:.4} rms, {max:.4} at most")?;
        write!(f, "; they spread by {spread:.4}; correlation {correlation:.6}")?;
        if *pairs == 0 {
            return write!(f, "\nno pairs: name rows with chosen and rejected, or several answers to a prompt");
        }
        let kept = pairs - turned.len();
        write!(f, "\norder of {pairs} pairs: {kept} kept ({:.2}%)", 100.0 * kept as f64 / *pairs as f64)?;
        let [count, before, after] = preferred;
        if *count > 0 {
            write!(f, "\nchosen above rejected, of {count}: {before} before, {after} after")?;
        }
        if turned.is_empty() {
            return Ok(());
        }
        write!(f, "\nwarning: {} of {pairs} pairs changed sides; best-of-n may choose others there", turned.len())?;
        for Turned { places: [left, right], before, after } in turned.iter().take(SHOWN_MAX) {
            let places = if left == right { left.clone() } else { format!("{left} and {right}") };
            let [b, a] = [before, after].map(|pair| format!("{:.4} and {:.4}", pair[0], pair[1]));
            write!(f, "\n  {places}: {b} became {a}")?;
        }
        match turned.len().saturating_sub(SHOWN_MAX) {
            0 => Ok(()),
            more => write!(f, "\n  and {more} more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(texts: usize, is_pair: bool, prompt: Option<&str>, line: usize) -> Item<()> {
        Item { texts: vec![(); texts], is_pair, prompt: prompt.map(str::to_owned), place: format!("x.jsonl:{line}") }
    }

    #[test]
    fn differences_and_order_are_counted() {
        // A pair, three answers in a row, and two rows of one prompt.
        let items = [
            item(2, true, None, 1),
            item(3, false, Some("q"), 2),
            item(1, false, Some("p"), 3),
            item(1, false, Some("p"), 4),
        ];
        let before = [2.0, 1.0, 0.0, 1.0, 2.0, 5.0, 4.0];
        let after = [1.0, 2.0, 0.0, 1.0, 2.0, 5.0, 4.5];
        let fidelity = Fidelity::of(&items, &before, &after);
        assert_eq!((fidelity.texts, fidelity.pairs, fidelity.preferred), (7, 5, [1, 1, 0]));
        assert!((fidelity.rms - (2.25_f64 / 7.0).sqrt()).abs() < 1e-12 && fidelity.max == 1.0);
        let turned = [Turned {
            places: ["x.jsonl:1".to_owned(), "x.jsonl:1".to_owned()],
            before: [2.0, 1.0],
            after: [1.0, 2.0],
        }];
        assert_eq!(fidelity.turned, turned);
        let text = fidelity.to_string();
        for part in [
            "off by 0.5669 rms, 1.0000 at most",
            "order of 5 pairs: 4 kept (80.00%)",
            "chosen above rejected, of 1: 1 before, 0 after",
            "warning: 1 of 5 pairs changed sides",
            "x.jsonl:1: 2.0000 and 1.0000 became 1.0000 and 2.0000",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn equal_rewards_are_no_pairs_and_rewards_that_become_equal_lose_their_order() {
        let items = [item(2, false, None, 1), item(2, false, None, 2)];
        let fidelity = Fidelity::of(&items, &[1.0, 1.0, 2.0, 3.0], &[1.0, 2.0, 4.0, 4.0]);
        assert_eq!((fidelity.pairs, fidelity.turned.len()), (1, 1));
        let same = Fidelity::of(&items[..1], &[1.0, 1.0], &[1.0, 1.0]);
        assert_eq!((same.rms, same.correlation, same.pairs), (0.0, 1.0, 0));
        assert!(same.to_string().contains("no pairs"));
        let scaled = Fidelity::of(&items, &[1.0, 2.0, 3.0, 5.0], &[2.0, 4.0, 6.0, 10.0]);
        assert!((scaled.correlation - 1.0).abs() < 1e-12 && scaled.turned.is_empty());
    }
}
