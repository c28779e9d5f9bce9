//! Weights in few bits: the formats of GGUF files, kept in memory as tiles that integer dot products read in order.
//! x W^T multiplies them by activations rounded to eight bits, block by block; an embedding reads rows back.

use super::parallel;
use super::storage::{slice, written_weight};
use crate::error::{Error, Result};
use candle_core::{Storage, Tensor};

mod blocks;
mod dot;
mod formats;
mod matrix;
mod quantize;
mod search;
mod tiles;

pub(super) use dot::Product;
pub use quantize::{ABS_MAX, quantize};

use blocks::Block;
use formats::COLUMNS;

/// Tiles whose records alternate, so that products which advance over both read one stream. Where their number is odd, the last is alone.
const TOGETHER: usize = 2;

/// How a row is cut into blocks and what is kept of each; the names and layouts are GGML's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// 32 numbers: an f16 scale and 4 bits each, offset by 8.
    Q4_0,
    /// 32 numbers: an f16 scale and 8 bits each.
    Q8_0,
    /// 256 numbers: 4 bits each; every 32 have a scale and a minimum of 6 bits, to be multiplied by two f16.
    Q4K,
    /// As [`Format::Q4K`] with 5 bits each.
    Q5K,
    /// 256 numbers: 6 bits each, offset by 32; every 16 have a scale of 8 bits, to be multiplied by an f16.
    Q6K,
}

impl Format {
    /// All there are.
    pub const ALL: [Self; 5] = [Self::Q4_0, Self::Q8_0, Self::Q4K, Self::Q5K, Self::Q6K];

    /// Numbers in a block; rows are whole blocks.
    pub fn block_len(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q8_0 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of a block in a file.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::Q4_0 => 18,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// The name that GGML and its users give it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "Q4_0",
            Self::Q8_0 => "Q8_0",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }
}

/// A quantised matrix `[rows, k]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Matrix {
    /// Its format.
    pub format: Format,
    /// Outputs of the layer, or tokens of the embedding.
    pub rows: usize,
    /// Inputs of the layer or width of the embedding, a multiple of [`Format::block_len`].
    pub k: usize,
}

impl Matrix {
    /// Tiles of the matrix whose `blocks` lie row after row as in a file.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for rows that are not whole blocks, [`Error::Checkpoint`] for another number of bytes.
    pub(super) fn pack(self, blocks: &[u8]) -> Result<Tensor> {
        let Self { format, rows, k } = self;
        if k == 0 || !k.is_multiple_of(format.block_len()) {
            let (name, len) = (format.name(), format.block_len());
            return Err(Error::Unsupported(format!("{name} needs rows of a multiple of {len} numbers, not {k}")));
        }
        let row_bytes = k / format.block_len() * format.block_bytes();
        if rows.checked_mul(row_bytes) != Some(blocks.len()) {
            let what = format!("{} bytes where {rows} rows in {} have {row_bytes} each", blocks.len(), format.name());
            return Err(Error::Checkpoint(what));
        }
        let span = TOGETHER * COLUMNS;
        let pack = |first: usize, out: &mut [u8]| {
            for row in first..rows.min(first + span) {
                let blocks = blocks[row * row_bytes..][..row_bytes].chunks_exact(format.block_bytes());
                let places = self.places((row - first) / COLUMNS, rows - first);
                for (block, at) in blocks.zip(places) {
                    let record = &mut out[at..at + tiles::record_bytes(format)];
                    tiles::put(format, &Block::parse(format, block), row % COLUMNS, record);
                }
            }
        };
        // SAFETY: the tiles are cleared, and are everything.
        #[allow(unsafe_code)]
        let tiles = unsafe {
            written_weight(self.tiles_bytes(), |out| {
                parallel::for_each(rows.div_ceil(span), |index| {
                    let first = index * TOGETHER * self.tile_bytes();
                    let len = (TOGETHER * self.tile_bytes()).min(self.tiles_bytes() - first);
                    pack(index * span, out.cleared(first, len));
                });
            })
        };
        Ok(tiles?)
    }

    /// Row `index` of the matrix in `tiles`, to `out` `[k]`.
    pub(super) fn row(self, tiles: &[u8], index: usize, out: &mut [f32]) {
        let first = index / COLUMNS / TOGETHER * TOGETHER;
        let tiles = &tiles[first * self.tile_bytes()..];
        let places = self.places(index / COLUMNS - first, self.rows - first * COLUMNS);
        let bytes = tiles::record_bytes(self.format);
        tiles::row(self.format, places.map(|at| &tiles[at..at + bytes]), index % COLUMNS, out);
    }

    /// Where the records of tile `index` of some that lie together begin, counted from the first of these; `rows` is what the matrix has
    /// from there on.
    fn places(self, index: usize, rows: usize) -> impl Iterator<Item = usize> {
        let (bytes, step) = (tiles::record_bytes(self.format), TOGETHER.min(rows.div_ceil(COLUMNS)));
        (0..self.k / self.format.block_len()).map(move |block| (block * step + index) * bytes)
    }

    /// All rows of the matrix in `tiles`.
    pub(super) fn widened(self, tiles: &[u8]) -> Vec<f32> {
        parallel::filled(self.rows * self.k, self.k, |index, out| self.row(tiles, index, out))
    }

    /// Bytes of all tiles: of the matrix in memory. Rows are filled up to sixteen, records hold more than blocks.
    pub fn tiles_bytes(self) -> usize {
        self.rows.div_ceil(COLUMNS) * self.tile_bytes()
    }

    /// Bytes of sixteen rows.
    fn tile_bytes(self) -> usize {
        self.k / self.format.block_len() * tiles::record_bytes(self.format)
    }
}

/// The tiles of one weight after those of another, as one weight.
pub(super) fn side_by_side(tiles: &[&Tensor]) -> Result<Tensor> {
    let held: Vec<_> = tiles.iter().map(|tiles| tiles.storage_and_layout()).collect();
    let mut parts: Vec<&[u8]> = Vec::with_capacity(held.len());
    for (storage, layout) in &held {
        let Storage::Cpu(storage) = &**storage else { return Ok(Tensor::cat(tiles, 0)?) };
        parts.push(slice("tiles", storage, layout)?);
    }
    // SAFETY: the parts follow each other, and are everything.
    #[allow(unsafe_code)]
    let all = unsafe {
        written_weight(parts.iter().map(|part| part.len()).sum(), |out| {
            let mut first = 0;
            for part in &parts {
                out.write(first, part);
                first += part.len();
            }
        })
    };
    Ok(all?)
}

#[cfg(test)]
mod tests;
