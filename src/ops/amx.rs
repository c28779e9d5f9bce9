//! The matrix unit of recent Intel server processors (AMX): eight registers of sixteen rows of 64 bytes, and instructions that add the
//! product of two of them to a third. Owns whether there is one, its set-up in a thread and the innermost loops; what is multiplied in
//! which layout is the business of `linear::matrix` and `quantized::matrix`. Written as assembly because the compiler's own functions for
//! it are not stable.
#![allow(unsafe_code)]

use crate::ops::storage::Target;
use half::bf16;
use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::OnceLock;

/// Rows of a register.
pub(super) const ROWS: usize = 16;
/// Columns of a product of bf16: four registers of sixteen sums.
const COLUMNS: usize = 64;
/// Pairs along k that one instruction takes.
pub(super) const PAIRS: usize = 16;
/// Of an operand that is read again and again: half of the level-2 cache that a core of these processors has.
pub(super) const CACHE_BYTES: usize = 1 << 20;
/// Bytes of a panel that one step reads: sixteen pairs of 64 columns.
const STEP_BYTES: usize = PAIRS * COLUMNS * 4;

/// Parts of bf16 that a number of float32 is cut into.
pub(super) const PARTS: usize = 3;
/// Rows and columns of a product of such numbers: two registers each way.
pub(super) const SQUARE: usize = 2 * ROWS;

/// Sixteen pairs of bf16, a row of a register.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
pub(super) struct Vector(pub(super) [u32; PAIRS]);

/// Proof that this processor has the unit and that the system lets this process use it.
#[derive(Clone, Copy)]
pub(super) struct Amx(());

/// What else a product asks the caches for.
#[derive(Clone, Copy, Default)]
pub(super) struct Hints<'a> {
    /// With one strip: how many bytes ahead of use the panel; not at all where 0.
    pub(super) ahead: usize,
    /// With two strips: the places of as many rows below those of the result, which come next.
    pub(super) more_rows: bool,
    /// With two strips: what is read later.
    pub(super) later: &'a [bf16],
}

impl Amx {
    pub(super) fn detect() -> Option<Self> {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        AVAILABLE.get_or_init(available).then_some(Self(()))
    }

    /// The registers of this thread until they are dropped, set up for left operands of `rows` rows of `bytes` bytes, one to sixteen and
    /// a multiple of four up to 64.
    pub(super) fn registers(self, rows: usize, bytes: usize) -> Registers {
        assert!((1..=ROWS).contains(&rows) && (4..=64).contains(&bytes) && bytes.is_multiple_of(4));
        let mut set_up = SetUp { palette: 1, ..SetUp::default() };
        // Four registers of sums, one of the left operand, three of right ones.
        set_up.row_bytes[..8].fill(64);
        set_up.row_bytes[4] = bytes as u16;
        set_up.rows[..5].fill(rows as u8);
        set_up.rows[5..8].fill((bytes / 4) as u8);
        // SAFETY: `self` is proof of the unit; the structure is what the instruction reads.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const set_up, options(nostack, preserves_flags)) };
        Registers { rows, bytes, thread: PhantomData }
    }
}

/// What `ldtilecfg` reads (Intel's Software Developer's Manual, volume 1, 18.3.1).
#[derive(Default)]
#[repr(C, align(64))]
struct SetUp {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Whether processor and system have it. Linux wants to be asked before a process uses so large registers.
fn available() -> bool {
    /// Leaf 7 of CPUID, EDX: AMX-BF16, AMX-TILE, AMX-INT8.
    const UNIT: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    if !is_x86_feature_detected!("avx512f") || __cpuid_count(7, 0).edx & UNIT != UNIT {
        return false;
    }
    // SAFETY: the call has no other effect than the permission.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// Asks for the `len` bytes that lie `ahead` bytes after `start`, if that is not 0.
#[inline(always)]
fn prefetch(start: *const u8, len: usize, ahead: usize) {
    if ahead > 0 {
        for line in (0..len).step_by(64) {
            // SAFETY: a hint; any address is allowed.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(ahead + line).cast()) };
        }
    }
}

/// Asks for the line at `address`, to be written.
#[inline(always)]
fn prefetch_to_write(address: usize) {
    // SAFETY: a hint; any address is allowed, and processors with the unit have it. The compiler's own function asks for reading where
    // this instruction is no feature of the whole program.
    unsafe { asm!("prefetchw [{}]", in(reg) address, options(nomem, nostack, preserves_flags)) };
}

/// The lines that two strips ask for while they go over half of a panel, a few at each step: all at once, they would hold up what is
/// read.
struct Wishes<'a> {
    out: &'a Target<'a>,
    /// First column of the half.
    column: usize,
    /// Those of the places below, two in each row.
    places: Range<usize>,
    places_each: usize,
    /// Those of what is read later.
    later: Range<*const bf16>,
    later_each: usize,
}

impl<'a> Wishes<'a> {
    /// Numbers of a line of the panel.
    const LINE: usize = 64 / size_of::<bf16>();

