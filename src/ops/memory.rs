//! How freed memory is kept. Steps of training ask for the same large blocks again and again: where the C library gives them back
//! to the system in between, every page costs a fault each time, up to a sixth of the time of a small model.

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
