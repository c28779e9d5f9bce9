//! Trees of actions, as UltraInteract has them: one row is a correct and an incorrect action of one turn. Which correct
//! actions end their branch, and the single-turn pairs of actions of different turns for reward models.

use std::collections::{HashMap, HashSet};

use super::schema::{Content, Row, Turn};
use crate::ops::sample::uniform;
use crate::text::chat::Message;
use crate::train::batch::Order;

/// Instructions with more pairs than this are not augmented (App. B of the paper).
const GRID_MAX: usize = 10;
/// Pairs of one instruction (App. B).
const PAIRS_MAX: usize = 9;
/// Pairs of one action (App. B).
const USES_MAX: usize = 3;

/// Digest of a text or of several.
type Key = [u8; 16];

fn key(parts: &[&str]) -> Key {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    let mut key = [0; 16];
    key.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    key
}

/// What a correct action is to SFT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// The end of a branch, seen for the first time.
    Leaf,
    /// Another row goes on from it.
    Inner,
    /// The end of a branch that an earlier row has with the same instruction.
    Repeated,
}

/// For each row whether its chosen action is to be imitated; none for rows that are no turn of a tree.
pub(super) fn leaves(rows: &[&Row]) -> Vec<Option<Action>> {
    let mut continued: HashSet<Key> = HashSet::new();
    for row in rows {
        if let Content::Pair { prompt, turn: Some(_), .. } = &row.content {
            // Only what ends with an action can be what another row chose.
            continued.extend(branch(prompt).into_iter().skip(1).step_by(2));
        }
    }
    let mut seen: HashSet<Key> = HashSet::new();
    let action = |row: &&Row| {
        let Content::Pair { prompt, chosen, turn: Some(_), .. } = &row.content else { return None };
        let mut path = prompt.clone();
        path.push(Message::new("assistant", chosen.as_str()));
        if branch(&path).last().is_some_and(|path| continued.contains(path)) {
            return Some(Action::Inner);
        }
        let leaf = key(&[row.instruction(), chosen]);
        Some(if seen.insert(leaf) { Action::Leaf } else { Action::Repeated })
    };
    rows.iter().map(action).collect()
}

/// One key for each beginning of the conversation.
fn branch(messages: &[Message]) -> Vec<Key> {
    let mut path: Key = [0; 16];
    let step = |message: &Message| {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&path).update(&key(&[&message.role, &message.content]));
        path.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        path
    };
    messages.iter().map(step).collect()
}

/// A pair of actions of different turns, to be answers to the bare instruction.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Augmented {
    /// Which row, by its place in the input, has the chosen action.
    pub(super) chosen: usize,
    /// Which row has the rejected one.
    pub(super) rejected: usize,
}

/// An action of an instruction and the turns at which it stands.
struct Node<'a> {
    row: usize,
    text: &'a str,
    turns: Vec<Turn>,
    uses: usize,
}

/// The single-turn pairs of all instructions, in the order in which the instructions appear. What is drawn for an instruction
/// depends on its own rows and `seed` only.
pub(super) fn augment(rows: &[&Row], seed: u64) -> Vec<Augmented> {
    let mut order: Vec<Key> = Vec::new();
    let mut members: HashMap<Key, Vec<usize>> = HashMap::new();
    for (index, row) in rows.iter().enumerate() {
        if let Content::Pair { turn: Some(_), .. } = &row.content {
            let tree = key(&[row.parent.as_deref().unwrap_or_default(), row.instruction()]);
            let indices = members.entry(tree).or_default();
            if indices.is_empty() {
                order.push(tree);
            }
            indices.push(index);
        }
    }
    let mut all = Vec::new();
    for tree in order {
        let Some(indices) = members.get(&tree) else { continue };
        let mut low = [0; 8];
        low.copy_from_slice(&tree[..8]);
        all.extend(pairs(rows, indices, seed ^ u64::from_le_bytes(low)));
    }
    all
}

