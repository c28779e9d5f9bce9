// What all kernels share: types, 16-byte vectors, sums over a warp and a block. nvcc and the emulator compile the same text.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

typedef __nv_bfloat16 bf16;
typedef __half f16;

// An array in shared memory; memory whose size the launch gives; the end of a kernel's definition.
#define SHARED(T, name, count) __shared__ T name[count]
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define EXPORT(name)

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(f16 x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ f16 narrow<f16>(float x) {
    return __float2half_rn(x);
}

// 2^x with an error of two units in the last place, 0 for minus infinity.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#else
#include "emulator/emulator.h"
#endif

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WARP_LANES = 32;
constexpr float MINUS_INFINITY = -INFINITY;

// Writes a kernel's text once for each type: EACH_TYPE(KERNEL) with KERNEL(T, suffix).
#define EACH_TYPE(KERNEL) KERNEL(float, f32) KERNEL(bf16, bf16) KERNEL(f16, f16)

// As many elements as one memory instruction moves.
template <class T>
struct alignas(16) Vector {
    static constexpr int COUNT = 16 / sizeof(T);
    T at[COUNT];
};

// Elements `first..` of a row of `width`, as f32, zeros past its end. `whole`: rows are multiples of a vector, so it can be one load.
template <class T>
__device__ __forceinline__ void load(const T* row, int first, int width, bool whole, float (&out)[Vector<T>::COUNT]) {
    if (whole) {
        const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(row + first);
#pragma unroll
        for (int i = 0; i < Vector<T>::COUNT; i++) out[i] = widen(vector.at[i]);
    } else {
#pragma unroll
        for (int i = 0; i < Vector<T>::COUNT; i++) out[i] = first + i < width ? widen(row[first + i]) : 0.0f;
    }
}

// The inverse of load: writes nothing past the end.
template <class T>
__device__ __forceinline__ void store(T* row, int first, int width, bool whole, const float (&values)[Vector<T>::COUNT]) {
    if (whole) {
        Vector<T> vector;
#pragma unroll
        for (int i = 0; i < Vector<T>::COUNT; i++) vector.at[i] = narrow<T>(values[i]);
        *reinterpret_cast<Vector<T>*>(row + first) = vector;
    } else {
#pragma unroll
        for (int i = 0; i < Vector<T>::COUNT; i++) {
            if (first + i < width) row[first + i] = narrow<T>(values[i]);
        }
    }
}

// The sum over a warp, the same bits in every lane.
template <class N>
__device__ __forceinline__ N warp_sum(N x) {
#pragma unroll
    for (int flip = WARP_LANES / 2; flip > 0; flip /= 2) x += __shfl_xor_sync(ALL_LANES, x, flip);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int flip = WARP_LANES / 2; flip > 0; flip /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, flip));
    return x;
}

// The sum over a block, the same bits in every thread. `scratch` holds one number for each warp; may be called again at once.
template <class N>
__device__ __forceinline__ N block_sum(N x, N* scratch) {
    const int warps = blockDim.x / WARP_LANES;
    x = warp_sum(x);
    if (threadIdx.x % WARP_LANES == 0) scratch[threadIdx.x / WARP_LANES] = x;
    __syncthreads();
    N sum = scratch[0];
    for (int i = 1; i < warps; i++) sum += scratch[i];
    __syncthreads();
    return sum;
}

__device__ __forceinline__ float block_max(float x, float* scratch) {
    const int warps = blockDim.x / WARP_LANES;
    x = warp_max(x);
    if (threadIdx.x % WARP_LANES == 0) scratch[threadIdx.x / WARP_LANES] = x;
    __syncthreads();
    float max = scratch[0];
    for (int i = 1; i < warps; i++) max = fmaxf(max, scratch[i]);
    __syncthreads();
    return max;
}
