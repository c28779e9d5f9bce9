//! Draws tokens from rows of logits: temperature, top-k, top-p, min-p, then one uniform number for each row.
//! Pure: the randomness is a function of a key and a counter, so a token never depends on what ran beside it.

mod weights;

#[cfg(feature = "cuda")]
use super::cuda;
use super::kernels;
use super::logprobs::{LogSoftmax, argmax, largest};
use super::parallel::filled;
use super::storage::slice;
use crate::error::{Error, Result};
use candle_core::{CpuStorage, CustomOp2, Device, Layout, Shape, Tensor};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, DType};
use weights::Weights;

/// Which tokens stay possible, and how sharply they differ. Applied in the order of the fields.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Filters {
    /// Divides the logits; 0 takes the largest, ties by lower id.
    pub temperature: f32,
    /// Only this many most probable tokens; 0 is off.
    pub top_k: usize,
    /// The fewest most probable tokens whose share of what is left reaches this: the token that crosses is kept; 1 is off.
    pub top_p: f32,
    /// Only tokens at least this fraction as probable as the most probable one; 0 is off.
    pub min_p: f32,
}

/// A number in `[0, 1)` with 53 random bits that depends on `seed` and `counter` only.
pub fn uniform(seed: u64, counter: u64) -> f64 {
    let words = philox([counter as u32, (counter >> 32) as u32, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let bits = u64::from(words[0]) | u64::from(words[1]) << 32;
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// The token of `logits` `[vocab]` at which the cumulative probability, in id order and after `filters`, exceeds
/// `uniform` in `[0, 1)`. Entries of minus infinity are never drawn. Sums have an order that depends on nothing but the row.
///
/// # Errors
/// [`Error::Internal`] if an entry is not a number or plus infinity, or if none is finite; [`Error::Invalid`] if a
/// filter is out of range.
pub fn pick(logits: &[f32], filters: &Filters, uniform: f64) -> Result<u32> {
    filters.check()?;
    if filters.temperature == 0.0 {
        return argmax(logits);
    }
    let mut weights = Weights::new(logits, largest(logits)?, filters.temperature);
    let last = weights.last(filters.top_k, f64::from(filters.top_p));
    if last.is_some() || filters.min_p > 0.0 {
        weights.keep(last, filters.min_p);
    }
    weights.locate(uniform).map_or_else(|| argmax(logits), Ok)
}

/// How one row is drawn from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// What stays possible; see [`Filters::are_possible`].
    pub filters: Filters,
    /// With `counter`, the arguments of [`uniform`].
    pub seed: u64,
    /// See `seed`.
    pub counter: u64,
    /// The log-probability of the token is wanted, too.
    pub logprob: bool,
}

/// A token that was drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drawn {
    /// Its id.
    pub token: u32,
    /// Where [`Draw::logprob`] asks for it: that of the logits as they are, before any filter.
    pub logprob: Option<f32>,
}

/// How rows are drawn from, where they are drawn.
#[derive(Debug, Clone)]
pub struct Draws<'a> {
    rows: &'a [Option<Draw>],
    /// `[8 R]` u32: what a GPU's kernel reads, see [`kernels::Draw`].
    words: Tensor,
}

impl<'a> Draws<'a> {
    /// Brings `rows` to `device`.
    ///
    /// # Errors
    /// If there is no memory left.
    pub fn new(rows: &'a [Option<Draw>], device: &Device) -> Result<Self> {
        let words: Vec<u32> = Self::words(rows).collect();
        let count = words.len();
        Ok(Self { rows, words: Tensor::from_vec(words, count, device)? })
    }

