//! Products of bf16 in the processor's matrix unit: rows in strips of sixteen, panels in parts that the level-1 cache holds.
//! The order of a sum is that of [`Registers::multiply_bf16`], whatever the number of rows, threads and parts.

use half::bf16;

use super::blocks::{Line, Sizes, WIDTH};
use super::brain::{Left, Right};
use super::float::Emit;
use super::pairs::{Pair, Pairs};
use crate::ops::amx::{Amx, Begin, From, PAIRS, ROWS, Registers};
use crate::ops::parallel;

/// Pairs of a panel that all strips of a block go over before the next ones: 32 KiB.
const PART: usize = 128;
/// Rows whose sums rest in a level-2 cache between two parts.
const BLOCK: usize = 256;

/// A processor with the unit.
#[derive(Clone, Copy)]
pub(super) struct Unit {
    amx: Amx,
    pairs: Pairs,
}

/// The right operand as panels, pairs of neighbours along k in 64 columns.
#[derive(Clone, Copy)]
pub(super) enum Panels<'a> {
    /// Of a stored weight, `[columns / 64, k / 2, 64, 2]`, k a multiple of 32.
    Stored(&'a [bf16]),
    /// Made when they are needed.
    Made(Right<'a>),
}

/// A product whose left operand is rounded and laid out.
pub(super) struct Product {
    unit: Unit,
    sizes: Sizes,
    /// Pairs of a row, filled up with zeros.
    steps: usize,
    /// `[rows, steps]`, filled up with zeros to whole strips.
    left: Vec<Pair>,
}

impl Unit {
    pub(super) fn detect() -> Option<Self> {
        Some(Self { amx: Amx::detect()?, pairs: Pairs::detect()? })
    }

    /// Whether a weight of `k` numbers a column can be stored in panels.
    pub(super) fn takes(k: usize) -> bool {
        k.is_multiple_of(2 * PAIRS)
    }

    /// The product of `left`.
    pub(super) fn product(self, left: Left<'_>, sizes: Sizes) -> Product {
        let Sizes { rows, k, .. } = sizes;
        let steps = k.div_ceil(2).max(1).next_multiple_of(PAIRS);
        let height = rows.clamp(1, ROWS);
        let left =
            parallel::filled(rows.next_multiple_of(height) * steps, height * steps, |index, out: &mut [Pair]| {
                self.pairs.lay_out(left, sizes, index * height, steps, out);
            });
        Product { unit: self, sizes, steps, left }
    }
}

/// What a thread works with.
struct Own {
    registers: Registers,
    panel: Vec<Line<Pair>>,
    sums: Vec<[f32; WIDTH]>,
}

impl Product {
    /// Computes every sum and hands it to `emit(row, column, sums)`, up to 64 columns of one row at a time, from several threads.
    pub(super) fn compute(&self, panels: Panels<'_>, emit: &Emit<'_>) {
        let Sizes { rows, columns, k } = self.sizes;
        if rows == 0 || columns == 0 {
            return;
        }
        let count = columns.div_ceil(WIDTH);
        // Enough pieces for all threads, at the price of making a panel more than once.
        let groups = (4 * parallel::threads()).div_ceil(count).min(rows.div_ceil(BLOCK));
        let each = rows.div_ceil(groups).next_multiple_of(ROWS);
        let own = || Own {
            registers: self.unit.amx.registers(rows.min(ROWS), 4 * PAIRS),
            panel: Vec::new(),
            sums: vec![[0.0; WIDTH]; rows.next_multiple_of(rows.min(ROWS)).min(BLOCK)],
        };
        parallel::for_each_init(count * groups, own, |own, index| {
            let (column, first) = (index / groups * WIDTH, index % groups * each);
            let rows = first..rows.min(first + each);
            match panels {
                Panels::Stored(all) => {
                    let panel = &all[column * k..][..WIDTH * k];
                    self.block(rows, column, panel, (&own.registers, &mut own.sums), emit);
                }
                Panels::Made(right) => {
                    own.panel.clear();
                    own.panel.resize(self.steps, Line::default());
                    self.unit.pairs.pack(right, self.sizes, column, &mut own.panel);
                    self.block(rows, column, &own.panel, (&own.registers, &mut own.sums), emit);
                }
            }
        });
    }

    /// Some rows over the panel whose first column is `column`.
    fn block<P>(
        &self,
        rows: std::ops::Range<usize>,
        column: usize,
        panel: &[P],
        (registers, sums): (&Registers, &mut [[f32; WIDTH]]),
        emit: &Emit<'_>,
    ) {
        let (steps, height, width) = (self.steps, self.sizes.rows.min(ROWS), WIDTH.min(self.sizes.columns - column));
        let from = if self.sizes.rows > ROWS { From::Cache } else { From::Memory };
        for first in rows.clone().step_by(BLOCK) {
            let last = rows.end.min(first + BLOCK);
            for part in (0..steps).step_by(PART) {
                let end = steps.min(part + PART);
                let begin = if part == 0 { Begin::Zeros } else { Begin::Sums };
                let right = &panel[panel.len() * part / steps..panel.len() * end / steps];
                for (row, sums) in (first..last).step_by(height).zip(sums.chunks_exact_mut(height)) {
                    registers.multiply_bf16(begin, (&self.left[row * steps + part..], steps), (right, from), sums);
                }
            }
            for (row, sums) in (first..last).zip(&*sums) {
                emit(row, column, &sums[..width]);
            }
        }
    }
}
