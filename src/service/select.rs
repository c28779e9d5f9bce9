//! The choice among rated candidates: a pure function from numbers to an order.

use std::cmp::Ordering;

use super::best_of_n::Strategy;

/// What the choice depends on. Numbers that are missing or not a number count as minus infinity.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Rated {
    /// Raw reward.
    pub reward: Option<f32>,
    /// Mean log-probability of the drawn tokens.
    pub mean_logprob: Option<f64>,
    /// Which answer: candidates with equal answers carry equal numbers; none has no answer.
    pub answer: Option<usize>,
}

/// What candidates with one answer have together.
#[derive(Debug, Clone, Copy)]
struct Standing {
    /// Their number, or the sum of their votes.
    votes: f64,
    /// Merit of the best of them.
    merit: f64,
    /// Index of the best of them.
    best: usize,
}

/// Indices of all candidates, best first.
///
/// A candidate's merit is its reward; under [`Strategy::LogProb`] its mean log-probability, which also replaces the
/// reward under [`Strategy::Majority`] unless every candidate has one. Reward and LogProb order by merit.
/// Majority and Weighted order answers first: by votes (how many candidates; or the sum of sigmoid(reward)), then by
/// the merit of the best candidate with that answer. Candidates of one answer stand together, by merit; those
/// without an answer stand last, by merit. What is still equal stands by index.
pub fn rank(strategy: Strategy, rated: &[Rated]) -> Vec<usize> {
    let merits = merits(strategy, rated);
    let standings = match strategy {
        Strategy::Reward | Strategy::LogProb => vec![None; rated.len()],
        Strategy::Majority | Strategy::Weighted => standings(strategy, rated, &merits),
    };
    let mut order: Vec<usize> = (0..rated.len()).collect();
    order.sort_by(|&a, &b| {
        by_answer(standings[a], standings[b]).then_with(|| merits[b].total_cmp(&merits[a])).then(a.cmp(&b))
    });
    order
}

fn merits(strategy: Strategy, rated: &[Rated]) -> Vec<f64> {
    let by_reward = match strategy {
        Strategy::Reward | Strategy::Weighted => true,
        Strategy::LogProb => false,
        Strategy::Majority => rated.iter().all(|one| one.reward.is_some()),
    };
    let merit = |one: &Rated| if by_reward { one.reward.map(f64::from) } else { one.mean_logprob };
    // Adding zero turns -0 into 0, so the total order below has no ties that == would not see.
    rated.iter().map(|one| merit(one).filter(|value| !value.is_nan()).unwrap_or(f64::NEG_INFINITY) + 0.0).collect()
}

/// For each candidate the standing of its answer; none without an answer. Sums run in index order.
fn standings(strategy: Strategy, rated: &[Rated], merits: &[f64]) -> Vec<Option<Standing>> {
    let mut answers: Vec<(usize, Standing)> = Vec::new();
    for (index, one) in rated.iter().enumerate() {
        let Some(answer) = one.answer else { continue };
        let vote = if strategy == Strategy::Weighted { sigmoid(merits[index]) } else { 1.0 };
        match answers.iter_mut().find(|(known, _)| *known == answer) {
            None => answers.push((answer, Standing { votes: vote, merit: merits[index], best: index })),
            Some((_, standing)) => {
                standing.votes += vote;
                if merits[index] > standing.merit {
                    (standing.merit, standing.best) = (merits[index], index);
                }
            }
        }
    }
    let find = |answer| answers.iter().find(|(known, _)| *known == answer).map(|(_, standing)| *standing);
    rated.iter().map(|one| one.answer.and_then(find)).collect()
}

fn by_answer(a: Option<Standing>, b: Option<Standing>) -> Ordering {
    match (a, b) {
        (None, None) => Ordering::Equal,
        (Some(_), None) => Ordering::Less,
        (None, Some(_)) => Ordering::Greater,
        (Some(a), Some(b)) => {
            b.votes.total_cmp(&a.votes).then_with(|| b.merit.total_cmp(&a.merit)).then(a.best.cmp(&b.best))
        }
    }
}

