//! Tensors seen from a CPU body: contiguous slices of candle storages, and one output shared by threads in disjoint parts.

use candle_core::{CpuStorage, Device, Layout, Tensor, WithDType};
use half::{bf16, f16};
use std::borrow::Cow;

/// What a processor reads from memory at once.
const LINE_BYTES: usize = 64;

/// The elements of a contiguous tensor, from its start offset on. Strided layouts and other types are errors that name `op`.
pub(super) fn slice<'a, T: WithDType>(
    op: &str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> candle_core::Result<&'a [T]> {
    let (start, end) = range(op, layout)?;
    Ok(&storage.as_slice::<T>()?[start..end])
}

/// The elements of a contiguous f32 tensor, to be written.
pub(super) fn slice_mut<'a>(
    op: &str,
    storage: &'a mut CpuStorage,
    layout: &Layout,
) -> candle_core::Result<&'a mut [f32]> {
    let (start, end) = range(op, layout)?;
    match storage {
        CpuStorage::F32(all) => Ok(&mut all[start..end]),
        _ => candle_core::bail!("{op}: what is written must be f32"),
    }
}

/// First and past-the-end element of a contiguous tensor in its storage.
pub(super) fn range(op: &str, layout: &Layout) -> candle_core::Result<(usize, usize)> {
    match layout.contiguous_offsets() {
        Some(range) => Ok(range),
        None => candle_core::bail!(
            "{op}: the tensor must be contiguous, it has shape {:?} and strides {:?}",
            layout.dims(),
            layout.stride()
        ),
    }
}

/// Parameters in the type they are stored in.
#[derive(Clone, Copy)]
pub(super) enum Weights<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

impl<'a> Weights<'a> {
    /// The elements of a contiguous tensor of one of the three types.
    pub(super) fn new(op: &str, storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<Self> {
        match storage {
            CpuStorage::F32(_) => Ok(Self::F32(slice(op, storage, layout)?)),
            CpuStorage::BF16(_) => Ok(Self::Bf16(slice(op, storage, layout)?)),
            CpuStorage::F16(_) => Ok(Self::F16(slice(op, storage, layout)?)),
            _ => candle_core::bail!("{op}: weights must be f32, bf16 or f16"),
        }
    }

    /// All elements as f32.
    pub(super) fn widened(&self) -> Cow<'a, [f32]> {
        match self {
            Self::F32(all) => Cow::Borrowed(all),
            Self::Bf16(all) => all.iter().map(|x| x.to_f32()).collect(),
            Self::F16(all) => all.iter().map(|x| x.to_f32()).collect(),
        }
    }

    /// Elements `start..start + out.len()`, widened exactly.
    pub(super) fn widen(&self, start: usize, out: &mut [f32]) {
        let end = start + out.len();
        match self {
            Self::F32(all) => out.copy_from_slice(&all[start..end]),
            Self::Bf16(all) => out.iter_mut().zip(&all[start..end]).for_each(|(out, x)| *out = x.to_f32()),
            Self::F16(all) => out.iter_mut().zip(&all[start..end]).for_each(|(out, x)| *out = x.to_f32()),
        }
    }
}

/// A mutable slice that several threads write in disjoint parts.
pub(super) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    _borrow: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: the only access is `part`, whose callers promise that no two live parts overlap, so threads touch separate elements.
#[allow(unsafe_code)]
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), _borrow: std::marker::PhantomData }
    }

    /// Elements `start..start + len`; panics outside of the slice.
    ///
    /// # Safety
    /// While the result lives, no other part may overlap it. Inside of [`written`], they must have been written before.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub(super) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        self.check(start, len);
        // SAFETY: inside the slice borrowed for 'a (checked above), and not aliased (the caller's promise).
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }

    /// Asks for the lines of the cache of elements that are soon written, where the processor takes such wishes.
    pub(super) fn ask(&self, start: usize, len: usize) {
        #[cfg(target_arch = "x86_64")]
        for i in (start..start + len).step_by(LINE_BYTES / size_of::<T>()) {
            // SAFETY: a prefetch never faults, whatever the address.
            #[allow(unsafe_code)]
            unsafe {
                use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
                _mm_prefetch::<_MM_HINT_T0>(self.start.wrapping_add(i).cast());
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (start, len);
    }

    fn check(&self, start: usize, len: usize) {
        assert!(start <= self.len && len <= self.len - start, "a part outside of the slice");
    }
}

/// The first `width` elements of `rows` rows that lie `across` apart, to be written.
// Only `amx` writes to it.
#[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), allow(dead_code))]
pub(super) struct Target<'a> {
    pub(super) start: *mut f32,
    pub(super) across: usize,
    pub(super) rows: usize,
    pub(super) width: usize,
    _borrow: std::marker::PhantomData<&'a mut [f32]>,
}

