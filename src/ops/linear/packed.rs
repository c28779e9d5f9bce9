//! Serving bf16 weights with activations rounded to bf16: half the work of float32 where the processor multiplies pairs of bf16.
//! Weights lie in panels of columns, pairs of neighbours along k: read in order for one row, and no packing for many.
//! Every sum has one order over k, so rows, threads and panels change no bit; another processor may. Where there is a matrix unit, panels
//! are multiplied there, by `matrix`; otherwise here, every sum in one chain.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Layout, Shape, Storage, Tensor};
use half::bf16;

use super::blocks::{HEIGHT, Sizes, VECTORS, WIDTH};
use super::brain::Left;
use super::matrix::{Panels, Unit};
use super::pairs::{Pair, Pairs};
use crate::error::Result;
use crate::ops::amx::ROWS;
use crate::ops::lanes::LANES;
use crate::ops::parallel;
use crate::ops::storage::{Shared, slice, written, written_weight};

/// The panels of `weight` `[out, k]`, `[out / WIDTH, k / 2, WIDTH, 2]` with zeros for the columns after the last, as `[out, k]` rounded
/// up to whole panels. None where it is not bf16, k is odd, or the processor does not multiply bf16.
///
/// # Errors
/// If a tensor operation fails.
pub(super) fn pack(weight: &Tensor) -> Result<Option<Tensor>> {
    let (rows, k) = weight.dims2()?;
    if Pairs::detect().is_none() || weight.dtype() != DType::BF16 || k == 0 || !k.is_multiple_of(2) {
        return Ok(None);
    }
    let (storage, layout) = weight.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { return Ok(None) };
    let weight: &[bf16] = slice("pack", storage, layout)?;
    let len = WIDTH * k;
    let count = rows.div_ceil(WIDTH);
    // SAFETY: the panels are cleared, and are everything.
    #[allow(unsafe_code)]
    let panels = unsafe {
        written_weight(count * len, |out: &Shared<'_, bf16>| {
            parallel::for_each(count, |index| {
                let columns = weight[index * len..].chunks_exact(k).take(WIDTH);
                put(columns, out.cleared(index * len, len));
            });
        })
    };
    Ok(Some(panels?.reshape((count * WIDTH, k))?))
}

/// The columns of a panel, pair by pair.
fn put<'a>(columns: impl Iterator<Item = &'a [bf16]>, panel: &mut [bf16]) {
    for (index, column) in columns.enumerate() {
        for (pair, line) in column.as_chunks::<2>().0.iter().zip(panel.chunks_exact_mut(2 * WIDTH)) {
            line[2 * index..][..2].copy_from_slice(pair);
        }
    }
}

/// `x` `[T, k]` f32 and the panels of a weight `[columns, k]` to `[T, columns]` f32.
pub(super) struct Product {
    pub(super) columns: usize,
}

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "linear in bf16"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        panels: &CpuStorage,
        panels_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, k) = x_layout.shape().dims2()?;
        let (padded, weight_k) = panels_layout.shape().dims2()?;
        if k != weight_k || padded != self.columns.next_multiple_of(WIDTH) {
            candle_core::bail!("{}: the input has {k} features, the weight is {padded} x {weight_k}", self.name());
        }
        let Some(pairs) = Pairs::detect() else {
            candle_core::bail!("{}: this processor does not multiply bf16", self.name())
        };
        let x: &[f32] = slice(self.name(), x, x_layout)?;
        let panels: &[bf16] = slice(self.name(), panels, panels_layout)?;
        let steps = k / 2;
        if let (Some(unit), true) = (Unit::detect(), Unit::takes(k)) {
            let sizes = Sizes { rows, columns: self.columns, k };
            let y = unit.product(Left::Rows(x), sizes).fresh(Panels::Stored(panels));
            return Ok((CpuStorage::F32(y), Shape::from((rows, self.columns))));
        }
        let x = parallel::filled(rows * steps, HEIGHT * steps, |index, out: &mut [Pair]| {
            pairs.rows(&x[index * HEIGHT * k..][..2 * out.len()], k, out);
        });
        // Of few rows, memory is the limit, which likes long runs; of many, arithmetic, where threads should end together.
        let count = self.columns.div_ceil(WIDTH);
        let run = if rows > HEIGHT { 1 } else { count.div_ceil(4 * parallel::threads()) };
        // SAFETY: every panel writes all of its columns of every row.
        #[allow(unsafe_code)]
        let y = unsafe {
            written(rows * self.columns, |y| {
                parallel::for_each(count.div_ceil(run), |index| {
                    for panel in index * run..count.min((index + 1) * run) {
                        let numbers = &panels[panel * WIDTH * k..][..WIDTH * k];
                        Panel { pairs, x: &x, numbers, steps, first: panel * WIDTH, columns: self.columns, y }
                            .compute();
                    }
                });
            })
        };
        Ok((CpuStorage::F32(y), Shape::from((rows, self.columns))))
    }
}

