//! The integers of one step, on the device of the model after one copy: what is embedded, where rows lie, what they see and which of
//! them are read.

use candle_core::{Device, Tensor};

use super::PagedBatch;
use crate::error::Result;

/// One step's rows, `T` of them, of which `R` are read.
#[derive(Debug, Clone, Copy)]
pub struct Integers<'a> {
    /// `[T]`.
    pub tokens: &'a [u32],
    /// `[T]`: of each row in its sequence.
    pub positions: &'a [u32],
    /// `[T]`: where keys and values go.
    pub slots: &'a [u32],
    /// `[R]`: rows, each once, in ascending order.
    pub reads: &'a [u32],
    /// What the rows see.
    pub paged: &'a PagedBatch,
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
    #[cfg(feature = "cuda")]
    pub(super) layout: super::device::Layout,
    /// All of them.
    #[cfg(feature = "cuda")]
    pub(super) words: Tensor,
}

/// Lays out arrays of integers in one, each from a multiple of 16 bytes on.
#[derive(Default)]
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

impl<'a> Inputs<'a> {
    /// Brings `integers` to `device`, for layers of `heads` query heads and key heads.
    ///
    /// # Errors
    /// If there is no memory left.
    pub fn new(integers: Integers<'a>, heads: [usize; 2], device: &Device) -> Result<Self> {
        let mut words = Words::default();
        let [tokens, positions, reads] = [integers.tokens, integers.positions, integers.reads]
            .map(|array| (words.push(array.iter().copied()), array.len()));
        #[cfg(feature = "cuda")]
        let layout = super::device::Layout::new(&integers, heads, &mut words);
        #[cfg(not(feature = "cuda"))]
        let _ = heads;
        let count = words.0.len();
        let all = Tensor::from_vec(words.0, count, device)?;
        let part = |(first, len): (usize, usize)| all.narrow(0, first, len);
        Ok(Self {
            integers,
            tokens: part(tokens)?,
            positions: part(positions)?,
            reads: part(reads)?,
            #[cfg(feature = "cuda")]
            layout,
            #[cfg(feature = "cuda")]
            words: all,
        })
    }
}