impl Shared<'_, f32> {
    /// Rows whose first begins at `start`; panics outside of the slice.
    ///
    /// # Safety
    /// While the result lives, no part may overlap the elements of its rows.
    #[allow(unsafe_code)]
    pub(super) unsafe fn target(&self, start: usize, across: usize, rows: usize, width: usize) -> Target<'_> {
        assert!(rows > 0 && width <= across);
        self.check(start, (rows - 1) * across + width);
        // SAFETY: inside the slice (checked above).
        Target { start: unsafe { self.start.add(start) }, across, rows, width, _borrow: std::marker::PhantomData }
    }
}

impl<T: Copy + Default> Shared<'_, T> {
    /// Puts `values` at `start`; panics outside of the slice.
    ///
    /// # Safety
    /// No part that lives may overlap them.
    #[allow(unsafe_code)]
    pub(super) unsafe fn write(&self, start: usize, values: &[T]) {
        self.check(start, values.len());
        // SAFETY: inside the slice (checked above); `values` is borrowed, so it is not part of a slice borrowed mutably.
        unsafe { self.start.add(start).copy_from_nonoverlapping(values.as_ptr(), values.len()) }
    }

    /// Zeros as elements `start..start + len`, which are returned; panics outside of the slice.
    ///
    /// # Safety
    /// While the result lives, no other part may overlap it.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub(super) unsafe fn cleared(&self, start: usize, len: usize) -> &mut [T] {
        self.check(start, len);
        for i in start..start + len {
            // SAFETY: inside the slice (checked above), and not aliased (the caller's promise).
            unsafe { self.start.add(i).write(T::default()) }
        }
        // SAFETY: the same, and written just now.
        unsafe { self.part(start, len) }
    }
}

/// A vector of `len` elements that `write` writes, in memory that nobody cleared before: half of the traffic where it is large.
///
/// # Safety
/// When `write` returns it must have written every element, by [`Shared::write`] or [`Shared::cleared`].
#[allow(unsafe_code)]
pub(super) unsafe fn written<T: Copy + Default>(len: usize, write: impl FnOnce(&Shared<'_, T>)) -> Vec<T> {
    let mut all = Vec::with_capacity(len);
    write(&Shared { start: all.as_mut_ptr(), len, _borrow: std::marker::PhantomData });
    // SAFETY: the capacity was asked for, the elements are written (the caller's promise).
    unsafe { all.set_len(len) };
    all
}

/// A weight of `len` elements that `write` writes, one-dimensional. It is read from end to end again and again, so it begins at a line
/// of the cache.
///
/// # Safety
/// As [`written`].
#[allow(unsafe_code)]
pub(super) unsafe fn written_weight<T: WithDType + Default>(
    len: usize,
    write: impl FnOnce(&Shared<'_, T>),
) -> candle_core::Result<Tensor> {
    let spare = LINE_BYTES / size_of::<T>();
    let mut all = Vec::<T>::with_capacity(len + spare);
    let first = all.as_ptr().align_offset(LINE_BYTES).min(spare);
    all.resize(first, T::default());
    // SAFETY: `first` is not above the capacity.
    let start = unsafe { all.as_mut_ptr().add(first) };
    write(&Shared { start, len, _borrow: std::marker::PhantomData });
    // SAFETY: the capacity was asked for; the first elements are resized, the others written (the caller's promise).
    unsafe { all.set_len(first + len) };
    Tensor::from_vec(all, first + len, &Device::Cpu)?.narrow(0, first, len)
}
