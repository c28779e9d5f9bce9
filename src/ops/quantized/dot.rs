//! The product of activations with tiles. Activations are rounded to eight bits in groups of 32, with one f32 scale each; the
//! products of a group are added up as integers, exactly, and groups by fused multiply-adds in order of k, whatever the number
//! of rows, threads and lanes.

use super::formats::{COLUMNS, GROUP, Q4K, Q5K, Q6K, Q40, Q80, Unpack, negative_min};
use super::tiles::record_bytes;
use super::{Format, Matrix, TOGETHER, matrix};
use crate::ops::amx::Amx;
use crate::ops::lanes::{Body, Isa, Kernel, LANES};
use crate::ops::parallel;
use crate::ops::storage::{Shared, slice, written};
use candle_core::{CpuStorage, CustomOp2, Layout, Shape};

/// Rows of activations that go over a tile together, at most.
const HEIGHT: usize = 8;
/// How far ahead of use a tile is asked for.
const PREFETCH_BYTES: usize = 4096;

/// 32 activations.
#[derive(Clone, Copy, Default)]
pub(super) struct Group {
    /// Four signed codes each.
    pub(super) codes: [i32; 8],
    /// What the sums of codes times codes begin with, of the first and the last sixteen: the zero of the weight's codes taken off.
    begins: [i32; 2],
    /// What codes are multiplied by.
    pub(super) scale: f32,
    /// The sum of the activations, as rounded: what a minimum is multiplied by.
    pub(super) sum: f32,
}

/// `x` `[T, k]` f32 and the tiles of `matrices`, u8, whose rows follow each other, to `[T, out]` f32.
pub(in crate::ops) struct Product<'a> {
    pub(in crate::ops) body: Body,
    pub(in crate::ops) matrices: &'a [Matrix],
}

impl CustomOp2 for Product<'_> {
    fn name(&self) -> &'static str {
        "quantised linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        tiles: &CpuStorage,
        tiles_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, k) = x_layout.shape().dims2()?;
        if let Some(matrix) = self.matrices.iter().find(|matrix| matrix.k != k) {
            candle_core::bail!("{}: the input has {k} features, the weight takes {}", self.name(), matrix.k);
        }
        let x: &[f32] = slice(self.name(), x, x_layout)?;
        let mut tiles: &[u8] = slice(self.name(), tiles, tiles_layout)?;
        let columns = self.matrices.iter().map(|matrix| matrix.rows).sum();
        if tiles.len() != self.matrices.iter().map(|matrix| matrix.tiles_bytes()).sum::<usize>() {
            candle_core::bail!("{}: {} bytes of tiles for {:?}", self.name(), tiles.len(), self.matrices);
        }
        // SAFETY: the columns of the matrices follow each other, and each product writes all of its own.
        #[allow(unsafe_code)]
        let y = unsafe {
            written(rows * columns, |y| {
                let mut first = 0;
                for matrix in self.matrices {
                    let (own, rest) = tiles.split_at(matrix.tiles_bytes());
                    product(self.body, Operands { x, tiles: own, matrix: *matrix }, &Output { y, first, columns });
                    (tiles, first) = (rest, first + matrix.rows);
                }
            })
        };
        Ok((CpuStorage::F32(y), Shape::from((rows, columns))))
    }
}

/// `x` `[T, k]` and the tiles of a weight.
#[derive(Clone, Copy)]
struct Operands<'a> {
    x: &'a [f32],
    tiles: &'a [u8],
    matrix: Matrix,
}

/// Where results go: columns from `first` on of `columns` in all.
pub(super) struct Output<'a> {
    y: &'a Shared<'a, f32>,
    first: usize,
    columns: usize,
}

impl Output<'_> {
    /// Puts the sums of a row into its columns from `column` on.
    ///
    /// # Safety
    /// Every sum may be handed out once.
    #[allow(unsafe_code)]
    pub(super) unsafe fn write(&self, row: usize, column: usize, sums: &[f32]) {
        // SAFETY: nobody else has these places (the caller's promise).
        unsafe { self.y.write(row * self.columns + self.first + column, sums) }
    }
}

fn product(body: Body, operands: Operands<'_>, out: &Output<'_>) {
    match operands.matrix.format {
        Format::Q4_0 => of::<Q40>(body, operands, out),
        Format::Q8_0 => of::<Q80>(body, operands, out),
        Format::Q4K => of::<Q4K>(body, operands, out),
        Format::Q5K => of::<Q5K>(body, operands, out),
        Format::Q6K => of::<Q6K>(body, operands, out),
    }
}

