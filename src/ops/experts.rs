//! Mixtures of experts: which rows each expert computes, and the weighted sum of what the experts of a row give
//! (arXiv 2401.04088, section 2.1). Experts are added in the order of their numbers.

#[cfg(feature = "cuda")]
use super::cuda;
#[cfg(feature = "cuda")]
use super::kernels;
use super::lanes::{Body, Isa, Kernel, LANES, store_part, widen_part};
use super::parallel::for_each;
use super::storage::{Shared, slice, slice_mut};
use super::{embed, host, select};
use crate::error::Result;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor};

/// What one expert computes in a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    /// Its number.
    pub expert: usize,
    /// Rows of the batch, ascending.
    pub rows: Vec<u32>,
    /// What its result counts in each; those of all experts of a row add up to 1.
    pub shares: Vec<f32>,
}

/// The routes of all experts that some row chose, in the order of their numbers: a row goes to the `per_token` largest of its `logits`
/// `[T, experts]`, ties to the lower number, with the softmax over those as shares. A row with a logit that is no number has no numbers
/// as shares.
///
/// # Errors
/// If the logits cannot be read.
pub fn route(logits: &Tensor, per_token: usize) -> Result<Vec<Route>> {
    let count = logits.dim(1)?;
    let mut routes: Vec<Route> =
        (0..count).map(|expert| Route { expert, rows: Vec::new(), shares: Vec::new() }).collect();
    for (row, logits) in (0..).zip(host::floats(logits)?.chunks(count.max(1))) {
        let (chosen, shares) = choose(logits, per_token);
        for (expert, share) in chosen.into_iter().zip(shares) {
            let route = &mut routes[expert as usize];
            route.rows.push(row);
            route.shares.push(share);
        }
    }
    routes.retain(|route| !route.rows.is_empty());
    Ok(routes)
}

/// The experts of one row, and their shares.
fn choose(logits: &[f32], per_token: usize) -> (Vec<u32>, Vec<f32>) {
    if logits.iter().any(|logit| logit.is_nan()) {
        return ((0..logits.len().min(per_token) as u32).collect(), vec![f32::NAN; per_token]);
    }
    let chosen = select::best(logits, per_token);
    let mut shares: Vec<f32> = chosen.iter().map(|&expert| logits[expert as usize]).collect();
    Body::best().run(Softmax(&mut shares));
    (chosen, shares)
}

/// exp(x - max) / sum of exp(x - max), of numbers in descending order.
struct Softmax<'a>(&'a mut [f32]);

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let max = isa.splat(self.0.first().copied().unwrap_or(0.0));
        for x in self.0.chunks_mut(LANES) {
            let weights = isa.exp(isa.sub(widen_part(isa, x), max));
            store_part(isa, weights, x);
        }
        let total: f32 = self.0.iter().sum();
        self.0.iter_mut().for_each(|x| *x /= total);
    }
}

impl Route {
    /// Its rows of `x` `[T, d]`, `[R, d]`.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn gather(&self, x: &Tensor) -> Result<Tensor> {
        if x.dim(0)? == self.rows.len() {
            return Ok(x.clone());
        }
        embed::select(x, &Tensor::new(self.rows.as_slice(), x.device())?)
    }

    /// Adds `y` `[R, d]`, times the shares, to its rows of `sum` `[T, d]`, in place; both are in the type of activations.
    ///
    /// # Errors
    /// If the shapes do not fit, or a tensor operation fails.
    pub fn add_to(&self, sum: &Tensor, y: &Tensor) -> Result<()> {
        Ok(sum.inplace_op2(y, self)?)
    }

    fn width(&self, sum: &Layout, y: &Layout) -> candle_core::Result<usize> {
        let ((rows, width), found) = (sum.shape().dims2()?, y.shape().dims2()?);
        if found != (self.rows.len(), width) || self.rows.last().is_some_and(|last| *last as usize >= rows) {
            let names = self.rows.len();
            candle_core::bail!("experts: {found:?} for {names} rows of {:?}", sum.dims());
        }
        Ok(width)
    }
}

impl InplaceOp2 for Route {
    fn name(&self) -> &'static str {
        "experts"
    }

    fn cpu_fwd(
        &self,
        sum: &mut CpuStorage,
        sum_layout: &Layout,
        y: &CpuStorage,
        y_layout: &Layout,
    ) -> candle_core::Result<()> {
        let width = self.width(sum_layout, y_layout)?;
        let y: &[f32] = slice(self.name(), y, y_layout)?;
        let sum = &Shared::new(slice_mut(self.name(), sum, sum_layout)?);
        let body = Body::best();
        for_each(self.rows.len(), |index| {
            // SAFETY: rows ascend, so each is there once.
            #[allow(unsafe_code)]
            let sum = unsafe { sum.part(self.rows[index] as usize * width, width) };
            body.run(AddShare { sum, y: &y[index * width..][..width], share: self.shares[index] });
        });
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        sum: &mut CudaStorage,
        sum_layout: &Layout,
        y: &CudaStorage,
        y_layout: &Layout,
    ) -> candle_core::Result<()> {
        let (width, dtype) = (self.width(sum_layout, y_layout)?, cuda::dtype(self.name(), y)?);
        let device = y.device.clone();
        let shares: Vec<u32> = self.shares.iter().map(|share| share.to_bits()).collect();
        let (rows, shares) = (cuda::upload(&device, &self.rows)?, cuda::upload(&device, &shares)?);
        let addresses = [
            cuda::address(self.name(), sum, sum_layout, dtype)?,
            cuda::address(self.name(), y, y_layout, dtype)?,
            cuda::base(self.name(), &rows)?,
            cuda::base(self.name(), &shares)?,
        ];
        cuda::launch(&device, &kernels::add_expert(dtype, addresses, [self.rows.len(), width]))
    }
}

