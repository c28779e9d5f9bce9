//! The losses of the stages, on numbers: from log-probabilities or rewards of texts to a loss and its slopes.
//! Formulas: arXiv 2404.02078 section 3 (reward model), Rafailov et al. 2023 (DPO), Ethayarajh et al. 2024 (KTO), Chen et al. 2024
//! (NCA). Slopes are in closed form, so that one backward pass of the log-probabilities serves every stage.

/// ln(1 / (1 + e^-x)), without overflow.
pub fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

/// 1 / (1 + e^-x).
pub fn sigmoid(x: f64) -> f64 {
    log_sigmoid(x).exp()
}

/// The sum of the log-probabilities of a text's targets, under the policy and under the reference.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Likelihood {
    /// Of the model that learns.
    pub policy: f64,
    /// Of the model that it started from.
    pub reference: f64,
}

impl Likelihood {
    /// beta * (policy - reference): the implicit reward.
    fn reward(self, beta: f64) -> f64 {
        beta * (self.policy - self.reference)
    }
}

/// The loss of one pair and its slopes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairLoss {
    /// What is minimised.
    pub loss: f64,
    /// Its derivative by the log-probability, or the reward, of the chosen text.
    pub d_chosen: f64,
    /// And of the rejected one.
    pub d_rejected: f64,
    /// The reward of the chosen text: implicit, or the model's.
    pub chosen: f64,
    /// And of the rejected one.
    pub rejected: f64,
}

/// -(1 - e) ln s(c - r) - e ln s(r - c), with c and r the implicit rewards and e = `label_smoothing` (conservative DPO).
pub fn dpo(chosen: Likelihood, rejected: Likelihood, beta: f64, label_smoothing: f64) -> PairLoss {
    let (c, r) = (chosen.reward(beta), rejected.reward(beta));
    let margin = c - r;
    let loss = -(1.0 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin);
    let slope = beta * (label_smoothing * sigmoid(margin) - (1.0 - label_smoothing) * sigmoid(-margin));
    PairLoss { loss, d_chosen: slope, d_rejected: -slope, chosen: c, rejected: r }
}

/// -ln s(c) - ln s(-c) / 2 - ln s(-r) / 2, with c and r the implicit rewards.
pub fn nca(chosen: Likelihood, rejected: Likelihood, beta: f64) -> PairLoss {
    let (c, r) = (chosen.reward(beta), rejected.reward(beta));
    PairLoss {
        loss: -log_sigmoid(c) - 0.5 * log_sigmoid(-c) - 0.5 * log_sigmoid(-r),
        d_chosen: beta * (0.5 * sigmoid(c) - sigmoid(-c)),
        d_rejected: beta * 0.5 * sigmoid(r),
        chosen: c,
        rejected: r,
    }
}

/// Which terms the loss of a reward model has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RewardTerms {
    /// Whether L_BT = -ln s(c - r - margin) counts.
    pub bradley_terry: bool,
    /// Whether L_DR = -ln s(c) - ln s(-r) counts.
    pub absolute: bool,
    /// By how much the rewards should differ.
    pub margin: f64,
    /// The factor of (c + r)^2, which keeps rewards around zero.
    pub centre: f64,
}

/// The loss of a pair of rewards: the sum of the terms that count.
pub fn reward(chosen: f64, rejected: f64, terms: RewardTerms) -> PairLoss {
    let (mut loss, mut d_chosen, mut d_rejected) = (0.0, 0.0, 0.0);
    if terms.bradley_terry {
        let margin = chosen - rejected - terms.margin;
        loss -= log_sigmoid(margin);
        d_chosen -= sigmoid(-margin);
        d_rejected += sigmoid(-margin);
    }
    if terms.absolute {
        loss -= log_sigmoid(chosen) + log_sigmoid(-rejected);
        d_chosen -= sigmoid(-chosen);
        d_rejected += sigmoid(rejected);
    }
    let sum = chosen + rejected;
    loss += terms.centre * sum * sum;
    d_chosen += 2.0 * terms.centre * sum;
    d_rejected += 2.0 * terms.centre * sum;
    PairLoss { loss, d_chosen, d_rejected, chosen, rejected }
}

/// The loss of one labelled answer and its slope.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AnswerLoss {
    /// What is minimised.
    pub loss: f64,
    /// Its derivative by the answer's log-probability.
    pub slope: f64,
    /// The implicit reward.
    pub reward: f64,
}

/// What KTO weighs and compares answers with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KtoTerms {
    /// Scale of the implicit rewards.
    pub beta: f64,
    /// Weight of desirable answers.
    pub desirable: f64,
    /// Weight of undesirable answers.
    pub undesirable: f64,
    /// [`kto_baseline`].
    pub z0: f64,
}

/// weight * (1 - s(beta * (policy - reference - z0))) for a desirable answer, with the sign turned for an undesirable one.
pub fn kto(answer: Likelihood, desirable: bool, terms: KtoTerms) -> AnswerLoss {
    let ratio = answer.policy - answer.reference;
    let (weight, sign) = if desirable { (terms.desirable, 1.0) } else { (terms.undesirable, -1.0) };
    let kept = sigmoid(sign * terms.beta * (ratio - terms.z0));
    AnswerLoss {
        loss: weight * (1.0 - kept),
        slope: -sign * weight * terms.beta * kept * (1.0 - kept),
        reward: terms.beta * ratio,
    }
}

