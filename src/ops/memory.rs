//! What the system is told of memory: how freed blocks are kept or given back, and where pages should be large. Steps ask for the same
//! large blocks again and again: where the C library gives them back to the system in between, every page costs a fault each time, up
//! to a sixth of the time of a small model.

/// Keeps what is freed for the next step, as far as the C library can be told: blocks of up to 32 MiB, the most that glibc takes.
pub fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const BLOCK_BYTES_MAX: libc::c_int = 32 << 20;
        // SAFETY: mallopt only sets parameters of the allocator, and may be called at any time. A refusal changes nothing.
        #[allow(unsafe_code)]
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, BLOCK_BYTES_MAX);
            libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        }
    }
}

/// Gives what is free back to the system: reading a checkpoint and its tokenizer takes memory that nothing asks for again.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: the allocator allows it at any time; what is in use stays as it is.
        #[allow(unsafe_code)]
        unsafe {
            libc::malloc_trim(0);
        }
    }
}

/// Asks for huge pages for the room of `buffer`, which should be empty still: reading on across ordinary ones costs a walk through
/// the page table every 4 KiB, a third of the rate of one stream. Only a wish: nothing fails where the system has none.
pub fn prefer_huge_pages<T>(buffer: &mut Vec<T>) {
    #[cfg(target_os = "linux")]
    {
        const PAGE_BYTES: usize = 2 << 20;
        let room = buffer.spare_capacity_mut().as_mut_ptr_range();
        let start = room.start.addr().next_multiple_of(PAGE_BYTES);
        let len = room.end.addr().saturating_sub(start) / PAGE_BYTES * PAGE_BYTES;
        if len > 0 {
            // SAFETY: whole pages inside of the allocation; the advice changes no contents. A refusal changes nothing.
            #[allow(unsafe_code)]
            unsafe {
                libc::madvise(room.start.with_addr(start).cast(), len, libc::MADV_HUGEPAGE);
            }
        }
    }
}

/// The C library's allocator. Its large blocks begin at a line of the cache, where it alone would begin them sixteen bytes later: then
/// every load and store of sixteen floats, and every row of the matrix unit, would take two lines, a quarter of the time of a prompt.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
struct Lines;

