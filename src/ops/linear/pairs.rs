//! Products of pairs of bf16, where the processor has them: rounding and packing of the operands, and the innermost loops.
//! What is multiplied in which order is the business of [`super::brain`] and [`super::packed`].
#![allow(unsafe_code)]

use half::bf16;
use std::arch::x86_64::*;
use std::mem::transmute;
use std::ops::Range;

use super::blocks::{self, Line, Multiply, Order, Product, ROWS, Sizes, Turn, VECTORS, WIDTH, lines, tiles};
use super::brain::{Left, Right};
use crate::ops::lanes::{Avx512, Isa, LANES};
use crate::ops::parallel;

/// A processor with AVX512_BF16.
#[derive(Clone, Copy)]
pub(super) struct Pairs(Avx512);

/// Two neighbours along k, the even one in the low half.
pub(super) type Pair = u32;

impl Pairs {
    pub(super) fn detect() -> Option<Self> {
        let isa = Avx512::detect()?;
        (is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512bw")).then_some(Self(isa))
    }

    /// What `run` makes of the product of `a`, its columns in pairs.
    pub(super) fn multiply<T>(self, a: Left<'_>, sizes: Sizes, run: impl FnOnce(&Product<'_, Self>) -> T) -> T {
        let Sizes { rows, k, .. } = sizes;
        let steps = k.div_ceil(2);
        let left = match a {
            Left::Rows(a) => parallel::filled(rows * steps, ROWS * steps, |index, out: &mut [Pair]| {
                let rows = a[index * ROWS * k..].chunks_exact(k).zip(out.chunks_exact_mut(steps));
                // SAFETY: `self` is proof of the features.
                rows.for_each(|(row, out)| unsafe { pairs_of_row(row, out) });
            }),
            Left::Columns(a) => tiles(rows, steps, |step, first, out: &mut [Pair]| {
                let two = &a[2 * step * rows..k.min(2 * step + 2) * rows];
                let (end, zeros) = (first + out.len(), [0.0; ROWS]);
                let odd = two.get(rows + first..rows + end).unwrap_or(&zeros[..out.len()]);
                // SAFETY: the same.
                unsafe { pairs_of_columns(&two[first..end], odd, out) }
            }),
        };
        let left = match a {
            Left::Rows(_) => blocks::Left::Rows(&left[..]),
            Left::Columns(_) => blocks::Left::Tiles(&left[..]),
        };
        run(&Product { multiply: self, left, sizes: Sizes { k: steps, ..sizes }, order: Order::Chain })
    }

    /// Some pairs of the rows from `first` on of the left operand, to `out` `[pairs / 16, rows, 16]`, which was zeros.
    pub(super) fn lay_out(self, a: Left<'_>, sizes: Sizes, first: usize, pairs: Range<usize>, out: &mut [Pair]) {
        let (height, numbers) = (out.len() / pairs.len(), 2 * pairs.start..sizes.k.min(2 * pairs.end));
        match a {
            // SAFETY: `self` is proof of the features.
            Left::Rows(a) => unsafe { spread_rows(&a[first * sizes.k..], sizes.k, numbers, height, out) },
            Left::Columns(a) => {
                let a = &a[numbers.start * sizes.rows..numbers.end * sizes.rows];
                // SAFETY: the same.
                unsafe { self.turn_rows(a, sizes.rows, first, height, out) }
            }
        }
    }

    /// Columns from `first` on of `b` to a panel of pairs.
    pub(super) fn pack(self, b: Right<'_>, sizes: Sizes, first: usize, panel: &mut [Line<Pair>]) {
        let (columns, k) = (sizes.columns, sizes.k);
        let last = columns.min(first + WIDTH);
        match b {
            Right::Rows(b) => {
                for (two, line) in b.chunks(2 * columns).zip(panel) {
                    let even = &two[first..last];
                    let odd = two.get(columns + first..columns + last).unwrap_or(&[0.0; WIDTH][..last - first]);
                    // SAFETY: `self` is proof of the features.
                    unsafe { pairs_of_columns(even, odd, &mut line.0.as_flattened_mut()[..last - first]) };
                }
            }
            Right::Columns(b) => {
                for (vector, columns) in b[first * k..last * k].chunks(LANES * k).enumerate() {
                    // SAFETY: the same.
                    unsafe { self.turn(columns, k, vector, panel) };
                }
            }
        }
    }