fn of<F: Unpack>(body: Body, Operands { x, tiles, matrix }: Operands<'_>, out: &Output<'_>) {
    let Matrix { rows: columns, k, .. } = matrix;
    let (rows, groups, tile_bytes) = (x.len() / k, k / GROUP, matrix.tile_bytes());
    let x: Vec<Group> = parallel::filled(rows * groups, groups, |row, out: &mut [Group]| {
        body.run(Round { x: &x[row * k..][..k], out, zero: F::FORMAT.zero(), scales: F::SCALES });
    });
    if let (Some(unit), true) = (Amx::detect(), rows >= matrix::ROWS_MIN && body.is_wide()) {
        return matrix::product::<F>((body, unit), &x, groups, (tiles, matrix), out);
    }
    // Of few rows, memory is the limit, which likes long runs: tiles that lie together advance together, where the registers hold the
    // sums of both. Of many, arithmetic, where threads should end together.
    let together = rows <= HEIGHT / 2 && body.is_wide();
    let tile_count = columns.div_ceil(COLUMNS);
    let run =
        if rows > HEIGHT { TOGETHER } else { tile_count.div_ceil(4 * parallel::threads()).next_multiple_of(TOGETHER) };
    parallel::for_each(tile_count.div_ceil(run), |index| {
        for first in (index * run..tile_count.min((index + 1) * run)).step_by(TOGETHER) {
            let count = TOGETHER.min(tile_count - first);
            let records = &tiles[first * tile_bytes..][..count * tile_bytes];
            let mut emit = |row: usize, c: usize, sums: &[f32; COLUMNS]| {
                let column = (first + c) * COLUMNS;
                // SAFETY: every sum is handed out once.
                #[allow(unsafe_code)]
                unsafe {
                    out.write(row, column, &sums[..COLUMNS.min(columns - column)]);
                }
            };
            if together && count == TOGETHER {
                rows_over::<F, TOGETHER>(body, &x, groups, Tiles { records, step: count, first: 0 }, &mut emit);
            } else {
                for c in 0..count {
                    let mut emit = |row: usize, _: usize, sums: &[f32; COLUMNS]| emit(row, c, sums);
                    rows_over::<F, 1>(body, &x, groups, Tiles { records, step: count, first: c }, &mut emit);
                }
            }
        }
    });
}

/// Some of `step` tiles whose records alternate, from `first` on.
#[derive(Clone, Copy)]
struct Tiles<'a> {
    records: &'a [u8],
    step: usize,
    first: usize,
}

/// All rows over C tiles, a few at a time.
fn rows_over<F: Unpack, const C: usize>(
    body: Body,
    x: &[Group],
    groups: usize,
    tiles: Tiles<'_>,
    emit: &mut impl FnMut(usize, usize, &[f32; COLUMNS]),
) {
    let rows = x.len() / groups;
    let mut first = 0;
    while first < rows {
        let x = &x[first * groups..];
        first += match rows - first {
            1 => strip::<F, 1, C>(body, x, groups, tiles, first, emit),
            2 => strip::<F, 2, C>(body, x, groups, tiles, first, emit),
            3 => strip::<F, 3, C>(body, x, groups, tiles, first, emit),
            4 | 5 => strip::<F, 4, C>(body, x, groups, tiles, first, emit),
            6 | 7 => strip::<F, 6, C>(body, x, groups, tiles, first, emit),
            _ => strip::<F, HEIGHT, C>(body, x, groups, tiles, first, emit),
        };
    }
}

/// R rows over C tiles; the number of rows.
fn strip<F: Unpack, const R: usize, const C: usize>(
    body: Body,
    x: &[Group],
    groups: usize,
    tiles: Tiles<'_>,
    first: usize,
    emit: &mut impl FnMut(usize, usize, &[f32; COLUMNS]),
) -> usize {
    let x = std::array::from_fn(|r| &x[r * groups..][..groups]);
    let sums: [[[f32; COLUMNS]; C]; R] = body.run(Dots::<F, R, C> { x, tiles, format: std::marker::PhantomData });
    for (r, sums) in sums.iter().enumerate() {
        for (c, sums) in sums.iter().enumerate() {
            emit(first + r, c, sums);
        }
    }
    R
}

struct Dots<'a, F, const R: usize, const C: usize> {
    x: [&'a [Group]; R],
    tiles: Tiles<'a>,
    format: std::marker::PhantomData<F>,
}

