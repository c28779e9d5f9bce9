//! The arithmetic of Llama-shaped checkpoints: one decoder for serving and training.

pub mod config;
pub mod decoder;
pub mod heads;
mod mlp;
pub mod parameters;
pub mod random;
pub mod tape;
pub mod weights;

use candle_core::Device;

use crate::error::Result;
use config::ModelConfig;
use decoder::Decoder;
use heads::Head;
use weights::Weights;

/// A whole checkpoint, ready to compute.
#[derive(Debug)]
pub struct Model {
    /// What config.json says.
    pub config: ModelConfig,
    /// From tokens to hidden states.
    pub decoder: Decoder,
    /// From hidden states to logits or rewards.
    pub head: Head,
}

impl Model {
    /// Builds the model that `config` describes out of `weights`, on `device`.
    ///
    /// # Errors
    /// [`crate::error::Error::Checkpoint`] naming every tensor that is missing, misshapen or not used.
    pub fn load(config: ModelConfig, mut weights: Weights, device: &Device) -> Result<Self> {
        let decoder = Decoder::new(&config, &mut weights, device)?;
        let head = Head::new(&config, &mut weights, &decoder)?;
        weights.finish()?;
        Ok(Self { config, decoder, head })
    }
}
