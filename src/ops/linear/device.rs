//! y = x W^T on a GPU: few rows by our own kernel, which reads the weight once at full speed, more of them by cuBLAS.
//! cuBLAS adds up in another order for other numbers of rows, so a row's last bits depend on how many there are.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Layout, Shape};

use crate::ops::{cuda, kernels};

/// Most rows of `kernels/linear.cu`.
const ROWS_MAX: usize = 8;

/// `x` `[T, in]` and `weight` `[out, in]` of one type to `[T, out]` of the same.
pub(super) fn product(
    (x, x_layout): (&CudaStorage, &Layout),
    (weight, weight_layout): (&CudaStorage, &Layout),
) -> candle_core::Result<(CudaStorage, Shape)> {
    let ((rows, k), (columns, weight_k)) = (x_layout.shape().dims2()?, weight_layout.shape().dims2()?);
    if k != weight_k {
        candle_core::bail!("linear: the input has {k} features, the weight takes {weight_k}");
    }
    let (device, dtype) = (&x.device, cuda::dtype("linear", x)?);
    let [from, by] =
        [cuda::address("linear", x, x_layout, dtype)?, cuda::address("linear", weight, weight_layout, dtype)?];
    let shape = Shape::from((rows, columns));
    if rows > ROWS_MAX {
        return Ok((x.matmul(weight, (1, rows, columns, k), x_layout, &weight_layout.transpose(0, 1)?)?, shape));
    }
    let out = cuda::output(device, dtype, rows * columns)?;
    if rows > 0 {
        let addresses = [cuda::base("linear", &out)?, from, by];
        cuda::launch(device, &kernels::linear(dtype, addresses, [rows, columns, k]))?;
    }
    Ok((out, shape))
}