/// z0 = max(0, mean(policy - reference)) over answers to other prompts: an estimate of the divergence, through which no
/// gradient flows. Zero of none.
pub fn kto_baseline(mismatched: &[Likelihood]) -> f64 {
    let sum: f64 = mismatched.iter().map(|one| one.policy - one.reference).sum();
    if mismatched.is_empty() { 0.0 } else { (sum / mismatched.len() as f64).max(0.0) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    #[track_caller]
    fn check(what: &str, got: f64, expected: f64) {
        assert!((got - expected).abs() < 5e-9, "{what}: {got}, expected {expected}");
    }

    fn likelihood(ratio: f64) -> Likelihood {
        Likelihood { policy: ratio - 30.0, reference: -30.0 }
    }

    const TERMS: RewardTerms = RewardTerms { bradley_terry: true, absolute: true, margin: 0.0, centre: 0.0 };

    /// Values worked out by hand from the formulas, for z_c = 5 and z_r = -8.
    #[test]
    fn losses_are_those_of_the_formulas() {
        let (chosen, rejected) = (likelihood(5.0), likelihood(-8.0));
        check("dpo", dpo(chosen, rejected, 0.1, 0.0).loss, 0.241_008_453);
        check("nca", nca(chosen, rejected, 0.1).loss, 1.146_665_810);
        let terms = KtoTerms { beta: 0.1, desirable: 1.33, undesirable: 1.0, z0: 2.0 };
        check("desirable", kto(chosen, true, terms).loss, 0.565_991_448);
        check("undesirable", kto(rejected, false, terms).loss, 0.268_941_421);
        let absolute = |c, r| reward(c, r, RewardTerms { bradley_terry: false, ..TERMS }).loss;
        let bradley_terry = |c, r| reward(c, r, RewardTerms { absolute: false, ..TERMS }).loss;
        check("L_BT", bradley_terry(1.0, -0.5), 0.201_413_278);
        check("L_DR", absolute(1.0, -0.5), 0.787_338_672);
        check("L_BT", bradley_terry(-1.0, -3.0), 0.126_928_011);
        check("L_DR", absolute(-1.0, -3.0), 1.361_849_039);
        check("both", reward(-1.0, -3.0, TERMS).loss, 1.488_777_050);
        let margin = reward(1.0, -0.5, RewardTerms { absolute: false, margin: 1.5, centre: 0.1, ..TERMS });
        check("margin and centre", margin.loss, std::f64::consts::LN_2 + 0.1 * 0.25);
    }

    #[test]
    fn slopes_are_those_of_differences() {
        let d = 1e-5;
        let slope = |f: &dyn Fn(f64) -> f64, at: f64| (f(at + d) - f(at - d)) / (2.0 * d);
        for (c, r) in [(0.3, -1.2), (5.0, 8.0), (-20.0, 1.0), (0.0, 0.0)] {
            type Loss<'a> = &'a dyn Fn(f64, f64) -> PairLoss;
            let pairs: [(&str, Loss<'_>); 5] = [
                ("dpo", &|c, r| dpo(likelihood(c), likelihood(r), 0.1, 0.0)),
                ("cdpo", &|c, r| dpo(likelihood(c), likelihood(r), 0.3, 0.1)),
                ("nca", &|c, r| nca(likelihood(c), likelihood(r), 0.1)),
                ("reward", &|c, r| reward(c, r, TERMS)),
                ("centred", &|c, r| reward(c, r, RewardTerms { margin: 0.7, centre: 0.05, ..TERMS })),
            ];
            for (name, loss) in pairs {
                let one = loss(c, r);
                let off = (one.d_chosen - slope(&|c| loss(c, r).loss, c)).abs();
                assert!(off < 1e-6, "{name} at {c}, {r}: chosen is off by {off}");
                let off = (one.d_rejected - slope(&|r| loss(c, r).loss, r)).abs();
                assert!(off < 1e-6, "{name} at {c}, {r}: rejected is off by {off}");
            }
            for desirable in [true, false] {
                let terms = KtoTerms { beta: 0.1, desirable: 1.33, undesirable: 0.9, z0: 0.4 };
                let one = |c| kto(likelihood(c), desirable, terms);
                assert!((one(c).slope - slope(&|c| one(c).loss, c)).abs() < 1e-6, "kto at {c}");
            }
        }
    }

    #[test]
    fn extremes_stay_finite_and_the_baseline_is_never_negative() {
        for x in [-1e4, -200.0, 200.0, 1e4] {
            assert!(log_sigmoid(x).is_finite() && sigmoid(x).is_finite(), "{x}");
        }
        assert_eq!(log_sigmoid(-200.0), -200.0);
        assert_eq!(kto_baseline(&[]), 0.0);
        assert_eq!(kto_baseline(&[likelihood(-3.0), likelihood(1.0)]), 0.0);
        assert_eq!(kto_baseline(&[likelihood(3.0), likelihood(1.0)]), 2.0);
    }
}
