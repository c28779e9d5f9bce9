//! Products of many rows: panels of the right operand that the caches hold, tiles of sums that the registers hold.
//! What a step multiplies is [`Multiply`]; every sum has one order, whatever tiles and threads there are.

use crate::ops::lanes::LANES;
use crate::ops::parallel;
use crate::ops::storage::{Shared, written};
use std::ops::Range;

/// Rows of a register tile.
pub(super) const HEIGHT: usize = 6;
/// Vectors in a row of a register tile.
pub(super) const VECTORS: usize = 4;
/// Columns of a panel.
pub(super) const WIDTH: usize = VECTORS * LANES;
/// Steps before the next tile, which take so much of a panel that a level-2 cache holds it: the longer a tile reads on in its rows, the
/// better the processor foresees it.
const STEPS: usize = 1024;
/// Tiles whose sums rest in a level-2 cache while others go on.
const TILES: usize = 16;
/// Rows that go through one part of a panel together.
pub(super) const ROWS: usize = TILES * HEIGHT;
/// Bytes of the panels that rows go through before the next rows do, about, so that both stay in a level-2 cache.
const PANELS_BYTES: usize = 512 << 10;
/// Steps of a tile that are laid out together: a few lines of the cache.
const TILE_STEPS: usize = 16;
/// Sums of one tile that wait for each other at most: one running and, of sixteen chains, four finished.
const LEVELS: usize = 5;

/// The sums of a tile, row by row.
pub(super) type Tile = [Line<f32>; HEIGHT];

/// One row of a panel or of a tile, in whole lines of the cache: a vector that lies across two costs twice.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
pub(super) struct Line<N>(pub(super) [[N; LANES]; VECTORS]);

/// Where sums go: every one to a place of its own, at once from several threads.
pub(super) enum Out<'a> {
    /// To memory that nobody has written.
    Fresh(&'a Shared<'a, f32>),
    /// On top of what is there.
    Added(&'a Shared<'a, f32>),
}

impl Out<'_> {
    /// Brings what `len` sums from `start` on will go to: a store that waits for its line makes all stores after it wait.
    fn ask(&self, start: usize, len: usize) {
        let (Self::Fresh(c) | Self::Added(c)) = self;
        c.ask(start, len);
    }

    /// Puts sums to their places, from `start` on.
    pub(super) fn take(&self, start: usize, sums: &[f32]) {
        // SAFETY: every sum is handed out once, so no other thread has this part.
        #[allow(unsafe_code)]
        unsafe {
            match self {
                Self::Fresh(c) => c.write(start, sums),
                Self::Added(c) => c.part(start, sums.len()).iter_mut().zip(sums).for_each(|(c, sum)| *c += sum),
            }
        }
    }
}

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

/// Rows of A that make a tile: the number of row r at step s of a chain is `numbers[lane + r * across + s * along]`.
#[derive(Clone, Copy)]
pub(super) struct Strip<'a, N> {
    numbers: &'a [N],
    across: usize,
    along: usize,
}

/// What a tile takes before the next tile does.
pub(super) struct Turn<'a, N> {
    pub(super) left: Strip<'a, N>,
    /// The panel.
    pub(super) right: &'a [Line<N>],
    /// Finished sums, and after them the running one.
    pub(super) sums: &'a mut [Tile],
    pub(super) parts: &'a [Part],
}

/// What a step of a sum multiplies, and how.
pub(super) trait Multiply: Copy + Sync {
    /// A number of an operand.
    type Number: Copy + Default + Send + Sync;

    /// Takes a turn of a tile of R rows.
    fn advance<const R: usize>(self, turn: Turn<'_, Self::Number>);
}

/// A chain of a sum: where it lies in a panel, and its numbers in A.
#[derive(Clone, Copy)]
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
pub(super) struct Part {
    chain: Chain,
    start: usize,
    end: usize,
}

impl Part {
    /// Whether the running sum starts here, from zero.
    pub(super) fn starts(&self) -> bool {
        self.start == 0
    }

    /// Where the running sum is, after the finished ones.
    pub(super) fn level(&self) -> usize {
        self.chain.level
    }

