//! Sixteen f32 lanes on AVX-512, AVX2 and plain Rust: one arithmetic, one set of bits.
//! Kernels are written once against [`Isa`]; [`Body`] chooses the instructions at run time.
//! Kernels are small loops: the compiler keeps sums in registers only there, and builds closures without their instructions.

use half::{bf16, f16};

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use portable::Portable;
#[cfg(target_arch = "x86_64")]
use x86::Avx2;
#[cfg(target_arch = "x86_64")]
pub(super) use x86::Avx512;

/// Lanes of a vector; also the number of partial sums of every dot product.
pub(super) const LANES: usize = 16;

/// An instruction set. A value is proof that this processor has it.
///
/// Every method rounds as IEEE 754 says and in the same order in all implementations, so the choice never shows in a result.
pub(super) trait Isa: Copy + Send + Sync {
    /// Sixteen f32.
    type V: Copy;
    /// Sixteen i32, or four bytes in each of their places.
    type Q: Copy;

    /// Runs `kernel` compiled for this instruction set.
    fn call<K: Kernel>(self, kernel: K) -> K::Output;
    fn splat(self, x: f32) -> Self::V;
    /// [`Isa::splat`] in a register of its own, where the compiler would read `x` again at every use.
    #[inline(always)]
    fn broadcast(self, x: f32) -> Self::V {
        self.splat(x)
    }
    fn load(self, x: &[f32; LANES]) -> Self::V;
    fn load_bf16(self, x: &[bf16; LANES]) -> Self::V;
    fn load_f16(self, x: &[f16; LANES]) -> Self::V;
    fn store(self, v: Self::V, out: &mut [f32; LANES]);
    /// a * b + c, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// a > b ? a : b, so b where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// a < b ? yes : no.
    fn select_less(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V;
    /// a < b ? sum + x : sum.
    fn add_where_less(self, sum: Self::V, a: Self::V, b: Self::V, x: Self::V) -> Self::V;
    /// Bit i is a < b in lane i.
    fn less(self, a: Self::V, b: Self::V) -> u16;
    /// v * 2^n for n = t - 1.5 * 2^23, where both v and the result are normal.
    fn scale_by_power(self, v: Self::V, t: Self::V) -> Self::V;
    fn splat_int(self, x: i32) -> Self::Q;
    fn load_bytes(self, x: &[u8; 4 * LANES]) -> Self::Q;
    fn store_bytes(self, q: Self::Q, out: &mut [u8; 4 * LANES]);
    /// The lowest byte of every lane.
    fn store_low_bytes(self, v: Self::V, out: &mut [u8; LANES]);
    fn and(self, a: Self::Q, b: Self::Q) -> Self::Q;
    fn or(self, a: Self::Q, b: Self::Q) -> Self::Q;
    /// Every byte of `a` less that of `b`, modulo 256.
    fn sub_bytes(self, a: Self::Q, b: Self::Q) -> Self::Q;
    /// Every i32 by `n` bits, zeros behind.
    fn shift_left(self, a: Self::Q, n: u32) -> Self::Q;
    /// Every i32 by `n` bits, zeros before.
    fn shift_right(self, a: Self::Q, n: u32) -> Self::Q;
    /// Every i32 of `sums` and the products of four unsigned bytes of `a` with four signed ones of `b`, none of which is -128.
    fn dot4(self, sums: Self::Q, a: Self::Q, b: Self::Q) -> Self::Q;
    /// i32 to f32, rounded to nearest even.
    fn to_float(self, a: Self::Q) -> Self::V;
    fn widen_u8(self, x: &[u8; LANES]) -> Self::V;
    fn widen_i8(self, x: &[u8; LANES]) -> Self::V;
    /// Hints that the cache line at `address` is needed soon; any address is allowed.
    fn prefetch(self, address: *const u8);

    /// The sum of the lanes: halves added to halves, 8 + 8, then 4 + 4, 2 + 2, 1 + 1.
    fn sum(self, v: Self::V) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
        }
        lanes[0]
    }

    /// The largest lane, 0 where none is above; lanes must be numbers.
    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] = if lanes[i] > lanes[i + half] { lanes[i] } else { lanes[i + half] };
            }
        }
        if lanes[0] > 0.0 { lanes[0] } else { 0.0 }
    }

    /// [`Isa::sum`] of four vectors.
    #[inline(always)]
    fn sum4(self, v: [Self::V; 4]) -> [f32; 4] {
        [self.sum(v[0]), self.sum(v[1]), self.sum(v[2]), self.sum(v[3])]
    }

    /// Lane i of vector j becomes lane j of vector i.
    #[inline(always)]
    fn transpose(self, v: [Self::V; LANES]) -> [Self::V; LANES] {
        let mut rows = [[0.0; LANES]; LANES];
        for (v, row) in v.iter().zip(&mut rows) {
            self.store(*v, row);
        }
        let mut out = v;
        for (i, out) in out.iter_mut().enumerate() {
            let mut turned = [0.0; LANES];
            for (turned, row) in turned.iter_mut().zip(&rows) {
                *turned = row[i];
            }
            *out = self.load(&turned);
        }
        out
    }

    /// Lane-wise e^x with an error of about one unit in the last place: 0 below -87, infinite above 88, NaN of NaN.
    ///
    /// x = n ln 2 + r with |r| <= ln(2)/2, then the Taylor series of e^r up to r^7 / 7!, times 2^n.
    #[inline(always)]
    fn exp(self, x: Self::V) -> Self::V {
        const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
        // ln 2 in two parts: n * HIGH is exact for |n| <= 2^8.
        const LN2_HIGH: f32 = 355.0 / 512.0;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        let t = self.fma(x, self.splat(std::f32::consts::LOG2_E), self.splat(MAGIC));
        let n = self.sub(t, self.splat(MAGIC));
        let r = self.fma(n, self.splat(-LN2_HIGH), x);
        let r = self.fma(n, self.splat(-LN2_LOW), r);
        let mut e = self.splat(1.0 / 5040.0);
        for term in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            e = self.fma(e, r, self.splat(term));
        }
        let e = self.scale_by_power(e, t);
        let e = self.select_less(x, self.splat(-87.0), self.splat(0.0), e);
        let e = self.select_less(self.splat(88.0), x, self.splat(f32::INFINITY), e);
        // NaN compares false both times; the bit trick above may have turned it into a number.
        self.select_less(x, self.splat(f32::INFINITY), e, self.mul(x, x))
    }
}

