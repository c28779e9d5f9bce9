//! Products of bf16 in the processor's matrix unit: rows in strips of sixteen, panels in parts that the level-1 cache holds.
//! The order of a sum is that of [`Registers::multiply_bf16`], whatever the number of rows, threads and parts.

use half::bf16;

use super::blocks::{Line, Sizes, WIDTH};
use super::brain::{Left, Right};
use super::pairs::{Pair, Pairs};
use crate::ops::amx::{Amx, Begin, Operand, PAIRS, ROWS, Registers};
use crate::ops::parallel;
use crate::ops::storage::{Shared, Target, written};
use crate::ops::swiglu;
use std::ops::Range;

/// Pairs of a panel that all strips of a block go over before the next ones: 24 KiB, half of a level-1 cache.
const PART: usize = 96;
/// How far ahead of use a panel is asked for that is read once.
const PREFETCH_BYTES: usize = 8192;
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
    /// Part after part, strip after strip of up to sixteen rows, `[pairs / 16, rows, 16]`: what the unit reads lies in the order in which
    /// it is read. Filled up with zeros.
    left: Vec<Pair>,
    /// Rows in it.
    rows: usize,
}

/// Where sums go.
enum Out<'a> {
    /// To memory that nobody has written.
    Fresh(&'a Shared<'a, f32>),
    /// On top of what is there.
    Added(&'a Shared<'a, f32>),
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
        let rows = rows.next_multiple_of(height);
        let strip = |first: usize, out: &Shared<'_, Pair>| {
            for part in (0..steps).step_by(PART) {
                let end = steps.min(part + PART);
                // SAFETY: every strip of every part has a place of its own.
                #[allow(unsafe_code)]
                let out = unsafe { out.cleared(part * rows + first * (end - part), (end - part) * height) };
                self.pairs.lay_out(left, sizes, first, part..end, out);
            }
        };
        // SAFETY: all strips of all parts are everything.
        #[allow(unsafe_code)]
        let left = unsafe {
            written(rows * steps, |out| parallel::for_each(rows / height, |index| strip(index * height, out)))
        };
        Product { unit: self, sizes, steps, left, rows }
    }
}

/// What a thread works with.
struct Own {
    registers: Registers,
    panel: Vec<Line<Pair>>,
    sums: Vec<[f32; WIDTH]>,
}

impl Product {
    /// All sums, `[rows, columns]`.
    pub(super) fn fresh(&self, panels: Panels<'_>) -> Vec<f32> {
        // SAFETY: every sum is written, once, to a place of its own.
        #[allow(unsafe_code)]
        unsafe {
            written(self.sizes.rows * self.sizes.columns, |c| self.compute(panels, &Out::Fresh(c)))
        }
    }

    /// Adds all sums to `c` `[rows, columns]`.
    pub(super) fn add(&self, panels: Panels<'_>, c: &mut [f32]) {
        self.compute(panels, &Out::Added(&Shared::new(c)));
    }