    #[inline(always)]
    fn new(hints: Hints<'a>, out: &'a Target<'a>, column: usize, steps: usize) -> Self {
        let places = if hints.more_rows { 2 * out.rows } else { 0 };
        let (first, second) = hints.later.split_at(hints.later.len() / 2);
        let later = if column == 0 { first } else { second };
        Self {
            out,
            column,
            places: 0..places,
            places_each: places.div_ceil(steps.max(1)),
            later: later.as_ptr_range(),
            later_each: later.len().div_ceil(Self::LINE).div_ceil(steps.max(1)),
        }
    }

    /// Asks for those of one step.
    #[inline(always)]
    fn ask(&mut self) {
        for line in self.places.by_ref().take(self.places_each) {
            let place = (self.out.rows + line / 2) * self.out.across + self.column + line % 2 * PAIRS;
            prefetch_to_write(self.out.start.wrapping_add(place).addr());
        }
        for _ in 0..self.later_each {
            if self.later.start < self.later.end {
                // SAFETY: a hint; any address is allowed.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(self.later.start.cast()) };
                self.later.start = self.later.start.wrapping_add(Self::LINE);
            }
        }
    }
}

/// Products of signed bytes, sixteen rows and columns.
#[repr(C, align(64))]
pub(super) struct Dots(pub(super) [[[u8; 64]; ROWS]; 2]);

/// The registers of one thread, in use.
pub(super) struct Registers {
    rows: usize,
    bytes: usize,
    /// They stay with their thread.
    thread: PhantomData<*mut ()>,
}

impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: the registers are in use until here. Without this every switch of threads would save them.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}

impl Registers {
    /// The product of one strip of rows, or two whole ones, `left` `[strips][pairs / 16, rows, 16]`, and the panel `right` `[pairs, 64]`,
    /// both pairs of bf16, whose number is a multiple of sixteen, to `out`, which has the rows of the strips.
    ///
    /// A sum over k is, for every 32 numbers in order: the products of the even ones in one chain of fused multiply-adds from zero, those
    /// of the odd ones in another, the two added, the result added to the sum; subnormal numbers count as zeros (Intel's Software
    /// Developer's Manual, TDPBF16PS).
    pub(super) fn multiply_bf16<P>(&self, left: &[u32], right: &[P], out: &Target<'_>, hints: Hints<'_>) {
        let (steps, strips) = (size_of_val(right) / STEP_BYTES, out.rows / self.rows);
        assert!(strips == 1 || strips == 2 && self.rows == ROWS);
        assert!(size_of_val(right) == steps * STEP_BYTES && left.len() == strips * steps * self.rows * PAIRS);
        assert!(out.width == COLUMNS && out.rows == strips * self.rows);
        let (a, b) = (left.as_ptr().cast(), right.as_ptr().cast());
        // SAFETY: the operands have these sizes, which are checked above, and the target is to be written.
        unsafe {
            if strips == 1 {
                return self.one_strip(a, b, steps, out, hints.ahead);
            }
            for column in [0, COLUMNS / 2] {
                self.two_strips([a, b], steps, out, column, Wishes::new(hints, out, column, steps));
            }
        }
    }