/// 1 / (1 + e^-x), without overflow at either end.
fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rated(rows: &[(Option<f32>, Option<f64>, Option<usize>)]) -> Vec<Rated> {
        rows.iter().map(|&(reward, mean_logprob, answer)| Rated { reward, mean_logprob, answer }).collect()
    }

    /// Rewards and answers; log-probabilities grow with the index, so that using them by mistake shows.
    fn rewarded(rows: &[(f32, Option<usize>)]) -> Vec<Rated> {
        let row = |(index, &(reward, answer)): (usize, &(f32, Option<usize>))| Rated {
            reward: Some(reward),
            mean_logprob: Some(-1.0 + index as f64 / 100.0),
            answer,
        };
        rows.iter().enumerate().map(row).collect()
    }

    #[track_caller]
    fn check(strategy: Strategy, rated: &[Rated], expected: &[usize]) {
        assert_eq!(rank(strategy, rated), expected);
    }

    #[test]
    fn reward_orders_by_reward_then_index() {
        check(Strategy::Reward, &rewarded(&[(1.0, None), (-3.0, Some(0)), (9.5, None), (1.0, Some(1))]), &[2, 0, 3, 1]);
        check(Strategy::Reward, &rewarded(&[(-0.0, None), (0.0, None)]), &[0, 1]);
        check(Strategy::Reward, &rewarded(&[(2.0, None); 5]), &[0, 1, 2, 3, 4]);
        check(Strategy::Reward, &[], &[]);
    }

    #[test]
    fn rewards_are_compared_unrounded_and_unbounded() {
        // A sigmoid in f32 would make both exactly 1.
        check(Strategy::Reward, &rewarded(&[(47.0, None), (47.440_43, None)]), &[1, 0]);
        let next = f32::from_bits(3.5f32.to_bits() + 1);
        check(Strategy::Reward, &rewarded(&[(3.5, None), (next, None)]), &[1, 0]);
    }

    #[test]
    fn logprob_ignores_rewards_and_answers() {
        let rows =
            rated(&[(Some(9.0), Some(-2.0), Some(0)), (Some(1.0), Some(-0.5), None), (None, Some(-1.0), Some(0))]);
        check(Strategy::LogProb, &rows, &[1, 2, 0]);
        check(Strategy::LogProb, &rated(&[(None, Some(-1.0), None), (None, Some(-1.0), None)]), &[0, 1]);
    }

    #[test]
    fn missing_and_not_a_number_rank_last() {
        let rows =
            rated(&[(None, None, None), (Some(f32::NAN), Some(f64::NAN), None), (Some(-50.0), Some(-90.0), None)]);
        check(Strategy::Reward, &rows, &[2, 0, 1]);
        check(Strategy::LogProb, &rows, &[2, 0, 1]);
        check(Strategy::Majority, &rows, &[2, 0, 1]);
        check(Strategy::Weighted, &rows, &[2, 0, 1]);
    }

    #[test]
    fn majority_beats_reward() {
        // Two of answer 7 against the best reward with answer 3.
        let rows = rewarded(&[(9.0, Some(3)), (1.0, Some(7)), (2.0, Some(7)), (5.0, None)]);
        check(Strategy::Majority, &rows, &[2, 1, 0, 3]);
    }

    #[test]
    fn majority_ties_go_to_the_higher_reward_then_the_lower_index() {
        let rows = rewarded(&[(1.0, Some(0)), (4.0, Some(1)), (3.0, Some(0)), (2.0, Some(1))]);
        check(Strategy::Majority, &rows, &[1, 3, 2, 0]);
        let equal = rewarded(&[(1.0, Some(5)), (1.0, Some(2)), (1.0, Some(5)), (1.0, Some(2))]);
        check(Strategy::Majority, &equal, &[0, 2, 1, 3]);
        // The best of each answer ties: index 1 (answer 1) against index 2 (answer 0).
        let best = rewarded(&[(0.0, Some(0)), (8.0, Some(1)), (8.0, Some(0)), (0.0, Some(1))]);
        check(Strategy::Majority, &best, &[1, 3, 2, 0]);
    }

    #[test]
    fn majority_without_a_reward_model_uses_logprobs() {
        let rows = rated(&[(None, Some(-0.9), Some(0)), (None, Some(-0.1), Some(1)), (None, Some(-0.3), Some(2))]);
        check(Strategy::Majority, &rows, &[1, 2, 0]);
        // One reward missing: rewards are not comparable, so none counts.
        let mixed = rated(&[(Some(9.0), Some(-0.9), Some(0)), (None, Some(-0.1), Some(1))]);
        check(Strategy::Majority, &mixed, &[1, 0]);
    }

    #[test]
    fn without_an_answer_nobody_wins_a_majority_unless_nobody_has_one() {
        let rows = rewarded(&[(9.0, None), (8.0, None), (7.0, None), (-7.0, Some(0))]);
        check(Strategy::Majority, &rows, &[3, 0, 1, 2]);
        check(Strategy::Weighted, &rows, &[3, 0, 1, 2]);
        check(Strategy::Reward, &rows, &[0, 1, 2, 3]);
        let none = rewarded(&[(1.0, None), (3.0, None), (2.0, None)]);
        check(Strategy::Majority, &none, &[1, 2, 0]);
        check(Strategy::Weighted, &none, &[1, 2, 0]);
    }

    #[test]
    fn weighted_sums_sigmoids() {
        // sigmoid(2) = 0.881; sigmoid(0) + sigmoid(-0.4) = 0.901; sigmoid(0) + sigmoid(-0.6) = 0.854
        check(Strategy::Weighted, &rewarded(&[(2.0, Some(0)), (0.0, Some(1)), (-0.4, Some(1))]), &[1, 2, 0]);
        check(Strategy::Weighted, &rewarded(&[(2.0, Some(0)), (0.0, Some(1)), (-0.6, Some(1))]), &[0, 1, 2]);
        // A plain sum of rewards would choose answer 1 (3 against 2.9); sigmoids do not: 2 x 0.81 against 0.953.
        check(Strategy::Weighted, &rewarded(&[(3.0, Some(1)), (1.45, Some(0)), (1.45, Some(0))]), &[1, 2, 0]);
    }

    #[test]
    fn weighted_survives_huge_rewards() {
        // Both sums are exactly 1 in f64, so the higher reward decides.
        check(Strategy::Weighted, &rewarded(&[(800.0, Some(0)), (900.0, Some(1))]), &[1, 0]);
        check(Strategy::Weighted, &rewarded(&[(-800.0, Some(0)), (-900.0, Some(1)), (-900.0, Some(1))]), &[0, 1, 2]);
        assert_eq!(sigmoid(f64::NEG_INFINITY), 0.0);
        assert_eq!(sigmoid(0.0), 0.5);
        assert!((sigmoid(-2.0) + sigmoid(2.0) - 1.0).abs() < 1e-15);
    }

    #[test]
    fn every_small_case_is_a_permutation_that_obeys_the_rule() {
        // All 3 candidates x 3 rewards x 3 answers.
        let answers = [None, Some(0), Some(1)];
        for code in 0..9usize.pow(3) {
            let digit = |i: u32| code / 9usize.pow(i) % 9;
            let rows: Vec<(f32, Option<usize>)> =
                (0..3).map(|i| ((digit(i) % 3) as f32, answers[digit(i) / 3])).collect();
            let rated = rewarded(&rows);
            for strategy in [Strategy::Reward, Strategy::LogProb, Strategy::Majority, Strategy::Weighted] {
                let order = rank(strategy, &rated);
                let mut sorted = order.clone();
                sorted.sort_unstable();
                assert_eq!(sorted, [0, 1, 2]);
            }
            let votes = |answer: Option<usize>| match answer {
                None => 0,
                some => rows.iter().filter(|row| row.1 == some).count(),
            };
            let winner = rows[rank(Strategy::Majority, &rated)[0]];
            let most = rows.iter().map(|row| votes(row.1)).max().unwrap_or(0);
            assert_eq!(votes(winner.1), most, "{rows:?}");
            let best = rows.iter().filter(|row| votes(row.1) == most).map(|row| row.0).fold(f32::MIN, f32::max);
            assert_eq!(winner.0, best, "{rows:?}");
        }
    }
}