fn pairs(rows: &[&Row], indices: &[usize], seed: u64) -> Vec<Augmented> {
    let (mut correct, mut incorrect): (Vec<Node<'_>>, Vec<Node<'_>>) = (Vec::new(), Vec::new());
    for &row in indices {
        if let Content::Pair { chosen, rejected, turn: Some(turn), .. } = &rows[row].content {
            node(&mut correct, row, chosen, *turn);
            node(&mut incorrect, row, rejected, *turn);
        }
    }
    if correct.len() * incorrect.len() > GRID_MAX {
        return Vec::new();
    }
    let apart = |right: &Node<'_>, wrong: &Node<'_>| {
        right.text != wrong.text && !right.turns.iter().any(|turn| wrong.turns.contains(turn))
    };
    let mut grid = Vec::new();
    for (first, right) in correct.iter().enumerate() {
        grid.extend(
            (0..incorrect.len()).filter(|second| apart(right, &incorrect[*second])).map(|second| (first, second)),
        );
    }
    let mut drawn = Vec::new();
    for index in Order::new(grid.len(), seed, 0).into_iter() {
        let (first, second) = grid[index];
        let (right, wrong) = (&mut correct[first], &mut incorrect[second]);
        if drawn.len() < PAIRS_MAX && right.uses < USES_MAX && wrong.uses < USES_MAX {
            (right.uses, wrong.uses) = (right.uses + 1, wrong.uses + 1);
            drawn.push(Augmented { chosen: right.row, rejected: wrong.row });
        }
    }
    drawn
}

fn node<'a>(nodes: &mut Vec<Node<'a>>, row: usize, text: &'a str, turn: Turn) {
    // More nodes than the grid can have need not be told apart: the instruction is left out then.
    if nodes.len() > GRID_MAX {
        return;
    }
    match nodes.iter_mut().find(|node| node.text == text) {
        Some(node) => node.turns.push(turn),
        None => nodes.push(Node { row, text, turns: vec![turn], uses: 0 }),
    }
}

/// A number in `[0, 1)` that depends on `seed` and `key` only.
pub(super) fn draw(seed: u64, key: &Key) -> f64 {
    let mut low = [0; 8];
    low.copy_from_slice(&key[..8]);
    uniform(seed, u64::from_le_bytes(low))
}

/// Which rows may be held out together, so that no instruction and no `parent_id` is on both sides.
pub(super) struct Families {
    parents: Vec<usize>,
    of_key: HashMap<Key, usize>,
    /// The smallest key of each family, at its root.
    least: Vec<Key>,
}

impl Families {
    /// Nobody yet.
    pub(super) fn new() -> Self {
        Self { parents: Vec::new(), of_key: HashMap::new(), least: Vec::new() }
    }

    /// The member that stands for `row`.
    pub(super) fn add(&mut self, row: &Row) -> usize {
        let instruction = self.member(key(&["instruction", row.instruction().trim()]));
        if let Some(parent) = &row.parent {
            let parent = self.member(key(&["parent_id", parent]));
            self.join(instruction, parent);
        }
        instruction
    }

    fn member(&mut self, key: Key) -> usize {
        let next = self.parents.len();
        let member = *self.of_key.entry(key).or_insert(next);
        if member == next {
            self.parents.push(next);
            self.least.push(key);
        }
        member
    }

    fn root(&mut self, mut member: usize) -> usize {
        while self.parents[member] != member {
            self.parents[member] = self.parents[self.parents[member]];
            member = self.parents[member];
        }
        member
    }

    fn join(&mut self, left: usize, right: usize) {
        let (left, right) = (self.root(left), self.root(right));
        let (low, high) = (left.min(right), left.max(right));
        self.parents[high] = low;
        self.least[low] = self.least[low].min(self.least[high]);
    }