    /// One strip over the columns of a panel.
    ///
    /// # Safety
    /// `a` points to `steps` steps of a strip and `b` to as many of a panel, `out` is to be written.
    #[inline(always)]
    unsafe fn one_strip(&self, a: *const u8, b: *const u8, steps: usize, out: &Target<'_>, ahead: usize) {
        // SAFETY: only what the caller promises is read and written; the compiler uses none of the registers.
        unsafe {
            zero();
            for step in 0..steps {
                let (a, b) = (a.add(step * self.rows * PAIRS * 4), b.add(step * STEP_BYTES));
                prefetch(b, STEP_BYTES, ahead);
                asm!(
                    "tileloadd tmm4, [{a} + {line}]",
                    "tileloadd tmm5, [{b} + {row}]",
                    "tdpbf16ps tmm0, tmm4, tmm5",
                    "tileloadd tmm6, [{b} + {row} + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm6",
                    "tileloadd tmm7, [{b} + {row} + 128]",
                    "tdpbf16ps tmm2, tmm4, tmm7",
                    "tileloadd tmm5, [{b} + {row} + 192]",
                    "tdpbf16ps tmm3, tmm4, tmm5",
                    a = in(reg) a, line = in(reg) 4 * PAIRS, b = in(reg) b, row = in(reg) 4 * COLUMNS,
                    options(readonly, nostack, preserves_flags)
                );
            }
            asm!(
                "tilestored [{to} + {across}], tmm0",
                "tilestored [{to} + {across} + 64], tmm1",
                "tilestored [{to} + {across} + 128], tmm2",
                "tilestored [{to} + {across} + 192], tmm3",
                to = in(reg) out.start, across = in(reg) 4 * out.across,
                options(nostack, preserves_flags)
            );
        }
    }

    /// Two strips over half of the columns of a panel, those from `column` on: four loads for four products, where one strip takes five.
    ///
    /// # Safety
    /// Strips have sixteen rows. `a` points to `steps` steps of one strip and then of another, `b` to as many of a panel, `out` is to be
    /// written.
    #[inline(always)]
    unsafe fn two_strips(
        &self,
        [a, b]: [*const u8; 2],
        steps: usize,
        out: &Target<'_>,
        column: usize,
        mut wishes: Wishes<'_>,
    ) {
        let step_bytes = ROWS * PAIRS * 4;
        // SAFETY: only what the caller promises is read and written; the compiler uses none of the registers.
        unsafe {
            let (b, to, across) = (b.add(4 * column), out.start.add(column), out.across);
            zero();
            for step in 0..steps {
                let (first, second, b) =
                    (a.add(step * step_bytes), a.add((steps + step) * step_bytes), b.add(step * STEP_BYTES));
                wishes.ask();
                asm!(
                    "tileloadd tmm4, [{first} + {line}]",
                    "tileloadd tmm6, [{b} + {row}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{b} + {row} + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{second} + {line}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    first = in(reg) first, second = in(reg) second, line = in(reg) 4 * PAIRS,
                    b = in(reg) b, row = in(reg) 4 * COLUMNS,
                    options(readonly, nostack, preserves_flags)
                );
            }
            store_square(to, across);
        }
    }