    /// As they came.
    pub fn rows(&self) -> &'a [Option<Draw>] {
        self.rows
    }

    /// Those of `rows` whose [`Self::words`] are on the device already.
    pub(super) fn of(rows: &'a [Option<Draw>], words: Tensor) -> Self {
        Self { rows, words }
    }

    /// The rows in the kernel's form.
    pub(super) fn words(rows: &[Option<Draw>]) -> impl Iterator<Item = u32> {
        rows.iter().flat_map(|draw| kernels::Draw::of(draw.as_ref()).words())
    }

    /// `count` of them from row `first` on.
    ///
    /// # Errors
    /// If there are not as many.
    pub fn narrow(&self, first: usize, count: usize) -> Result<Self> {
        let words = self.words.narrow(0, first * kernels::Draw::WORDS, count * kernels::Draw::WORDS)?;
        Ok(Self { rows: &self.rows[first..first + count], words })
    }
}

/// What [`pick`] draws from each row of `logits` `[R, vocab]`, as words for [`read`], u32. Logits and words are on one device, and
/// nothing waits for it. A GPU trusts that filters are possible.
///
/// # Errors
/// If there are not as many draws as rows, on a GPU for a vocabulary of more than [`kernels::SAMPLE_VOCAB_MAX`], or if a tensor operation
/// fails.
pub fn draw(logits: &Tensor, draws: &Draws<'_>) -> Result<Tensor> {
    Ok(logits.apply_op2_no_bwd(&draws.words, &DrawRows { draws: draws.rows })?)
}

/// The tokens that [`draw`] left in `words` for `rows`. None for rows without a draw, and for those that are no distribution.
///
/// # Errors
/// If the words are of another number of rows, and with whatever went wrong before on the device.
pub fn read(words: &Tensor, rows: &[Option<Draw>]) -> Result<Vec<Option<Drawn>>> {
    let words: Vec<u32> = words.to_vec1()?;
    let each = (words.len() / rows.len().max(1)).saturating_sub(1);
    if words.len() != rows.len() * (1 + each) || (each == 0 && !rows.is_empty()) {
        return Err(Error::Internal(format!("sample: {} words for {} draws", words.len(), rows.len())));
    }
    let (tokens, numbers) = words.split_at(rows.len());
    let drawn = |row: usize| {
        let draw = rows[row].filter(|_| tokens[row] != kernels::NONE)?;
        let logprob = f32::from_bits(numbers[row * each]);
        let logprob = draw.logprob.then_some(logprob);
        logprob.is_none_or(|logprob| !logprob.is_nan()).then_some(Drawn { token: tokens[row], logprob })
    };
    Ok((0..rows.len()).map(drawn).collect())
}

struct DrawRows<'a> {
    draws: &'a [Option<Draw>],
}

impl CustomOp2 for DrawRows<'_> {
    fn name(&self) -> &'static str {
        "sample"
    }

    /// Tokens, then a number for each.
    fn cpu_fwd(
        &self,
        logits: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        words_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, vocab) = self.shape(layout, words_layout)?;
        let logits: &[f32] = slice("sample", logits, layout)?;
        let drawn = filled(2 * rows, 2, |row, out: &mut [u32]| {
            let logits = &logits[row * vocab..][..vocab];
            let token = |draw: &Draw| pick(logits, &draw.filters, uniform(draw.seed, draw.counter)).ok();
            let draw = self.draws[row].as_ref();
            let token = draw.and_then(token);
            let asked = token.filter(|_| draw.is_some_and(|draw| draw.logprob));
            let logprob = asked.and_then(|token| LogSoftmax::new(logits).and_then(|softmax| softmax.at(token)).ok());
            out.copy_from_slice(&[token.unwrap_or(kernels::NONE), logprob.unwrap_or(f32::NAN).to_bits()]);
        });
        let words = [0, 1].into_iter().flat_map(|part| drawn.iter().skip(part).step_by(2).copied());
        Ok((CpuStorage::U32(words.collect()), Shape::from(2 * rows)))
    }

    /// Tokens, then the three numbers of each target's score.
    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        logits: &CudaStorage,
        layout: &Layout,
        words: &CudaStorage,
        words_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let (rows, vocab) = self.shape(layout, words_layout)?;
        if vocab > kernels::SAMPLE_VOCAB_MAX {
            candle_core::bail!("sample: {vocab} logits are more than the kernel takes");
        }
        let (device, dtype) = (&logits.device, cuda::dtype("sample", logits)?);
        let out = cuda::output(device, DType::U32, 4 * rows)?;
        let (tokens, logits) = (cuda::base("sample", &out)?, cuda::address("sample", logits, layout, dtype)?);
        let draws = cuda::address("sample", words, words_layout, DType::U32)?;
        cuda::launch(device, &kernels::sample(dtype, [tokens, logits, draws], [rows, vocab]))?;
        let scores = tokens + 4 * rows as u64;
        cuda::launch(device, &kernels::target_scores(dtype, [scores, logits, tokens], [rows, vocab]))?;
        Ok((out, Shape::from(4 * rows)))
    }
}

