//! What the product needs of each format: how codes and scales are unpacked from a record into vectors.

use super::Format;
use super::tiles::Layout;
use crate::ops::lanes::{Isa, LANES};
use half::f16;

/// Rows of the weight, columns of the product, that lie side by side: one for each lane.
pub(super) const COLUMNS: usize = LANES;
/// Numbers whose products are added up as integers, at most.
pub(super) const GROUP: usize = 32;

impl Format {
    /// The code of 0.
    pub(super) const fn zero(self) -> i32 {
        match self {
            Self::Q4_0 => 8,
            Self::Q8_0 => 128,
            Self::Q4K | Self::Q5K => 0,
            Self::Q6K => 32,
        }
    }
}

/// One format, known to the compiler.
pub(super) trait Unpack: Copy + Send + Sync {
    const FORMAT: Format;
    const LAYOUT: Layout = Layout::of(Self::FORMAT);
    /// Groups of 32 numbers in a block.
    const GROUPS: usize;
    /// Scales in such a group: 1, or 2 of sixteen numbers each.
    const SCALES: usize;
    /// Whether groups have minimums.
    const MINS: bool = false;

    /// The codes of group `group`: vector i has numbers 4 i to 4 i + 3 of sixteen columns.
    fn codes<I: Isa>(isa: I, record: &[u8], group: usize) -> [I::Q; 8];
    /// Scale `index` of group `group`.
    fn scale<I: Isa>(isa: I, record: &[u8], group: usize, index: usize) -> I::V;
}

/// The minimum of group `group` with its sign turned.
#[inline(always)]
pub(super) fn negative_min<I: Isa, F: Unpack>(isa: I, record: &[u8], group: usize) -> I::V {
    let mins = isa.widen_u8(array(record, F::LAYOUT.mins + COLUMNS * group));
    isa.mul(mins, isa.sub(isa.splat(0.0), halves(isa, record, 2 * COLUMNS)))
}

/// N bytes of a record.
#[inline(always)]
fn array<const N: usize>(record: &[u8], at: usize) -> &[u8; N] {
    match record[at..].first_chunk() {
        Some(bytes) => bytes,
        None => unreachable!("a record has all of its parts"),
    }
}

/// Sixteen f16.
#[inline(always)]
fn halves<I: Isa>(isa: I, record: &[u8], at: usize) -> I::V {
    let bytes: &[u8; 2 * COLUMNS] = array(record, at);
    let (pairs, _) = bytes.as_chunks::<2>();
    let mut halves = [f16::ZERO; COLUMNS];
    halves.iter_mut().zip(pairs).for_each(|(half, pair)| *half = f16::from_le_bytes(*pair));
    isa.load_f16(&halves)
}

/// Eight vectors of four bits.
#[inline(always)]
fn nibbles<I: Isa>(isa: I, record: &[u8], at: usize) -> [I::Q; 8] {
    let mut codes = [isa.splat_int(0); 8];
    for i in 0..4 {
        let both = isa.load_bytes(array(record, at + 64 * i));
        codes[i] = isa.and(both, isa.splat_int(0x0f0f_0f0f));
        codes[i + 4] = isa.and(isa.shift_right(both, 4), isa.splat_int(0x0f0f_0f0f));
    }
    codes
}

#[derive(Clone, Copy)]
pub(super) struct Q40;

impl Unpack for Q40 {
    const FORMAT: Format = Format::Q4_0;
    const GROUPS: usize = 1;
    const SCALES: usize = 1;

    #[inline(always)]
    fn codes<I: Isa>(isa: I, record: &[u8], _: usize) -> [I::Q; 8] {
        nibbles(isa, record, Self::LAYOUT.codes)
    }

    #[inline(always)]
    fn scale<I: Isa>(isa: I, record: &[u8], _: usize, _: usize) -> I::V {
        halves(isa, record, 0)
    }
}

#[derive(Clone, Copy)]
pub(super) struct Q80;