    /// A square of a product of float32, cut into parts, the largest first: `left` `[steps, PARTS, 32 rows]` and `right` `[steps, PARTS, 2,
    /// 16]`, both vectors of sixteen pairs along k, the latter of one pair in sixteen columns. To `out`: of the products of parts the six
    /// largest, for every step of 32 numbers in the order in which operands stay in the registers longest.
    pub(super) fn multiply_parts(&self, left: &[Vector], right: &[Vector], out: &Target<'_>) {
        const LEN: usize = PARTS * SQUARE;
        assert!(self.rows == ROWS && self.bytes == 4 * PAIRS && [out.rows, out.width] == [SQUARE; 2]);
        assert!(left.len() == right.len() && left.len().is_multiple_of(LEN));
        // SAFETY: the operands have these sizes, which are checked above, and the target is to be written; the compiler uses none of the
        // registers.
        unsafe {
            zero();
            for (a, b) in left.chunks_exact(LEN).zip(right.chunks_exact(LEN)) {
                asm!(
                    // The largest part of the left, the smallest of the right.
                    "tileloadd tmm4, [{a} + {line}]",
                    "tileloadd tmm6, [{b} + {line} + 4096]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{b} + {line} + 5120]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{a} + {line} + 1024]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    // The largest, the middle one.
                    "tileloadd tmm6, [{b} + {line} + 2048]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{b} + {line} + 3072]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    // Both middle ones.
                    "tileloadd tmm4, [{a} + {line} + 2048]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{a} + {line} + 3072]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    // The middle one, the largest.
                    "tileloadd tmm6, [{b} + {line}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{b} + {line} + 1024]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    // The smallest, the largest.
                    "tileloadd tmm4, [{a} + {line} + 4096]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{a} + {line} + 5120]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    // Both largest ones.
                    "tileloadd tmm4, [{a} + {line}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{a} + {line} + 1024]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    a = in(reg) a.as_ptr(), b = in(reg) b.as_ptr(), line = in(reg) 4 * PAIRS,
                    options(readonly, nostack, preserves_flags)
                );
            }
            store_square(out.start, out.across);
        }
    }

    /// The products of two left operands `[16, bytes]` of signed bytes, whose rows lie `across` bytes apart, and two right ones
    /// `[bytes / 4, 16, 4]`: `dots[i][row][column]` as i32.
    #[inline(always)]
    pub(super) fn multiply_int8(&self, left: [&[u8]; 2], across: usize, right: [&[[u8; 64]]; 2], dots: &mut Dots) {
        assert!(self.rows == ROWS && left.iter().all(|left| left.len() >= (ROWS - 1) * across + self.bytes));
        assert!(right.iter().all(|right| right.len() == self.bytes / 4));
        // SAFETY: the registers are set up for operands of these sizes, which are checked above; the compiler uses none of them.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tileloadd tmm4, [{a} + {across}]",
                "tileloadd tmm5, [{b} + {row}]",
                "tdpbssd tmm0, tmm4, tmm5",
                "tilezero tmm1",
                "tileloadd tmm4, [{next_a} + {across}]",
                "tileloadd tmm6, [{next_b} + {row}]",
                "tdpbssd tmm1, tmm4, tmm6",
                "tilestored [{dots} + {row}], tmm0",
                "tilestored [{dots} + {row} + 1024], tmm1",
                a = in(reg) left[0].as_ptr(), next_a = in(reg) left[1].as_ptr(), across = in(reg) across,
                b = in(reg) right[0].as_ptr(), next_b = in(reg) right[1].as_ptr(), row = in(reg) 64usize,
                dots = in(reg) dots.0.as_mut_ptr(), options(nostack, preserves_flags)
            );
        }
    }
}

/// Writes the sums of two strips and 32 columns to rows that lie `across` apart.
///
/// # Safety
/// The registers are set up for strips of sixteen rows, and 32 such rows from `to` on are to be written.
#[inline(always)]
unsafe fn store_square(to: *mut f32, across: usize) {
    // SAFETY: only what the caller promises is written; the compiler uses none of the registers.
    unsafe {
        asm!(
            "tilestored [{to} + {across}], tmm0",
            "tilestored [{to} + {across} + 64], tmm1",
            "tilestored [{below} + {across}], tmm2",
            "tilestored [{below} + {across} + 64], tmm3",
            to = in(reg) to, below = in(reg) to.add(ROWS * across), across = in(reg) 4 * across,
            options(nostack, preserves_flags)
        );
    }
}

