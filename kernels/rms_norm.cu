// x / sqrt(mean(x^2) + eps) * weight, alone and after a residual addition. One block for each row.
#include "common.cuh"

constexpr int THREADS = 256;

// With a residual: sum = x + residual, rounded to T, is written and normalised.
template <class T, bool RESIDUAL>
__device__ __forceinline__ void rms_norm(T* out, T* sum, const T* x, const T* residual, const T* weight, int width, float eps) {
    constexpr int COUNT = Vector<T>::COUNT;
    SHARED(float, scratch, THREADS / WARP_LANES);
    const size_t start = size_t(blockIdx.x) * width;
    const bool whole = width % COUNT == 0;
    float squares = 0;
    for (int i = threadIdx.x * COUNT; i < width; i += THREADS * COUNT) {
        float a[COUNT];
        load(x + start, i, width, whole, a);
        if (RESIDUAL) {
            float b[COUNT];
            load(residual + start, i, width, whole, b);
#pragma unroll
            for (int j = 0; j < COUNT; j++) a[j] = widen(narrow<T>(a[j] + b[j]));
            store(sum + start, i, width, whole, a);
        }
#pragma unroll
        for (int j = 0; j < COUNT; j++) squares = fmaf(a[j], a[j], squares);
    }
    const float inverse = 1.0f / sqrtf(block_sum(squares, scratch) / width + eps);
    // A thread reads back what it has read or written itself.
    const T* row = (RESIDUAL ? sum : x) + start;
    for (int i = threadIdx.x * COUNT; i < width; i += THREADS * COUNT) {
        float a[COUNT], w[COUNT];
        load(row, i, width, whole, a);
        load(weight, i, width, whole, w);
#pragma unroll
        for (int j = 0; j < COUNT; j++) a[j] = a[j] * inverse * w[j];
        store(out + start, i, width, whole, a);
    }
}

// out, x [T, width]; weight [width].
#define RMS_NORM(T, suffix)                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                        \
        rms_norm_##suffix(T* out, const T* x, const T* weight, int width, float eps) {                           \
        rms_norm<T, false>(out, nullptr, x, nullptr, weight, width, eps);                                        \
    }                                                                                                            \
    EXPORT(rms_norm_##suffix)
EACH_TYPE(RMS_NORM)

// out, sum, x, residual [T, width]; weight [width]. sum may be residual or x.
#define ADD_RMS_NORM(T, suffix)                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) add_rms_norm_##suffix(                                 \
        T* out, T* sum, const T* x, const T* residual, const T* weight, int width, float eps) {                  \
        rms_norm<T, true>(out, sum, x, residual, weight, width, eps);                                            \
    }                                                                                                            \
    EXPORT(add_rms_norm_##suffix)
EACH_TYPE(ADD_RMS_NORM)