    /// The product whose left operand is silu(gate) * up, `columns` wide, where `panels` are those of gate and then of up, as many.
    pub(super) fn gated(&self, panels: &[bf16], columns: usize) -> Self {
        let Sizes { rows, columns: both, k } = self.sizes;
        let half = both / 2;
        assert!(half.is_multiple_of(WIDTH) && panels.len() == both * k, "halves are whole panels");
        let (steps, height) = (half / 2, rows.clamp(1, ROWS));
        let own = || {
            let own = self.own();
            let ups = own.sums.clone();
            (own, ups, vec![0.0; BLOCK * WIDTH])
        };
        let write = |left: &Shared<'_, Pair>| {
            self.pieces(half / WIDTH, own, |(own, ups, values), panel, rows| {
                let [gate, up] = [0, half].map(|half| &panels[(half + panel * WIDTH) * k..][..WIDTH * k]);
                let pair = panel * WIDTH / 2;
                let part = pair / PART * PART;
                let width = steps.min(part + PART) - part;
                for first in rows.clone().step_by(BLOCK) {
                    let rows = first..rows.end.min(first + BLOCK);
                    self.multiply(rows.clone(), gate, (&own.registers, &mut own.sums), |_| None);
                    self.multiply(rows.clone(), up, (&own.registers, ups), |_| None);
                    let values = &mut values[..rows.len().next_multiple_of(height) * WIDTH];
                    let [gates, ups] = [&own.sums, &*ups].map(|sums| &sums.as_flattened()[..values.len()]);
                    swiglu::numbers(gates, ups, values);
                    for (row, values) in rows.step_by(height).zip(values.chunks_exact(height * WIDTH)) {
                        let start = part * self.rows + row * width + (pair - part) * height;
                        // SAFETY: every strip of every panel has a place of its own.
                        #[allow(unsafe_code)]
                        let out = unsafe { left.cleared(start, height * WIDTH / 2) };
                        let sizes = Sizes { rows: height, columns, k: WIDTH };
                        self.unit.pairs.lay_out(Left::Rows(values), sizes, 0, 0..WIDTH / 2, out);
                    }
                }
            });
        };
        // SAFETY: all strips of all panels are everything.
        #[allow(unsafe_code)]
        let left = unsafe { written(self.rows * steps, write) };
        Self { unit: self.unit, sizes: Sizes { rows, columns, k: half }, steps, left, rows: self.rows }
    }

    fn own(&self) -> Own {
        let rows = self.sizes.rows;
        Own {
            registers: self.unit.amx.registers(rows.min(ROWS), 4 * PAIRS),
            panel: Vec::new(),
            sums: vec![[0.0; WIDTH]; rows.next_multiple_of(rows.min(ROWS)).min(BLOCK)],
        }
    }

    /// Runs `body(own, panel, rows)` in parallel until every row of each of `panels` panels had its turn.
    fn pieces<T>(&self, panels: usize, own: impl Fn() -> T + Sync, body: impl Fn(&mut T, usize, Range<usize>) + Sync) {
        let rows = self.sizes.rows;
        if rows == 0 || panels == 0 {
            return;
        }
        // Enough pieces for all threads, at the price of reading or making a panel more than once.
        let groups = (4 * parallel::threads()).div_ceil(panels).min(rows.div_ceil(BLOCK));
        let each = rows.div_ceil(groups).next_multiple_of(ROWS);
        parallel::for_each_init(panels * groups, own, |own, index| {
            let first = index % groups * each;
            body(own, index / groups, first..rows.min(first + each));
        });
    }

    fn compute(&self, panels: Panels<'_>, out: &Out<'_>) {
        let Sizes { columns, k, .. } = self.sizes;
        self.pieces(
            columns.div_ceil(WIDTH),
            || self.own(),
            |own, panel, rows| {
                let column = panel * WIDTH;
                match panels {
                    Panels::Stored(all) => {
                        let panel = &all[column * k..][..WIDTH * k];
                        self.block(rows, column, panel, (&own.registers, &mut own.sums), out);
                    }
                    Panels::Made(right) => {
                        own.panel.clear();
                        own.panel.resize(self.steps, Line::default());
                        self.unit.pairs.pack(right, self.sizes, column, &mut own.panel);
                        self.block(rows, column, &own.panel, (&own.registers, &mut own.sums), out);
                    }
                }
            },
        );
    }

    /// Some rows over the panel whose first column is `column`.
    fn block<P: Copy>(
        &self,
        rows: Range<usize>,
        column: usize,
        panel: &[P],
        (registers, sums): (&Registers, &mut [[f32; WIDTH]]),
        out: &Out<'_>,
    ) {
        let Sizes { rows: all, columns, .. } = self.sizes;
        let (height, width) = (all.min(ROWS), WIDTH.min(columns - column));
        for first in rows.clone().step_by(BLOCK) {
            let last = rows.end.min(first + BLOCK);
            // Rows whose sums the unit writes to their places itself: whole strips over a whole panel.
            let direct = match out {
                Out::Fresh(_) if width == WIDTH => (last - first) / height * height,
                _ => 0,
            };
            let target = |row: usize| match out {
                // SAFETY: every sum has a place of its own.
                #[allow(unsafe_code)]
                Out::Fresh(c) if row < first + direct => unsafe {
                    Some(c.target(row * columns + column, columns, height, WIDTH))
                },
                _ => None,
            };
            self.multiply(first..last, panel, (registers, sums), target);
            self.put(first + direct..last, column..column + width, &sums[direct..], out);
        }
    }

    /// The sums of a block of rows over a panel: those of a strip to the target of its first row, where it has one, or else to `sums`.
    fn multiply<'a, P: Copy>(
        &self,
        rows: Range<usize>,
        panel: &[P],
        (registers, sums): (&Registers, &mut [[f32; WIDTH]]),
        target: impl Fn(usize) -> Option<Target<'a>>,
    ) {
        let (steps, height) = (self.steps, self.sizes.rows.min(ROWS));
        let once = self.sizes.rows <= ROWS;
        for part in (0..steps).step_by(PART) {
            let end = steps.min(part + PART);
            let begin = if part == 0 { Begin::Zeros } else { Begin::Sums };
            let right = &panel[panel.len() * part / steps..panel.len() * end / steps];
            let right = Operand { numbers: right, ahead: if once { PREFETCH_BYTES } else { 0 } };
            for (row, sums) in rows.clone().step_by(height).zip(sums.chunks_exact_mut(height)) {
                let left = &self.left[part * self.rows + row * (end - part)..][..(end - part) * height];
                // The next strip, while this one is multiplied.
                let left = Operand { numbers: left, ahead: if once { 0 } else { size_of_val(left) } };
                let target = if end == steps { target(row) } else { None };
                registers.multiply_bf16(begin, left, right, sums, target);
            }
        }
    }

    /// Puts the sums of rows to their places.
    fn put(&self, rows: Range<usize>, columns: Range<usize>, sums: &[[f32; WIDTH]], out: &Out<'_>) {
        for (row, sums) in rows.zip(sums) {
            let (start, sums) = (row * self.sizes.columns + columns.start, &sums[..columns.len()]);
            match out {
                // SAFETY: every sum has a place of its own.
                #[allow(unsafe_code)]
                Out::Fresh(c) => unsafe { c.write(start, sums) },
                Out::Added(c) => {
                    // SAFETY: the same.
                    #[allow(unsafe_code)]
                    let c = unsafe { c.part(start, sums.len()) };
                    c.iter_mut().zip(sums).for_each(|(c, sum)| *c += sum);
                }
            }
        }
    }
}