#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod lines {
    use super::Lines;
    use std::alloc::{GlobalAlloc, Layout};

    #[global_allocator]
    static ALLOCATOR: Lines = Lines;

    const LINE_BYTES: usize = 64;
    /// Blocks from this size on are large.
    const LARGE_BYTES: usize = 4096;
    /// What `malloc` aligns to.
    const ALIGN: usize = align_of::<libc::max_align_t>();

    /// A large block lies within one of `malloc`, which is a line longer and whose address stands before it. `posix_memalign` would do, but
    /// glibc before 2.38 seldom finds what it freed of such blocks again.
    fn is_large(size: usize, align: usize) -> bool {
        size >= LARGE_BYTES && align <= LINE_BYTES
    }

    /// The large block within `outer`, which is null or has a line more than it.
    ///
    /// # Safety
    /// `outer` is null or points to at least [`LINE_BYTES`], and to [`ALIGN`].
    #[allow(unsafe_code)]
    unsafe fn within(outer: *mut u8) -> *mut u8 {
        if outer.is_null() {
            return outer;
        }
        let before = LINE_BYTES - outer.addr() % LINE_BYTES;
        // SAFETY: `before` is a multiple of `ALIGN` from `ALIGN` to a line, so the address of `outer` fits before the block.
        unsafe {
            let block = outer.add(before);
            block.cast::<*mut u8>().sub(1).write(outer);
            block
        }
    }

    /// What [`within`] was given for the large block `block`.
    ///
    /// # Safety
    /// `block` is what it returned.
    #[allow(unsafe_code)]
    unsafe fn outer(block: *mut u8) -> *mut u8 {
        // SAFETY: it stands there.
        unsafe { block.cast::<*mut u8>().sub(1).read() }
    }

    // SAFETY: every block comes from the C library, with at least the alignment and size that is asked for, and goes back to it: large
    // ones, which size and alignment tell, by the address before them, others by their own.
    #[allow(unsafe_code)]
    unsafe impl GlobalAlloc for Lines {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            if is_large(layout.size(), layout.align()) {
                // SAFETY: the block is a line longer. A layout is at most half of all addresses.
                return unsafe { within(libc::malloc(layout.size() + LINE_BYTES).cast()) };
            }
            if layout.align() <= ALIGN {
                // SAFETY: any size may be asked for.
                return unsafe { libc::malloc(layout.size()) }.cast();
            }
            let mut block = std::ptr::null_mut();
            // SAFETY: the alignment is a power of two and a multiple of a pointer's size; the result is written to `block`.
            match unsafe { libc::posix_memalign(&raw mut block, layout.align(), layout.size()) } {
                0 => block.cast(),
                _ => std::ptr::null_mut(),
            }
        }

        unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
            // SAFETY: `block` is one of this allocator, of this layout (the caller's promise).
            unsafe {
                let is_large = is_large(layout.size(), layout.align());
                libc::free(if is_large { outer(block) } else { block }.cast());
            }
        }

        unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
            // SAFETY: as in `alloc`, and it has the size that is cleared. Zeros of the system are not touched: caches are large.
            unsafe {
                if is_large(layout.size(), layout.align()) {
                    return within(libc::calloc(layout.size() + LINE_BYTES, 1).cast());
                }
                let block = self.alloc(layout);
                if !block.is_null() {
                    block.write_bytes(0, layout.size());
                }
                block
            }
        }

        unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
            let (was, is) = (is_large(layout.size(), layout.align()), is_large(size, layout.align()));
            // SAFETY: `block` is one of this allocator, of this layout (the caller's promise), so it has the bytes that are moved; sizes
            // are those of layouts with this alignment (the same).
            unsafe {
                if !was && !is && layout.align() <= ALIGN {
                    return libc::realloc(block.cast(), size).cast();
                }
                let kept = layout.size().min(size);
                if was && is {
                    let before = block.offset_from_unsigned(outer(block));
                    let moved: *mut u8 = libc::realloc(outer(block).cast(), size + LINE_BYTES).cast();
                    if moved.is_null() {
                        return moved;
                    }
                    // The numbers first: the address may take their place.
                    let start = moved.add(LINE_BYTES - moved.addr() % LINE_BYTES);
                    start.copy_from(moved.add(before), kept);
                    return within(moved);
                }
                let new = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
                if !new.is_null() {
                    new.copy_from_nonoverlapping(block, kept);
                    self.dealloc(block, layout);
                }
                new
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::LINE_BYTES;

        #[test]
        fn large_blocks_begin_at_a_line_and_keep_what_they_hold() {
            for len in [1024, 1025, 100_000, 3 << 20] {
                let block = Vec::<f32>::with_capacity(len);
                assert!(block.as_ptr().addr().is_multiple_of(LINE_BYTES), "{len}");
            }
            // Small, then large, large in other places, and small again.
            let mut grown: Vec<u32> = Vec::new();
            (0..1_000_000).for_each(|i| grown.push(i));
            assert!(grown.as_ptr().addr().is_multiple_of(LINE_BYTES) && grown.iter().copied().eq(0..1_000_000));
            for len in [999_999, 300_000, 2_000, 1_000, 10] {
                grown.truncate(len);
                grown.shrink_to_fit();
                assert!(grown.iter().copied().eq(0..len as u32), "{len}");
            }
            let zeros = vec![0_u8; 1 << 20];
            assert!(zeros.as_ptr().addr().is_multiple_of(LINE_BYTES) && zeros.iter().all(|byte| *byte == 0));
            // More than alignment of a line, and a type of it that grows.
            #[derive(Clone, Copy, PartialEq, Debug)]
            #[repr(align(128))]
            struct Wide(u8);
            let mut wide = vec![Wide(0); 3];
            wide.extend((1..100).map(Wide));
            assert!(wide.as_ptr().addr().is_multiple_of(128) && wide.last() == Some(&Wide(99)));
        }
    }
}
