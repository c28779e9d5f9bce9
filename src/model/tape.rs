//! A forward pass that remembers enough to be differentiated, and the pass back through the layers.

use candle_core::Tensor;

use super::decoder::{AttentionGradient, Decoder, Rows, Trace};
use crate::error::Result;
use crate::ops::embed::{embed, embed_backward};

/// What to keep of each layer between the two passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// All that its gradients need.
    Everything,
    /// Its input only: the rest is computed again, for a third more work and a fraction of the memory.
    Inputs,
}

/// A forward pass on its way to its gradients.
pub struct Tape<'a, A> {
    decoder: &'a Decoder,
    attention: &'a A,
    /// `[T]` u32.
    tokens: &'a Tensor,
    /// `[T]` u32.
    positions: &'a Tensor,
    layers: Vec<Kept>,
    /// `[T, hidden]`: what the final norm was given.
    x: Tensor,
    hidden: Tensor,
}

enum Kept {
    Trace(Trace),
    Input(Tensor),
}

impl Decoder {
    /// As [`Decoder::forward`], with what [`Tape::backward`] needs.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn forward_kept<'a, A: AttentionGradient>(
        &'a self,
        tokens: &'a Tensor,
        positions: &'a Tensor,
        attention: &'a A,
        keep: Keep,
    ) -> Result<Tape<'a, A>> {
        let rows = Rows { positions, attention };
        let (mut residual, mut added) = (embed(tokens, &self.embedding)?, None);
        let mut layers = Vec::with_capacity(self.layers.len());
        for index in 0..self.layers.len() {
            let (trace, mlp) = self.layer(index, residual, added, &rows)?;
            (residual, added) = (trace.fed.y.clone(), Some(mlp));
            layers.push(match keep {
                Keep::Everything => Kept::Trace(trace),
                Keep::Inputs => Kept::Input(trace.attended.x),
            });
        }
        let (x, hidden) = self.finish(residual, added)?;
        Ok(Tape { decoder: self, attention, tokens, positions, layers, x, hidden })
    }
}

impl<A: AttentionGradient> Tape<'_, A> {
    /// The hidden states `[T, hidden]` after the final norm.
    pub fn hidden(&self) -> &Tensor {
        &self.hidden
    }

    /// Adds to the gradient of every trained weight what follows from that of the hidden states, `d_hidden` `[T, hidden]`.
    /// The memory of a layer is given back as soon as its gradients are known.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn backward(self, d_hidden: &Tensor) -> Result<()> {
        let Self { decoder, attention, tokens, positions, layers, x, .. } = self;
        let rows = Rows { positions, attention };
        let mut d = decoder.finish_backward(&x, d_hidden)?;
        drop(x);
        for (index, kept) in layers.into_iter().enumerate().rev() {
            let trace = match kept {
                Kept::Trace(trace) => trace,
                Kept::Input(x) => decoder.layer(index, x, None, &rows)?.0,
            };
            d = decoder.layer_backward(index, &trace, d, &rows)?;
        }
        embed_backward(tokens, &decoder.embedding, &d)
    }
}
