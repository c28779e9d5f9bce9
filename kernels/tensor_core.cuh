// One warp's instructions: 16x8x16 products on tensor cores, loads of 8x8 matrices, copies to shared memory in the background.
#pragma once

#include "common.cuh"

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// d [16, 8] f32 += a [16, 16] b [16, 8]. With g = lane / 4, t = lane % 4, a register holds two neighbours along k:
// a rows g, g + 8, g, g + 8 at k = 2t, 2t, 2t + 8, 2t + 8; b column g at k = 2t, 2t + 8; d rows g, g, g + 8, g + 8 at columns 2t, 2t + 1.
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, bf16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, f16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices of 2-byte elements; lane l gives the address of row l % 8 of matrix l / 8 and gets of each matrix
// elements 2t, 2t + 1 of row g, or of the transposed matrix.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Copies 16 bytes from global to shared memory, or writes zeros where `inside` is false; `from` is then not read.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
    const int bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// This thread's copies are complete; those of others are after a barrier.
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ uint32_t pair(float low, float high, bf16) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ uint32_t pair(float low, float high, f16) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}

#else

template <class T>
float widen_bits(uint16_t bits) {
    return widen(T{bits});
}
template <class T>
uint32_t pair(float low, float high, T) {
    return narrow<T>(low).bits | uint32_t(narrow<T>(high).bits) << 16;
}
#define multiply(d, a, b, type) emulator::product(d, a, b, widen_bits<decltype(type)>, __FILE__, __LINE__)
#define load_matrices(out, row) emulator::read_matrices(out, row, false, __FILE__, __LINE__)
#define load_transposed(out, row) emulator::read_matrices(out, row, true, __FILE__, __LINE__)
#define copy_async(to, from, inside) emulator::copy_async(to, from, (inside) ? 16 : 0)
#define commit_copies() emulator::commit_copies()
#define wait_copies() emulator::wait_copies(0)

#endif