    /// The pairs of rows `[rows, k]`, k even.
    pub(super) fn rows(self, rows: &[f32], k: usize, out: &mut [Pair]) {
        for (row, out) in rows.chunks_exact(k).zip(out.chunks_exact_mut(k / 2)) {
            // SAFETY: `self` is proof of the features.
            unsafe { pairs_of_row(row, out) }
        }
    }

    /// The sums of R rows `[steps]` over a panel `[steps, WIDTH, 2]`, each one chain in order of the steps.
    pub(super) fn dots<const R: usize>(self, x: [&[Pair]; R], panel: &[bf16]) -> [[[f32; LANES]; VECTORS]; R] {
        // SAFETY: `self` is proof of the features.
        unsafe { dots(x, panel) }
    }

    /// Its other instructions.
    pub(super) fn isa(self) -> Avx512 {
        self.0
    }

    /// Sixteen rows, or fewer, of aT for `a` `[k, rows]`, from `first` on.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn turn_rows(self, a: &[f32], rows: usize, first: usize, height: usize, out: &mut [Pair]) {
        let count = LANES.min(rows - first);
        for (block, lines) in a.chunks(2 * LANES * rows).enumerate() {
            let mut pairs = [_mm512_setzero_ps(); LANES];
            for (pairs, two) in pairs.iter_mut().zip(lines.chunks(2 * rows)) {
                let odd = two.get(rows + first..rows + first + count).unwrap_or(&[0.0; LANES][..count]);
                *pairs = _mm512_castsi512_ps(pairs_across(&two[first..first + count], odd));
            }
            let out = &mut out[block * height * LANES..][..height * LANES];
            for (pairs, out) in self.0.transpose(pairs).iter().zip(out.chunks_exact_mut(LANES)) {
                store(_mm512_castps_si512(*pairs), out);
            }
        }
    }

    /// Sixteen columns of k numbers, or fewer, to one vector of every line.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn turn(self, columns: &[f32], k: usize, vector: usize, panel: &mut [Line<Pair>]) {
        for (block, lines) in panel.chunks_mut(LANES).enumerate() {
            let mut pairs = [_mm512_setzero_ps(); LANES];
            for (pairs, column) in pairs.iter_mut().zip(columns.chunks_exact(k)) {
                let part = &column[block * 2 * LANES..k.min((block + 1) * 2 * LANES)];
                *pairs = _mm512_castsi512_ps(pairs_along(part));
            }
            let turned = self.0.transpose(pairs);
            for (line, pairs) in lines.iter_mut().zip(&turned) {
                // SAFETY: sixteen writable pairs.
                unsafe { _mm512_storeu_ps(line.0[vector].as_mut_ptr().cast(), *pairs) };
            }
        }
    }
}

/// Rows of bf16 that follow each other in an operand, wherever they lie: those of `range`, as long as each other; in the place of others
/// there are zeros.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Stored<'a> {
    pub(in crate::ops) rows: &'a [&'a [bf16]; WIDTH],
    pub(in crate::ops) range: (usize, usize),
}

impl Stored<'_> {
    /// The 32 numbers of row `index` from `first` on, zeros after its end.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn load(&self, index: usize, first: usize) -> __m512i {
        let row = if (self.range.0..self.range.1).contains(&index) { self.rows[index] } else { &[] };
        let left = row.len().saturating_sub(first).min(2 * LANES);
        let mask = ((1_u64 << left) - 1) as u32;
        // SAFETY: only numbers of the row are read, none where the mask is empty.
        unsafe { _mm512_maskz_loadu_epi16(mask, row.as_ptr().wrapping_add(first).cast()) }
    }
}

impl Pairs {
    /// The rows, `[64, k]`, as columns of a panel; sixteen columns that are not there at all stay what they were.
    pub(super) fn turn_stored(self, stored: Stored<'_>, k: usize, panel: &mut [Line<Pair>]) {
        // SAFETY: `self` is proof of the features.
        unsafe { self.turn_rows_stored(stored, k, panel) }
    }

