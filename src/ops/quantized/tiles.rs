//! Tiles: sixteen rows of a weight side by side, so that a vector has four neighbouring codes of each. A tile is a sequence of
//! records, one for each block; a record has scales first, then codes of 32 numbers after codes of 32 numbers.
//!
//! Codes of 32 numbers are eight vectors of four numbers each, in sixteen columns. Their low four bits are packed into four
//! vectors, vectors i and i + 4 in the halves of the bytes of one; their fifth bits into one, bit i of a byte for vector i; bits
//! five and six of vectors 4 v to 4 v + 3 into vector v of two. Codes of eight bits lie as they are.

use super::Format;
use super::blocks::Block;
use super::formats::{COLUMNS, GROUP};
use half::f16;

/// Bytes of sixteen f16.
const HALVES: usize = 2 * COLUMNS;
/// A vector: four codes of sixteen columns.
const VECTOR: usize = 4 * COLUMNS;

/// Where the parts of a record begin.
pub(super) struct Layout {
    /// Scales of groups, sixteen bytes each, after `d` and, where there are minimums, `d_min`.
    pub(super) scales: usize,
    pub(super) mins: usize,
    pub(super) codes: usize,
    /// Bytes of the codes of a group: the low bits, then the high ones.
    pub(super) group: usize,
    pub(super) high: usize,
    pub(super) end: usize,
}

impl Layout {
    pub(super) const fn of(format: Format) -> Self {
        let (scales, scale_count, min_count) = match format {
            Format::Q4_0 | Format::Q8_0 => (HALVES, 0, 0),
            Format::Q4K | Format::Q5K => (2 * HALVES, 8, 8),
            Format::Q6K => (HALVES, 16, 0),
        };
        let (low, high, groups) = match format {
            Format::Q8_0 => (8 * VECTOR, 0, 1),
            Format::Q4_0 => (4 * VECTOR, 0, 1),
            Format::Q4K => (4 * VECTOR, 0, 8),
            Format::Q5K => (4 * VECTOR, VECTOR, 8),
            Format::Q6K => (4 * VECTOR, 2 * VECTOR, 8),
        };
        let mins = scales + scale_count * COLUMNS;
        let codes = mins + min_count * COLUMNS;
        let group = low + high;
        Self { scales, mins, codes, group, high: low, end: codes + groups * group }
    }
}

/// Bytes of a block of sixteen columns.
pub(super) const fn record_bytes(format: Format) -> usize {
    Layout::of(format).end
}

/// Puts `block` into `column` of `record`, which was zeros.
pub(super) fn put(format: Format, block: &Block, column: usize, record: &mut [u8]) {
    let layout = Layout::of(format);
    record[2 * column..][..2].copy_from_slice(&block.d);
    if layout.scales > HALVES {
        record[HALVES + 2 * column..][..2].copy_from_slice(&block.d_min);
    }
    for (i, scale) in block.scales[..(layout.mins - layout.scales) / COLUMNS].iter().enumerate() {
        record[layout.scales + COLUMNS * i + column] = *scale;
    }
    for (i, min) in block.mins[..(layout.codes - layout.mins) / COLUMNS].iter().enumerate() {
        record[layout.mins + COLUMNS * i + column] = *min;
    }
    for (i, code) in block.codes[..format.block_len()].iter().enumerate() {
        for (at, shift, mask, lift) in places(format, &layout, i, column) {
            record[at] |= (code >> lift & mask) << shift;
        }
    }
}

/// The block in `column` of `record`: the inverse of [`put`].
pub(super) fn get(format: Format, record: &[u8], column: usize) -> Block {
    let layout = Layout::of(format);
    let mut block = Block::empty();
    block.d.copy_from_slice(&record[2 * column..][..2]);
    if layout.scales > HALVES {
        block.d_min.copy_from_slice(&record[HALVES + 2 * column..][..2]);
    }
    for (i, scale) in block.scales[..(layout.mins - layout.scales) / COLUMNS].iter_mut().enumerate() {
        *scale = record[layout.scales + COLUMNS * i + column];
    }
    for (i, min) in block.mins[..(layout.codes - layout.mins) / COLUMNS].iter_mut().enumerate() {
        *min = record[layout.mins + COLUMNS * i + column];
    }
    for (i, code) in block.codes[..format.block_len()].iter_mut().enumerate() {
        for (at, shift, mask, lift) in places(format, &layout, i, column) {
            *code |= (record[at] >> shift & mask) << lift;
        }
    }
    block
}

/// Where the bits of code `i` are: byte, shift there, mask, and shift in the code; low bits and high bits.
fn places(format: Format, layout: &Layout, i: usize, column: usize) -> [(usize, usize, u8, usize); 2] {
    let (group, vector, byte) = (i / GROUP, i % GROUP / 4, 4 * column + i % 4);
    let low = layout.codes + group * layout.group;
    let high = low + layout.high;
    let nothing = (0, 0, 0, 0);
    if format == Format::Q8_0 {
        return [(low + VECTOR * vector + byte, 0, 255, 0), nothing];
    }
    let nibble = (low + VECTOR * (vector % 4) + byte, 4 * (vector / 4), 15, 0);
    match format {
        Format::Q5K => [nibble, (high + byte, vector, 1, 4)],
        Format::Q6K => [nibble, (high + VECTOR * (vector / 4) + byte, 2 * (vector % 4), 3, 4)],
        _ => [nibble, nothing],
    }
}

/// Row `column` of the tile of `records`, as numbers.
pub(super) fn row<'a>(format: Format, records: impl Iterator<Item = &'a [u8]>, column: usize, out: &mut [f32]) {
    let (len, zero) = (format.block_len(), format.zero());
    for (record, out) in records.zip(out.chunks_exact_mut(len)) {
        let block = get(format, record, column);
        let (scales, mins) = block.steps(format);
        for (i, out) in out.iter_mut().enumerate() {
            let code = i32::from(block.codes[i]) - zero;
            *out = scales[i / 16] * code as f32 - mins[i / GROUP];
        }
    }
}

impl Block {
    /// The scale of every sixteen numbers and the minimum of every thirty-two.
    pub(super) fn steps(&self, format: Format) -> ([f32; 16], [f32; 8]) {
        let d = f16::from_le_bytes(self.d).to_f32();
        let d_min = f16::from_le_bytes(self.d_min).to_f32();
        let scales = std::array::from_fn(|i| match format {
            Format::Q4_0 | Format::Q8_0 => d,
            Format::Q4K | Format::Q5K => d * f32::from(self.scales[i / 2]),
            Format::Q6K => d * f32::from(self.scales[i].cast_signed()),
        });
        (scales, self.mins.map(|min| d_min * f32::from(min)))
    }
}
