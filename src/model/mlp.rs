//! The feed-forward part of a layer: one gated layer for all rows, or several among which a router chooses for each row.

use candle_core::Tensor;

use super::config::ModelConfig;
use super::config::tensors::{GatedNames, ROUTER};
use super::weights::Weights;
use crate::error::{Error, Result};
use crate::ops::experts::route;
use crate::ops::linear::{self, Linear};
use crate::ops::parameter::Parameter;
use crate::ops::place::Place;
use crate::ops::swiglu::{swiglu, swiglu_backward};

/// Rows that go through quantised weights together: what lies between the two products of more would be larger than the caches, and of
/// a long step more memory than all else.
const ROWS_TOGETHER: usize = 128;

#[derive(Debug)]
pub(super) enum Mlp {
    Gated(Gated),
    /// Mixtral's.
    Experts {
        /// `[experts, hidden]`.
        router: Linear,
        experts: Vec<Gated>,
        /// Experts that compute each row.
        per_token: usize,
    },
}

/// down(silu(gate(x)) * up(x))
#[derive(Debug)]
pub(super) struct Gated {
    /// `[2 * intermediate, hidden]`: gate, up.
    pub(super) gate_up: Linear,
    /// `[hidden, intermediate]`.
    pub(super) down: Linear,
}

impl Mlp {
    /// That of the layer whose tensors' names begin with `prefix`.
    pub(super) fn new(config: &ModelConfig, weights: &mut Weights, prefix: &str, place: &Place) -> Result<Self> {
        let Some(experts) = config.experts else {
            return Ok(Self::Gated(Gated::new(config, weights, prefix, &GatedNames::only(), place)?));
        };
        let router = weights.take_matrix(&format!("{prefix}.{ROUTER}.weight"), &[experts.count, config.hidden])?;
        let expert = |index| Gated::new(config, weights, prefix, &GatedNames::expert(index), place);
        Ok(Self::Experts {
            router: Linear::dense(place.put(router)?)?,
            experts: (0..experts.count).map(expert).collect::<Result<_>>()?,
            per_token: experts.per_token,
        })
    }

    /// `x` `[T, hidden]` to `[T, hidden]`, and what [`Mlp::backward`] needs beside `x`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        match self {
            Self::Gated(gated) => gated.forward(x),
            Self::Experts { router, experts, per_token } => {
                let sum = x.zeros_like()?;
                for route in route(&router.forward(x)?, *per_token)? {
                    let gated = &experts[route.expert];
                    route.add_to(&sum, &gated.forward(&route.gather(x)?)?.0)?;
                }
                Ok((sum, None))
            }
        }
    }

    /// The gradient of `x` from that of the result, `d`, `[T, hidden]` both, and what [`Mlp::forward`] gave beside it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for experts and for weights quantised or laid out for serving.
    pub(super) fn backward(&self, x: &Tensor, gate_up: Option<&Tensor>, d: &Tensor) -> Result<Tensor> {
        let (Self::Gated(gated), Some(gate_up)) = (self, gate_up) else {
            let message = "mixtures of experts, and weights quantised or laid out for serving, are not trained";
            return Err(Error::Unsupported(message.to_owned()));
        };
        let d_act = gated.down.backward(&swiglu(gate_up)?, d)?;
        gated.gate_up.backward(x, &swiglu_backward(gate_up, &d_act)?)
    }

    /// Every linear layer, the router first.
    pub(super) fn each(&self) -> Vec<&Linear> {
        match self {
            Self::Gated(gated) => vec![&gated.gate_up, &gated.down],
            Self::Experts { router, experts, .. } => {
                let experts = experts.iter().flat_map(|gated| [&gated.gate_up, &gated.down]);
                [router].into_iter().chain(experts).collect()
            }
        }
    }

    /// As [`Mlp::each`].
    pub(super) fn each_mut(&mut self) -> Vec<&mut Linear> {
        match self {
            Self::Gated(gated) => vec![&mut gated.gate_up, &mut gated.down],
            Self::Experts { router, experts, .. } => {
                let experts = experts.iter_mut().flat_map(|gated| [&mut gated.gate_up, &mut gated.down]);
                [router].into_iter().chain(experts).collect()
            }
        }
    }

    /// The names of the tensors that the layers of [`Mlp::each`] are stacked of, each with its rows, without the layer's prefix.
    pub(super) fn names(&self) -> Vec<Vec<(String, usize)>> {
        let rows = |linear: &Linear| linear.dims().map_or(0, |(rows, _)| rows);
        let gated = |gated: &Gated, names: GatedNames| {
            let half = rows(&gated.gate_up) / 2;
            [vec![(names.gate, half), (names.up, half)], vec![(names.down, rows(&gated.down))]]
        };
        match self {
            Self::Gated(only) => gated(only, GatedNames::only()).into(),
            Self::Experts { router, experts, .. } => {
                let experts = experts.iter().enumerate();
                let experts = experts.flat_map(|(index, expert)| gated(expert, GatedNames::expert(index)));
                [vec![(ROUTER.to_owned(), rows(router))]].into_iter().chain(experts).collect()
            }
        }
    }
}