impl DrawRows<'_> {
    fn shape(&self, logits: &Layout, words: &Layout) -> candle_core::Result<(usize, usize)> {
        let (rows, vocab) = logits.shape().dims2()?;
        if rows != self.draws.len() || words.dims() != [rows * kernels::Draw::WORDS] {
            candle_core::bail!("sample: {rows} rows of logits for {} draws", self.draws.len());
        }
        Ok((rows, vocab))
    }
}

impl Filters {
    /// Whether [`pick`] takes them.
    pub fn are_possible(&self) -> bool {
        self.check().is_ok()
    }

    fn check(&self) -> Result<()> {
        let rules = [
            ("temperature", self.temperature, self.temperature >= 0.0 && self.temperature.is_finite()),
            ("top_p", self.top_p, (0.0..=1.0).contains(&self.top_p)),
            ("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p)),
        ];
        match rules.into_iter().find(|(_, _, holds)| !holds) {
            Some((name, value, _)) => Err(Error::invalid(name, format!("{name} cannot be {value}"))),
            None => Ok(()),
        }
    }
}

/// Philox4x32-10: ten rounds of multiplication and exclusive-or on a 128-bit counter under a 64-bit key (Salmon,
/// Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3).
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let even = 0xD251_1F53 * u64::from(counter[0]);
        let odd = 0xCD9E_8D57 * u64::from(counter[2]);
        counter = [
            (odd >> 32) as u32 ^ counter[1] ^ key[0],
            odd as u32,
            (even >> 32) as u32 ^ counter[3] ^ key[1],
            even as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    const PLAIN: Filters = Filters { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
    const NEVER: f32 = f32::NEG_INFINITY;

    /// The smallest and largest uniforms at which each token is drawn, found on a fine grid, as shares.
    fn shares(logits: &[f32], filters: &Filters) -> Vec<f64> {
        let steps = 4000;
        let mut shares = vec![0.0; logits.len()];
        for step in 0..steps {
            let uniform = (f64::from(step) + 0.5) / f64::from(steps);
            shares[pick(logits, filters, uniform).unwrap() as usize] += 1.0 / f64::from(steps);
        }
        shares
    }

    #[track_caller]
    fn check(logits: &[f32], filters: Filters, expected: &[f64]) {
        let found = shares(logits, &filters);
        assert_eq!(found.len(), expected.len());
        for (found_one, expected_one) in found.iter().zip(expected) {
            assert!((found_one - expected_one).abs() < 1e-3, "{found:?} instead of {expected:?}");
            assert_eq!(*found_one == 0.0, *expected_one == 0.0, "{found:?} instead of {expected:?}");
        }
    }

    fn logs(probabilities: &[f64]) -> Vec<f32> {
        // An offset must not matter.
        probabilities.iter().map(|p| p.ln() as f32 + 5.0).collect()
    }

    #[test]
    fn philox_gives_the_published_answers() {
        // The known-answer vectors that accompany the reference implementation (Random123, kat_vectors).
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let (counter, key) = ([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]);
        assert_eq!(philox(counter, key), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn uniforms_fill_the_interval_evenly_and_use_both_halves_of_seed_and_counter() {
        let count = 20_000;
        let mut bins = [0u32; 20];
        for counter in 0..count {
            bins[(uniform(7, counter) * 20.0) as usize] += 1;
        }
        // Chi-squared with 19 degrees of freedom: 43.8 is exceeded once in a thousand seeds.
        let expected = count as f64 / 20.0;
        let distance: f64 = bins.iter().map(|&n| (f64::from(n) - expected).powi(2) / expected).sum();
        assert!(distance < 43.8, "{distance}");
        let all = [uniform(1, 1), uniform(1 << 32, 1), uniform(1, 1 << 32), uniform(0, 1), uniform(1, 0)];
        for (i, a) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|b| a != b));
        }
    }

    #[test]
    fn zero_temperature_takes_the_largest_and_the_lowest_of_equals() {
        let greedy = Filters { temperature: 0.0, ..PLAIN };
        assert_eq!(pick(&[0.5, 2.0, NEVER, 2.0], &greedy, 0.99).unwrap(), 1);
        assert_eq!(pick(&[-0.0, 0.0], &greedy, 0.99).unwrap(), 0);
    }

    #[test]
    fn shares_are_the_probabilities() {
        check(&logs(&[0.1, 0.4, 0.2, 0.3]), PLAIN, &[0.1, 0.4, 0.2, 0.3]);
        check(&[NEVER, 0.0, NEVER, 0.0, NEVER], PLAIN, &[0.0, 0.5, 0.0, 0.5, 0.0]);
    }

    #[test]
    fn temperature_sharpens_and_flattens() {
        let logits = logs(&[0.2, 0.8]);
        check(&logits, Filters { temperature: 0.5, ..PLAIN }, &[0.04 / 0.68, 0.64 / 0.68]);
        check(&logits, Filters { temperature: 2.0, ..PLAIN }, &[1.0 / 3.0, 2.0 / 3.0]);
        // Colder than a float can divide by without overflow: still the most probable token.
        check(&logits, Filters { temperature: f32::MIN_POSITIVE, ..PLAIN }, &[0.0, 1.0]);
    }

    #[test]
    fn top_k_keeps_the_best_and_ties_go_to_the_lower_id() {
        let logits = logs(&[0.1, 0.3, 0.2, 0.3, 0.1]);
        check(&logits, Filters { top_k: 1, ..PLAIN }, &[0.0, 1.0, 0.0, 0.0, 0.0]);
        check(&logits, Filters { top_k: 3, ..PLAIN }, &[0.0, 0.375, 0.25, 0.375, 0.0]);
        check(&logits, Filters { top_k: 4, ..PLAIN }, &[1.0 / 9.0, 3.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0, 0.0]);
        check(&logits, Filters { top_k: 99, ..PLAIN }, &[0.1, 0.3, 0.2, 0.3, 0.1]);
    }

    #[test]
    fn top_p_keeps_the_token_that_crosses() {
        let logits = logs(&[0.1, 0.4, 0.2, 0.3]);
        check(&logits, Filters { top_p: 0.0, ..PLAIN }, &[0.0, 1.0, 0.0, 0.0]);
        check(&logits, Filters { top_p: 0.39, ..PLAIN }, &[0.0, 1.0, 0.0, 0.0]);
        check(&logits, Filters { top_p: 0.41, ..PLAIN }, &[0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]);
        check(&logits, Filters { top_p: 0.89, ..PLAIN }, &[0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0]);
        check(&logits, Filters { top_p: 0.91, ..PLAIN }, &[0.1, 0.4, 0.2, 0.3]);
        // The nucleus is that of the distribution at this temperature: 1/17 and 16/17.
        check(&logs(&[0.2, 0.8]), Filters { temperature: 0.5, top_p: 0.9, ..PLAIN }, &[0.0, 1.0]);
        // And of what top-k left: 4/7 and 3/7.
        check(&logits, Filters { top_k: 2, top_p: 0.5, ..PLAIN }, &[0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn min_p_is_relative_to_the_best() {
        let logits = logs(&[0.1, 0.4, 0.2, 0.3]);
        check(&logits, Filters { min_p: 0.49, ..PLAIN }, &[0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0]);
        check(&logits, Filters { min_p: 0.51, ..PLAIN }, &[0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]);
        check(&logits, Filters { min_p: 1.0, ..PLAIN }, &[0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn the_ends_of_the_interval_never_reach_impossible_tokens() {
        let logits = [NEVER, 0.3, 0.1, 0.2, NEVER];
        assert_eq!(pick(&logits, &PLAIN, 0.0).unwrap(), 1);
        assert_eq!(pick(&logits, &PLAIN, 1.0 - f64::EPSILON / 2.0).unwrap(), 3);
    }

    #[test]
    fn rows_are_drawn_as_one_by_one_and_others_left_alone() {
        let logits: Vec<f32> = (0..4 * 50).map(|i| (i * i % 37) as f32 * 0.25).collect();
        let mut rows = logits.clone();
        rows[3 * 50] = f32::NAN;
        let draw = |counter, top_p, logprob| Draw { filters: Filters { top_p, ..PLAIN }, seed: 7, counter, logprob };
        let draws = [Some(draw(3, 1.0, true)), None, Some(draw(4, 0.5, false)), Some(draw(5, 1.0, false))];
        let device = Device::Cpu;
        let tensor = Tensor::from_vec(rows, (4, 50), &device).unwrap();
        let drawn = |draws: &[Option<Draw>]| {
            super::draw(&tensor, &Draws::new(draws, &device).unwrap()).and_then(|words| read(&words, draws))
        };
        let expected = |row: usize, draw: Draw| {
            let logits = &logits[row * 50..][..50];
            let token = pick(logits, &draw.filters, uniform(7, draw.counter)).unwrap();
            let logprob = draw.logprob.then(|| LogSoftmax::new(logits).unwrap().at(token).unwrap());
            Some(Drawn { token, logprob })
        };
        let [first, _, third, _] = draws;
        let expected = [expected(0, first.unwrap()), None, expected(2, third.unwrap()), None];
        assert_eq!(drawn(&draws).unwrap(), expected);
        assert_eq!(drawn(&[None, None, None, Some(draw(1, 1.5, false))]).unwrap(), [None; 4]);
        assert!(drawn(&draws[..3]).is_err());
        let all = Draws::new(&draws, &device).unwrap();
        let part = all.narrow(2, 1).unwrap();
        let row = tensor.narrow(0, 2, 1).unwrap();
        assert_eq!(read(&super::draw(&row, &part).unwrap(), &draws[2..3]).unwrap(), expected[2..3]);
    }

    #[test]
    fn broken_rows_and_rules_are_errors() {
        for temperature in [0.0, 1.0] {
            let filters = Filters { temperature, ..PLAIN };
            for logits in [&[0.0, f32::NAN][..], &[f32::INFINITY], &[NEVER, NEVER], &[]] {
                assert!(matches!(pick(logits, &filters, 0.5).unwrap_err(), Error::Internal(_)));
            }
        }
        for filters in [
            Filters { temperature: -1.0, ..PLAIN },
            Filters { temperature: f32::NAN, ..PLAIN },
            Filters { top_p: 1.5, ..PLAIN },
            Filters { top_p: f32::NAN, ..PLAIN },
            Filters { min_p: -0.1, ..PLAIN },
        ] {
            assert!(matches!(pick(&[0.0], &filters, 0.5).unwrap_err(), Error::Invalid { .. }));
        }
    }
}
