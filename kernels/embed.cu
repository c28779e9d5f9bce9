// Rows of the embedding matrix by token id. One block for each token.
#include "common.cuh"

constexpr int THREADS = 128;

// ids [T], weight [vocab, width], out [T, width]. Ids are checked before they come here.
template <class T>
__device__ __forceinline__ void embed(T* out, const uint32_t* ids, const T* weight, int width) {
    constexpr int COUNT = Vector<T>::COUNT;
    const bool whole = width % COUNT == 0;
    const T* from = weight + size_t(ids[blockIdx.x]) * width;
    for (int i = threadIdx.x * COUNT; i < width; i += THREADS * COUNT) {
        float values[COUNT];
        load(from, i, width, whole, values);
        store(out + size_t(blockIdx.x) * width, i, width, whole, values);
    }
}

#define EMBED(T, suffix)                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS)                                              \
        embed_##suffix(T* out, const uint32_t* ids, const T* weight, int width) {                      \
        embed<T>(out, ids, weight, width);                                                             \
    }                                                                                                  \
    EXPORT(embed_##suffix)
EACH_TYPE(EMBED)
