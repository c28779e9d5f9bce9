//! Rows of the embedding matrix by token id, widened to f32.

use super::parallel::for_each_chunk;
use super::storage::{Weights, slice};
use crate::error::Result;
use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor};

/// `ids` `[T]` u32 and `weight` `[V, d]` f32, bf16 or f16 to `[T, d]` f32. An id of V or more is an error.
pub fn embed(ids: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Ok(ids.apply_op2(weight, Embed)?)
}

struct Embed;

impl CustomOp2 for Embed {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn cpu_fwd(
        &self,
        ids: &CpuStorage,
        ids_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let count = ids_layout.shape().dims1()?;
        let (vocab, width) = weight_layout.shape().dims2()?;
        let ids: &[u32] = slice("embed", ids, ids_layout)?;
        let weight = Weights::new("embed", weight, weight_layout)?;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            candle_core::bail!("embed: token id {id} is outside of the vocabulary of {vocab}");
        }
        let mut out = vec![0.0; count * width];
        for_each_chunk(&mut out, width, |row, out| weight.widen(ids[row] as usize * width, out));
        Ok((CpuStorage::F32(out), Shape::from((count, width))))
    }
}