    /// The columns from `first` on of the rows, `[64, columns]`, to a panel; whether all numbers are finite.
    pub(super) fn pack_stored(self, stored: Stored<'_>, first: usize, panel: &mut [Line<Pair>]) -> bool {
        // SAFETY: the same.
        unsafe { pairs_of_rows_stored(stored, first, panel) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn turn_rows_stored(self, stored: Stored<'_>, k: usize, panel: &mut [Line<Pair>]) {
        for (block, lines) in panel.chunks_exact_mut(LANES).enumerate().take(k.div_ceil(2 * LANES)) {
            for vector in stored.range.0 / LANES..stored.range.1.div_ceil(LANES) {
                let mut pairs = [_mm512_setzero_ps(); LANES];
                for (lane, pairs) in pairs.iter_mut().enumerate() {
                    *pairs = _mm512_castsi512_ps(stored.load(vector * LANES + lane, block * 2 * LANES));
                }
                let turned = self.0.transpose(pairs);
                for (line, pairs) in lines.iter_mut().zip(&turned) {
                    // SAFETY: sixteen writable pairs.
                    unsafe { _mm512_storeu_ps(line.0[vector].as_mut_ptr().cast(), *pairs) };
                }
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pairs_of_rows_stored(stored: Stored<'_>, first: usize, panel: &mut [Line<Pair>]) -> bool {
    // Number i of one row, then number i of the other, whose numbers count from 32 on.
    let order = |first: usize| {
        let order: [u16; 2 * LANES] = std::array::from_fn(|i| (first + i / 2 + i % 2 * 2 * LANES) as u16);
        // SAFETY: 32 readable numbers.
        unsafe { _mm512_loadu_si512(order.as_ptr().cast()) }
    };
    let orders = [order(0), order(LANES)];
    // All ones in infinities and what is no number.
    let exponent = _mm512_set1_epi16(0x7f80);
    let mut strange = 0;
    for (pair, line) in panel.iter_mut().enumerate() {
        for (half, parts) in line.0.chunks_exact_mut(2).enumerate() {
            let columns = first + half * 2 * LANES;
            let (even, odd) = (stored.load(2 * pair, columns), stored.load(2 * pair + 1, columns));
            for row in [even, odd] {
                strange |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(row, exponent), exponent);
            }
            for (order, part) in orders.iter().zip(parts) {
                store(_mm512_permutex2var_epi16(even, *order, odd), part);
            }
        }
    }
    strange == 0
}

/// The pairs of at most 32 numbers that follow each other, zeros after the last.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pairs_along(x: &[f32]) -> __m512i {
    let mut whole = [0.0; 2 * LANES];
    let x = x.first_chunk().unwrap_or_else(|| {
        whole[..x.len()].copy_from_slice(x);
        &whole
    });
    // SAFETY: 32 readable floats; a vector of bf16 seen as integers.
    unsafe {
        let (low, high) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x[LANES..].as_ptr()));
        transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
    }
}

/// The pairs of a row of numbers.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pairs_of_row(row: &[f32], out: &mut [Pair]) {
    for (x, out) in row.chunks(2 * LANES).zip(out.chunks_mut(LANES)) {
        store(pairs_along(x), out);
    }
}

/// The pairs of some numbers of each of `height` rows of k, or fewer: sixteen of one row, sixteen of the next, and so on.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn spread_rows(rows: &[f32], k: usize, numbers: Range<usize>, height: usize, out: &mut [Pair]) {
    for (index, row) in rows.chunks_exact(k).take(height).enumerate() {
        let mut place = index * LANES;
        for x in row[numbers.clone()].chunks(2 * LANES) {
            store(pairs_along(x), &mut out[place..place + LANES]);
            place += height * LANES;
        }
    }
}

/// Pairs of one number of `even` and one of `odd` each.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pairs_of_columns(even: &[f32], odd: &[f32], out: &mut [Pair]) {
    for ((even, odd), out) in even.chunks(LANES).zip(odd.chunks(LANES)).zip(out.chunks_mut(LANES)) {
        store(pairs_across(even, odd), out);
    }
}

/// Pairs of one number of `even` and one of `odd` each, at most sixteen.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pairs_across(even: &[f32], odd: &[f32]) -> __m512i {
    _mm512_or_si512(widened(even), _mm512_slli_epi32::<16>(widened(odd)))
}

/// At most sixteen numbers as bf16, each in the low half of its lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn widened(x: &[f32]) -> __m512i {
    let mut whole = [0.0; LANES];
    let x = x.first_chunk().unwrap_or_else(|| {
        whole[..x.len()].copy_from_slice(x);
        &whole
    });
    // SAFETY: sixteen readable floats; a vector of bf16 seen as integers.
    unsafe {
        let rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(x.as_ptr()));
        _mm512_cvtepu16_epi32(transmute::<__m256bh, __m256i>(rounded))
    }
}

/// The first pairs of a vector, as many as `out` has.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn store(pairs: __m512i, out: &mut [Pair]) {
    if let Some(out) = out.first_chunk_mut::<LANES>() {
        // SAFETY: sixteen writable pairs.
        return unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), pairs) };
    }
    let mut whole = [0; LANES];
    // SAFETY: the same.
    unsafe { _mm512_storeu_si512(whole.as_mut_ptr().cast(), pairs) };
    out.copy_from_slice(&whole[..out.len()]);
}

