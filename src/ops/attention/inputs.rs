//! The integers of one step, on the device of the model after one copy: what is embedded, where rows lie, what they see, which of
//! them are read and how these are drawn from.

use candle_core::{Device, Tensor};

use super::PagedBatch;
use crate::error::Result;
use crate::ops::kernels;
use crate::ops::sample::{Draw, Draws};

/// One step's rows, `T` of them, of which `R` are read.
#[derive(Debug, Clone, Copy)]
pub struct Integers<'a> {
    /// `[T]`.
    pub tokens: &'a [u32],
    /// `[T]`: of each row in its sequence.
    pub positions: &'a [u32],
    /// `[T]`: where keys and values go. On a GPU [`kernels::NONE`] keeps them from going anywhere.
    pub slots: &'a [u32],
    /// `[R]`: rows, each once, in ascending order.
    pub reads: &'a [u32],
    /// `[R]`, or none at all: how the rows that are read are drawn from.
    pub draws: &'a [Option<Draw>],
    /// What the rows see.
    pub paged: &'a PagedBatch,
}

impl<'a> Integers<'a> {
    /// Those of rows that attend and that nobody reads, for attention alone: their tokens are their positions.
    pub fn unread(positions: &'a [u32], slots: &'a [u32], paged: &'a PagedBatch) -> Self {
        Self { tokens: positions, positions, slots, reads: &[], draws: &[], paged }
    }
}

/// [`Integers`] where operations read them.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// As they came.
    pub integers: Integers<'a>,
    /// `[T]` u32.
    pub tokens: Tensor,
    /// `[T]` u32.
    pub positions: Tensor,
    /// `[R]` u32.
    pub reads: Tensor,
    /// `[R]`, in `[8 R]` u32.
    pub draws: Draws<'a>,
    #[cfg(feature = "cuda")]
    pub(super) layout: super::device::Layout,
    /// All of them.
    #[cfg(feature = "cuda")]
    pub(in crate::ops) words: Tensor,
}

/// Arrays of integers in one, each from a multiple of 16 bytes on.
#[derive(Debug, Default)]
pub(super) struct Words(Vec<u32>);

impl Words {
    /// Where the first of `words` lies.
    pub(super) fn push(&mut self, words: impl IntoIterator<Item = u32>) -> usize {
        let first = self.0.len().next_multiple_of(4);
        self.0.resize(first, 0);
        self.0.extend(words);
        first
    }
}

/// [`Integers`] in one piece.
#[derive(Debug)]
pub(in crate::ops) struct LaidOut {
    /// All of them.
    pub(in crate::ops) words: Vec<u32>,
    /// Where each begins, and how many words it has.
    tokens: [usize; 2],
    positions: [usize; 2],
    reads: [usize; 2],
    draws: [usize; 2],
    #[cfg(feature = "cuda")]
    layout: super::device::Layout,
}

impl LaidOut {
    /// For layers of `heads` query heads and key heads, with room for contexts of `context_max` positions: integers of as many rows
    /// and the same room lie alike where every sequence has one row.
    pub(in crate::ops) fn new(integers: &Integers<'_>, heads: [usize; 2], context_max: usize) -> Self {
        let mut words = Words::default();
        let [tokens, positions, reads] = [integers.tokens, integers.positions, integers.reads]
            .map(|array| [words.push(array.iter().copied()), array.len()]);
        let draws = [words.push(Draws::words(integers.draws)), integers.draws.len() * kernels::Draw::WORDS];
        #[cfg(feature = "cuda")]
        let layout = super::device::Layout::new(integers, heads, context_max, &mut words);
        #[cfg(not(feature = "cuda"))]
        let _ = (heads, context_max);
        Self {
            words: words.0,
            tokens,
            positions,
            reads,
            draws,
            #[cfg(feature = "cuda")]
            layout,
        }
    }
}

impl<'a> Inputs<'a> {
    /// Brings `integers` to `device`, for layers of `heads` query heads and key heads.
    ///
    /// # Errors
    /// If there is no memory left.
    pub fn new(integers: Integers<'a>, heads: [usize; 2], device: &Device) -> Result<Self> {
        let context_max = integers.paged.contexts.iter().copied().max().unwrap_or(0);
        Self::of(integers, LaidOut::new(&integers, heads, context_max), device)
    }

    /// Brings `integers` as they are laid out to `device`.
    pub(in crate::ops) fn of(integers: Integers<'a>, laid_out: LaidOut, device: &Device) -> Result<Self> {
        let count = laid_out.words.len();
        let words = Tensor::from_vec(laid_out.words, count, device)?;
        let part = |[first, len]: [usize; 2]| words.narrow(0, first, len);
        Ok(Self {
            integers,
            tokens: part(laid_out.tokens)?,
            positions: part(laid_out.positions)?,
            reads: part(laid_out.reads)?,
            draws: Draws::of(integers.draws, part(laid_out.draws)?),
            #[cfg(feature = "cuda")]
            layout: laid_out.layout,
            #[cfg(feature = "cuda")]
            words,
        })
    }
}
