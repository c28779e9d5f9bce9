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
