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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use crate::ops::samples::{check_bits, floats, tensor};
    use candle_core::{DType, Device};

    #[test]
    fn rows_are_those_of_the_weight() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let weight = tensor(1, (10, 7)).to_dtype(dtype).unwrap();
            let rows = floats(&weight);
            let ids = [9u32, 0, 3, 3];
            let got = embed(&Tensor::new(&ids, &Device::Cpu).unwrap(), &weight).unwrap();
            assert_eq!((got.dims(), got.dtype()), (&[4, 7][..], DType::F32));
            let expected: Vec<f32> = ids.iter().flat_map(|&id| rows[id as usize * 7..][..7].to_vec()).collect();
            check_bits("rows", &floats(&got), &expected);
        }
    }

    #[test]
    fn an_id_outside_of_the_vocabulary_is_an_error() {
        let ids = Tensor::new(&[1u32, 10], &Device::Cpu).unwrap();
        let error = embed(&ids, &tensor(1, (10, 7))).unwrap_err().to_string();
        assert!(error.contains("token id 10"), "{error}");
    }
}