impl Multiply for Pairs {
    type Number = Pair;

    fn advance<const R: usize>(self, turn: Turn<'_, Pair>) {
        // SAFETY: `self` is proof of the features.
        unsafe { advance::<R>(turn) }
    }
}

/// A turn of R rows of sums of one chain.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn advance<const R: usize>(turn: Turn<'_, Pair>) {
    let Turn { left, right, sums: kept, parts } = turn;
    for part in parts {
        let (numbers, across, along) = left.numbers::<R>(part);
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; R];
        if !part.starts() {
            for (sums, kept) in sums.iter_mut().zip(&kept[0]) {
                for (sum, kept) in sums.iter_mut().zip(&kept.0) {
                    // SAFETY: sixteen readable floats.
                    *sum = unsafe { _mm512_loadu_ps(kept.as_ptr()) };
                }
            }
        }
        for (step, line) in lines(right, part).iter().enumerate() {
            let mut columns = [_mm512_setzero_si512(); VECTORS];
            for (column, line) in columns.iter_mut().zip(&line.0) {
                // SAFETY: sixteen readable pairs.
                *column = unsafe { _mm512_loadu_si512(line.as_ptr().cast()) };
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: the numbers of R rows of the part exist, and it has as many steps as lines.
                let row = in_register(unsafe { *numbers.get_unchecked(r * across + step * along) });
                for (sum, column) in sums.iter_mut().zip(&columns) {
                    *sum = add_pairs(*sum, row, *column);
                }
            }
        }
        for (sums, kept) in sums.iter().zip(&mut kept[0]) {
            for (sum, kept) in sums.iter().zip(&mut kept.0) {
                // SAFETY: sixteen writable floats.
                unsafe { _mm512_storeu_ps(kept.as_mut_ptr(), *sum) };
            }
        }
    }
}

/// How far ahead of use a panel is asked for; the hardware alone stops at each 4 KiB boundary.
const PREFETCH_BYTES: usize = 4096;

#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn dots<const R: usize>(x: [&[Pair]; R], panel: &[bf16]) -> [[[f32; LANES]; VECTORS]; R] {
    let steps = x[0].len();
    assert!(x.iter().all(|x| x.len() == steps));
    let x = x.map(<[Pair]>::as_ptr);
    let (lines, _) = panel.as_chunks::<{ 2 * WIDTH }>();
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; R];
    for (step, line) in lines[..steps].iter().enumerate() {
        let mut columns = [_mm512_setzero_si512(); VECTORS];
        for (column, part) in columns.iter_mut().zip(line.as_chunks::<{ 2 * LANES }>().0) {
            _mm_prefetch::<_MM_HINT_T0>(part.as_ptr().cast::<i8>().wrapping_add(PREFETCH_BYTES));
            // SAFETY: 32 readable bf16.
            *column = unsafe { _mm512_loadu_si512(part.as_ptr().cast()) };
        }
        for (x, sums) in x.iter().zip(&mut sums) {
            // SAFETY: below the number of steps. A check in this loop would keep the sums in memory.
            let row = in_register(unsafe { *x.add(step) });
            for (sum, column) in sums.iter_mut().zip(&columns) {
                *sum = add_pairs(*sum, row, *column);
            }
        }
    }
    let mut out = [[[0.0; LANES]; VECTORS]; R];
    // Two loops: over a flattened array it would be one that is not unrolled, and the sums above would live in memory.
    for (sums, out) in sums.iter().zip(&mut out) {
        for (sum, out) in sums.iter().zip(out) {
            // SAFETY: sixteen writable floats.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), *sum) };
        }
    }
    out
}

/// A pair in every lane, in a register where the compiler would read it again at every use.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn in_register(pair: Pair) -> __m512i {
    let mut row = _mm512_set1_epi32(pair.cast_signed());
    // SAFETY: no instruction at all.
    unsafe { std::arch::asm!("/* {0} */", inout(zmm_reg) row, options(pure, nomem, nostack, preserves_flags)) };
    row
}

/// Every lane of `sum` and the products of the pairs of `a` and `b`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn add_pairs(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: vectors of 64 bytes seen as 32 bf16.
    let (a, b) = unsafe { (transmute::<__m512i, __m512bh>(a), transmute::<__m512i, __m512bh>(b)) };
    _mm512_dpbf16_ps(sum, a, b)
}
