//! Sixteen lanes in plain Rust: the reference for the other bodies, and what runs where they do not.

use super::{Isa, Kernel, LANES};
use half::{bf16, f16};

/// No particular instruction set.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Portable;

type V = [f32; LANES];
type Q = [i32; LANES];

#[inline(always)]
fn zip(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Isa for Portable {
    type V = V;
    type Q = Q;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; LANES]
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> V {
        *x
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> V {
        x.map(bf16::to_f32)
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> V {
        x.map(f16::to_f32)
    }

    #[inline(always)]
    fn store(self, v: V, out: &mut [f32; LANES]) {
        *out = v;
    }

    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn select_less(self, a: V, b: V, yes: V, no: V) -> V {
        std::array::from_fn(|i| if a[i] < b[i] { yes[i] } else { no[i] })
    }

    #[inline(always)]
    fn add_where_less(self, sum: V, a: V, b: V, x: V) -> V {
        std::array::from_fn(|i| if a[i] < b[i] { sum[i] + x[i] } else { sum[i] })
    }

    #[inline(always)]
    fn less(self, a: V, b: V) -> u16 {
        (0..LANES).fold(0, |mask, i| mask | u16::from(a[i] < b[i]) << i)
    }

    #[inline(always)]
    fn scale_by_power(self, v: V, t: V) -> V {
        zip(v, t, |v, t| f32::from_bits(v.to_bits().wrapping_add(t.to_bits() << 23)))
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Q {
        [x; LANES]
    }

    #[inline(always)]
    fn load_bytes(self, x: &[u8; 4 * LANES]) -> Q {
        let (fours, _) = x.as_chunks();
        std::array::from_fn(|i| i32::from_le_bytes(fours[i]))
    }

    #[inline(always)]
    fn store_bytes(self, q: Q, out: &mut [u8; 4 * LANES]) {
        let (fours, _) = out.as_chunks_mut();
        fours.iter_mut().zip(q).for_each(|(four, q)| *four = q.to_le_bytes());
    }

    #[inline(always)]
    fn store_low_bytes(self, v: V, out: &mut [u8; LANES]) {
        out.iter_mut().zip(v).for_each(|(out, x)| *out = x.to_bits() as u8);
    }

    #[inline(always)]
    fn and(self, a: Q, b: Q) -> Q {
        std::array::from_fn(|i| a[i] & b[i])
    }

    #[inline(always)]
    fn sub_bytes(self, a: Q, b: Q) -> Q {
        std::array::from_fn(|i| {
            let (a, b) = (a[i].to_le_bytes(), b[i].to_le_bytes());
            i32::from_le_bytes(std::array::from_fn(|j| a[j].wrapping_sub(b[j])))
        })
    }

    #[inline(always)]
    fn or(self, a: Q, b: Q) -> Q {
        std::array::from_fn(|i| a[i] | b[i])
    }

    #[inline(always)]
    fn shift_left(self, a: Q, n: u32) -> Q {
        a.map(|a| a << n)
    }

    #[inline(always)]
    fn shift_right(self, a: Q, n: u32) -> Q {
        a.map(|a| (a.cast_unsigned() >> n).cast_signed())
    }

    #[inline(always)]
    fn dot4(self, sums: Q, a: Q, b: Q) -> Q {
        std::array::from_fn(|i| {
            let products = a[i].to_le_bytes().into_iter().zip(b[i].to_le_bytes());
            products.fold(sums[i], |sum, (a, b)| sum.wrapping_add(i32::from(a) * i32::from(b.cast_signed())))
        })
    }

    #[inline(always)]
    fn to_float(self, a: Q) -> V {
        a.map(|a| a as f32)
    }

    #[inline(always)]
    fn widen_u8(self, x: &[u8; LANES]) -> V {
        x.map(f32::from)
    }

    #[inline(always)]
    fn widen_i8(self, x: &[u8; LANES]) -> V {
        x.map(|x| f32::from(x.cast_signed()))
    }

    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
}
