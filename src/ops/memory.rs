//! What the system is told of memory: how freed blocks are kept, and where pages should be large. Steps ask for the same large
//! blocks again and again: where the C library gives them back to the system in between, every page costs a fault each time, up
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
    /// What `malloc` gives every block.
    const ALIGN: usize = align_of::<libc::max_align_t>();

    // SAFETY: every block comes from the C library, with at least the alignment and size that is asked for, and goes back to it; `free`
    // and `realloc` take what any of its functions gave.
    #[allow(unsafe_code)]
    unsafe impl GlobalAlloc for Lines {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            let align = if layout.size() < LARGE_BYTES { layout.align() } else { layout.align().max(LINE_BYTES) };
            if align <= ALIGN {
                // SAFETY: any size may be asked for.
                return unsafe { libc::malloc(layout.size()) }.cast();
            }
            let mut block = std::ptr::null_mut();
            // SAFETY: the alignment is a power of two and a multiple of a pointer's size; the result is written to `block`.
            match unsafe { libc::posix_memalign(&raw mut block, align, layout.size()) } {
                0 => block.cast(),
                _ => std::ptr::null_mut(),
            }
        }

        unsafe fn dealloc(&self, block: *mut u8, _layout: Layout) {
            // SAFETY: `block` is one of this allocator (the caller's promise).
            unsafe { libc::free(block.cast()) }
        }

        /// Large blocks of zeros, such as caches, come from the system and are touched when they are written, so they begin where they do.
        unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
            if layout.align() <= ALIGN {
                // SAFETY: any size may be asked for.
                return unsafe { libc::calloc(layout.size(), 1) }.cast();
            }
            // SAFETY: the caller's promise is that of `alloc`; what it gives has this size.
            unsafe {
                let block = self.alloc(layout);
                if !block.is_null() {
                    block.write_bytes(0, layout.size());
                }
                block
            }
        }

        unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
            if layout.align() <= ALIGN {
                // SAFETY: `block` is one of this allocator (the caller's promise).
                return unsafe { libc::realloc(block.cast(), size) }.cast();
            }
            // SAFETY: the caller's promise is that of `alloc` for the new size, and that `block` has the old one.
            unsafe {
                let new = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
                if !new.is_null() {
                    new.copy_from_nonoverlapping(block, layout.size().min(size));
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
            let mut grown: Vec<u32> = Vec::new();
            (0..100_000).for_each(|i| grown.push(i));
            grown.shrink_to_fit();
            assert!(grown.iter().copied().eq(0..100_000));
            assert!(vec![0_u8; 1 << 20].iter().all(|byte| *byte == 0));
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
