//! What the system is told of memory: how freed blocks are kept or given back, where pages should be large, and what need not be there yet.

/// Sets the C library up for this program, before anything large is allocated and before there are threads. Steps ask for the same large
/// blocks again and again: where they are given back in between, every page costs a fault each time, up to a sixth of the time of a small
/// model. So they are kept as far as glibc can be told, up to 32 MiB, and in one place for all threads, where they lie together.
pub fn set_up() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: mallopt only sets parameters of the allocator, and may be called at any time. A refusal changes nothing.
        #[allow(unsafe_code)]
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, 1);
            libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT_BYTES_MAX);
            libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
            libc::mallopt(libc::M_TOP_PAD, lines::SPARE_BYTES as libc::c_int);
        }
    }
}

/// The most that glibc takes.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const KEPT_BYTES_MAX: libc::c_int = 32 << 20;

/// What `make` makes, the zeros of this thread among it apart from other blocks: they take no memory before they are written, as those of a
/// cache that may never be full.
pub fn apart<T>(make: impl FnOnce() -> T) -> T {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    let _apart = lines::Apart::new();
    make()
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

/// The C library's allocator. Its large blocks begin at a line of the cache, where it alone would begin them sixteen bytes later: then
/// every load and store of sixteen floats, and every row of the matrix unit, would take two lines, a quarter of the time of a prompt.
/// Larger ones are in huge pages where the system has them, unless they are made of zeros or grow to their size: reading on across
/// ordinary pages costs a walk through the page table every 4 KiB, a sixth of the time of a token of a small model and a tenth of that of a
/// prompt or a training step.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
struct Lines;

#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod lines {
    use super::{KEPT_BYTES_MAX, Lines};
    use std::alloc::{GlobalAlloc, Layout};
    use std::cell::Cell;

    #[global_allocator]
    static ALLOCATOR: Lines = Lines;

    const LINE_BYTES: usize = 64;
    /// Blocks from this size on are large.
    const LARGE_BYTES: usize = 4096;
    /// What the C library asks the system for at once, at least. Nothing is in memory before it is written.
    pub(super) const SPARE_BYTES: usize = 64 << 20;
    /// Blocks from this size on are in huge pages.
    const HUGE_BYTES: usize = 256 << 10;
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

    /// Asks for huge pages wherever a large block lies, together with its neighbours, and where the next ones will lie: a page that is
    /// written before is an ordinary one, and the C library writes to the end of every block. What it maps alone is advised alone. Only a
    /// wish: nothing fails where the system has none.
    fn prefer_huge_pages(block: *mut u8, size: usize) {
        const PAGE_BYTES: usize = 2 << 20;
        if size >= HUGE_BYTES && !block.is_null() {
            let (room, page) = if size < KEPT_BYTES_MAX as usize { (SPARE_BYTES, PAGE_BYTES) } else { (0, 4096) };
            let start = block.addr() / page * page;
            let end = (block.addr() + size + room).next_multiple_of(page);
            // SAFETY: the advice changes no contents, whosever they are. What is not there is passed over.
            #[allow(unsafe_code)]
            unsafe {
                libc::madvise(block.with_addr(start).cast(), end - start, libc::MADV_HUGEPAGE);
            }
        }
    }

    thread_local! {
        static IS_APART: Cell<bool> = const { Cell::new(false) };
    }

    /// While it lives, large zeros of this thread are mapped alone.
    pub(super) struct Apart(bool);

    impl Apart {
        pub(super) fn new() -> Self {
            Self(IS_APART.replace(true))
        }
    }

    impl Drop for Apart {
        fn drop(&mut self) {
            IS_APART.set(self.0);
        }
    }

    /// Marks, in the address before a large block, one that is mapped alone: others are even.
    const MAPPED: usize = 1;

    /// A large block of zeros that is mapped alone, null if there is no memory.
    fn mapped(size: usize) -> *mut u8 {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: new memory, which has room for a line before the block.
        #[allow(unsafe_code)]
        unsafe {
            let outer = libc::mmap(std::ptr::null_mut(), size + LINE_BYTES, protection, flags, -1, 0);
            if outer == libc::MAP_FAILED {
                return std::ptr::null_mut();
            }
            let block = within(outer.cast());
            block.cast::<*mut u8>().sub(1).write(outer.cast::<u8>().map_addr(|address| address | MAPPED));
            block
        }
    }

    // SAFETY: every block comes from the C library, with at least the alignment and size that is asked for, and goes back to it: large
    // ones, which size and alignment tell, by the address before them, others by their own. Large ones whose address is marked come from
    // the system, and go back there.
    #[allow(unsafe_code)]
    unsafe impl GlobalAlloc for Lines {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            if is_large(layout.size(), layout.align()) {
                // SAFETY: the block is a line longer. A layout is at most half of all addresses.
                let block = unsafe { within(libc::malloc(layout.size() + LINE_BYTES).cast()) };
                prefer_huge_pages(block, layout.size());
                return block;
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
                if !is_large(layout.size(), layout.align()) {
                    return libc::free(block.cast());
                }
                let outer = outer(block);
                if outer.addr() & MAPPED == 0 {
                    return libc::free(outer.cast());
                }
                libc::munmap(outer.map_addr(|address| address - MAPPED).cast(), layout.size() + LINE_BYTES);
            }
        }

        unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
            // SAFETY: as in `alloc`, and it has the size that is cleared.
            unsafe {
                if is_large(layout.size(), layout.align()) {
                    if IS_APART.get() {
                        return mapped(layout.size());
                    }
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
                if was && is && outer(block).addr() & MAPPED == 0 {
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
        #![allow(clippy::unwrap_used, clippy::expect_used)]

        use super::LINE_BYTES;
        use crate::ops::memory::{apart, set_up};

        /// What the system says of the memory that `address` is in: the lines of its mapping in smaps.
        fn mapping(address: usize) -> Vec<String> {
            let all = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let range = |line: &str| -> Option<std::ops::Range<usize>> {
                let (start, end) = line.split(' ').next()?.split_once('-')?;
                let number = |text| usize::from_str_radix(text, 16).ok();
                Some(number(start)?..number(end)?)
            };
            let lines = all.lines().skip_while(|line| !range(line).is_some_and(|range| range.contains(&address)));
            lines
                .enumerate()
                .take_while(|(i, line)| *i == 0 || range(line).is_none())
                .map(|(_, line)| line.into())
                .collect()
        }

        #[test]
        fn large_blocks_are_in_huge_pages_and_zeros_apart_are_nowhere_yet() {
            if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
                return;
            }
            set_up();
            let block = Vec::<u8>::with_capacity(3 << 20);
            let flags = mapping(block.as_ptr().addr()).into_iter().find(|line| line.starts_with("VmFlags")).unwrap();
            assert!(flags.contains(" hg"), "{flags}");
            let zeros = apart(|| vec![0_u8; 24 << 20]);
            let mut is_there = vec![0_u8; zeros.len() / 4096 - 1];
            // SAFETY: whole pages of the block, and as many bytes for the answer.
            #[allow(unsafe_code)]
            let code = unsafe {
                let start = zeros.as_ptr().addr().next_multiple_of(4096);
                libc::mincore(
                    zeros.as_ptr().with_addr(start).cast_mut().cast(),
                    is_there.len() * 4096,
                    is_there.as_mut_ptr(),
                )
            };
            // Where all pages are huge, the first one is there, with the address before the block.
            let count = is_there.iter().filter(|page| **page & 1 == 1).count();
            assert!(code == 0 && count <= 512, "{count} pages are there");
            // They can be moved and given back like others.
            let mut zeros = apart(|| vec![0_u8; 1 << 20]);
            zeros[7] = 1;
            zeros.resize(3 << 20, 2);
            zeros.shrink_to(0);
            assert!(zeros.iter().map(|x| usize::from(*x)).sum::<usize>() == 1 + (4 << 20));
        }

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
