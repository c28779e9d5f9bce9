//! Stands in for `pairs.rs` where the architecture has no such instruction: a type without values.

use half::bf16;
use std::ops::Range;

use super::blocks::{Line, Multiply, Product, Sizes, Turn, VECTORS, WIDTH};
use super::brain::{Left, Right};
use crate::ops::amx::Vector;
use crate::ops::lanes::{Element, LANES};

/// See `pairs.rs`.
pub(super) type Pair = u32;

/// There is no processor like this.
#[derive(Clone, Copy)]
pub(super) enum Pairs {}

/// See `pairs.rs`.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Stored<'a> {
    pub(in crate::ops) rows: &'a [&'a [bf16]; WIDTH],
    pub(in crate::ops) range: (usize, usize),
}

impl Pairs {
    pub(super) fn turn_stored(self, _: Stored<'_>, _: usize, _: &mut [Line<Pair>]) {
        match self {}
    }

    pub(super) fn pack_stored(self, _: Stored<'_>, _: usize, _: &mut [Line<Pair>]) -> bool {
        match self {}
    }

    pub(super) fn detect() -> Option<Self> {
        None
    }

    pub(super) fn multiply<T>(self, _: Left<'_>, _: Sizes, _: impl FnOnce(&Product<'_, Self>) -> T) -> T {
        match self {}
    }

    pub(super) fn lay_out(self, _: Left<'_>, _: Sizes, _: usize, _: Range<usize>, _: &mut [Pair]) {
        match self {}
    }

    pub(super) fn pack(self, _: Right<'_>, _: Sizes, _: usize, _: &mut [Line<Pair>]) {
        match self {}
    }

    pub(super) fn add(self, _: &[f32], _: &mut [f32]) {
        match self {}
    }

    pub(super) fn cut_left(self, _: Left<'_>, _: Sizes, _: Range<usize>, _: Range<usize>, _: &mut [Vector]) {
        match self {}
    }

    pub(super) fn cut_right<E: Element>(self, _: &[E], _: usize, _: Range<usize>, _: &mut [Vector]) {
        match self {}
    }

    pub(super) fn rows(self, _: &[f32], _: usize, _: &mut [Pair]) {
        match self {}
    }

    pub(super) fn dots<const R: usize>(self, _: [&[Pair]; R], _: &[bf16]) -> [[[f32; LANES]; VECTORS]; R] {
        match self {}
    }
}

impl Multiply for Pairs {
    type Number = Pair;

    fn advance<const R: usize>(self, _: Turn<'_, Pair>) {
        match self {}
    }
}
