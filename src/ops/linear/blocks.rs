//! Products of many rows: panels of the right operand that the caches hold, tiles of sums that the registers hold.
//! What a step multiplies is [`Multiply`]; every sum has one order, whatever tiles and threads there are.

use crate::ops::lanes::LANES;
use crate::ops::parallel;

/// Rows of a register tile.
pub(super) const HEIGHT: usize = 6;
/// Vectors in a row of a register tile.
pub(super) const VECTORS: usize = 4;
/// Columns of a panel.
pub(super) const WIDTH: usize = VECTORS * LANES;
/// Steps before the next tile: so much of a panel stays in the caches near the core.
const STEPS: usize = 384;
/// Tiles whose sums rest in a level-2 cache while others go on.
const TILES: usize = 16;
/// Rows that go through one part of a panel together.
pub(super) const ROWS: usize = TILES * HEIGHT;
/// Sums of one tile that wait for each other at most: one running and, of sixteen chains, four finished.
const LEVELS: usize = 5;

/// The sums of a tile, row by row.
pub(super) type Tile = [Line<f32>; HEIGHT];

/// One row of a panel or of a tile, in whole lines of the cache: a vector that lies across two costs twice.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
pub(super) struct Line<N>(pub(super) [[N; LANES]; VECTORS]);

/// Sizes of one product: C `[rows, columns]`, A `[rows, k]`, B `[k, columns]`.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) k: usize,
}

/// The order of a sum over k.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// One chain in order of k.
    Chain,
    /// Sixteen chains, of equal k mod 16, folded halves onto halves as `Isa::sum` does: the order of `dot`.
    Lanes,
}

/// A as the tiles read it.
#[derive(Clone, Copy)]
pub(super) enum Left<'a, N> {
    /// `[rows, k]`
    Rows(&'a [N]),
    /// `[rows / HEIGHT][k, HEIGHT]`, the last tile narrower; not for [`Order::Lanes`].
    Tiles(&'a [N]),
}

/// Rows of A that make a tile: the number of row r at step s is `numbers[r * across + s * along]`.
#[derive(Clone, Copy)]
pub(super) struct Strip<'a, N> {
    pub(super) numbers: &'a [N],
    pub(super) across: usize,
    pub(super) along: usize,
}

/// Some steps of one chain of the sums of a tile.
pub(super) struct Steps<'a, N> {
    pub(super) left: Strip<'a, N>,
    pub(super) right: &'a [Line<N>],
    /// Finished sums, and at `level` the running one.
    pub(super) sums: &'a mut [Tile],
    pub(super) level: usize,
    /// Whether the running sum starts here, from zero.
    pub(super) first: bool,
    /// How many finished sums below are added to it in the end, the nearest first; it comes to rest in the place of the last.
    pub(super) merged: usize,
}

/// What a step of a sum multiplies, and how.
pub(super) trait Multiply: Copy + Sync {
    /// A number of an operand.
    type Number: Copy + Default + Send + Sync;

    /// Takes some steps of a tile of R rows.
    fn advance<const R: usize>(self, steps: Steps<'_, Self::Number>);
}

/// A chain of a sum: where it lies in a panel, and its numbers in A.
pub(super) struct Chain {
    /// k mod 16, 0 where there is one chain.
    pub(super) lane: usize,
    /// First step in the panel.
    pub(super) start: usize,
    pub(super) steps: usize,
    /// Finished sums while it runs.
    level: usize,
    /// Finished sums that it is added to.
    merged: usize,
}

impl Order {
    /// The chains of a sum over `k`, in order. Lanes come in the order of their reversed bits, so the next sums to be added to each
    /// other are always the last two.
    pub(super) fn chains(self, k: usize) -> Vec<Chain> {
        if self == Self::Chain {
            return vec![Chain { lane: 0, start: 0, steps: k, level: 0, merged: 0 }];
        }
        let mut start = 0;
        let chain = |index: u8| {
            let lane = usize::from(index.reverse_bits() >> 4);
            let steps = k / LANES + usize::from(lane < k % LANES);
            let (level, merged) = (index.count_ones() as usize, index.trailing_ones() as usize);
            let chain = Chain { lane, start, steps, level, merged };
            start += steps;
            chain
        };
        (0..LANES as u8).map(chain).collect()
    }
}

/// Steps `start..end` of a chain.
struct Part<'a> {
    chain: &'a Chain,
    start: usize,
    end: usize,
}

