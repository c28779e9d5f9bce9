//! The product of many rows in the processor's matrix unit. It makes the integers of `dot`, in another order of additions that does not
//! show in integers, and floats are added up in the order of `dot`: the same bits.

use super::dot::{Group, Output};
use super::formats::{COLUMNS, Unpack, negative_min};
use super::tiles::record_bytes;
use super::{Matrix, TOGETHER};
use crate::ops::amx::{Amx, CACHE_BYTES, Dots, ROWS, Registers};
use crate::ops::lanes::{Body, Isa, Kernel};
use crate::ops::parallel;
use std::marker::PhantomData;

/// From this many rows on it pays to unpack tiles and to fill up the last sixteen rows.
pub(super) const ROWS_MIN: usize = 24;

/// Fewest rows of a block: each unpacks its tiles anew.
const BLOCK_MIN: usize = 128;

/// A group of sixteen rows of activations.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
struct Sixteen {
    /// Signed.
    codes: [[[u8; 4]; 8]; ROWS],
    scales: [f32; ROWS],
    sums: [f32; ROWS],
}

/// A tile without its packing.
struct Open {
    /// Signed codes as the unit reads them: eight vectors for every 32 numbers.
    codes: Vec<[u8; 4 * COLUMNS]>,
    /// Of every group, or half of a group where that has a scale of its own.
    scales: Vec<[f32; COLUMNS]>,
    /// Of every group with their signs turned; empty where there are none.
    mins: Vec<[f32; COLUMNS]>,
    /// What the unit has made of two parts of a strip.
    dots: Dots,
}

/// All `rows` of `x` `[rows, groups]` over all tiles.
pub(super) fn product<F: Unpack>(
    (body, unit): (Body, Amx),
    x: &[Group],
    groups: usize,
    (tiles, matrix): (&[u8], Matrix),
    out: &Output<'_>,
) {
    let rows = x.len() / groups;
    let left = parallel::filled(rows.div_ceil(ROWS) * groups, groups, |strip, out: &mut [Sixteen]| {
        for (row, x) in x[strip * ROWS * groups..].chunks_exact(groups).take(ROWS).enumerate() {
            for (x, out) in x.iter().zip(&mut *out) {
                out.codes[row] = x.codes.map(i32::to_le_bytes);
                (out.scales[row], out.sums[row]) = (x.scale, x.sum);
            }
        }
    });
    let tile_count = matrix.rows.div_ceil(COLUMNS);
    let start = || (unit.registers(ROWS, 32 / F::SCALES), Open::new::<F>(groups));
    let held = (CACHE_BYTES / (groups * size_of::<Sixteen>()) * ROWS).max(BLOCK_MIN);
    let each = parallel::rows_of_block(tile_count, rows, BLOCK_MIN..=held, ROWS);
    parallel::for_each_block(tile_count, (rows, each), start, |(registers, open), tile, rows| {
        let first = tile / TOGETHER * TOGETHER;
        let count = TOGETHER.min(tile_count - first);
        let records = &tiles[first * matrix.tile_bytes()..][..count * matrix.tile_bytes()];
        body.run(Opening::<F> { records, step: count, first: tile - first, open, format: PhantomData });
        let width = COLUMNS.min(matrix.rows - tile * COLUMNS);
        for first in rows.clone().step_by(ROWS) {
            let left = &left[first / ROWS * groups..][..groups];
            let sums = body.run(Strip::<F> { registers, left, open, format: PhantomData });
            for (row, sums) in (first..rows.end).zip(&sums) {
                // SAFETY: every sum is handed out once.
                #[allow(unsafe_code)]
                unsafe {
                    out.write(row, tile * COLUMNS, &sums[..width]);
                }
            }
        }
    });
}

impl Open {
    fn new<F: Unpack>(groups: usize) -> Self {
        let lanes = |count: usize| vec![[0.0; COLUMNS]; count];
        Self {
            codes: vec![[0; 4 * COLUMNS]; groups * 8],
            scales: lanes(groups * F::SCALES),
            mins: lanes(if F::MINS { groups } else { 0 }),
            dots: Dots([[[0; 64]; ROWS]; 2]),
        }
    }
}

/// Unpacks tile `first` of `step` tiles whose records alternate.
struct Opening<'a, F> {
    records: &'a [u8],
    step: usize,
    first: usize,
    open: &'a mut Open,
    format: PhantomData<F>,
}

impl<F: Unpack> Kernel for Opening<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let bytes = const { record_bytes(F::FORMAT) };
        let Open { codes, scales, mins, .. } = self.open;
        let zero = isa.splat_int(i32::from_ne_bytes([F::FORMAT.zero() as u8; 4]));
        for (block, records) in self.records.chunks_exact(self.step * bytes).enumerate() {
            let record = &records[self.first * bytes..][..bytes];
            for group in 0..F::GROUPS {
                let index = block * F::GROUPS + group;
                for (vector, out) in F::codes(isa, record, group).iter().zip(&mut codes[8 * index..]) {
                    isa.store_bytes(isa.sub_bytes(*vector, zero), out);
                }
                for (half, out) in scales[F::SCALES * index..].iter_mut().take(F::SCALES).enumerate() {
                    isa.store(F::scale(isa, record, group, half), out);
                }
                if F::MINS {
                    isa.store(negative_min::<I, F>(isa, record, group), &mut mins[index]);
                }
            }
        }
    }
}

/// Sixteen rows over a tile.
struct Strip<'a, F> {
    registers: &'a Registers,
    /// `[groups]`
    left: &'a [Sixteen],
    open: &'a mut Open,
    format: PhantomData<F>,
}

impl<F: Unpack> Kernel for Strip<'_, F> {
    type Output = [[f32; COLUMNS]; ROWS];

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> Self::Output {
        let Open { codes, scales, mins, dots } = self.open;
        let (parts, vectors) = (self.left.len() * F::SCALES, 8 / F::SCALES);
        let mut sums = [isa.splat(0.0); ROWS];
        for first in (0..parts).step_by(2) {
            // Where the number of parts is odd, the last one twice.
            let two = [first, (first + 1).min(parts - 1)];
            let left = two.map(|part| {
                let codes = self.left[part / F::SCALES].codes.as_flattened().as_flattened();
                &codes[part % F::SCALES * 4 * vectors..]
            });
            let right = two.map(|part| &codes[part * vectors..][..vectors]);
            self.registers.multiply_int8(left, 32, right, dots);
            for (part, dots) in (first..parts).zip(&dots.0) {
                let (scale, left) = (isa.load(&scales[part]), &self.left[part / F::SCALES]);
                for row in 0..ROWS {
                    let scale = isa.mul(scale, isa.splat(left.scales[row]));
                    sums[row] = isa.fma(isa.to_float(isa.load_bytes(&dots[row])), scale, sums[row]);
                }
                if F::MINS {
                    let min = isa.load(&mins[part]);
                    for (sum, x) in sums.iter_mut().zip(&left.sums) {
                        *sum = isa.fma(min, isa.splat(*x), *sum);
                    }
                }
            }
        }
        let mut out = [[0.0; COLUMNS]; ROWS];
        for row in 0..ROWS {
            isa.store(sums[row], &mut out[row]);
        }
        out
    }
}
