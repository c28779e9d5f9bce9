// Rotary embedding of queries and keys, and the write of keys and values to their slots of the block cache. One block for each token.
#include "common.cuh"

constexpr int THREADS = 256;
// The slot of a row that fills up a batch: nothing is written for it.
constexpr uint32_t NO_SLOT = 0xffffffffu;

// qkv [T, (heads + 2 kv_heads) * head_dim]: queries are turned in place, keys and values go to the caches
// [blocks, kv_heads, block_size, head_dim]. table [positions, head_dim]: cosines, then sines. slot = block * block_size + offset.
template <class T>
__device__ __forceinline__ void rope_kv(T* qkv, T* k_cache, T* v_cache, const float* table, const uint32_t* positions,
                                        const uint32_t* slots, int heads, int kv_heads, int head_dim, int block_size) {
    const uint32_t slot = slots[blockIdx.x];
    if (slot == NO_SLOT) return;
    T* row = qkv + size_t(blockIdx.x) * (heads + 2 * kv_heads) * head_dim;
    const float* turn = table + size_t(positions[blockIdx.x]) * head_dim;
    const int half = head_dim / 2;
    const size_t block = slot / block_size, offset = slot % block_size;
    for (int i = threadIdx.x; i < (heads + kv_heads) * half; i += THREADS) {
        const int head = i / half, at = i % half;
        const float low = widen(row[head * head_dim + at]), high = widen(row[head * head_dim + half + at]);
        const float cosine = turn[at], sine = turn[half + at];
        T* to = row + head * head_dim;
        if (head >= heads) to = k_cache + ((block * kv_heads + head - heads) * block_size + offset) * head_dim;
        to[at] = narrow<T>(low * cosine - high * sine);
        to[half + at] = narrow<T>(high * cosine + low * sine);
    }
    const T* values = row + (heads + kv_heads) * head_dim;
    for (int i = threadIdx.x; i < kv_heads * head_dim; i += THREADS) {
        v_cache[((block * kv_heads + i / head_dim) * block_size + offset) * head_dim + i % head_dim] = values[i];
    }
}

#define ROPE_KV(T, suffix)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS) rope_kv_##suffix(                                          \
        T* qkv, T* k_cache, T* v_cache, const float* table, const uint32_t* positions, const uint32_t* slots, int heads, \
        int kv_heads, int head_dim, int block_size) {                                                                \
        rope_kv<T>(qkv, k_cache, v_cache, table, positions, slots, heads, kv_heads, head_dim, block_size);           \
    }                                                                                                                \
    EXPORT(rope_kv_##suffix)
EACH_TYPE(ROPE_KV)