/// What a tile takes before the next tile does: parts of the chains, in order, of at most STEPS together.
fn turns(chains: &[Chain]) -> Vec<Vec<Part<'_>>> {
    let mut turns = Vec::new();
    let (mut turn, mut room) = (Vec::new(), STEPS);
    for chain in chains {
        // A chain without steps is a sum of zero, and takes part like others.
        for start in (0..chain.steps.max(1)).step_by(STEPS) {
            let end = chain.steps.min(start + STEPS);
            if room < end - start {
                turns.push(std::mem::take(&mut turn));
                room = STEPS;
            }
            room -= end - start;
            turn.push(Part { chain, start, end });
        }
    }
    turns.push(turn);
    turns
}

/// One product.
pub(super) struct Product<'a, M: Multiply> {
    pub(super) multiply: M,
    pub(super) left: Left<'a, M::Number>,
    pub(super) sizes: Sizes,
    pub(super) order: Order,
}

impl<M: Multiply> Product<'_, M> {
    /// Computes every sum and hands it to `emit(row, column, sums)`, up to WIDTH columns of one row at a time, from several threads.
    /// `pack(column, panel)` writes the columns from `column` on as `[k, WIDTH]`, chain after chain; those after the last are zeros
    /// already.
    pub(super) fn compute(
        &self,
        pack: impl Fn(usize, &mut [Line<M::Number>]) + Sync,
        emit: impl Fn(usize, usize, &[f32]) + Sync,
    ) {
        let Sizes { rows, columns, k } = self.sizes;
        if rows == 0 || columns == 0 {
            return;
        }
        let chains = self.order.chains(k);
        let turns = turns(&chains);
        let panels = columns.div_ceil(WIDTH);
        // Enough pieces for all threads, at the price of packing a panel more than once.
        let groups = (4 * parallel::threads()).div_ceil(panels).min(rows.div_ceil(ROWS));
        let each = rows.div_ceil(groups).next_multiple_of(ROWS);
        let buffers = || (vec![Line::<M::Number>::default(); k], vec![[Tile::default(); LEVELS]; TILES]);
        parallel::for_each_init(panels * groups, buffers, |(right, sums), index| {
            let (column, first) = (index / groups * WIDTH, index % groups * each);
            if first >= rows {
                return;
            }
            let width = WIDTH.min(columns - column);
            if width < WIDTH {
                right.fill(Line::default());
            }
            pack(column, right);
            for row in (first..rows.min(first + each)).step_by(ROWS) {
                let end = rows.min(first + each).min(row + ROWS);
                self.advance(row..end, &turns, right, sums);
                for row_here in row..end {
                    let (tile, r) = ((row_here - row) / HEIGHT, (row_here - row) % HEIGHT);
                    emit(row_here, column, &sums[tile][0][r].0.as_flattened()[..width]);
                }
            }
        });
    }

    /// All turns of the tiles of `rows`; the sums come to rest at level 0.
    fn advance(
        &self,
        rows: std::ops::Range<usize>,
        turns: &[Vec<Part<'_>>],
        right: &[Line<M::Number>],
        sums: &mut [[Tile; LEVELS]],
    ) {
        for turn in turns {
            for (row, sums) in rows.clone().step_by(HEIGHT).zip(sums.iter_mut()) {
                let height = HEIGHT.min(rows.end - row);
                for Part { chain, start, end } in turn {
                    let right = &right[chain.start + start..chain.start + end];
                    let merged = if *end == chain.steps { chain.merged } else { 0 };
                    let left = self.strip(row, height, chain.lane, *start);
                    let steps = Steps { left, right, sums, level: chain.level, first: *start == 0, merged };
                    match height {
                        1 => self.multiply.advance::<1>(steps),
                        2 => self.multiply.advance::<2>(steps),
                        3 => self.multiply.advance::<3>(steps),
                        4 => self.multiply.advance::<4>(steps),
                        5 => self.multiply.advance::<5>(steps),
                        _ => self.multiply.advance::<HEIGHT>(steps),
                    }
                }
            }
        }
    }

    /// `height` rows from `row` on, from step `start` of the chain of `lane` on.
    fn strip(&self, row: usize, height: usize, lane: usize, start: usize) -> Strip<'_, M::Number> {
        let k = self.sizes.k;
        match self.left {
            Left::Rows(all) => {
                let along = if self.order == Order::Lanes { LANES } else { 1 };
                let rows = &all[row * k..][..height * k];
                Strip { numbers: rows.get(lane + start * along..).unwrap_or_default(), across: k, along }
            }
            Left::Tiles(all) => {
                let tile = &all[row * k..][..height * k];
                Strip { numbers: &tile[start * height..], across: 1, along: height }
            }
        }
    }
}
