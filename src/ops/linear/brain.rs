//! C += A B with both operands rounded to bf16 and sums in float32: half the time where the processor multiplies pairs of bf16.
//! For training only. Every element is one chain over k, so threads and tiles change no bit; another processor may.

use half::bf16;

use super::outer::{self, HEIGHT, Left, ROWS, STEPS, Sizes, WIDTH};
use crate::ops::lanes::Body;
use crate::ops::parallel;
use crate::ops::storage::Shared;

/// `[k, columns]` as it lies in memory.
#[derive(Clone, Copy)]
pub(super) enum Right<'a> {
    /// Row after row.
    Rows(&'a [f32]),
    /// The transpose `[columns, k]`, row after row.
    Columns(&'a [f32]),
}

/// c += a b, all contiguous, the operands rounded to bf16.
pub(super) fn add_product(body: Body, c: &mut [f32], a: Left<'_>, b: Right<'_>, sizes: Sizes) {
    #[cfg(target_arch = "x86_64")]
    if let Some(pairs) = pairs::Pairs::detect() {
        return pairs.add_product(c, a, b, sizes);
    }
    rounded(body, c, a, b, sizes);
}

/// The same on processors without such an instruction: rounded, then multiplied in float32.
fn rounded(body: Body, c: &mut [f32], a: Left<'_>, b: Right<'_>, sizes: Sizes) {
    let round = |x: &[f32]| x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect::<Vec<f32>>();
    let b = match b {
        Right::Rows(b) => round(b),
        Right::Columns(b) => {
            let mut turned = vec![0.0; b.len()];
            for (column, values) in b.chunks_exact(sizes.k.max(1)).enumerate() {
                let places = turned.iter_mut().skip(column).step_by(sizes.columns);
                places.zip(values).for_each(|(out, x)| *out = bf16::from_f32(*x).to_f32());
            }
            turned
        }
    };
    match a {
        Left::Rows(a) => outer::add_product(body, c, Left::Rows(&round(a)), &b, sizes),
        Left::Columns(a) => outer::add_product(body, c, Left::Columns(&round(a)), &b, sizes),
    }
}

#[cfg(target_arch = "x86_64")]
mod pairs {
    #![allow(unsafe_code)]

    use super::*;
    use std::arch::x86_64::*;
    use std::mem::transmute;

    /// A processor with AVX512_BF16.
    #[derive(Clone, Copy)]
    pub(super) struct Pairs(());

    /// Two neighbours along k, the even one in the low half.
    type Pair = u32;

    impl Pairs {
        pub(super) fn detect() -> Option<Self> {
            (is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")).then_some(Self(()))
        }

        pub(super) fn add_product(self, c: &mut [f32], a: Left<'_>, b: Right<'_>, sizes: Sizes) {
            let Sizes { rows, columns, k } = sizes;
            if c.is_empty() || k == 0 {
                return;
            }
            let steps = k.div_ceil(2);
            let (count, panels) = (rows.div_ceil(HEIGHT), columns.div_ceil(WIDTH));
            let mut left: Vec<Pair> = vec![0; count * HEIGHT * steps];
            for_each_chunk(&mut left, HEIGHT * steps, |index, out| pack_left(a, sizes, index * HEIGHT, out));
            let mut right: Vec<Pair> = vec![0; panels * WIDTH * steps];
            for_each_chunk(&mut right, WIDTH * steps, |index, out| pack_right(b, sizes, index * WIDTH, out));
            let c = &Shared::new(c);
            let tiles = ROWS / HEIGHT;
            parallel::for_each(panels * count.div_ceil(tiles), |index| {
                let (panel, first) = (index % panels, index / panels * tiles);
                let left = &left[first * HEIGHT * steps..count.min(first + tiles) * HEIGHT * steps];
                let right = &right[panel * WIDTH * steps..][..WIDTH * steps];
                self.piece(c, left, right, [first * HEIGHT, panel * WIDTH], sizes);
            });
        }

        /// Rows from `row` on for one panel of columns from `column` on.
        fn piece(self, c: &Shared<'_, f32>, left: &[Pair], right: &[Pair], [row, column]: [usize; 2], sizes: Sizes) {
            let steps = sizes.k.div_ceil(2);
            let width = WIDTH.min(sizes.columns - column);
            for start in (0..steps).step_by(STEPS) {
                let range = start..steps.min(start + STEPS);
                let right = &right.as_chunks::<WIDTH>().0[range.clone()];
                for (index, left) in left.chunks_exact(HEIGHT * steps).enumerate() {
                    let left = &left.as_chunks::<HEIGHT>().0[range.clone()];
                    let first = row + index * HEIGHT;
                    let rows = first..sizes.rows.min(first + HEIGHT);
                    let mut sums = [[0.0; WIDTH]; HEIGHT];
                    for (sums, row) in sums.iter_mut().zip(rows.clone()) {
                        // SAFETY: rows and panels belong to one index of the loop in `add_product` each.
                        let c = unsafe { c.part(row * sizes.columns + column, width) };
                        sums[..width].copy_from_slice(c);
                    }
                    // SAFETY: `self` is proof of the features.
                    unsafe { advance(left, right, &mut sums) };
                    for (sums, row) in sums.iter().zip(rows) {
                        // SAFETY: as above.
                        let c = unsafe { c.part(row * sizes.columns + column, width) };
                        c.copy_from_slice(&sums[..width]);
                    }
                }
            }
        }
    }

    /// Some steps of the sums of one tile, two elements of k each.
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn advance(left: &[[Pair; HEIGHT]], right: &[[Pair; WIDTH]], sums: &mut [[f32; WIDTH]; HEIGHT]) {
        const VECTORS: usize = WIDTH / 16;
        let mut all = [[_mm512_setzero_ps(); VECTORS]; HEIGHT];
        for (all, sums) in all.iter_mut().zip(sums.iter()) {
            for (sum, kept) in all.iter_mut().zip(sums.as_chunks::<16>().0) {
                // SAFETY: sixteen readable floats.
                *sum = unsafe { _mm512_loadu_ps(kept.as_ptr()) };
            }
        }
        for (left, right) in left.iter().zip(right) {
            // SAFETY: a vector of 64 bytes seen as 32 bf16, here and below.
            let mut columns = [unsafe { transmute::<__m512i, __m512bh>(_mm512_setzero_si512()) }; VECTORS];
            for (column, right) in columns.iter_mut().zip(right.as_chunks::<16>().0) {
                // SAFETY: sixteen readable pairs.
                *column = unsafe { transmute::<__m512i, __m512bh>(_mm512_loadu_si512(right.as_ptr().cast())) };
            }
            for (left, all) in left.iter().zip(&mut all) {
                // SAFETY: as above.
                let row = unsafe { transmute::<__m512i, __m512bh>(_mm512_set1_epi32(left.cast_signed())) };
                for (sum, column) in all.iter_mut().zip(&columns) {
                    *sum = _mm512_dpbf16_ps(*sum, row, *column);
                }
            }
        }
        for (all, sums) in all.iter().zip(sums) {
            for (sum, kept) in all.iter().zip(sums.as_chunks_mut::<16>().0) {
                // SAFETY: sixteen writable floats.
                unsafe { _mm512_storeu_ps(kept.as_mut_ptr(), *sum) };
            }
        }
    }

    fn for_each_chunk(data: &mut [Pair], len: usize, body: impl Fn(usize, &mut [Pair]) + Sync) {
        let (total, shared) = (data.len(), Shared::new(data));
        parallel::for_each(total.div_ceil(len), |index| {
            let start = index * len;
            // SAFETY: chunks of different indices do not overlap.
            body(index, unsafe { shared.part(start, len.min(total - start)) });
        });
    }

    fn pair(even: f32, odd: f32) -> Pair {
        Pair::from(rounded(even)) | Pair::from(rounded(odd)) << 16
    }

    /// The bits of the nearest bf16, ties to even; NaN stays NaN.
    fn rounded(x: f32) -> u16 {
        let bits = x.to_bits();
        let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        if x.is_nan() { (bits >> 16) as u16 | 0x40 } else { nearest as u16 }
    }

    /// Rows from `first` on to `[steps, HEIGHT]`, zeros after the last row and the last element.
    fn pack_left(a: Left<'_>, Sizes { rows, k, .. }: Sizes, first: usize, out: &mut [Pair]) {
        let height = HEIGHT.min(rows - first);
        match a {
            Left::Rows(a) => {
                for r in 0..height {
                    spread(&a[(first + r) * k..][..k], out, r, HEIGHT);
                }
            }
            Left::Columns(a) => {
                for (out, two) in out.chunks_exact_mut(HEIGHT).zip(a.chunks(2 * rows)) {
                    merge(two, rows, first..first + height, out);
                }
            }
        }
    }

    /// Columns from `first` on to `[steps, WIDTH]`, zeros after the last column and the last element.
    fn pack_right(b: Right<'_>, Sizes { columns, k, .. }: Sizes, first: usize, out: &mut [Pair]) {
        let width = WIDTH.min(columns - first);
        match b {
            Right::Columns(b) => {
                for column in 0..width {
                    spread(&b[(first + column) * k..][..k], out, column, WIDTH);
                }
            }
            Right::Rows(b) => {
                for (out, two) in out.chunks_exact_mut(WIDTH).zip(b.chunks(2 * columns)) {
                    merge(two, columns, first..first + width, out);
                }
            }
        }
    }

    /// The pairs of `x` to every `stride`-th place of `out` from `first` on.
    fn spread(x: &[f32], out: &mut [Pair], first: usize, stride: usize) {
        let (twos, rest) = x.as_chunks::<2>();
        let mut places = out[first..].iter_mut().step_by(stride);
        twos.iter().zip(&mut places).for_each(|([even, odd], place)| *place = pair(*even, *odd));
        if let ([last], Some(place)) = (rest, places.next()) {
            *place = pair(*last, 0.0);
        }
    }

    /// The pairs of the columns `range` of two rows of `width` numbers, or of one and zeros.
    fn merge(two: &[f32], width: usize, range: std::ops::Range<usize>, out: &mut [Pair]) {
        let even = &two[range.clone()];
        match two.get(width + range.start..width + range.end) {
            Some(odd) => out.iter_mut().zip(even).zip(odd).for_each(|((out, even), odd)| *out = pair(*even, *odd)),
            None => out.iter_mut().zip(even).for_each(|(out, even)| *out = pair(*even, 0.0)),
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
        for (rows, columns, k) in [(1, 1, 1), (7, 65, 3), (13, 130, 258), (100, 64, 31), (6, 200, 600)] {
            let (a, b, c) = (numbers(1, rows * k), numbers(2, k * columns), numbers(3, rows * columns));
            let round = |x: f32| f64::from(bf16::from_f32(x).to_f32());
            let sum = |row: usize, column: usize| -> f64 {
                (0..k).map(|i| round(a[row * k + i]) * round(b[i * columns + column])).sum()
            };
            let expected: Vec<f64> =
                (0..rows * columns).map(|i| f64::from(c[i]) + sum(i / columns, i % columns)).collect();
            let (at, bt) = (turned(&a, k), turned(&b, columns));
            let sizes = Sizes { rows, columns, k };
            let run = |a, b| {
                let mut c = c.clone();
                add_product(Body::best(), &mut c, a, b, sizes);
                let mut plain = numbers(3, rows * columns);
                rounded(Body::best(), &mut plain, a, b, sizes);
                let plain_expected: Vec<f64> = plain.iter().map(|x| f64::from(*x)).collect();
                check_close("with and without the instruction", &c, &plain_expected, 1e-6 * k as f64);
                c
            };
            let got = run(Left::Rows(&a), Right::Rows(&b));
            check_close(&format!("{rows}x{k}x{columns}"), &got, &expected, 1e-6 * k as f64);
            check_bits("a turned", &run(Left::Columns(&at), Right::Rows(&b)), &got);
            check_bits("b turned", &run(Left::Rows(&a), Right::Columns(&bt)), &got);
        }
    }
}
