// Causal attention of chunks of several sequences over their block caches; a chunk may begin anywhere in its context.
#include "attention.cuh"

constexpr int ROW_WARPS = 4;
constexpr int THREADS = WARP_LANES * ROW_WARPS;

// Grid: tiles, kv_heads. tiles [tiles, 2]: a sequence, and the first row of its chunk that the tile holds, of 64 / share rows.
// q [T, q_stride], its first heads * head_dim elements; out [T, heads * head_dim]; q_starts [S + 1], contexts [S] as in the
// operation; tables [S, table_stride]. Row token * share + head of a tile: share query heads have one key head.
template <class T, int HEAD_DIM>
__device__ __forceinline__ void prefill_attention(T* out, const T* q, const T* k_cache, const T* v_cache, const uint32_t* tiles,
                                                  const uint32_t* q_starts, const uint32_t* contexts, const uint32_t* tables,
                                                  int q_stride, int heads, int kv_heads, int table_stride, int block_size,
                                                  int window, float scale) {
    using Rows = Attention<T, HEAD_DIM, ROW_WARPS, 1>;
    DYNAMIC_SHARED(memory);
    const int sequence = tiles[blockIdx.x * 2], first_row = tiles[blockIdx.x * 2 + 1], kv_head = blockIdx.y;
    const int share = heads / kv_heads, chunk_end = q_starts[sequence + 1];
    const int tokens = min(Rows::ROWS / share, chunk_end - first_row);
    // Of the tile's first row and past its last.
    const int first = int(contexts[sequence]) - (chunk_end - first_row), end = first + tokens;
    const auto offset = [&](int i) { return (kv_head * share + i % share) * HEAD_DIM; };
    const auto query = [&](int i) {
        return i < tokens * share ? q + size_t(first_row + i / share) * q_stride + offset(i) : nullptr;
    };
    Rows rows(memory, query, [&](int i) { return first + i / share; });
    const Cache<T> cache{k_cache, v_cache, table_of(tables, sequence, table_stride), kv_heads, kv_head, block_size};
    // Rows without a query see nothing, and their results are not read: no mask is needed on their account.
    rows.attend(cache, first_seen(first, window), end, first_seen(end - 1, window), first + 1, window, scale);
    rows.finish();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int index = rows.row_index(i);
        if (index >= tokens * share) continue;
        const float inverse = 1.0f / rows.sum[i];
        T* to = out + size_t(first_row + index / share) * heads * HEAD_DIM + offset(index);
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++) {
            const uint32_t both = pair(rows.out[n][2 * i] * inverse, rows.out[n][2 * i + 1] * inverse, T());
            *reinterpret_cast<uint32_t*>(to + n * 8 + rows.lane % 4 * 2) = both;
        }
    }
}

#define PREFILL_ATTENTION(T, suffix, HEAD_DIM)                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) prefill_attention_##suffix##_##HEAD_DIM(                          \
        T* out, const T* q, const T* k_cache, const T* v_cache, const uint32_t* tiles, const uint32_t* q_starts,            \
        const uint32_t* contexts, const uint32_t* tables, int q_stride, int heads, int kv_heads, int table_stride,          \
        int block_size, int window, float scale) {                                                                          \
        prefill_attention<T, HEAD_DIM>(out, q, k_cache, v_cache, tiles, q_starts, contexts, tables, q_stride, heads,        \
                                       kv_heads, table_stride, block_size, window, scale);                                  \
    }                                                                                                                       \
    EXPORT(prefill_attention_##suffix##_##HEAD_DIM)
PREFILL_ATTENTION(bf16, bf16, 64)
PREFILL_ATTENTION(bf16, bf16, 128)
PREFILL_ATTENTION(f16, f16, 64)
PREFILL_ATTENTION(f16, f16, 128)