    /// For each member whether its family is held out: `fraction` of the families, one at least where there are two. Which
    /// ones depends on `seed` and the families, not on their order.
    pub(super) fn held_out(&mut self, fraction: f64, seed: u64) -> Vec<bool> {
        let roots: Vec<usize> = (0..self.parents.len()).map(|member| self.root(member)).collect();
        let mut families: Vec<usize> = (0..roots.len()).filter(|member| roots[*member] == *member).collect();
        let count = (fraction * families.len() as f64).round() as usize;
        let least = usize::from(fraction > 0.0 && families.len() > 1);
        let most = families.len().saturating_sub(1);
        families.sort_by(|left, right| {
            let rank = |root: &usize| draw(seed, &self.least[*root]);
            rank(left).total_cmp(&rank(right)).then(self.least[*left].cmp(&self.least[*right]))
        });
        let mut held = vec![false; roots.len()];
        families.iter().take(count.clamp(least, most.max(least))).for_each(|root| held[*root] = true);
        roots.iter().map(|root| held[*root]).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn row(parent: &str, prompt: &[&str], chosen: &str, rejected: &str, turn: u32) -> Row {
        let roles = ["user", "assistant"].into_iter().cycle();
        let prompt = roles.zip(prompt).map(|(role, text)| Message::new(role, *text)).collect();
        let (chosen, rejected) = (chosen.to_owned(), rejected.to_owned());
        let content = Content::Pair { prompt, chosen, rejected, margin: None, turn: Some(Turn(turn)) };
        Row { parent: Some(parent.to_owned()), content }
    }

    /// A tree of one row a turn, each going on from the incorrect action.
    fn chain(name: &str, depth: u32) -> Vec<Row> {
        let mut prompt = vec![format!("ask {name}")];
        let mut rows = Vec::new();
        for turn in 0..depth {
            let (chosen, rejected) = (format!("right {turn}"), format!("wrong {turn}"));
            let texts: Vec<&str> = prompt.iter().map(String::as_str).collect();
            rows.push(row(name, &texts, &chosen, &rejected, turn));
            prompt.extend([rejected, format!("out {turn}")]);
        }
        rows
    }

    fn texts(rows: &[Row], pair: &Augmented) -> (String, String) {
        match (&rows[pair.chosen].content, &rows[pair.rejected].content) {
            (Content::Pair { chosen, .. }, Content::Pair { rejected, .. }) => (chosen.clone(), rejected.clone()),
            _ => panic!("only pairs are augmented"),
        }
    }

    fn turn(row: &Row) -> Turn {
        match &row.content {
            Content::Pair { turn, .. } => turn.unwrap(),
            _ => panic!("not a turn"),
        }
    }

    #[test]
    fn only_the_first_of_equal_correct_leaves_is_learnt() {
        let rows = [
            row("a", &["q"], "x", "w", 0),
            row("a", &["q", "w", "o"], "y", "v", 1),
            // Another row goes on from the correct action z: no leaf.
            row("b", &["p"], "z", "w", 0),
            row("b", &["p", "z", "o"], "x", "v", 1),
            // The action of a row above after another history, and of another instruction.
            row("a", &["q", "v", "o"], "x", "u", 1),
            row("c", &["r"], "x", "w", 0),
        ];
        use Action::{Inner, Leaf, Repeated};
        let expected = [Leaf, Leaf, Inner, Leaf, Repeated, Leaf].map(Some);
        assert_eq!(leaves(&rows.iter().collect::<Vec<_>>()), expected);
        let answer = Content::Answer { prompt: Vec::new(), answer: String::new(), desirable: None };
        assert_eq!(leaves(&[&Row { parent: None, content: answer }]), [None]);
    }

    #[test]
    fn a_chain_of_three_gives_its_six_pairs_and_one_of_four_none() {
        let pairs = |depth| {
            let rows = chain("t", depth);
            let mut pairs: Vec<_> =
                augment(&rows.iter().collect::<Vec<_>>(), 7).iter().map(|pair| texts(&rows, pair)).collect();
            pairs.sort();
            pairs
        };
        let pair = |right: u32, wrong: u32| (format!("right {right}"), format!("wrong {wrong}"));
        assert_eq!(pairs(1), []);
        assert_eq!(pairs(2), [pair(0, 1), pair(1, 0)]);
        assert_eq!(pairs(3), [pair(0, 1), pair(0, 2), pair(1, 0), pair(1, 2), pair(2, 0), pair(2, 1)]);
        assert_eq!(pairs(4), []);
    }

    #[test]
    fn a_repeated_action_is_one_action() {
        // The wrong action of turn 0 comes again at turn 1: the pair of turn 1's chosen with it is in the multi-turn set.
        let rows = [row("a", &["q"], "x", "w", 0), row("a", &["q", "w", "o"], "y", "w", 1)];
        assert_eq!(augment(&rows.iter().collect::<Vec<_>>(), 1), []);
        // Two correct and five incorrect actions are the largest grid; one is at turn 0, the others at turn 1.
        let wide = |count: u32| -> Vec<Row> {
            let right = |n: u32| if n == 0 { "x" } else { "y" };
            (0..count).map(|n| row("a", &["q"], right(n), &format!("w{n}"), n.min(1))).collect()
        };
        let rows = wide(5);
        let drawn = augment(&rows.iter().collect::<Vec<_>>(), 1);
        let with_x = drawn.iter().filter(|pair| texts(&rows, pair).0 == "x").count();
        assert_eq!((drawn.len(), with_x), (4, 3), "x has four partners and may have three");
        assert_eq!(augment(&wide(6).iter().collect::<Vec<_>>(), 1), []);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn augmentation_keeps_every_limit(
            shape in prop::collection::vec((0..6u8, 0..3u8, 0..6u8, 0..3u32), 0..40),
            seed in any::<u64>(),
        ) {
            let made: Vec<Row> = shape.iter().map(|(tree, chosen, rejected, turn)| {
                row(&format!("p{tree}"), &[&format!("q{}", tree / 2)], &format!("c{chosen}"), &format!("r{rejected}"), *turn)
            }).collect();
            let rows: Vec<&Row> = made.iter().collect();
            let drawn = augment(&rows, seed);
            prop_assert_eq!(&drawn, &augment(&rows, seed));
            let mut per_tree: HashMap<&str, Vec<(String, String)>> = HashMap::new();
            for pair in &drawn {
                let (right, wrong) = (&made[pair.chosen], &made[pair.rejected]);
                prop_assert_eq!(&right.parent, &wrong.parent);
                let parent = right.parent.as_deref().unwrap();
                prop_assert!(turn(right) != turn(wrong));
                let (chosen, rejected) = texts(&made, pair);
                // No row has both at one turn.
                let stands = |text: &str, better: bool| -> Vec<Turn> {
                    let of_tree = made.iter().filter(|row| row.parent.as_deref() == Some(parent));
                    of_tree.filter(|row| match &row.content {
                        Content::Pair { chosen, rejected, .. } => text == if better { chosen } else { rejected },
                        _ => false,
                    }).map(turn).collect()
                };
                let apart = stands(&rejected, false);
                prop_assert!(stands(&chosen, true).iter().all(|turn| !apart.contains(turn)));
                per_tree.entry(parent).or_default().push((chosen, rejected));
            }
            for (parent, pairs) in per_tree {
                prop_assert!(pairs.len() <= 9);
                for (chosen, rejected) in &pairs {
                    prop_assert_eq!(pairs.iter().filter(|pair| (&pair.0, &pair.1) == (chosen, rejected)).count(), 1);
                    prop_assert!(pairs.iter().filter(|pair| pair.0 == *chosen).count() <= 3);
                    prop_assert!(pairs.iter().filter(|pair| pair.1 == *rejected).count() <= 3);
                }
                let distinct = |better: bool| -> usize {
                    let of_tree = made.iter().filter(|row| row.parent.as_deref() == Some(parent));
                    of_tree.map(|row| match &row.content {
                        Content::Pair { chosen, rejected, .. } => if better { chosen } else { rejected },
                        _ => panic!("only pairs"),
                    }).collect::<HashSet<_>>().len()
                };
                prop_assert!(distinct(true) * distinct(false) <= 10);
            }
        }

        #[test]
        fn families_are_held_out_whole_and_whatever_their_order(
            shape in prop::collection::vec((0..30u8, 0..30u8), 2..60),
            fraction in 0.01..0.9f64,
            seed in any::<u64>(),
        ) {
            let rows: Vec<Row> = shape.iter().map(|(parent, ask)| row(&format!("p{parent}"), &[&format!("q{ask}")], "c", "r", 0)).collect();
            let split = |order: &[usize]| {
                let mut families = Families::new();
                let members: Vec<usize> = order.iter().map(|index| families.add(&rows[*index])).collect();
                let held = families.held_out(fraction, seed);
                let mut sides = vec![false; rows.len()];
                order.iter().zip(members).for_each(|(index, member)| sides[*index] = held[member]);
                sides
            };
            let forwards: Vec<usize> = (0..rows.len()).collect();
            let backwards: Vec<usize> = forwards.iter().rev().copied().collect();
            let sides = split(&forwards);
            prop_assert_eq!(&sides, &split(&backwards));
            for (left, first) in shape.iter().enumerate() {
                for (right, second) in shape.iter().enumerate() {
                    if first.0 == second.0 || first.1 == second.1 {
                        prop_assert_eq!(sides[left], sides[right]);
                    }
                }
            }
            prop_assert!(sides.contains(&false));
        }
    }
}
