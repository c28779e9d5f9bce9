//! The operands of [`blocks`] rounded to bf16, sums in float32: less than half the time where the processor multiplies bf16, in
//! its matrix unit or in pairs. For training only. Every sum has one order over k, so threads and tiles change no bit; another
//! processor may.

use half::bf16;

use super::blocks::Sizes;
use super::float;
use super::matrix::{Panels, Unit};
use super::pairs::Pairs;
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
    if let Some(unit) = Unit::detect() {
        return unit.product(a, sizes).fresh(Panels::Made(b));
    }
    if let Some(pairs) = Pairs::detect() {
        return pairs.multiply(a, sizes, |product| product.fresh(|column, panel| pairs.pack(b, sizes, column, panel)));
    }
    let mut c = vec![0.0; sizes.rows * sizes.columns];
    rounded(body, &mut c, a, b, sizes);
    c
}

/// c += a b, as [`product`].
pub(super) fn add_product(body: Body, c: &mut [f32], a: Left<'_>, b: Right<'_>, sizes: Sizes) {
    if let Some(unit) = Unit::detect() {
        return unit.product(a, sizes).add(Panels::Made(b), c);
    }
    if let Some(pairs) = Pairs::detect() {
        return pairs.multiply(a, sizes, |product| product.add(c, |column, panel| pairs.pack(b, sizes, column, panel)));
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