/// A computation to be compiled for each instruction set; implementations mark `run` `#[inline(always)]`.
pub(super) trait Kernel {
    type Output;
    fn run<I: Isa>(self, isa: I) -> Self::Output;
}

/// The instruction set a CPU body runs on.
#[derive(Clone, Copy)]
pub(super) enum Body {
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    Portable(Portable),
}

impl Body {
    /// The widest that this processor has.
    pub(super) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(isa) = Avx512::detect() {
                return Self::Avx512(isa);
            }
            if let Some(isa) = Avx2::detect() {
                return Self::Avx2(isa);
            }
        }
        Self::Portable(Portable)
    }

    /// All that this processor has.
    #[cfg(test)]
    pub(super) fn all() -> Vec<Self> {
        let mut all = vec![Self::Portable(Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(Avx2::detect().map(Self::Avx2));
            all.extend(Avx512::detect().map(Self::Avx512));
        }
        all
    }

    /// Whether 32 vectors fit the registers, or only eight: the size of tiles.
    pub(super) fn is_wide(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => true,
            _ => false,
        }
    }

    /// Runs `kernel` on this instruction set.
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(isa) => isa.call(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(isa) => isa.call(kernel),
            Self::Portable(isa) => isa.call(kernel),
        }
    }
}

/// A storage type of parameters, widened to f32 exactly.
pub(super) trait Element: Copy + Default + Send + Sync + 'static {
    fn widen<I: Isa>(isa: I, x: &[Self; LANES]) -> I::V;
}

