// What an expert of a mixture gives, times its shares, added to the rows it computed. One block for each row.
#include "common.cuh"

constexpr int THREADS = 128;

// sum [T, width], y [R, width], rows [R] below T and each once, shares [R].
template <class T>
__device__ __forceinline__ void add_expert(T* sum, const T* y, const uint32_t* rows, const float* shares, int width) {
    constexpr int COUNT = Vector<T>::COUNT;
    const bool whole = width % COUNT == 0;
    const float share = shares[blockIdx.x];
    const T* from = y + size_t(blockIdx.x) * width;
    T* to = sum + size_t(rows[blockIdx.x]) * width;
    for (int i = threadIdx.x * COUNT; i < width; i += THREADS * COUNT) {
        float values[COUNT], sums[COUNT];
        load(from, i, width, whole, values);
        load(to, i, width, whole, sums);
#pragma unroll
        for (int j = 0; j < COUNT; j++) sums[j] = fmaf(values[j], share, sums[j]);
        store(to, i, width, whole, sums);
    }
}

#define ADD_EXPERT(T, suffix)                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                   \
        add_expert_##suffix(T* sum, const T* y, const uint32_t* rows, const float* shares, int width) {     \
        add_expert<T>(sum, y, rows, shares, width);                                                         \
    }                                                                                                       \
    EXPORT(add_expert_##suffix)
EACH_TYPE(ADD_EXPERT)
