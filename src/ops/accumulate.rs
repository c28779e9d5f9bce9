//! Changes in place: one tensor added to another, whole or to some of its columns, or put in its place.

use super::parallel::for_each_chunk;
use super::storage::{slice, slice_mut};
use crate::error::Result;
use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor};

/// Numbers a thread takes at a time.
const CHUNK: usize = 16 << 10;

/// `sum` += `x`, both f32, contiguous and of one shape.
///
/// # Errors
/// If they are not.
pub fn add_to(sum: &Tensor, x: &Tensor) -> Result<()> {
    Ok(sum.inplace_op2(x, &AddTo)?)
}

/// `y[t, first + i]` += `scale` * `x[t, i]` for `y` `[T, out]` and `x` `[T, n]`, both f32 and contiguous.
///
/// # Errors
/// If the shapes do not fit.
pub(super) fn add_to_columns(y: &Tensor, x: &Tensor, first: usize, scale: f32) -> Result<()> {
    Ok(y.inplace_op2(x, &AddToColumns { first, scale })?)
}

/// The elements of `x` in the place of those of `target`, both f32, contiguous and of one shape.
///
/// # Errors
/// If they are not.
pub fn copy_to(target: &Tensor, x: &Tensor) -> Result<()> {
    Ok(target.inplace_op2(x, &CopyTo)?)
}

struct CopyTo;

impl InplaceOp2 for CopyTo {
    fn name(&self) -> &'static str {
        "copy_to"
    }

    fn cpu_fwd(
        &self,
        target: &mut CpuStorage,
        target_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> candle_core::Result<()> {
        if target_layout.dims() != x_layout.dims() {
            candle_core::bail!("copy_to: {:?} in the place of {:?}", x_layout.dims(), target_layout.dims());
        }
        slice_mut("copy_to", target, target_layout)?.copy_from_slice(slice("copy_to", x, x_layout)?);
        Ok(())
    }
}

struct AddTo;

impl InplaceOp2 for AddTo {
    fn name(&self) -> &'static str {
        "add_to"
    }

    fn cpu_fwd(
        &self,
        sum: &mut CpuStorage,
        sum_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> candle_core::Result<()> {
        if sum_layout.dims() != x_layout.dims() {
            candle_core::bail!("add_to: {:?} added to {:?}", x_layout.dims(), sum_layout.dims());
        }
        let x: &[f32] = slice("add_to", x, x_layout)?;
        for_each_chunk(slice_mut("add_to", sum, sum_layout)?, CHUNK, |index, sum| {
            sum.iter_mut().zip(&x[index * CHUNK..]).for_each(|(sum, x)| *sum += x);
        });
        Ok(())
    }
}

struct AddToColumns {
    first: usize,
    scale: f32,
}

impl InplaceOp2 for AddToColumns {
    fn name(&self) -> &'static str {
        "add_to_columns"
    }

    fn cpu_fwd(
        &self,
        y: &mut CpuStorage,
        y_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> candle_core::Result<()> {
        let ((rows, width), (x_rows, count)) = (y_layout.shape().dims2()?, x_layout.shape().dims2()?);
        if rows != x_rows || self.first + count > width {
            candle_core::bail!(
                "add_to_columns: {:?} from column {} on of {:?}",
                x_layout.dims(),
                self.first,
                y_layout.dims()
            );
        }
        let x: &[f32] = slice("add_to_columns", x, x_layout)?;
        for_each_chunk(slice_mut("add_to_columns", y, y_layout)?, width, |row, y| {
            let y = &mut y[self.first..self.first + count];
            y.iter_mut().zip(&x[row * count..]).for_each(|(y, x)| *y += self.scale * x);
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use crate::ops::samples::{check_bits, floats, tensor};

    #[test]
    fn sums_are_those_of_the_parts() {
        let (sum, x) = (tensor(1, (300, 70)), tensor(2, (300, 70)));
        let expected = floats(&(&sum + &x).unwrap());
        add_to(&sum, &x).unwrap();
        check_bits("all", &floats(&sum), &expected);
        copy_to(&sum, &x).unwrap();
        check_bits("copy", &floats(&sum), &floats(&x));
        let (y, x) = (tensor(3, (5, 10)), tensor(4, (5, 3)));
        let (before, part) = (floats(&y), floats(&x));
        add_to_columns(&y, &x, 6, 0.5).unwrap();
        for (i, (got, before)) in floats(&y).iter().zip(&before).enumerate() {
            let (row, column) = (i / 10, i % 10);
            let added = if (6..9).contains(&column) { 0.5 * part[row * 3 + column - 6] } else { 0.0 };
            assert_eq!(*got, before + added, "element {i}");
        }
    }

    #[test]
    fn wrong_shapes_are_errors() {
        assert!(add_to(&tensor(1, (2, 3)), &tensor(2, (3, 2))).is_err());
        assert!(copy_to(&tensor(1, (2, 3)), &tensor(2, (3, 2))).is_err());
        assert!(add_to_columns(&tensor(1, (2, 3)), &tensor(2, (2, 2)), 2, 1.0).is_err());
        assert!(add_to_columns(&tensor(1, (2, 3)), &tensor(2, (1, 2)), 0, 1.0).is_err());
    }
}