impl Unpack for Q80 {
    const FORMAT: Format = Format::Q8_0;
    const GROUPS: usize = 1;
    const SCALES: usize = 1;

    #[inline(always)]
    fn codes<I: Isa>(isa: I, record: &[u8], _: usize) -> [I::Q; 8] {
        let mut codes = [isa.splat_int(0); 8];
        for (i, codes) in codes.iter_mut().enumerate() {
            *codes = isa.load_bytes(array(record, Self::LAYOUT.codes + 64 * i));
        }
        codes
    }

    #[inline(always)]
    fn scale<I: Isa>(isa: I, record: &[u8], _: usize, _: usize) -> I::V {
        halves(isa, record, 0)
    }
}

#[derive(Clone, Copy)]
pub(super) struct Q4K;

impl Unpack for Q4K {
    const FORMAT: Format = Format::Q4K;
    const GROUPS: usize = 8;
    const SCALES: usize = 1;
    const MINS: bool = true;

    #[inline(always)]
    fn codes<I: Isa>(isa: I, record: &[u8], group: usize) -> [I::Q; 8] {
        nibbles(isa, record, Self::LAYOUT.codes + group * Self::LAYOUT.group)
    }

    #[inline(always)]
    fn scale<I: Isa>(isa: I, record: &[u8], group: usize, _: usize) -> I::V {
        isa.mul(isa.widen_u8(array(record, Self::LAYOUT.scales + COLUMNS * group)), halves(isa, record, 0))
    }
}

#[derive(Clone, Copy)]
pub(super) struct Q5K;

impl Unpack for Q5K {
    const FORMAT: Format = Format::Q5K;
    const GROUPS: usize = 8;
    const SCALES: usize = 1;
    const MINS: bool = true;

    #[inline(always)]
    fn codes<I: Isa>(isa: I, record: &[u8], group: usize) -> [I::Q; 8] {
        let at = Self::LAYOUT.codes + group * Self::LAYOUT.group;
        let mut codes = nibbles(isa, record, at);
        let fifth = isa.load_bytes(array(record, at + Self::LAYOUT.high));
        for (i, codes) in (0..).zip(&mut codes) {
            let moved = if i < 4 { isa.shift_left(fifth, 4 - i) } else { isa.shift_right(fifth, i - 4) };
            *codes = isa.or(*codes, isa.and(moved, isa.splat_int(0x1010_1010)));
        }
        codes
    }

    #[inline(always)]
    fn scale<I: Isa>(isa: I, record: &[u8], group: usize, index: usize) -> I::V {
        Q4K::scale(isa, record, group, index)
    }
}

#[derive(Clone, Copy)]
pub(super) struct Q6K;

impl Unpack for Q6K {
    const FORMAT: Format = Format::Q6K;
    const GROUPS: usize = 8;
    const SCALES: usize = 2;

    #[inline(always)]
    fn codes<I: Isa>(isa: I, record: &[u8], group: usize) -> [I::Q; 8] {
        let at = Self::LAYOUT.codes + group * Self::LAYOUT.group;
        let mut codes = nibbles(isa, record, at);
        for (half, codes) in codes.chunks_exact_mut(4).enumerate() {
            let high = isa.load_bytes(array(record, at + Self::LAYOUT.high + 64 * half));
            for (i, codes) in (0..).zip(codes) {
                let moved = if i < 2 { isa.shift_left(high, 4 - 2 * i) } else { isa.shift_right(high, 2 * i - 4) };
                *codes = isa.or(*codes, isa.and(moved, isa.splat_int(0x3030_3030)));
            }
        }
        codes
    }

    #[inline(always)]
    fn scale<I: Isa>(isa: I, record: &[u8], group: usize, index: usize) -> I::V {
        let scales = isa.widen_i8(array(record, Self::LAYOUT.scales + COLUMNS * (2 * group + index)));
        isa.mul(scales, halves(isa, record, 0))
    }
}
