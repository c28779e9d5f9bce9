// Attention of one new token of each sequence over its block cache, cut into splits of the context, and the sum over the splits.
// Splits start at multiples of split_len whatever the batch is, so a row has the same bits in every batch.
#include "attention.cuh"

// The warps share the positions of a tile: 16 rows are more than most models have query heads to a key head.
constexpr int KEY_WARPS = 4;
constexpr int THREADS = WARP_LANES * KEY_WARPS;

// Grid: splits, kv_heads * tiles of 16 query heads, sequences. q [S, q_stride], its first heads * head_dim elements;
// tables [S, table_stride]; contexts [S]: positions with the new one, 0 for a row that sees nothing.
// partial [S, heads, splits, head_dim] is not normalised; stats [S, heads, splits, 2]: maximum in units of log2, and sum.
template <class T, int HEAD_DIM>
__device__ __forceinline__ void decode_attention(float* partial, float* stats, const T* q, const T* k_cache, const T* v_cache,
                                                 const uint32_t* tables, const uint32_t* contexts, int q_stride, int heads,
                                                 int kv_heads, int table_stride, int block_size, int window, int split_len,
                                                 float scale) {
    using Rows = Attention<T, HEAD_DIM, 1, KEY_WARPS>;
    DYNAMIC_SHARED(memory);
    SHARED(float, maxima, KEY_WARPS * 16);
    SHARED(float, sums, KEY_WARPS * 16);
    const int splits = gridDim.x, split = blockIdx.x, sequence = blockIdx.z;
    const int share = heads / kv_heads, kv_head = blockIdx.y % kv_heads, first_head = blockIdx.y / kv_heads * 16;
    const int count = min(16, share - first_head);
    const int position = int(contexts[sequence]) - 1, seen = first_seen(position, window);
    const int begin = max(seen, split * split_len), end = min(position + 1, (split + 1) * split_len);
    const size_t row = size_t(sequence) * heads + kv_head * share + first_head;
    if (begin >= end) {
        if (threadIdx.x < count) {
            stats[((row + threadIdx.x) * splits + split) * 2] = MINUS_INFINITY;
            stats[((row + threadIdx.x) * splits + split) * 2 + 1] = 0;
        }
        return;
    }
    const T* queries = q + size_t(sequence) * q_stride + (kv_head * share + first_head) * HEAD_DIM;
    Rows rows(
        memory, [&](int i) { return i < count ? queries + i * HEAD_DIM : nullptr; }, [&](int) { return position; });
    const Cache<T> cache{k_cache, v_cache, table_of(tables, sequence, table_stride), kv_heads, kv_head, block_size};
    rows.attend(cache, begin, end, seen, end, window, scale);
    rows.finish();
    // The tiles are not needed any more: their place takes the sums of the warps, [KEY_WARPS, 16, HEAD_DIM].
    __syncthreads();
    float* outs = reinterpret_cast<float*>(memory) + rows.key_warp * 16 * HEAD_DIM;
    for (int n = 0; n < HEAD_DIM / 8; n++) {
        for (int i = 0; i < 4; i++) outs[rows.row_index(i / 2) * HEAD_DIM + n * 8 + rows.lane % 4 * 2 + i % 2] = rows.out[n][i];
    }
    if (rows.lane % 4 == 0) {
        for (int i = 0; i < 2; i++) {
            maxima[rows.key_warp * 16 + rows.row_index(i)] = rows.max[i];
            sums[rows.key_warp * 16 + rows.row_index(i)] = rows.sum[i];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * HEAD_DIM; i += THREADS) {
        const int head = i / HEAD_DIM, element = i % HEAD_DIM;
        float top = MINUS_INFINITY, total = 0, sum = 0;
        for (int warp = 0; warp < KEY_WARPS; warp++) top = fmaxf(top, maxima[warp * 16 + head]);
        for (int warp = 0; warp < KEY_WARPS; warp++) {
            const float factor = exp2_approx(maxima[warp * 16 + head] - top);
            total = fmaf(factor, reinterpret_cast<float*>(memory)[warp * 16 * HEAD_DIM + i], total);
            sum = fmaf(factor, sums[warp * 16 + head], sum);
        }
        const size_t at = (row + head) * splits + split;
        partial[at * HEAD_DIM + element] = total;
        if (element == 0) {
            stats[at * 2] = top;
            stats[at * 2 + 1] = sum;
        }
    }
}

#define DECODE_ATTENTION(T, suffix, HEAD_DIM)                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) decode_attention_##suffix##_##HEAD_DIM(                           \
        float* partial, float* stats, const T* q, const T* k_cache, const T* v_cache, const uint32_t* tables,               \
        const uint32_t* contexts, int q_stride, int heads, int kv_heads, int table_stride, int block_size, int window,      \
        int split_len, float scale) {                                                                                       \
        decode_attention<T, HEAD_DIM>(partial, stats, q, k_cache, v_cache, tables, contexts, q_stride, heads, kv_heads,     \
                                      table_stride, block_size, window, split_len, scale);                                  \
    }                                                                                                                       \
    EXPORT(decode_attention_##suffix##_##HEAD_DIM)
DECODE_ATTENTION(bf16, bf16, 64)
DECODE_ATTENTION(bf16, bf16, 128)
DECODE_ATTENTION(f16, f16, 64)
DECODE_ATTENTION(f16, f16, 128)

// Grid: heads, rows. out [R, heads * head_dim] from partial [R, heads, splits, head_dim] and stats [R, heads, splits, 2].
// A row without any position gives zeros.
template <class T>
__device__ __forceinline__ void combine_splits(T* out, const float* partial, const float* stats, int splits, int head_dim) {
    const size_t row = size_t(blockIdx.y) * gridDim.x + blockIdx.x;
    stats += row * splits * 2;
    float top = MINUS_INFINITY;
    for (int split = 0; split < splits; split++) top = fmaxf(top, stats[split * 2]);
    for (int i = threadIdx.x; i < head_dim; i += blockDim.x) {
        float total = 0, sum = 0;
        for (int split = 0; split < splits; split++) {
            // Nothing was written for a split without positions.
            if (stats[split * 2 + 1] == 0) continue;
            const float factor = exp2_approx(stats[split * 2] - top);
            total = fmaf(factor, partial[(row * splits + split) * head_dim + i], total);
            sum = fmaf(factor, stats[split * 2 + 1], sum);
        }
        out[row * head_dim + i] = narrow<T>(sum == 0 ? 0 : total / sum);
    }
}

#define COMBINE_SPLITS(T, suffix)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                     \
        combine_splits_##suffix(T* out, const float* partial, const float* stats, int splits, int head_dim) { \
        combine_splits<T>(out, partial, stats, splits, head_dim);                                             \
    }                                                                                                         \
    EXPORT(combine_splits_##suffix)
EACH_TYPE(COMBINE_SPLITS)
