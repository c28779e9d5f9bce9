//! New weights for a model that has none: norms of one, everything else normal, from one seed.

use std::collections::HashMap;

use candle_core::{Device, Tensor};

use super::config::ModelConfig;
use crate::error::Result;
use crate::ops::sample::uniform;

/// The usual standard deviation (`initializer_range` of transformers).
pub const DEVIATION: f64 = 0.02;

/// Every tensor that `config` asks for, f32, by its Hugging Face name; the same for the same seed.
///
/// # Errors
/// If the memory cannot be had.
pub fn random_tensors(config: &ModelConfig, seed: u64) -> Result<HashMap<String, Tensor>> {
    let mut normal = Normal::new(seed);
    let mut tensors = HashMap::new();
    for (name, shape) in config.weight_shapes() {
        let count = shape.iter().product();
        let values = if name.ends_with("norm.weight") { vec![1.0; count] } else { normal.take(count, DEVIATION) };
        tensors.insert(name, Tensor::from_vec(values, shape, &Device::Cpu)?);
    }
    Ok(tensors)
}

/// Normal numbers by the method of Box and Muller, from the generator of the sampler.
#[derive(Debug)]
pub struct Normal {
    seed: u64,
    drawn: u64,
}

impl Normal {
    /// The sequence of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { seed, drawn: 0 }
    }

    /// The next `count` numbers, of mean 0 and standard deviation `deviation`.
    pub fn take(&mut self, count: usize, deviation: f64) -> Vec<f32> {
        let mut values = Vec::with_capacity(count + 1);
        while values.len() < count {
            let radius = deviation * (-2.0 * (1.0 - self.next()).ln()).sqrt();
            let angle = std::f64::consts::TAU * self.next();
            values.extend([(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]);
        }
        values.truncate(count);
        values
    }

    fn next(&mut self) -> f64 {
        self.drawn += 1;
        uniform(self.seed, self.drawn)
    }
}