impl Gated {
    fn new(
        config: &ModelConfig,
        weights: &mut Weights,
        prefix: &str,
        names: &GatedNames,
        place: &Place,
    ) -> Result<Self> {
        let ModelConfig { hidden, intermediate, .. } = *config;
        let mut part = |name: &str, shape: &[usize]| weights.take_matrix(&format!("{prefix}.{name}.weight"), shape);
        let wide = [intermediate, hidden];
        let gate_up = Parameter::stack(&[part(&names.gate, &wide)?, part(&names.up, &wide)?])?;
        let down = part(&names.down, &[hidden, intermediate])?;
        Ok(Self { gate_up: Linear::dense(place.put(gate_up)?)?, down: Linear::dense(place.put(down)?)? })
    }

    /// As [`Mlp::forward`]. Weights quantised or laid out for serving may give nothing beside.
    fn forward(&self, x: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        if let Some(y) = linear::gated(x, &self.gate_up, &self.down)? {
            return Ok((y, None));
        }
        let rows = x.dim(0)?;
        if rows > ROWS_TOGETHER && self.gate_up.weight().is_quantized() {
            let some = |first| x.narrow(0, first, ROWS_TOGETHER.min(rows - first));
            let parts = (0..rows).step_by(ROWS_TOGETHER).map(|first| Ok(self.forward(&some(first)?)?.0));
            return Ok((Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?, None));
        }
        let gate_up = self.gate_up.forward(x)?;
        Ok((self.down.forward(&swiglu(&gate_up)?)?, Some(gate_up)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use candle_core::Device;

    use super::*;
    use crate::ops::quantized::{Format, Matrix, quantize};
    use crate::ops::sample::uniform;

    fn numbers(seed: u64, count: usize) -> Vec<f32> {
        (0..count as u64).map(|i| uniform(seed, i) as f32 - 0.5).collect()
    }

    fn quantised(seed: u64, rows: usize, k: usize) -> Linear {
        let matrix = Matrix { format: Format::Q8_0, rows, k };
        let blocks = quantize(matrix.format, &numbers(seed, rows * k));
        Linear::dense(Parameter::quantized(matrix, &blocks, &Device::Cpu).unwrap()).unwrap()
    }

    #[test]
    fn many_rows_through_quantised_weights_have_the_bits_of_few() {
        let gated = Gated { gate_up: quantised(1, 192, 64), down: quantised(2, 64, 96) };
        let count = 2 * ROWS_TOGETHER + 5;
        let x = Tensor::from_vec(numbers(3, count * 64), (count, 64), &Device::Cpu).unwrap();
        let bits = |x: &Tensor| -> Vec<u32> {
            let found = gated.forward(x).unwrap().0;
            found.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
        };
        let few = (0..count).step_by(50).map(|first| x.narrow(0, first, 50.min(count - first)).unwrap());
        assert_eq!(bits(&x), few.flat_map(|x| bits(&x)).collect::<Vec<_>>());
    }
}
