//! New weights for a model that has none: norms of one, everything else normal, from one seed.

use std::collections::HashMap;

use candle_core::{Device, Tensor};

use super::config::ModelConfig;
use crate::error::Result;
use crate::ops::parallel::filled;
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
        // Pairs that a thread draws at a time.
        const PAIRS: usize = 2048;
        let (seed, first) = (self.seed, self.drawn);
        let pairs = count.div_ceil(2);
        self.drawn += 2 * pairs as u64;
        let mut values = filled(2 * pairs, 2 * PAIRS, |index, values: &mut [f32]| {
            for (pair, values) in values.chunks_exact_mut(2).enumerate() {
                let next = |nth: u64| uniform(seed, first + 2 * (index * PAIRS + pair) as u64 + nth);
                let radius = deviation * (-2.0 * (1.0 - next(1)).ln()).sqrt();
                let angle = std::f64::consts::TAU * next(2);
                values.copy_from_slice(&[(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]);
            }
        });
        values.truncate(count);
        values
    }
}
