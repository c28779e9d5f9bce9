//! Scales of the formats with blocks of 256: for each group the scale, and where the format has one the minimum, whose codes come
//! nearest to its numbers by squares; then codes again, for the few bits that a block keeps of them. The same on every processor.

use super::Format;
use super::blocks::{Block, LEN_MAX};
use crate::ops::lanes::{Isa, Kernel};
use half::f16;

/// Numbers that share a scale and a minimum.
const LINE: usize = 32;
/// Numbers that share a scale alone.
const RAY: usize = 16;
/// Widths that are tried for the range of the codes, a tenth of a code apart.
const WIDTHS: usize = 21;
/// Codes and scale follow from each other: so often, at most, each is computed again from the other.
const TURNS: usize = 4;
/// Largest scale and minimum of six bits.
const SIX_BITS: f32 = 63.0;

/// Writes blocks of `format`, one of those with 256 numbers, for `x`, of as many numbers as `out` has blocks for.
pub(super) struct Search<'a> {
    pub(super) format: Format,
    pub(super) x: &'a [f32],
    pub(super) out: &'a mut [u8],
}

impl Kernel for Search<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let (blocks, _) = self.x.as_chunks::<LEN_MAX>();
        for (x, out) in blocks.iter().zip(self.out.chunks_exact_mut(self.format.block_bytes())) {
            let block = match self.format {
                Format::Q6K => rays(x),
                Format::Q5K => lines(x, 31.0),
                _ => lines(x, 15.0),
            };
            block.write(self.format, out);
        }
    }
}

/// `x` is near `scale * code + low`, and the nearer the greater `gain` is: what the codes take off the sum of squares.
#[derive(Clone, Copy)]
struct Fit {
    scale: f32,
    /// Of a line at most 0, of a ray 0.
    low: f32,
    gain: f32,
}

impl Fit {
    #[inline(always)]
    fn or_better(self, other: Self) -> Self {
        if other.gain > self.gain { other } else { self }
    }
}

/// A block of eight lines with codes from 0 to `most`.
#[inline(always)]
fn lines(x: &[f32; LEN_MAX], most: f32) -> Block {
    let (groups, _) = x.as_chunks::<LINE>();
    let mut fits = [Fit { scale: 0.0, low: 0.0, gain: 0.0 }; LEN_MAX / LINE];
    let (mut scale_max, mut min_max) = (0.0_f32, 0.0_f32);
    for (x, fit) in groups.iter().zip(&mut fits) {
        *fit = line(x, most);
        (scale_max, min_max) = (scale_max.max(fit.scale), min_max.max(-fit.low));
    }
    let (d, d_min) = (f16::from_f32(scale_max / SIX_BITS), f16::from_f32(min_max / SIX_BITS));
    let mut block = Block { d: d.to_le_bytes(), d_min: d_min.to_le_bytes(), ..Block::empty() };
    let (d, d_min) = (d.to_f32(), d_min.to_f32());
    for (group, (x, fit)) in groups.iter().zip(&fits).enumerate() {
        let (scale, min) = (steps(fit.scale, d), steps(-fit.low, d_min));
        let mut best = (f32::INFINITY, 0.0, 0.0);
        // The best of rounded scales is not always the rounded best one.
        for scale in [scale - 1.0, scale, scale + 1.0] {
            for min in [min - 1.0, min, min + 1.0] {
                let (scale, min) = (between(scale, 0.0, SIX_BITS), between(min, 0.0, SIX_BITS));
                let off = off(x, d * scale, -d_min * min, [0.0, most]);
                best = if off < best.0 { (off, scale, min) } else { best };
            }
        }
        (block.scales[group], block.mins[group]) = (best.1 as u8, best.2 as u8);
        let codes = codes(x, inverse(d * best.1), -d_min * best.2, [0.0, most]);
        for (code, out) in codes.iter().zip(&mut block.codes[group * LINE..][..LINE]) {
            *out = *code as u8;
        }
    }
    block
}

/// A block of sixteen rays with codes from -32 to 31, kept with 32 added.
#[inline(always)]
fn rays(x: &[f32; LEN_MAX]) -> Block {
    const RANGE: [f32; 2] = [-32.0, 31.0];
    let (groups, _) = x.as_chunks::<RAY>();
    let mut scales = [0.0; LEN_MAX / RAY];
    let mut largest = 0.0_f32;
    for (x, scale) in groups.iter().zip(&mut scales) {
        *scale = ray(x, RANGE);
        largest = if scale.abs() > largest.abs() { *scale } else { largest };
    }
    // Scales have one step more below 0 than above.
    let d = f16::from_f32(largest / -128.0);
    let mut block = Block { d: d.to_le_bytes(), ..Block::empty() };
    let d = d.to_f32();
    for (group, (x, scale)) in groups.iter().zip(&scales).enumerate() {
        let nearest = steps(*scale, d);
        let mut best = (f32::INFINITY, 0.0);
        for scale in [nearest - 1.0, nearest, nearest + 1.0] {
            let scale = between(scale, -128.0, 127.0);
            let off = off(x, d * scale, 0.0, RANGE);
            best = if off < best.0 { (off, scale) } else { best };
        }
        block.scales[group] = (best.1 as i8).cast_unsigned();
        let codes = codes(x, inverse(d * best.1), 0.0, RANGE);
        for (code, out) in codes.iter().zip(&mut block.codes[group * RAY..][..RAY]) {
            *out = (*code + 32.0) as u8;
        }
    }
    block
}