/// down(silu(gate(x)) * up(x)) in the matrix unit: `x` `[T, k]` f32 and the panels of gate and up and of down to `[T, columns]` f32.
/// The same bits as one product after the other, without their results in memory.
pub(super) struct Gated {
    unit: Unit,
    columns: usize,
}

impl Gated {
    /// For gate and up, `both` columns together, of `k` numbers each, and down of `columns`. None where one after the other is as good or
    /// the only way: without a matrix unit, where the gate does not fill its panels, and for few rows, where weights are the traffic.
    pub(super) fn new(rows: usize, k: usize, both: usize, columns: usize) -> Option<Self> {
        let fits = rows > ROWS && Unit::takes(k) && both.is_multiple_of(2 * WIDTH);
        Unit::detect().filter(|_| fits).map(|unit| Self { unit, columns })
    }
}

impl CustomOp3 for Gated {
    fn name(&self) -> &'static str {
        "gated linear in bf16"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        gate_up: &CpuStorage,
        gate_up_layout: &Layout,
        down: &CpuStorage,
        down_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, k) = x_layout.shape().dims2()?;
        let (both, gate_k) = gate_up_layout.shape().dims2()?;
        let (padded, half) = down_layout.shape().dims2()?;
        if k != gate_k || both != 2 * half || padded != self.columns.next_multiple_of(WIDTH) {
            candle_core::bail!(
                "{}: the input has {k} features, the weights are {both} x {gate_k} and {padded} x {half}",
                self.name()
            );
        }
        let x: &[f32] = slice(self.name(), x, x_layout)?;
        let gate_up: &[bf16] = slice(self.name(), gate_up, gate_up_layout)?;
        let down: &[bf16] = slice(self.name(), down, down_layout)?;
        let product = self.unit.product(Left::Rows(x), Sizes { rows, columns: both, k });
        let y = product.gated(gate_up, self.columns).fresh(Panels::Stored(down));
        Ok((CpuStorage::F32(y), Shape::from((rows, self.columns))))
    }
}

/// All rows over one panel.
struct Panel<'a> {
    pairs: Pairs,
    /// `[rows, steps]`
    x: &'a [Pair],
    /// `[steps, WIDTH, 2]`
    numbers: &'a [bf16],
    /// Pairs of a row.
    steps: usize,
    /// First column.
    first: usize,
    /// Columns of the result.
    columns: usize,
    y: &'a Shared<'a, f32>,
}

impl Panel<'_> {
    fn compute(&self) {
        let rows = self.x.len() / self.steps;
        // As even as can be: seven rows are four and three, not six and one.
        let height = rows.div_ceil(rows.div_ceil(HEIGHT));
        for row in (0..rows).step_by(height) {
            match height.min(rows - row) {
                1 => self.strip::<1>(row),
                2 => self.strip::<2>(row),
                3 => self.strip::<3>(row),
                4 => self.strip::<4>(row),
                5 => self.strip::<5>(row),
                _ => self.strip::<HEIGHT>(row),
            }
        }
    }

    fn strip<const R: usize>(&self, row: usize) {
        let x = std::array::from_fn(|r| &self.x[(row + r) * self.steps..][..self.steps]);
        let sums: [[[f32; LANES]; VECTORS]; R] = self.pairs.dots(x, self.numbers);
        let width = WIDTH.min(self.columns - self.first);
        for (r, sums) in sums.iter().enumerate() {
            // SAFETY: every sum is handed out once, to a place of its own.
            #[allow(unsafe_code)]
            unsafe {
                self.y.write((row + r) * self.columns + self.first, &sums.as_flattened()[..width]);
            }
        }
    }
}