    /// How many finished sums are added to the running one in the end, the last first; it comes to rest in the place of the first.
    pub(super) fn merged(&self) -> usize {
        if self.end == self.chain.steps { self.chain.merged } else { 0 }
    }
}

impl<'a, N: Copy> Strip<'a, N> {
    /// The numbers of `part` from row 0 on, and how far from each other they are in neighbouring rows and steps. Those of R rows exist.
    pub(super) fn numbers<const R: usize>(self, part: &Part) -> (&'a [N], usize, usize) {
        let Self { numbers, across, along } = self;
        let steps = part.end - part.start;
        let numbers = numbers.get(part.chain.lane + part.start * along..).unwrap_or_default();
        assert!(steps == 0 || numbers.len() > (R - 1) * across + (steps - 1) * along, "a strip of too few numbers");
        (numbers, across, along)
    }
}

/// The lines of `panel` that `part` goes over.
pub(super) fn lines<'a, N>(panel: &'a [Line<N>], part: &Part) -> &'a [Line<N>] {
    &panel[part.chain.start + part.start..part.chain.start + part.end]
}

/// What a tile takes before the next tile does: parts of the chains, in order, of at most STEPS together.
fn turns(chains: &[Chain]) -> Vec<Vec<Part>> {
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
            turn.push(Part { chain: *chain, start, end });
        }
    }
    turns.push(turn);
    turns
}

/// aT in tiles, `[rows / HEIGHT][k, HEIGHT]`, the last narrower, for `line(step, first, numbers)` that gives the numbers of `a` at a step
/// from column `first` on.
pub(super) fn tiles<N: Copy + Default + Send>(
    rows: usize,
    k: usize,
    line: impl Fn(usize, usize, &mut [N]) + Sync,
) -> Vec<N> {
    let block = |start: usize, out: &Shared<'_, N>| {
        let steps = TILE_STEPS.min(k - start);
        let (mut numbers, mut run) = ([[N::default(); ROWS]; TILE_STEPS], [N::default(); TILE_STEPS * HEIGHT]);
        for first in (0..rows).step_by(ROWS) {
            let count = ROWS.min(rows - first);
            for (step, numbers) in numbers.iter_mut().enumerate().take(steps) {
                line(start + step, first, &mut numbers[..count]);
            }
            for tile in (0..count).step_by(HEIGHT) {
                let height = HEIGHT.min(count - tile);
                for (step, numbers) in numbers.iter().enumerate() {
                    // All six where fewer are wanted: a copy of a known length. The next step writes over the others.
                    run[step * height..][..HEIGHT].copy_from_slice(&numbers[tile..tile + HEIGHT]);
                }
                // SAFETY: every step of every tile has a place of its own.
                #[allow(unsafe_code)]
                unsafe {
                    out.write((first + tile) * k + start * height, &run[..steps * height]);
                }
            }
        }
    };
    // SAFETY: all steps of all tiles are everything.
    #[allow(unsafe_code)]
    unsafe {
        written(rows * k, |out| parallel::for_each(k.div_ceil(TILE_STEPS), |index| block(index * TILE_STEPS, out)))
    }
}

/// One product.
pub(super) struct Product<'a, M: Multiply> {
    pub(super) multiply: M,
    pub(super) left: Left<'a, M::Number>,
    pub(super) sizes: Sizes,
    pub(super) order: Order,
}

