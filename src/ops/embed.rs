//! Rows of the embedding matrix by token id, widened to f32.

use super::parallel::{filled, for_each};
use super::parameter::Parameter;
use super::quantized::Matrix;
use super::storage::{Shared, Weights, slice, slice_mut};
#[cfg(feature = "cuda")]
use super::{cuda, kernels};
use crate::error::Result;
use candle_core::{CpuStorage, CustomOp2, InplaceOp3, Layout, Shape, Tensor};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, DType};

/// `ids` `[T]` u32 and `weight` `[V, d]`, quantised, f32, bf16 or f16, to `[T, d]` f32. An id of V or more is an error.
pub fn embed(ids: &Tensor, weight: &Parameter) -> Result<Tensor> {
    Ok(ids.apply_op2_no_bwd(weight.value(), &Embed { quantized: weight.matrices().first().copied() })?)
}

/// Rows `rows` `[R]` u32 of `x` `[T, d]` to `[R, d]`, in the type of activations.
///
/// # Errors
/// If there is no such row, or a tensor operation fails.
pub fn select(x: &Tensor, rows: &Tensor) -> Result<Tensor> {
    embed(rows, &x.clone().into())
}

/// Adds row t of `dy` `[T, d]` f32, the gradient of [`embed`]'s result, to row `ids[t]` of the gradient of a trained `weight`.
pub fn embed_backward(ids: &Tensor, weight: &Parameter, dy: &Tensor) -> Result<()> {
    match weight.gradient() {
        Some(gradient) => Ok(gradient.inplace_op3(ids, dy, &EmbedGradient)?),
        None => Ok(()),
    }
}

struct Embed {
    /// What the bytes of a quantised weight stand for.
    quantized: Option<Matrix>,
}

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
        let (vocab, width) = match self.quantized {
            Some(matrix) => (matrix.rows, matrix.k),
            None => weight_layout.shape().dims2()?,
        };
        let ids: &[u32] = slice("embed", ids, ids_layout)?;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            candle_core::bail!("embed: token id {id} is outside of the vocabulary of {vocab}");
        }
        let out = match self.quantized {
            Some(matrix) => {
                let tiles: &[u8] = slice("embed", weight, weight_layout)?;
                filled(count * width, width, |row, out| matrix.row(tiles, ids[row] as usize, out))
            }
            None => {
                let weight = Weights::new("embed", weight, weight_layout)?;
                filled(count * width, width, |row, out| weight.widen(ids[row] as usize * width, out))
            }
        };
        Ok((CpuStorage::F32(out), Shape::from((count, width))))
    }

    /// In the type of the weight. Ids are not compared with the vocabulary: they are on the device.
    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        ids: &CudaStorage,
        ids_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let (count, (_, width)) = (ids_layout.shape().dims1()?, weight_layout.shape().dims2()?);
        let (device, dtype) = (&weight.device, cuda::dtype("embed", weight)?);
        let out = cuda::output(device, dtype, count * width)?;
        let [ids, weight] = [
            cuda::address("embed", ids, ids_layout, DType::U32)?,
            cuda::address("embed", weight, weight_layout, dtype)?,
        ];
        cuda::launch(device, &kernels::embed(dtype, [cuda::base("embed", &out)?, ids, weight], [count, width]))?;
        Ok((out, Shape::from((count, width))))
    }
}

struct EmbedGradient;

impl InplaceOp3 for EmbedGradient {
    fn name(&self) -> &'static str {
        "embed gradient"
    }

    fn cpu_fwd(
        &self,
        gradient: &mut CpuStorage,
        layout: &Layout,
        ids: &CpuStorage,
        ids_layout: &Layout,
        dy: &CpuStorage,
        dy_layout: &Layout,
    ) -> candle_core::Result<()> {
        let (vocab, width) = layout.shape().dims2()?;
        let ids: &[u32] = slice(self.name(), ids, ids_layout)?;
        if dy_layout.dims() != [ids.len(), width] || ids.iter().any(|&id| id as usize >= vocab) {
            candle_core::bail!("{}: {} ids, {:?} into {:?}", self.name(), ids.len(), dy_layout.dims(), layout.dims());
        }
        let dy: &[f32] = slice(self.name(), dy, dy_layout)?;
        // Rows by id, and of one id in order: each row of the gradient has one thread and one order of its sum.
        let mut rows: Vec<usize> = (0..ids.len()).collect();
        rows.sort_by_key(|&row| ids[row]);
        let groups: Vec<&[usize]> = rows.chunk_by(|&a, &b| ids[a] == ids[b]).collect();
        let gradient = &Shared::new(slice_mut(self.name(), gradient, layout)?);
        for_each(groups.len(), |index| {
            let id = ids[groups[index][0]] as usize;
            // SAFETY: an id has one group, so no other thread has this row.
            #[allow(unsafe_code)]
            let sum = unsafe { gradient.part(id * width, width) };
            for &row in groups[index] {
                sum.iter_mut().zip(&dy[row * width..]).for_each(|(sum, dy)| *sum += dy);
            }
        });
        Ok(())
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
            let got = embed(&Tensor::new(&ids, &Device::Cpu).unwrap(), &weight.into()).unwrap();
            assert_eq!((got.dims(), got.dtype()), (&[4, 7][..], DType::F32));
            let expected: Vec<f32> = ids.iter().flat_map(|&id| rows[id as usize * 7..][..7].to_vec()).collect();
            check_bits("rows", &floats(&got), &expected);
        }
    }

    #[test]
    fn the_gradient_adds_up_the_rows_of_each_id() {
        let (weight, dy) = (Parameter::trained(&tensor(1, (10, 7))).unwrap(), tensor(2, (5, 7)));
        let ids = Tensor::new(&[3u32, 0, 3, 9, 3], &Device::Cpu).unwrap();
        embed_backward(&ids, &weight, &dy).unwrap();
        let (got, dy) = (floats(weight.gradient().unwrap()), floats(&dy));
        let mut expected = vec![0.0; 70];
        for (row, id) in [3, 0, 3, 9, 3].into_iter().enumerate() {
            (0..7).for_each(|i| expected[id * 7 + i] += dy[row * 7 + i]);
        }
        check_bits("sums", &got, &expected);
        embed_backward(&ids, &Parameter::frozen(tensor(1, (10, 7))), &tensor(2, (5, 7))).unwrap();
        assert!(embed_backward(&ids, &weight, &tensor(2, (4, 7))).is_err());
    }

    #[test]
    fn an_id_outside_of_the_vocabulary_is_an_error() {
        let ids = Tensor::new(&[1u32, 10], &Device::Cpu).unwrap();
        let error = embed(&ids, &tensor(1, (10, 7)).into()).unwrap_err().to_string();
        assert!(error.contains("token id 10"), "{error}");
    }
}