impl Element for f32 {
    #[inline(always)]
    fn widen<I: Isa>(isa: I, x: &[Self; LANES]) -> I::V {
        isa.load(x)
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen<I: Isa>(isa: I, x: &[Self; LANES]) -> I::V {
        isa.load_bf16(x)
    }
}

impl Element for f16 {
    #[inline(always)]
    fn widen<I: Isa>(isa: I, x: &[Self; LANES]) -> I::V {
        isa.load_f16(x)
    }
}

/// The first sixteen elements of `x`, zeros after its end.
#[inline(always)]
pub(super) fn widen_part<I: Isa, E: Element>(isa: I, x: &[E]) -> I::V {
    if let Some(full) = x.first_chunk() {
        return E::widen(isa, full);
    }
    let mut lanes = [E::default(); LANES];
    lanes[..x.len()].copy_from_slice(x);
    E::widen(isa, &lanes)
}

/// The lanes of `v` to the first sixteen elements of `out`, or as many as it has.
#[inline(always)]
pub(super) fn store_part<I: Isa>(isa: I, v: I::V, out: &mut [f32]) {
    if let Some(full) = out.first_chunk_mut() {
        return isa.store(v, full);
    }
    let mut lanes = [0.0; LANES];
    isa.store(v, &mut lanes);
    out.copy_from_slice(&lanes[..out.len()]);
}

/// `sums[i]` += a * `b[i]`: one step of the running sums of one row.
#[inline(always)]
pub(super) fn add_products<I: Isa, const C: usize>(isa: I, a: I::V, b: &[I::V; C], sums: &mut [I::V; C]) {
    for (sum, b) in sums.iter_mut().zip(b) {
        *sum = isa.fma(a, *b, *sum);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use crate::ops::samples::{check_bits, numbers};

    struct Exp<'a>(&'a [f32]);

    impl Kernel for Exp<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<I: Isa>(self, isa: I) -> Vec<f32> {
            let mut out = vec![0.0; self.0.len()];
            for (x, out) in self.0.chunks(LANES).zip(out.chunks_mut(LANES)) {
                let mut lanes = [0.0; LANES];
                isa.store(isa.exp(widen_part(isa, x)), &mut lanes);
                out.copy_from_slice(&lanes[..out.len()]);
            }
            out
        }
    }

    #[test]
    fn exp_is_within_two_units_and_has_the_same_bits_on_every_body() {
        let mut xs: Vec<f32> = (-86_999..88_000).map(|i| i as f32 * 1e-3).collect();
        xs.extend(numbers(1, 10_000));
        let got = Body::best().run(Exp(&xs));
        for (x, got) in xs.iter().zip(&got) {
            let expected = f64::from(*x).exp();
            let off = (f64::from(*got) - expected).abs() / expected;
            assert!(off < 2.0 * f64::from(f32::EPSILON), "e^{x} = {got}, expected {expected}");
        }
        for body in Body::all() {
            check_bits("exp", &body.run(Exp(&xs)), &got);
        }
    }

    #[test]
    fn exp_of_the_extremes() {
        let xs = [0.0, -0.0, -87.1, -1e30, f32::NEG_INFINITY, 88.1, f32::INFINITY, 1e-40, f32::NAN];
        for body in Body::all() {
            let got = body.run(Exp(&xs));
            check_bits("exp", &got[..8], &[1.0, 1.0, 0.0, 0.0, 0.0, f32::INFINITY, f32::INFINITY, 1.0]);
            assert!(got[8].is_nan());
        }
    }