/// The best line through `x` with codes from 0 to `most`.
#[inline(always)]
fn line(x: &[f32; LINE], most: f32) -> Fit {
    let (mut low, mut high) = (0.0_f32, f32::NEG_INFINITY);
    for x in x {
        (low, high) = (low.min(*x), high.max(*x));
    }
    let mut best = Fit { scale: 0.0, low, gain: f32::NEG_INFINITY };
    if high <= low {
        return best;
    }
    for width in 0..WIDTHS {
        let width = most - 1.0 + 0.1 * width as f32;
        best = best.or_better(fit_line(x, width / (high - low), low, most));
    }
    for _ in 0..TURNS {
        best = best.or_better(fit_line(x, inverse(best.scale), best.low, most));
    }
    best
}

/// The line of least squares for the codes of `(x - low) * inverse`.
#[inline(always)]
fn fit_line(x: &[f32; LINE], inverse: f32, low: f32, most: f32) -> Fit {
    let codes = codes(x, inverse, low, [0.0, most]);
    let (mut products, mut squares) = ([0.0; LINE], [0.0; LINE]);
    for i in 0..LINE {
        (products[i], squares[i]) = (codes[i] * x[i], codes[i] * codes[i]);
    }
    let (count, sum_x, sum) = (LINE as f32, total(*x), total(codes));
    let (product, square) = (total(products), total(squares));
    let determinant = count * square - sum * sum;
    let mut fit = Fit {
        scale: (count * product - sum_x * sum) / determinant,
        low: (square * sum_x - sum * product) / determinant,
        gain: 0.0,
    };
    // Minimums are kept without a sign. Codes that are all the same have no determinant.
    if !(determinant > 0.0 && fit.low <= 0.0) {
        fit = Fit { scale: if square > 0.0 { product / square } else { 0.0 }, low: 0.0, gain: 0.0 };
    }
    Fit { gain: fit.scale * product + fit.low * sum_x, ..fit }
}

/// The scale of the best codes within `range` for `x`.
#[inline(always)]
fn ray(x: &[f32; RAY], range: [f32; 2]) -> f32 {
    let mut largest = 0.0_f32;
    for x in x {
        largest = if x.abs() > largest.abs() { *x } else { largest };
    }
    let mut best = Fit { scale: 0.0, low: 0.0, gain: 0.0 };
    if largest == 0.0 {
        return 0.0;
    }
    for width in 0..WIDTHS {
        // The largest number gets the lowest code, of which there is one more.
        let width = range[0] + 1.0 - 0.1 * width as f32;
        best = best.or_better(fit_ray(x, width / largest, range));
    }
    for _ in 0..TURNS {
        best = best.or_better(fit_ray(x, inverse(best.scale), range));
    }
    best.scale
}

/// The scale of least squares for the codes of `x * inverse`.
#[inline(always)]
fn fit_ray(x: &[f32; RAY], inverse: f32, range: [f32; 2]) -> Fit {
    let codes = codes(x, inverse, 0.0, range);
    let (mut products, mut squares) = ([0.0; RAY], [0.0; RAY]);
    for i in 0..RAY {
        (products[i], squares[i]) = (codes[i] * x[i], codes[i] * codes[i]);
    }
    let (product, square) = (total(products), total(squares));
    let scale = if square > 0.0 { product / square } else { 0.0 };
    Fit { scale, low: 0.0, gain: scale * product }
}

/// Whole numbers within `range` near `(x - low) * inverse`.
#[inline(always)]
fn codes<const N: usize>(x: &[f32; N], inverse: f32, low: f32, range: [f32; 2]) -> [f32; N] {
    let mut codes = [0.0; N];
    for i in 0..N {
        codes[i] = nearest(between((x[i] - low) * inverse, range[0], range[1]));
    }
    codes
}

/// The sum of squares of what `x` is off by where it is kept as `scale * code + low`.
#[inline(always)]
fn off<const N: usize>(x: &[f32; N], scale: f32, low: f32, range: [f32; 2]) -> f32 {
    let codes = codes(x, inverse(scale), low, range);
    let mut squares = [0.0; N];
    for i in 0..N {
        let off = scale * codes[i] + low - x[i];
        squares[i] = off * off;
    }
    total(squares)
}

/// How many times `step` goes into `x`; 0 where there is no step.
#[inline(always)]
fn steps(x: f32, step: f32) -> f32 {
    if step == 0.0 { 0.0 } else { (x / step).round() }
}

#[inline(always)]
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

#[inline(always)]
fn between(x: f32, least: f32, most: f32) -> f32 {
    let x = if x > least { x } else { least };
    if x < most { x } else { most }
}

/// `x` rounded to the nearest whole number, up to 2^22: in two additions, which vectors have.
#[inline(always)]
fn nearest(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23
    (x + MAGIC) - MAGIC
}

/// The sum in one order: halves added to halves. N is a power of two.
#[inline(always)]
fn total<const N: usize>(mut x: [f32; N]) -> f32 {
    let mut half = N / 2;
    while half > 0 {
        for i in 0..half {
            x[i] += x[i + half];
        }
        half /= 2;
    }
    x[0]
}
