//! Stands in for `amx.rs` where there is no such unit: types without values.

use crate::ops::storage::Target;

/// See `amx.rs`.
pub(super) const ROWS: usize = 16;
/// See `amx.rs`.
pub(super) const PAIRS: usize = 16;

/// There is no processor like this.
#[derive(Clone, Copy)]
pub(super) enum Amx {}

/// See `amx.rs`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Begin {
    Zeros,
    Sums,
}

/// See `amx.rs`.
#[derive(Clone, Copy)]
#[allow(dead_code)]
pub(super) struct Operand<'a, N> {
    pub(super) numbers: &'a [N],
    pub(super) ahead: usize,
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
    pub(super) fn multiply_bf16<P>(
        &self,
        _: Begin,
        _: Operand<'_, u32>,
        _: Operand<'_, P>,
        _: &mut [[f32; 64]],
        _: Option<Target<'_>>,
    ) {
        match *self {}
    }

    pub(super) fn multiply_int8(&self, _: [&[u8]; 2], _: usize, _: [&[[u8; 64]]; 2], _: &mut Dots) {
        match *self {}
    }
}