    /// Every operation that has its own implementation somewhere, on sixteen vectors.
    struct Each<'a>(&'a [[f32; LANES]; LANES]);

    impl Kernel for Each<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<I: Isa>(self, isa: I) -> Vec<f32> {
            let v = self.0.map(|v| isa.load(&v));
            let mut results = isa.transpose(v).to_vec();
            let (a, b, c) = (v[0], v[1], v[2]);
            results.extend([isa.fma(a, b, c), isa.add(a, b), isa.sub(a, b), isa.mul(a, b), isa.div(a, b)]);
            results.extend([isa.max(a, b), isa.select_less(a, b, c, v[3])]);
            results.push(isa.add_where_less(a, b, c, v[3]));
            results.extend([isa.less(a, b), isa.less(b, c), isa.less(c, c)].map(|mask| isa.splat(f32::from(mask))));
            let halves = self.0[4].map(f16::from_f32);
            let brains = self.0[5].map(bf16::from_f32);
            results.extend([isa.load_f16(&halves), isa.load_bf16(&brains)]);
            let bytes = |row: usize| {
                let mut bytes = [0; 4 * LANES];
                let source = self.0[row].iter().flat_map(|x| x.to_bits().to_le_bytes());
                bytes.iter_mut().zip(source).for_each(|(byte, x)| *byte = x);
                bytes
            };
            let (p, q) = (isa.load_bytes(&bytes(6)), isa.load_bytes(&bytes(7).map(|byte| byte.max(0x81))));
            let mut ints =
                vec![isa.splat_int(-7), isa.and(p, q), isa.or(p, q), isa.shift_left(p, 3), isa.shift_right(p, 5)];
            ints.push(isa.sub_bytes(p, q));
            ints.extend([
                isa.dot4(isa.shift_right(p, 9), p, q),
                isa.dot4(q, isa.splat_int(-1), isa.splat_int(0x7f7f_7f7f)),
            ]);
            ints.push(isa.dot4(isa.splat_int(1), isa.splat_int(-1), isa.splat_int(0x8181_8181_u32.cast_signed())));
            for ints in &ints {
                let mut stored = [0; 4 * LANES];
                isa.store_bytes(*ints, &mut stored);
                results.push(isa.to_float(isa.load_bytes(&stored)));
            }
            results.extend(ints.into_iter().map(|ints| isa.to_float(ints)));
            let mut few = [0; LANES];
            isa.store_low_bytes(v[9], &mut few);
            results.push(isa.widen_u8(&few));
            let few: [u8; LANES] = std::array::from_fn(|i| bytes(8)[i]);
            results.extend([isa.widen_u8(&few), isa.widen_i8(&few)]);
            results.push(isa.splat(isa.largest(b)));
            let mut out: Vec<f32> = isa.sum4([a, b, c, v[3]]).into();
            out.extend([a, b, c, v[3]].map(|v| isa.sum(v)));
            for result in results {
                let mut lanes = [0.0; LANES];
                isa.store(result, &mut lanes);
                out.extend(lanes);
            }
            out
        }
    }

    #[test]
    fn every_operation_has_the_same_bits_on_every_body() {
        let numbers = numbers(3, LANES * LANES);
        let mut rows = [[0.0; LANES]; LANES];
        rows.iter_mut().flatten().zip(&numbers).for_each(|(out, x)| *out = *x);
        rows[0][3] = f32::NAN;
        let first = Body::Portable(Portable).run(Each(&rows));
        let bits = |all: &[f32]| all.iter().map(|x| if x.is_nan() { 0 } else { x.to_bits() }).collect::<Vec<_>>();
        for body in Body::all() {
            assert_eq!(bits(&body.run(Each(&rows))), bits(&first));
        }
        assert_eq!(bits(&first[..4]), bits(&first[4..8]), "sum4 and sum");
        let turned: Vec<f32> = (0..LANES * LANES).map(|i| rows[i % LANES][i / LANES]).collect();
        assert_eq!(bits(&first[8..8 + LANES * LANES]), bits(&turned), "transpose");
    }
}