struct AddShare<'a> {
    sum: &'a mut [f32],
    y: &'a [f32],
    share: f32,
}

impl Kernel for AddShare<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let share = isa.splat(self.share);
        for (sum, y) in self.sum.chunks_mut(LANES).zip(self.y.chunks(LANES)) {
            let added = isa.fma(widen_part(isa, y), share, widen_part(isa, sum));
            store_part(isa, added, sum);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::ops::samples::{check_bits, check_close, floats, tensor};
    use candle_core::Device;

    fn logits(rows: &[[f32; 4]]) -> Tensor {
        Tensor::from_slice(rows.as_flattened(), (rows.len(), 4), &Device::Cpu).unwrap()
    }

    #[test]
    fn rows_go_to_their_largest_logits_with_shares_of_one() {
        let routes = route(&logits(&[[0.0, 1.0, 3.0, 2.0], [5.0, 5.0, 5.0, 4.0], [1e30, -1e30, 0.0, 0.0]]), 2).unwrap();
        let found: Vec<(usize, &[u32])> = routes.iter().map(|route| (route.expert, &route.rows[..])).collect();
        // Equals go to the lower number; nobody chose the last expert of the second row.
        assert_eq!(found, [(0, &[1, 2][..]), (1, &[1]), (2, &[0, 2]), (3, &[0])]);
        let e = f64::exp(-1.0);
        check_close("shares", &routes[0].shares, &[0.5, 1.0], 1e-7);
        check_close("shares", &routes[2].shares, &[1.0 / (1.0 + e), 0.0], 1e-7);
        check_close("shares", &routes[3].shares, &[e / (1.0 + e)], 1e-7);
        // All of them: the plain softmax.
        let all = route(&logits(&[[0.0, 1.0, 2.0, 3.0]]), 4).unwrap();
        let total: f64 = (0..4).map(|x| f64::from(x).exp()).sum();
        for (index, route) in all.iter().enumerate() {
            check_close("softmax", &route.shares, &[(index as f64).exp() / total], 1e-7);
        }
    }

    #[test]
    fn a_row_without_numbers_spoils_no_other() {
        let sound = [0.0, 1.0, 3.0, 2.0];
        let routes = route(&logits(&[[0.0, f32::NAN, 1.0, 2.0], sound]), 2).unwrap();
        let alone = route(&logits(&[sound]), 2).unwrap();
        for route in &routes {
            for (row, share) in route.rows.iter().zip(&route.shares) {
                match row {
                    0 => assert!(share.is_nan()),
                    _ => {
                        let same = alone.iter().find(|alone| alone.expert == route.expert).unwrap();
                        assert_eq!(share.to_bits(), same.shares[0].to_bits());
                    }
                }
            }
        }
        assert_eq!(routes.iter().filter(|route| route.rows.contains(&0)).count(), 2);
    }

    #[test]
    fn impossible_experts_have_no_share_and_no_rows_no_routes() {
        let never = f32::NEG_INFINITY;
        let routes = route(&logits(&[[never, 2.0, never, never]]), 2).unwrap();
        let found: Vec<(usize, f32)> = routes.iter().map(|route| (route.expert, route.shares[0])).collect();
        assert_eq!(found, [(0, 0.0), (1, 1.0)]);
        for row in [[never; 4], [f32::INFINITY, 0.0, 0.0, 0.0]] {
            assert!(route(&logits(&[row]), 2).unwrap().iter().any(|route| route.shares[0].is_nan()));
        }
        assert_eq!(route(&Tensor::zeros((0, 4), candle_core::DType::F32, &Device::Cpu).unwrap(), 2).unwrap(), []);
    }

    #[test]
    fn results_come_back_to_their_rows() {
        let (x, sum, y) = (tensor(1, (5, 19)), tensor(2, (5, 19)), tensor(3, (2, 19)));
        let route = Route { expert: 0, rows: vec![1, 4], shares: vec![0.25, 0.75] };
        let (all, mut expected, added) = (floats(&x), floats(&sum), floats(&y));
        check_bits("gathered", &floats(&route.gather(&x).unwrap()), &[&all[19..38], &all[76..]].concat());
        for (index, (row, share)) in [(1, 0.25f32), (4, 0.75)].into_iter().enumerate() {
            (0..19).for_each(|i| expected[row * 19 + i] = added[index * 19 + i].mul_add(share, expected[row * 19 + i]));
        }
        route.add_to(&sum, &y).unwrap();
        check_bits("sums", &floats(&sum), &expected);
        assert!(route.add_to(&sum, &tensor(3, (3, 19))).is_err());
        assert!(route.add_to(&tensor(2, (4, 19)), &y).is_err());
        let whole = Route { expert: 0, rows: vec![0, 1], shares: vec![0.5; 2] };
        check_bits("all rows", &floats(&whole.gather(&y).unwrap()), &added);
    }
}