/// Clears the registers of sums.
///
/// # Safety
/// The registers are set up.
#[inline(always)]
unsafe fn zero() {
    // SAFETY: the compiler uses none of them.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            options(nomem, nostack, preserves_flags)
        );
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use crate::ops::samples::{check_bits, numbers};
    use crate::ops::storage::Shared;
    use half::bf16;

    /// The order that `multiply_bf16` promises, number by number.
    fn chains(a: &[bf16], b: impl Fn(usize) -> bf16) -> f32 {
        let product = |chain: f32, i: usize| a[i].to_f32().mul_add(b(i).to_f32(), chain);
        (0..a.len()).step_by(2 * PAIRS).fold(0.0, |sum, first| {
            let [even, odd] = [0, 1].map(|odd| (first + odd..first + 2 * PAIRS).step_by(2).fold(0.0, product));
            sum + (even + odd)
        })
    }

    #[test]
    fn products_of_bf16_are_chains_of_even_and_odd_numbers() {
        let Some(amx) = Amx::detect() else { return };
        let round = |x: Vec<f32>| x.into_iter().map(bf16::from_f32).collect::<Vec<_>>();
        for (rows, k) in [(1, 32), (5, 64), (16, 320)] {
            let (a, b) = (round(numbers(1, rows * k)), round(numbers(2, k * COLUMNS)));
            let pair = |row: usize, i: usize| {
                let [x, y] = [0, 1].map(|odd| u32::from(a[row * k + 2 * i + odd].to_bits()));
                x | y << 16
            };
            let left: Vec<u32> = (0..k / 2 / PAIRS)
                .flat_map(|step| (0..rows).flat_map(move |row| (0..PAIRS).map(move |i| (row, step * PAIRS + i))))
                .map(|(row, i)| pair(row, i))
                .collect();
            // One strip, and with it the same rows in reverse order as a second one.
            let turned = left.chunks(rows * PAIRS).flat_map(|step| step.chunks(PAIRS).rev().flatten().copied());
            let both: Vec<u32> = left.iter().copied().chain(turned).collect();
            let expected = |row: usize| -> Vec<f32> {
                let sum = |column: usize| chains(&a[row * k..][..k], |i| b[i / 2 * 2 * COLUMNS + 2 * column + i % 2]);
                (0..COLUMNS).map(sum).collect()
            };
            for (left, ahead) in [(&left, 4096), (&both, 0)].into_iter().take(if rows == ROWS { 2 } else { 1 }) {
                // Into rows of a wider matrix.
                let count = left.len() / (k / 2);
                let mut wide = vec![7.0; count * 100];
                let shared = Shared::new(&mut wide);
                // SAFETY: nobody else has the matrix.
                let out = unsafe { shared.target(30, 100, count, COLUMNS) };
                amx.registers(rows, 64).multiply_bf16(left, &b, &out, Hints { ahead, more_rows: true, later: &b });
                for (index, got) in wide.chunks(100).enumerate() {
                    let row = if index < rows { index } else { 2 * rows - 1 - index };
                    check_bits(&format!("row {index} of {count}, {k}"), &got[30..30 + COLUMNS], &expected(row));
                    assert!(got[..30].iter().chain(&got[30 + COLUMNS..]).all(|x| *x == 7.0));
                }
            }
        }
    }

    #[test]
    fn products_of_bytes_are_exact() {
        let Some(amx) = Amx::detect() else { return };
        let bytes = |seed, count: usize| -> Vec<u8> {
            // Both ends are among them.
            let some = [0x80, 0x7f, 0xff, 0];
            numbers(seed, count)
                .iter()
                .enumerate()
                .map(|(i, x)| some.get(i).copied().unwrap_or(x.to_bits() as u8))
                .collect()
        };
        for width in [16, 32] {
            let across = 48;
            let (a, b) = ([bytes(1, 16 * across), bytes(2, 16 * across)], [bytes(3, 16 * width), bytes(4, 16 * width)]);
            let mut dots = Dots([[[1; 64]; ROWS]; 2]);
            let right = b.each_ref().map(|b| b.as_chunks().0);
            amx.registers(ROWS, width).multiply_int8(a.each_ref().map(|a| &a[..]), across, right, &mut dots);
            for (i, dots) in dots.0.iter().enumerate() {
                for (row, dots) in dots.iter().enumerate() {
                    for (column, dot) in dots.as_chunks().0.iter().enumerate() {
                        let number = |byte: u8| i32::from(byte.cast_signed());
                        let product =
                            |j: usize| number(a[i][row * across + j]) * number(b[i][j / 4 * 64 + 4 * column + j % 4]);
                        assert_eq!(i32::from_le_bytes(*dot), (0..width).map(product).sum::<i32>(), "{row}, {column}");
                    }
                }
            }
        }
    }
}
