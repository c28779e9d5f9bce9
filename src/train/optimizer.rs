//! The optimiser's state: moments of every trained weight, clipping by the norm of all gradients, and the learning rate of a step.

use candle_core::{DType, Tensor};

use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::parameters::NamedParameter;
use crate::ops::adamw::{AdamW, sum_of_squares};

/// Constants of AdamW that stay the same.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decay of weights other than norms, for each unit of learning rate.
    pub weight_decay: f64,
    /// Largest norm of all gradients together; larger ones are scaled down to it.
    pub clip_norm: Option<f64>,
}

/// One trained weight.
#[derive(Debug)]
pub struct Slot {
    /// The weight and its names.
    pub named: NamedParameter,
    /// `[2, elements]` f32: the running means of gradients and of their squares.
    pub moments: Tensor,
    gradient: Tensor,
}

/// AdamW over the trained weights of a model.
#[derive(Debug)]
pub struct Optimizer {
    options: AdamWOptions,
    slots: Vec<Slot>,
    /// Steps done.
    step: u64,
}

impl Slot {
    /// What it is called among the slots of one model: the name of its first tensor.
    pub fn name(&self) -> &str {
        self.named.parts.first().map_or("", |part| &part.name)
    }
}

impl Optimizer {
    /// For the trained weights of `model`, which it moves in place.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn new(model: &Model, options: AdamWOptions) -> Result<Self> {
        let mut slots = Vec::new();
        for named in model.parameters() {
            let Some(gradient) = named.parameter.gradient().cloned() else { continue };
            let moments = Tensor::zeros((2, gradient.elem_count()), DType::F32, gradient.device())?;
            slots.push(Slot { named, moments, gradient });
        }
        Ok(Self { options, slots, step: 0 })
    }

    /// The trained weights and their moments.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Goes on after `step` steps, with moments that were put into [`Optimizer::slots`].
    pub fn resume(&mut self, step: u64) {
        self.step = step;
    }

    /// The norm of all gradients together.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn gradient_norm(&self) -> Result<f64> {
        let squares = self.slots.iter().map(|slot| sum_of_squares(&slot.gradient));
        Ok(squares.sum::<Result<f64>>()?.sqrt())
    }

    /// Whether every trained tensor got a gradient. The first matrix of a correction gets none while the second is zero, as it is
    /// at first, and is passed over.
    ///
    /// # Errors
    /// [`Error::Internal`] naming the tensors whose gradient is zero or not finite: they would never learn, silently.
    pub fn check_gradients(&self) -> Result<()> {
        let mut without = Vec::new();
        for slot in &self.slots {
            for part in slot.named.parts.iter().filter(|part| !part.name.ends_with(".lora_A.weight")) {
                let norm = sum_of_squares(&slot.gradient.narrow(0, part.rows.start, part.rows.len())?)?;
                if norm == 0.0 || !norm.is_finite() {
                    without.push(format!("{} ({norm})", part.name));
                }
            }
        }
        if without.is_empty() {
            return Ok(());
        }
        Err(Error::internal(format!("no usable gradient reaches {}", without.join(", "))))
    }

    /// Moves the weights by their gradients, whose norm is `norm`, and clears these.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn step(&mut self, learning_rate: f64, norm: f64) -> Result<()> {
        self.step += 1;
        let AdamWOptions { betas, eps, weight_decay, clip_norm } = self.options;
        // As torch.nn.utils.clip_grad_norm_ has it.
        let gradient_scale = clip_norm.map_or(1.0, |most| (most / (norm + 1e-6)).min(1.0));
        for slot in &self.slots {
            let weight = slot.named.parameter.value();
            let weight_decay = if weight.rank() > 1 { weight_decay } else { 0.0 };
            let step = AdamW { learning_rate, betas, eps, weight_decay, step: self.step, gradient_scale };
            step.step(weight, &slot.gradient, &slot.moments)?;
        }
        self.clear()
    }

    /// Forgets the gradients.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn clear(&self) -> Result<()> {
        self.slots.iter().try_for_each(|slot| Ok(slot.gradient.zero_set()?))
    }
}
