// Attention without tensor cores: any row of any sequence, any type, any even head size up to 256. What float32 uses.
#include "attention.cuh"

constexpr int THREADS = 128;
// Query heads of a key head that share the keys and values read; one for each warp.
constexpr int HEADS = THREADS / WARP_LANES;
constexpr int HEAD_DIM_MAX = 256;

// Grid: splits, kv_heads * tiles of 4 query heads, rows. q [T, q_stride]; sequences [T]; positions [T], -1 for a row that sees
// nothing; tables [S, table_stride]. partial and stats as those of decode_attention, for rows.
template <class T>
__device__ __forceinline__ void plain_attention(float* partial, float* stats, const T* q, const T* k_cache, const T* v_cache,
                                                const uint32_t* tables, const uint32_t* sequences, const uint32_t* positions,
                                                int q_stride, int heads, int kv_heads, int head_dim, int table_stride,
                                                int block_size, int window, int split_len, float scale) {
    DYNAMIC_SHARED(memory);
    float* queries = reinterpret_cast<float*>(memory);
    SHARED(float, weights, HEADS * THREADS);
    SHARED(float, corrections, HEADS);
    const int splits = gridDim.x, split = blockIdx.x, sequence = sequences[blockIdx.z];
    const int share = heads / kv_heads, kv_head = blockIdx.y % kv_heads, first_head = blockIdx.y / kv_heads * HEADS;
    const int count = min(HEADS, share - first_head);
    const int position = positions[blockIdx.z], seen = first_seen(position, window);
    const int begin = max(seen, split * split_len), end = min(position + 1, (split + 1) * split_len);
    const size_t row = size_t(blockIdx.z) * heads + kv_head * share + first_head;
    const Cache<T> cache{k_cache, v_cache, table_of(tables, sequence, table_stride), kv_heads, kv_head, block_size};
    const int warp = threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES;
    const T* from = q + size_t(blockIdx.z) * q_stride + (kv_head * share + first_head) * head_dim;
    for (int i = threadIdx.x; i < count * head_dim; i += THREADS) queries[i] = widen(from[i]) * (scale * LOG2_E);
    __syncthreads();
    float max = MINUS_INFINITY, sum = 0;
    float out[HEADS][HEAD_DIM_MAX / THREADS] = {};
    for (int first = begin; first < end; first += THREADS) {
        const int keys = min(THREADS, end - first);
        float scores[HEADS] = {};
        if (threadIdx.x < keys) {
            const T* key = k_cache + cache.at(first + threadIdx.x, head_dim);
            for (int i = 0; i < head_dim; i++) {
                const float element = widen(key[i]);
#pragma unroll
                for (int head = 0; head < HEADS; head++) {
                    if (head < count) scores[head] = fmaf(queries[head * head_dim + i], element, scores[head]);
                }
            }
        }
#pragma unroll
        for (int head = 0; head < HEADS; head++) {
            weights[head * THREADS + threadIdx.x] = threadIdx.x < keys && head < count ? scores[head] : MINUS_INFINITY;
        }
        __syncthreads();
        // A warp has one head.
        float top = max, terms = 0;
        for (int i = lane; i < keys; i += WARP_LANES) top = fmaxf(top, weights[warp * THREADS + i]);
        top = warp_max(top);
        const float base = top == MINUS_INFINITY ? 0 : top;
        for (int i = lane; i < keys; i += WARP_LANES) {
            const float term = exp2f(weights[warp * THREADS + i] - base);
            weights[warp * THREADS + i] = term;
            terms += term;
        }
        const float correction = exp2f(max - base);
        sum = sum * correction + warp_sum(terms);
        max = top;
        if (lane == 0) corrections[warp] = correction;
        __syncthreads();
#pragma unroll
        for (int part = 0; part < HEAD_DIM_MAX / THREADS; part++) {
            const int element = part * THREADS + threadIdx.x;
            if (element >= head_dim) continue;
#pragma unroll
            for (int head = 0; head < HEADS; head++) out[head][part] *= corrections[head];
            for (int i = 0; i < keys; i++) {
                const float value = widen(v_cache[cache.at(first + i, head_dim) + element]);
#pragma unroll
                for (int head = 0; head < HEADS; head++) {
                    out[head][part] = fmaf(weights[head * THREADS + i], value, out[head][part]);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int head = 0; head < HEADS; head++) {
        if (head >= count) break;
#pragma unroll
        for (int part = 0; part < HEAD_DIM_MAX / THREADS; part++) {
            const int element = part * THREADS + threadIdx.x;
            if (element < head_dim) partial[((row + head) * splits + split) * head_dim + element] = out[head][part];
        }
    }
    if (warp < count && lane == 0) {
        stats[((row + warp) * splits + split) * 2] = max;
        stats[((row + warp) * splits + split) * 2 + 1] = sum;
    }
}

// One block at least: without a number the compiler puts registers into memory to fit more of them.
#define PLAIN_ATTENTION(T, suffix)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) plain_attention_##suffix(                                         \
        float* partial, float* stats, const T* q, const T* k_cache, const T* v_cache, const uint32_t* tables,               \
        const uint32_t* sequences, const uint32_t* positions, int q_stride, int heads, int kv_heads, int head_dim,          \
        int table_stride, int block_size, int window, int split_len, float scale) {                                         \
        plain_attention<T>(partial, stats, q, k_cache, v_cache, tables, sequences, positions, q_stride, heads, kv_heads,    \
                           head_dim, table_stride, block_size, window, split_len, scale);                                   \
    }                                                                                                                       \
    EXPORT(plain_attention_##suffix)
EACH_TYPE(PLAIN_ATTENTION)
