// silu(gate) * up, silu(x) = x / (1 + e^-x). Grid: parts of a row, rows.
#include "common.cuh"

constexpr int THREADS = 256;

// gate_up [T, 2 * width], the gate first; out [T, width].
template <class T>
__device__ __forceinline__ void swiglu(T* out, const T* gate_up, int width) {
    constexpr int COUNT = Vector<T>::COUNT;
    const bool whole = width % COUNT == 0;
    const int i = (blockIdx.x * THREADS + threadIdx.x) * COUNT;
    if (i >= width) return;
    const T* row = gate_up + size_t(blockIdx.y) * 2 * width;
    float gate[COUNT], up[COUNT];
    load(row, i, width, whole, gate);
    load(row + width, i, width, whole, up);
#pragma unroll
    for (int j = 0; j < COUNT; j++) up[j] *= gate[j] / (1.0f + expf(-gate[j]));
    store(out + size_t(blockIdx.y) * width, i, width, whole, up);
}

#define SWIGLU(T, suffix)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS) swiglu_##suffix(T* out, const T* gate_up, int width) { \
        swiglu<T>(out, gate_up, width);                                                                     \
    }                                                                                                       \
    EXPORT(swiglu_##suffix)
EACH_TYPE(SWIGLU)
