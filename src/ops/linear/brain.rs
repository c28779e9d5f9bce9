//! The operands of [`blocks`] rounded to bf16, sums in float32: half the time where the processor multiplies pairs of bf16.
//! For training only. Every element is one chain over k, so threads and tiles change no bit; another processor may.

use half::bf16;

use super::blocks::Sizes;
use super::float;
use crate::ops::lanes::Body;

/// `[rows, k]` as it lies in memory.
#[derive(Clone, Copy)]
pub(super) enum Left<'a> {
    /// Row after row.
    Rows(&'a [f32]),
    /// The transpose `[k, rows]`, row after row.
    Columns(&'a [f32]),
}

/// `[k, columns]` as it lies in memory.
#[derive(Clone, Copy)]
pub(super) enum Right<'a> {
    /// Row after row.
    Rows(&'a [f32]),
    /// The transpose `[columns, k]`, row after row.
    Columns(&'a [f32]),
}

/// a b, contiguous, the operands rounded to bf16: `[rows, columns]`.
pub(super) fn product(body: Body, a: Left<'_>, b: Right<'_>, sizes: Sizes) -> Vec<f32> {
    #[cfg(target_arch = "x86_64")]
    if let Some(pairs) = pairs::Pairs::detect() {
        return pairs
            .multiply(a, sizes, |product| float::fresh(product, |column, panel| pairs.pack(b, sizes, column, panel)));
    }
    let mut c = vec![0.0; sizes.rows * sizes.columns];
    rounded(body, &mut c, a, b, sizes);
    c
}

/// c += a b, as [`product`].
pub(super) fn add_product(body: Body, c: &mut [f32], a: Left<'_>, b: Right<'_>, sizes: Sizes) {
    #[cfg(target_arch = "x86_64")]
    if let Some(pairs) = pairs::Pairs::detect() {
        return pairs
            .multiply(a, sizes, |product| float::add(product, c, |column, panel| pairs.pack(b, sizes, column, panel)));
    }
    rounded(body, c, a, b, sizes);
}

/// The same on processors without such an instruction: rounded, then multiplied in float32.
fn rounded(body: Body, c: &mut [f32], a: Left<'_>, b: Right<'_>, sizes: Sizes) {
    let round = |x: &f32| bf16::from_f32(*x).to_f32();
    let turned = |x: &[f32], width: usize| -> Vec<f32> {
        (0..width).flat_map(|column| x.iter().skip(column).step_by(width).map(round)).collect()
    };
    let a = match a {
        Left::Columns(a) => a.iter().map(round).collect(),
        Left::Rows(a) => turned(a, sizes.k),
    };
    let b = match b {
        Right::Rows(b) => b.iter().map(round).collect(),
        Right::Columns(b) => turned(b, sizes.k),
    };
    float::add_outer_product(body, c, &a, &b, sizes);
}

#[cfg(target_arch = "x86_64")]
mod pairs {
    #![allow(unsafe_code)]

    use super::*;
    use crate::ops::lanes::{Avx512, Isa, LANES};
    use crate::ops::linear::blocks::{
        self, HEIGHT, Line, Multiply, Order, Product, ROWS, Steps, Strip, VECTORS, WIDTH,
    };
    use crate::ops::parallel;
    use std::arch::x86_64::*;
    use std::mem::transmute;

    /// A processor with AVX512_BF16.
    #[derive(Clone, Copy)]
    pub(super) struct Pairs(Avx512);

    /// Two neighbours along k, the even one in the low half.
    type Pair = u32;

    impl Pairs {
        pub(super) fn detect() -> Option<Self> {
            let isa = Avx512::detect()?;
            (is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512bw")).then_some(Self(isa))
        }

        /// What `run` makes of the product of `a`, its columns in pairs.
        pub(super) fn multiply<T>(self, a: Left<'_>, sizes: Sizes, run: impl FnOnce(&Product<'_, Self>) -> T) -> T {
            let Sizes { rows, k, .. } = sizes;
            let steps = k.div_ceil(2);
            let left = parallel::filled(rows * steps, ROWS * steps, |index, out: &mut [Pair]| match a {
                Left::Rows(a) => {
                    let rows = a[index * ROWS * k..].chunks_exact(k).zip(out.chunks_exact_mut(steps));
                    // SAFETY: `self` is proof of the features.
                    rows.for_each(|(row, out)| unsafe { pairs_of_row(row, out) });
                }
                // SAFETY: the same.
                Left::Columns(a) => unsafe { pack_tiles(a, rows, index * ROWS, out) },
            });
            let left = match a {
                Left::Rows(_) => blocks::Left::Rows(&left[..]),
                Left::Columns(_) => blocks::Left::Tiles(&left[..]),
            };
            run(&Product { multiply: self, left, sizes: Sizes { k: steps, ..sizes }, order: Order::Chain })
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

    /// Pairs of one number of `even` and one of `odd` each.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn pairs_of_columns(even: &[f32], odd: &[f32], out: &mut [Pair]) {
        for ((even, odd), out) in even.chunks(LANES).zip(odd.chunks(LANES)).zip(out.chunks_mut(LANES)) {
            let (even, odd) = (widened(even), widened(odd));
            store(_mm512_or_si512(even, _mm512_slli_epi32::<16>(odd)), out);
        }
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

    /// The rows from `first` on of aT for `a` `[k, rows]`, to tiles `[k / 2, HEIGHT]`, the last narrower.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn pack_tiles(a: &[f32], rows: usize, first: usize, out: &mut [Pair]) {
        let count = ROWS.min(rows - first);
        let steps = out.len() / count;
        let mut line = [0; ROWS];
        for (step, two) in a.chunks(2 * rows).enumerate() {
            let odd = two.get(rows + first..rows + first + count).unwrap_or(&[0.0; ROWS][..count]);
            pairs_of_columns(&two[first..first + count], odd, &mut line[..count]);
            let (whole, rest) = line[..count].as_chunks::<HEIGHT>();
            for (tile, pairs) in whole.iter().enumerate() {
                out[tile * HEIGHT * steps + step * HEIGHT..][..HEIGHT].copy_from_slice(pairs);
            }
            out[whole.len() * HEIGHT * steps + step * rest.len()..][..rest.len()].copy_from_slice(rest);
        }
    }

    impl Multiply for Pairs {
        type Number = Pair;

        fn advance<const R: usize>(self, steps: Steps<'_, Pair>) {
            // SAFETY: `self` is proof of the features.
            unsafe { advance::<R>(steps) }
        }
    }

    #[inline(never)]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn advance<const R: usize>(steps: Steps<'_, Pair>) {
        let Steps { left: Strip { numbers, across, along }, right, sums: kept, level, first, .. } = steps;
        assert!(right.is_empty() || numbers.len() > (R - 1) * across + (right.len() - 1) * along);
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; R];
        if !first {
            for (sums, kept) in sums.iter_mut().zip(&kept[level]) {
                for (sum, kept) in sums.iter_mut().zip(&kept.0) {
                    // SAFETY: sixteen readable floats.
                    *sum = unsafe { _mm512_loadu_ps(kept.as_ptr()) };
                }
            }
        }
        for (step, line) in right.iter().enumerate() {
            let mut columns = [_mm512_setzero_si512(); VECTORS];
            for (column, line) in columns.iter_mut().zip(&line.0) {
                // SAFETY: sixteen readable pairs.
                *column = unsafe { _mm512_loadu_si512(line.as_ptr().cast()) };
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: below the last row and step, whose index is checked above.
                let pair = unsafe { *numbers.get_unchecked(r * across + step * along) };
                let mut row = _mm512_set1_epi32(pair.cast_signed());
                // SAFETY: no instruction at all; it only keeps the row in a register instead of reading it four times.
                unsafe {
                    std::arch::asm!("/* {0} */", inout(zmm_reg) row, options(pure, nomem, nostack, preserves_flags))
                };
                for (sum, column) in sums.iter_mut().zip(&columns) {
                    // SAFETY: vectors of 64 bytes seen as 32 bf16.
                    *sum = unsafe {
                        let (row, column) =
                            (transmute::<__m512i, __m512bh>(row), transmute::<__m512i, __m512bh>(*column));
                        _mm512_dpbf16_ps(*sum, row, column)
                    };
                }
            }
        }
        for (sums, kept) in sums.iter().zip(&mut kept[level]) {
            for (sum, kept) in sums.iter().zip(&mut kept.0) {
                // SAFETY: sixteen writable floats.
                unsafe { _mm512_storeu_ps(kept.as_mut_ptr(), *sum) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use crate::ops::samples::{check_bits, check_close, numbers};

    fn turned(x: &[f32], columns: usize) -> Vec<f32> {
        (0..columns).flat_map(|column| x.iter().skip(column).step_by(columns).copied()).collect()
    }

    #[test]
    fn sums_are_those_of_rounded_operands_in_every_layout() {
        for (rows, columns, k) in [(1, 1, 1), (7, 65, 3), (13, 130, 258), (100, 64, 31), (6, 200, 600), (200, 33, 1031)]
        {
            let (a, b, c) = (numbers(1, rows * k), numbers(2, k * columns), numbers(3, rows * columns));
            let round = |x: f32| f64::from(bf16::from_f32(x).to_f32());
            let sum = |row: usize, column: usize| -> f64 {
                (0..k).map(|i| round(a[row * k + i]) * round(b[i * columns + column])).sum()
            };
            let sums: Vec<f64> = (0..rows * columns).map(|i| sum(i / columns, i % columns)).collect();
            let added: Vec<f64> = sums.iter().zip(&c).map(|(sum, c)| sum + f64::from(*c)).collect();
            let (at, bt) = (turned(&a, k), turned(&b, columns));
            let sizes = Sizes { rows, columns, k };
            let what = format!("{rows}x{k}x{columns}");
            let run = |a, b| {
                let got = product(Body::best(), a, b, sizes);
                check_close(&what, &got, &sums, 1e-6 * k as f64);
                let mut all = c.clone();
                add_product(Body::best(), &mut all, a, b, sizes);
                check_close(&what, &all, &added, 1e-6 * k as f64);
                let mut plain = vec![0.0; rows * columns];
                rounded(Body::best(), &mut plain, a, b, sizes);
                check_close("without the instruction", &plain, &sums, 1e-6 * k as f64);
                got
            };
            let got = run(Left::Rows(&a), Right::Rows(&b));
            check_bits("a turned", &run(Left::Columns(&at), Right::Rows(&b)), &got);
            check_bits("b turned", &run(Left::Rows(&a), Right::Columns(&bt)), &got);
        }
    }
}
