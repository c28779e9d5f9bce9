//! Stands in for `amx.rs` where there is no such unit: types without values.

use crate::ops::storage::Target;
use half::bf16;

/// See `amx.rs`.
pub(super) const ROWS: usize = 16;
/// See `amx.rs`.
pub(super) const PAIRS: usize = 16;
/// See `amx.rs`.
pub(super) const CACHE_BYTES: usize = 1 << 20;
/// See `amx.rs`.
pub(super) const PARTS: usize = 3;
/// See `amx.rs`.
pub(super) const SQUARE: usize = 2 * ROWS;

/// See `amx.rs`.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
#[allow(dead_code)]
pub(super) struct Vector(pub(super) [u32; PAIRS]);

/// There is no processor like this.
#[derive(Clone, Copy)]
pub(super) enum Amx {}

/// See `amx.rs`.
#[derive(Clone, Copy, Default)]
#[allow(dead_code)]
pub(super) struct Hints<'a> {
    pub(super) ahead: usize,
    pub(super) more_rows: bool,
    pub(super) later: &'a [bf16],
}

/// See `amx.rs`.
pub(super) struct Dots(pub(super) [[[u8; 64]; ROWS]; 2]);

/// There are none.
pub(super) enum Registers {}

impl Amx {
    pub(super) fn detect() -> Option<Self> {
        None
    }

    pub(super) fn registers(self, _: usize, _: usize) -> Registers {
        match self {}
    }
}

impl Registers {
    pub(super) fn multiply_bf16<P>(&self, _: &[u32], _: &[P], _: &Target<'_>, _: Hints<'_>) {
        match *self {}
    }

    pub(super) fn multiply_parts(&self, _: &[Vector], _: &[Vector], _: &Target<'_>) {
        match *self {}
    }

    pub(super) fn multiply_int8(&self, _: [&[u8]; 2], _: usize, _: [&[[u8; 64]]; 2], _: &mut Dots) {
        match *self {}
    }
}