impl<M: Multiply> Product<'_, M> {
    /// The product in memory of its own. `pack(column, panel)` writes the columns from `column` on as `[k, WIDTH]`, chain after chain;
    /// those after the last are zeros already.
    pub(super) fn fresh(&self, pack: impl Fn(usize, &mut [Line<M::Number>]) + Sync) -> Vec<f32> {
        // SAFETY: every sum is written, once, to a place of its own.
        #[allow(unsafe_code)]
        unsafe {
            written(self.sizes.rows * self.sizes.columns, |c| self.compute(&Out::Fresh(c), pack))
        }
    }

    /// The product added to `c`, as [`Product::fresh`].
    pub(super) fn add(&self, c: &mut [f32], pack: impl Fn(usize, &mut [Line<M::Number>]) + Sync) {
        self.compute(&Out::Added(&Shared::new(c)), pack);
    }

    /// Every sum to `out`, from several threads.
    fn compute(&self, out: &Out<'_>, pack: impl Fn(usize, &mut [Line<M::Number>]) + Sync) {
        let Sizes { rows, columns, k } = self.sizes;
        if rows == 0 || columns == 0 {
            return;
        }
        let turns = turns(&self.order.chains(k));
        let panels = columns.div_ceil(WIDTH);
        let together = (PANELS_BYTES / (k * size_of::<Line<M::Number>>()).max(1)).clamp(1, panels);
        let items = panels.div_ceil(together);
        let together = panels.div_ceil(items);
        // Enough pieces for all threads, at the price of packing a panel more than once.
        let groups = (4 * parallel::threads()).div_ceil(items).min(rows.div_ceil(ROWS));
        let each = rows.div_ceil(groups).next_multiple_of(ROWS);
        let buffers = || (vec![Line::<M::Number>::default(); k * together], vec![[Tile::default(); LEVELS]; TILES]);
        parallel::for_each_init(items * groups, buffers, |(right, sums), index| {
            let (first_panel, first) = (index / groups * together, index % groups * each);
            let columns_of = |panel: usize| panel * WIDTH..columns.min((panel + 1) * WIDTH);
            if first >= rows {
                return;
            }
            let (panels, last) = (first_panel..panels.min(first_panel + together), rows.min(first + each));
            for (panel, right) in panels.clone().zip(right.chunks_exact_mut(k.max(1))) {
                if columns_of(panel).len() < WIDTH {
                    right.fill(Line::default());
                }
                pack(panel * WIDTH, right);
            }
            for row in (first..last).step_by(ROWS) {
                for (index, panel) in panels.clone().enumerate() {
                    let right = &right[index * k..][..k];
                    self.advance((row..last.min(row + ROWS), columns_of(panel)), &turns, right, sums, out);
                }
            }
        });
    }

    /// All turns of the tiles of `rows`, at most ROWS, over the panel of `columns`.
    fn advance(
        &self,
        (rows, columns): (Range<usize>, Range<usize>),
        turns: &[Vec<Part>],
        right: &[Line<M::Number>],
        sums: &mut [[Tile; LEVELS]],
        out: &Out<'_>,
    ) {
        let place = |row: usize| row * self.sizes.columns + columns.start;
        for (index, parts) in turns.iter().enumerate() {
            for (row, sums) in rows.clone().step_by(HEIGHT).zip(sums.iter_mut()) {
                let height = HEIGHT.min(rows.end - row);
                let is_last = index + 1 == turns.len();
                if is_last {
                    (row..row + height).for_each(|row| out.ask(place(row), columns.len()));
                }
                let turn = Turn { left: self.strip(row, height), right, sums, parts };
                match height {
                    1 => self.multiply.advance::<1>(turn),
                    2 => self.multiply.advance::<2>(turn),
                    3 => self.multiply.advance::<3>(turn),
                    4 => self.multiply.advance::<4>(turn),
                    5 => self.multiply.advance::<5>(turn),
                    _ => self.multiply.advance::<HEIGHT>(turn),
                }
                if is_last {
                    for (row, sums) in (row..row + height).zip(&sums[0]) {
                        out.take(place(row), &sums.0.as_flattened()[..columns.len()]);
                    }
                }
            }
        }
    }

    /// `height` rows from `row` on.
    fn strip(&self, row: usize, height: usize) -> Strip<'_, M::Number> {
        let k = self.sizes.k;
        let (all, across, along) = match (self.left, self.order) {
            (Left::Rows(all), Order::Chain) => (all, k, 1),
            (Left::Rows(all), Order::Lanes) => (all, k, LANES),
            (Left::Tiles(all), _) => (all, 1, height),
        };
        Strip { numbers: &all[row * k..][..height * k], across, along }
    }
}