impl<F: Unpack, const R: usize, const C: usize> Kernel for Dots<'_, F, R, C> {
    type Output = [[[f32; COLUMNS]; C]; R];

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> Self::Output {
        let bytes = const { record_bytes(F::FORMAT) };
        let mut sums = [[isa.splat(0.0); C]; R];
        let blocks = self.x[0].len() / F::GROUPS;
        let x = self.x.map(|x| &x[..blocks * F::GROUPS]);
        let Tiles { records, step, first } = self.tiles;
        for (block, records) in records.chunks_exact(step * bytes).take(blocks).enumerate() {
            // A range and not an iterator over records: that is not unrolled, and the sums would live in memory.
            for c in 0..C {
                let record = &records[(first + c) * bytes..][..bytes];
                let ahead = record.as_ptr().wrapping_add(PREFETCH_BYTES);
                for group in 0..F::GROUPS {
                    for line in 0..(bytes / F::GROUPS).div_ceil(64) {
                        isa.prefetch(ahead.wrapping_add(group * (bytes / F::GROUPS) + 64 * line));
                    }
                    let codes = F::codes(isa, record, group);
                    let scales: [I::V; 2] = if F::SCALES == 2 {
                        [F::scale(isa, record, group, 0), F::scale(isa, record, group, 1)]
                    } else {
                        [F::scale(isa, record, group, 0); 2]
                    };
                    let min = if F::MINS { negative_min::<I, F>(isa, record, group) } else { isa.splat(0.0) };
                    for (x, sums) in x.iter().zip(&mut sums) {
                        let x = &x[block * F::GROUPS + group];
                        let scale = isa.splat(x.scale);
                        let mut sum = sums[c];
                        for (half, scales) in scales.iter().enumerate().take(F::SCALES) {
                            let part = 8 / F::SCALES;
                            let mut dots = isa.splat_int(x.begins[half]);
                            for (codes, x) in codes[half * part..][..part].iter().zip(&x.codes[half * part..]) {
                                dots = isa.dot4(dots, *codes, isa.splat_int(*x));
                            }
                            sum = isa.fma(isa.to_float(dots), isa.mul(*scales, scale), sum);
                        }
                        if F::MINS {
                            sum = isa.fma(min, isa.splat(x.sum), sum);
                        }
                        sums[c] = sum;
                    }
                }
            }
        }
        let mut out = [[[0.0; COLUMNS]; C]; R];
        // Two loops: over a flattened array it would be one that is not unrolled, and the sums above would live in memory.
        for (sums, out) in sums.iter().zip(&mut out) {
            for (sum, out) in sums.iter().zip(out) {
                isa.store(*sum, out);
            }
        }
        out
    }
}

/// Rounds the activations of a row; `zero` is the weight's code of 0, `scales` the number of its scales in a group.
struct Round<'a> {
    x: &'a [f32],
    out: &'a mut [Group],
    zero: i32,
    scales: usize,
}

impl Kernel for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
        for (x, out) in self.x.as_chunks::<GROUP>().0.iter().zip(self.out) {
            let (parts, _) = x.as_chunks();
            let parts = [isa.load(&parts[0]), isa.load(&parts[1])];
            let zeros = isa.splat(0.0);
            let (mut most, mut poison) = (zeros, zeros);
            for part in parts {
                most = isa.max(part, isa.max(isa.sub(zeros, part), most));
                poison = isa.fma(part, zeros, poison);
            }
            let largest = isa.largest(most);
            // Not a number where an activation is none, or infinite.
            let scale = largest / 127.0 + isa.sum(poison);
            let inverse = isa.splat(if largest > 0.0 { 127.0 / largest } else { 0.0 });
            let mut sums = [0; 2];
            for (half, part) in parts.into_iter().enumerate() {
                let rounded = isa.fma(part, inverse, isa.splat(MAGIC));
                let mut bytes = [0; LANES];
                isa.store_low_bytes(rounded, &mut bytes);
                for (codes, bytes) in out.codes[4 * half..].iter_mut().zip(bytes.as_chunks().0) {
                    *codes = i32::from_le_bytes(*bytes);
                }
                // Small integers: the sum is exact. Where an activation is no number the scale tells, whatever this is.
                sums[half] = isa.sum(isa.sub(rounded, isa.splat(MAGIC))) as i32;
            }
            let all = sums[0] + sums[1];
            out.begins = if self.scales == 2 { sums } else { [all, 0] }.map(|sum| -self.zero * sum);
            out.scale = scale;
            out.sum = scale * all as f32;
        }
    }
}
