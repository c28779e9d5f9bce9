//! Sixteen lanes as one AVX-512 register or two AVX registers.
#![allow(unsafe_code)]

use super::{Isa, Kernel, LANES};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// AVX-512F and its integer dot products (VNNI), with AVX2, FMA and F16C. The first processors with AVX-512 have no VNNI and slow
/// down with it: they use AVX2.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Avx512(());

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Avx2(());

impl Avx512 {
    pub(in crate::ops) fn detect() -> Option<Self> {
        let all = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni");
        (all && Avx2::detect().is_some()).then_some(Self(()))
    }
}

impl Avx2 {
    pub(super) fn detect() -> Option<Self> {
        let all =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        all.then_some(Self(()))
    }
}

// Never inlined: a kernel among others competes with them for registers, and loses.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512vnni,avx2,fma,f16c")]
fn with_avx512<K: Kernel>(isa: Avx512, kernel: K) -> K::Output {
    kernel.run(isa)
}

#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
fn with_avx2<K: Kernel>(isa: Avx2, kernel: K) -> K::Output {
    kernel.run(isa)
}

impl Isa for Avx512 {
    type V = __m512;
    type Q = __m512i;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` exists only where `detect` found the features.
        unsafe { with_avx512(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: `self` is proof of AVX-512F; the same holds for every block of this implementation.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn broadcast(self, x: f32) -> __m512 {
        // SAFETY: AVX-512F.
        unsafe { in_register(x) }
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> __m512 {
        // SAFETY: AVX-512F, and 16 readable floats; no alignment is asked for.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> __m512 {
        // SAFETY: AVX-512F, and 32 readable bytes; no alignment is asked for.
        unsafe {
            let bits = _mm256_loadu_si256(x.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
        }
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> __m512 {
        // SAFETY: AVX-512F, and 32 readable bytes; no alignment is asked for.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }

    #[inline(always)]
    fn store(self, v: __m512, out: &mut [f32; LANES]) {
        // SAFETY: AVX-512F, and 16 writable floats; no alignment is asked for.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: AVX-512F.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: AVX-512F.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: AVX-512F.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: AVX-512F.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: AVX-512F.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: AVX-512F.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn select_less(self, a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 {
        // SAFETY: AVX-512F.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), no, yes) }
    }

    #[inline(always)]
    fn add_where_less(self, sum: __m512, a: __m512, b: __m512, x: __m512) -> __m512 {
        // SAFETY: AVX-512F.
        unsafe { _mm512_mask_add_ps(sum, _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), sum, x) }
    }

    #[inline(always)]
    fn less(self, a: __m512, b: __m512) -> u16 {
        // SAFETY: AVX-512F.
        unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b) }
    }

    #[inline(always)]
    fn scale_by_power(self, v: __m512, t: __m512) -> __m512 {
        // SAFETY: AVX-512F.
        unsafe {
            let power = _mm512_slli_epi32::<23>(_mm512_castps_si512(t));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), power))
        }
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> __m512i {
        // SAFETY: AVX-512F.
        unsafe { _mm512_set1_epi32(x) }
    }

    #[inline(always)]
    fn load_bytes(self, x: &[u8; 4 * LANES]) -> __m512i {
        // SAFETY: AVX-512F, and 64 readable bytes; no alignment is asked for.
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store_bytes(self, q: __m512i, out: &mut [u8; 4 * LANES]) {
        // SAFETY: AVX-512F, and 64 writable bytes; no alignment is asked for.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), q) }
    }

    #[inline(always)]
    fn store_low_bytes(self, v: __m512, out: &mut [u8; LANES]) {
        // SAFETY: AVX-512F, and 16 writable bytes; no alignment is asked for.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(_mm512_castps_si512(v))) }
    }

    #[inline(always)]
    fn sub_bytes(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: AVX-512F, which has no bytes: no borrow leaves a byte whose highest bit is set in `a` and clear in `b`; that bit follows.
        unsafe {
            let high = _mm512_set1_epi32(0x8080_8080_u32.cast_signed());
            let low = _mm512_sub_epi32(_mm512_or_si512(a, high), _mm512_andnot_si512(high, b));
            _mm512_xor_si512(low, _mm512_andnot_si512(_mm512_xor_si512(a, b), high))
        }
    }

    #[inline(always)]
    fn and(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: AVX-512F.
        unsafe { _mm512_and_si512(a, b) }
    }

    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: AVX-512F.
        unsafe { _mm512_or_si512(a, b) }
    }

    #[inline(always)]
    fn shift_left(self, a: __m512i, n: u32) -> __m512i {
        // SAFETY: AVX-512F.
        unsafe { _mm512_sll_epi32(a, _mm_cvtsi32_si128(n.cast_signed())) }
    }

    #[inline(always)]
    fn shift_right(self, a: __m512i, n: u32) -> __m512i {
        // SAFETY: AVX-512F.
        unsafe { _mm512_srl_epi32(a, _mm_cvtsi32_si128(n.cast_signed())) }
    }

    #[inline(always)]
    fn dot4(self, sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: VNNI.
        unsafe { _mm512_dpbusd_epi32(sums, a, b) }
    }

    #[inline(always)]
    fn to_float(self, a: __m512i) -> __m512 {
        // SAFETY: AVX-512F.
        unsafe { _mm512_cvtepi32_ps(a) }
    }

    #[inline(always)]
    fn widen_u8(self, x: &[u8; LANES]) -> __m512 {
        // SAFETY: AVX-512F, and 16 readable bytes.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(x.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn widen_i8(self, x: &[u8; LANES]) -> __m512 {
        // SAFETY: AVX-512F, and 16 readable bytes.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }

    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        // SAFETY: AVX-512F, which has AVX and SSE.
        unsafe {
            let v = _mm512_add_ps(v, _mm512_shuffle_f32x4::<0b01_00_11_10>(v, v));
            let v = _mm512_castps512_ps256(v);
            sum8(v)
        }
    }

    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        // SAFETY: AVX-512F; the stored array has the size of the register.
        unsafe {
            // 8 + 8: the halves of a, then those of b; the same for c and d.
            let ab = fold_halves(a, b);
            let cd = fold_halves(c, d);
            // 4 + 4: quarters 0 and 2 on top of 1 and 3; a, b, c, d with four lanes each.
            let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd);
            let odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd);
            let v = _mm512_add_ps(even, odd);
            // 2 + 2, then 1 + 1 inside of each quarter.
            let v = _mm512_add_ps(v, _mm512_permute_ps::<0b01_00_11_10>(v));
            let v = _mm512_add_ps(v, _mm512_permute_ps::<0b10_11_00_01>(v));
            let firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
            let v = _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, v));
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), v);
            out
        }
    }

    #[inline(always)]
    fn transpose(self, v: [__m512; LANES]) -> [__m512; LANES] {
        // SAFETY: AVX-512F.
        unsafe {
            let mut a = v;
            // 2x2 blocks of lanes, then of pairs, inside of each quarter: a[4i + c] holds, in quarter q, column 4q + c of
            // rows 4i..4i + 4.
            for i in 0..8 {
                let (x, y) = (v[2 * i], v[2 * i + 1]);
                a[2 * i] = _mm512_unpacklo_ps(x, y);
                a[2 * i + 1] = _mm512_unpackhi_ps(x, y);
            }
            let mut b = a;
            for i in 0..4 {
                let (p, q) = (_mm512_castps_pd(a[4 * i]), _mm512_castps_pd(a[4 * i + 1]));
                let (r, s) = (_mm512_castps_pd(a[4 * i + 2]), _mm512_castps_pd(a[4 * i + 3]));
                b[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, r));
                b[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, r));
                b[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(q, s));
                b[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(q, s));
            }
            // The 4x4 quarters of each column class c.
            let mut out = b;
            for c in 0..4 {
                let even01 = _mm512_shuffle_f32x4::<0b10_00_10_00>(b[c], b[4 + c]);
                let odd01 = _mm512_shuffle_f32x4::<0b11_01_11_01>(b[c], b[4 + c]);
                let even23 = _mm512_shuffle_f32x4::<0b10_00_10_00>(b[8 + c], b[12 + c]);
                let odd23 = _mm512_shuffle_f32x4::<0b11_01_11_01>(b[8 + c], b[12 + c]);
                out[c] = _mm512_shuffle_f32x4::<0b10_00_10_00>(even01, even23);
                out[4 + c] = _mm512_shuffle_f32x4::<0b10_00_10_00>(odd01, odd23);
                out[8 + c] = _mm512_shuffle_f32x4::<0b11_01_11_01>(even01, even23);
                out[12 + c] = _mm512_shuffle_f32x4::<0b11_01_11_01>(odd01, odd23);
            }
            out
        }
    }
}

/// `x` in every lane, of a register whose origin the compiler does not know.
#[inline]
#[target_feature(enable = "avx512f")]
fn in_register(x: f32) -> __m512 {
    let mut v = _mm512_set1_ps(x);
    // SAFETY: no instruction at all.
    unsafe { std::arch::asm!("/* {0} */", inout(zmm_reg) v, options(pure, nomem, nostack, preserves_flags)) }
    v
}

/// Both halves of a added, then both halves of b.
#[inline]
#[target_feature(enable = "avx512f")]
fn fold_halves(a: __m512, b: __m512) -> __m512 {
    let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b);
    let high = _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b);
    _mm512_add_ps(low, high)
}

/// 4 + 4, 2 + 2, 1 + 1.
#[inline]
#[target_feature(enable = "avx")]
fn sum8(v: __m256) -> f32 {
    let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    let v = _mm_add_ss(v, _mm_shuffle_ps::<1>(v, v));
    _mm_cvtss_f32(v)
}

/// Products of two bytes are added as 16 bits, which hold them where the unsigned one has seven bits: its eighth goes apart.
#[inline]
#[target_feature(enable = "avx2")]
fn dot4(sums: __m256i, a: __m256i, b: __m256i) -> __m256i {
    let (low, high) = (_mm256_and_si256(a, _mm256_set1_epi8(127)), _mm256_srli_epi16::<7>(a));
    let low = _mm256_maddubs_epi16(low, b);
    let high = _mm256_maddubs_epi16(_mm256_and_si256(high, _mm256_set1_epi8(1)), b);
    let low = _mm256_madd_epi16(low, _mm256_set1_epi16(1));
    let high = _mm256_madd_epi16(high, _mm256_set1_epi16(128));
    _mm256_add_epi32(sums, _mm256_add_epi32(low, high))
}

type Pair = [__m256; 2];

impl Isa for Avx2 {
    type V = Pair;
    type Q = [__m256i; 2];

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` exists only where `detect` found the features.
        unsafe { with_avx2(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Pair {
        // SAFETY: `self` is proof of AVX2, FMA and F16C; the same holds for every block of this implementation.
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Pair {
        // SAFETY: AVX, and twice 8 readable floats; no alignment is asked for.
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x[8..].as_ptr())] }
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> Pair {
        // SAFETY: AVX2, and twice 16 readable bytes; no alignment is asked for.
        unsafe {
            let (low, high) = (_mm_loadu_si128(x.as_ptr().cast()), _mm_loadu_si128(x[8..].as_ptr().cast()));
            let low = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(low));
            let high = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(high));
            [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
        }
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> Pair {
        // SAFETY: F16C, and twice 16 readable bytes; no alignment is asked for.
        unsafe {
            let (low, high) = (_mm_loadu_si128(x.as_ptr().cast()), _mm_loadu_si128(x[8..].as_ptr().cast()));
            [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
        }
    }

    #[inline(always)]
    fn store(self, v: Pair, out: &mut [f32; LANES]) {
        // SAFETY: AVX, and twice 8 writable floats; no alignment is asked for.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(out[8..].as_mut_ptr(), v[1]);
        }
    }

    #[inline(always)]
    fn fma(self, a: Pair, b: Pair, c: Pair) -> Pair {
        // SAFETY: FMA.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn add(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: AVX.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn sub(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: AVX.
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: AVX.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn div(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: AVX.
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn max(self, a: Pair, b: Pair) -> Pair {
        // SAFETY: AVX.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn select_less(self, a: Pair, b: Pair, yes: Pair, no: Pair) -> Pair {
        // SAFETY: AVX.
        unsafe {
            let low = _mm256_blendv_ps(no[0], yes[0], _mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0]));
            let high = _mm256_blendv_ps(no[1], yes[1], _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1]));
            [low, high]
        }
    }

    #[inline(always)]
    fn add_where_less(self, sum: Pair, a: Pair, b: Pair, x: Pair) -> Pair {
        self.select_less(a, b, self.add(sum, x), sum)
    }

    #[inline(always)]
    fn less(self, a: Pair, b: Pair) -> u16 {
        // SAFETY: AVX.
        let mask = |i: usize| unsafe { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(a[i], b[i])) };
        (mask(0) | mask(1) << 8) as u16
    }

    #[inline(always)]
    fn scale_by_power(self, v: Pair, t: Pair) -> Pair {
        // SAFETY: AVX2.
        unsafe {
            let low = _mm256_slli_epi32::<23>(_mm256_castps_si256(t[0]));
            let high = _mm256_slli_epi32::<23>(_mm256_castps_si256(t[1]));
            let low = _mm256_add_epi32(_mm256_castps_si256(v[0]), low);
            let high = _mm256_add_epi32(_mm256_castps_si256(v[1]), high);
            [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
        }
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> [__m256i; 2] {
        // SAFETY: AVX.
        unsafe { [_mm256_set1_epi32(x); 2] }
    }

    #[inline(always)]
    fn load_bytes(self, x: &[u8; 4 * LANES]) -> [__m256i; 2] {
        // SAFETY: AVX, and twice 32 readable bytes; no alignment is asked for.
        unsafe { [_mm256_loadu_si256(x.as_ptr().cast()), _mm256_loadu_si256(x[32..].as_ptr().cast())] }
    }

    #[inline(always)]
    fn store_bytes(self, q: [__m256i; 2], out: &mut [u8; 4 * LANES]) {
        // SAFETY: AVX, and twice 32 writable bytes; no alignment is asked for.
        unsafe {
            _mm256_storeu_si256(out.as_mut_ptr().cast(), q[0]);
            _mm256_storeu_si256(out[32..].as_mut_ptr().cast(), q[1]);
        }
    }

    #[inline(always)]
    fn store_low_bytes(self, v: [__m256; 2], out: &mut [u8; LANES]) {
        // SAFETY: AVX2, and 16 writable bytes; no alignment is asked for.
        unsafe {
            let low = _mm256_set1_epi32(0xff);
            let [first, last] = v.map(|v| _mm256_and_si256(_mm256_castps_si256(v), low));
            // Packing works in halves of registers: four lanes of `first`, four of `last`, and again.
            let pairs = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(first, last));
            let bytes = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs));
            _mm_storeu_si128(out.as_mut_ptr().cast(), bytes);
        }
    }

    #[inline(always)]
    fn sub_bytes(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: AVX2.
        unsafe { [_mm256_sub_epi8(a[0], b[0]), _mm256_sub_epi8(a[1], b[1])] }
    }

    #[inline(always)]
    fn and(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: AVX2.
        unsafe { [_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])] }
    }

    #[inline(always)]
    fn or(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: AVX2.
        unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
    }

    #[inline(always)]
    fn shift_left(self, a: [__m256i; 2], n: u32) -> [__m256i; 2] {
        // SAFETY: AVX2.
        unsafe {
            let n = _mm_cvtsi32_si128(n.cast_signed());
            [_mm256_sll_epi32(a[0], n), _mm256_sll_epi32(a[1], n)]
        }
    }

    #[inline(always)]
    fn shift_right(self, a: [__m256i; 2], n: u32) -> [__m256i; 2] {
        // SAFETY: AVX2.
        unsafe {
            let n = _mm_cvtsi32_si128(n.cast_signed());
            [_mm256_srl_epi32(a[0], n), _mm256_srl_epi32(a[1], n)]
        }
    }

    #[inline(always)]
    fn dot4(self, sums: [__m256i; 2], a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: AVX2.
        unsafe { [dot4(sums[0], a[0], b[0]), dot4(sums[1], a[1], b[1])] }
    }

    #[inline(always)]
    fn to_float(self, a: [__m256i; 2]) -> Pair {
        // SAFETY: AVX.
        unsafe { [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])] }
    }

    #[inline(always)]
    fn widen_u8(self, x: &[u8; LANES]) -> Pair {
        // SAFETY: AVX2, and 16 readable bytes.
        unsafe {
            let x = _mm_loadu_si128(x.as_ptr().cast());
            let high = _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(x));
            [_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)), _mm256_cvtepi32_ps(high)]
        }
    }

    #[inline(always)]
    fn widen_i8(self, x: &[u8; LANES]) -> Pair {
        // SAFETY: AVX2, and 16 readable bytes.
        unsafe {
            let x = _mm_loadu_si128(x.as_ptr().cast());
            let high = _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(x));
            [_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)), _mm256_cvtepi32_ps(high)]
        }
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }

    #[inline(always)]
    fn sum(self, v: Pair) -> f32 {
        // SAFETY: AVX.
        unsafe { sum8(_mm256_add_ps(v[0], v[1])) }
    }
}
