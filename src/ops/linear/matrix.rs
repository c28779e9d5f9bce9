//! Products of bf16 in the processor's matrix unit: blocks of rows that a level-2 cache holds while panels go over them, two strips of
//! sixteen rows at a time. The order of a sum is that of [`Registers::multiply_bf16`], whatever the number of rows, threads and blocks.

use half::bf16;

use super::blocks::{Line, Out, Sizes, WIDTH};
use super::brain::{Left, Right};
use super::pairs::{Pair, Pairs};
use crate::ops::amx::{Amx, CACHE_BYTES, Hints, PAIRS, ROWS, Registers};
use crate::ops::parallel;
use crate::ops::storage::{Shared, written};
use crate::ops::swiglu;
use std::ops::Range;

/// Rows that go over a panel together: two strips.
const TURN: usize = 2 * ROWS;
/// Fewest rows of a block: a panel that comes from further away has to be worth it.
const BLOCK_MIN: usize = 2 * TURN;
/// Most rows of a block.
const BLOCK_MAX: usize = 16 * TURN;
/// Fewest rows of a block for which a panel is made.
const MADE_MIN: usize = 8 * TURN;
/// Fewest turns that ask for the next panel.
const TURNS_MIN: usize = 4;
/// Pairs of a strip that are laid out at once, in a level-1 cache.
const PART: usize = 96;
/// How far ahead of use a panel is asked for that is read once.
const PREFETCH_BYTES: usize = 8192;

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
    /// Strip after strip of up to sixteen rows, `[pairs / 16, rows, 16]`: what the unit reads lies in the order in which it is read. Filled
    /// up with zeros.
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
        let rows = rows.next_multiple_of(height);
        let strip = |first: usize, out: &Shared<'_, Pair>| {
            for part in (0..steps).step_by(PART) {
                let end = steps.min(part + PART);
                // SAFETY: every part of every strip has a place of its own.
                #[allow(unsafe_code)]
                let out = unsafe { out.cleared(first * steps + part * height, (end - part) * height) };
                self.pairs.lay_out(left, sizes, first, part..end, out);
            }
        };
        // SAFETY: all parts of all strips are everything.
        #[allow(unsafe_code)]
        let left = unsafe {
            written(rows * steps, |out| parallel::for_each(rows / height, |index| strip(index * height, out)))
        };
        Product { unit: self, sizes, steps, left }
    }
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
        let (half, height) = (both / 2, self.height());
        assert!(half.is_multiple_of(WIDTH) && panels.len() == both * k, "gate and up are whole panels");
        let (steps, count) = (half / 2, half / WIDTH);
        let own = || (self.registers(), [(); 3].map(|()| vec![0.0; TURN * WIDTH]));
        let write = |left: &Shared<'_, Pair>| {
            let blocks = (rows, self.block_rows(count));
            parallel::for_each_block(count, blocks, own, |(registers, [gates, ups, values]), index, rows| {
                for turn in self.turns(rows.clone()) {
                    let len = turn.len() * WIDTH;
                    for (first, sums) in [(0, &mut *gates), (half, &mut *ups)] {
                        let (panel, next) = panels[(first + index * WIDTH) * k..].split_at(WIDTH * k);
                        let hints = self.hints(&rows, &turn, next.get(..WIDTH * k).unwrap_or_default());
                        self.multiply(registers, turn.clone(), panel, (sums, hints));
                    }
                    swiglu::products(&gates[..len], &ups[..len], &mut values[..len]);
                    for (row, values) in turn.step_by(height).zip(values.chunks_exact(height * WIDTH)) {
                        let start = row * steps + index * WIDTH / 2 * height;
                        // SAFETY: every strip of every panel has a place of its own.
                        #[allow(unsafe_code)]
                        let out = unsafe { left.cleared(start, height * WIDTH / 2) };
                        let sizes = Sizes { rows: height, columns, k: WIDTH };
                        self.unit.pairs.lay_out(Left::Rows(values), sizes, 0, 0..WIDTH / 2, out);
                    }
                }
            });
        };
        // SAFETY: all strips of all panels are everything, as a panel is whole steps of the unit.
        #[allow(unsafe_code)]
        let left = unsafe { written(rows.next_multiple_of(height) * steps, write) };
        Self { unit: self.unit, sizes: Sizes { rows, columns, k: half }, steps, left }
    }

    fn compute(&self, panels: Panels<'_>, out: &Out<'_>) {
        let Sizes { rows, columns, k } = self.sizes;
        let count = columns.div_ceil(WIDTH);
        let each = match panels {
            Panels::Stored(_) => self.block_rows(count),
            Panels::Made(_) => parallel::rows_of_block(count, rows, MADE_MIN..=usize::MAX, TURN),
        };
        let own = || (self.registers(), Vec::new(), vec![0.0; TURN * WIDTH]);
        parallel::for_each_block(count, (rows, each), own, |(registers, made, sums), index, rows| {
            let column = index * WIDTH;
            match panels {
                Panels::Stored(all) => {
                    let (panel, next) = all[column * k..].split_at(WIDTH * k);
                    let next = next.get(..WIDTH * k).unwrap_or_default();
                    self.block(rows, column, (panel, next), (registers, sums), out);
                }
                Panels::Made(right) => {
                    made.clear();
                    made.resize(self.steps, Line::default());
                    self.unit.pairs.pack(right, self.sizes, column, made);
                    self.block(rows, column, (made, &[]), (registers, sums), out);
                }
            }
        });
    }

    /// Rows of a strip.
    fn height(&self) -> usize {
        self.sizes.rows.clamp(1, ROWS)
    }

    /// Those of this thread.
    fn registers(&self) -> Registers {
        self.unit.amx.registers(self.height(), 4 * PAIRS)
    }

    /// Rows of a block that go over `panels` stored panels.
    fn block_rows(&self, panels: usize) -> usize {
        let held = (CACHE_BYTES / (self.steps * size_of::<Pair>())).clamp(BLOCK_MIN, BLOCK_MAX);
        parallel::rows_of_block(panels, self.sizes.rows, BLOCK_MIN..=held, TURN)
    }

    /// Two strips or one at a time, whole ones, of `rows`, which begin with a strip.
    fn turns(&self, rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let height = self.height();
        let end = rows.end.next_multiple_of(height);
        (rows.start..end).step_by(2 * height).map(move |first| first..end.min(first + 2 * height))
    }

    /// Some rows over the panel whose first column is `column`, before they go over the next one.
    fn block<P>(
        &self,
        rows: Range<usize>,
        column: usize,
        (panel, next): (&[P], &[bf16]),
        (registers, sums): (&Registers, &mut [f32]),
        out: &Out<'_>,
    ) {
        let Sizes { rows: all, columns, .. } = self.sizes;
        let width = WIDTH.min(columns - column);
        for turn in self.turns(rows.clone()) {
            let hints = self.hints(&rows, &turn, next);
            match out {
                // The unit writes to their places itself what are whole strips over a whole panel.
                Out::Fresh(c) if width == WIDTH && turn.end <= all => {
                    // SAFETY: every sum has a place of its own.
                    #[allow(unsafe_code)]
                    let target = unsafe { c.target(turn.start * columns + column, columns, turn.len(), WIDTH) };
                    let hints = Hints { more_rows: turn.end < rows.end, ..hints };
                    registers.multiply_bf16(self.left(turn), panel, &target, hints);
                }
                _ => {
                    self.multiply(registers, turn.clone(), panel, (sums, hints));
                    for (row, sums) in (turn.start..all.min(turn.end)).zip(sums.chunks_exact(WIDTH)) {
                        out.take(row * columns + column, &sums[..width]);
                    }
                }
            }
        }
    }

    /// The sums of the rows of a turn over a panel, to `sums`.
    fn multiply<P>(
        &self,
        registers: &Registers,
        turn: Range<usize>,
        panel: &[P],
        (sums, hints): (&mut [f32], Hints<'_>),
    ) {
        let shared = Shared::new(sums);
        // SAFETY: nobody else has them.
        #[allow(unsafe_code)]
        let target = unsafe { shared.target(0, WIDTH, turn.len(), WIDTH) };
        registers.multiply_bf16(self.left(turn), panel, &target, hints);
    }

    /// What the unit reads for the strips of a turn.
    fn left(&self, turn: Range<usize>) -> &[Pair] {
        &self.left[turn.start * self.steps..turn.end * self.steps]
    }

    /// For a turn of `rows`, which go over the panel `next` after this one.
    fn hints<'b>(&self, rows: &Range<usize>, turn: &Range<usize>, next: &'b [bf16]) -> Hints<'b> {
        let turns = rows.len().div_ceil(TURN);
        // A part of it in every turn, unless there are so few that it would come too fast.
        let len = if turns < TURNS_MIN { 0 } else { next.len() / turns };
        let later = &next[(turn.start - rows.start) / TURN * len..][..len];
        // Panels are read once where there is one strip.
        Hints { ahead: if self.sizes.rows <= ROWS { PREFETCH_BYTES } else { 0 }, more_rows: false, later }
    }
}
