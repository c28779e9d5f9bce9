// The arithmetic of attention on tensor cores: some rows of one key head against a range of positions of one sequence.
// A row is one token of one query head; the query heads that share a key head lie in the same tile, so keys and values are read once.
#pragma once

#include "tensor_core.cuh"

// Positions of a tile.
constexpr int TILE = 64;
constexpr float LOG2_E = 1.44269504088896340736f;

// The keys and values of one sequence and key head in the block caches [blocks, kv_heads, block_size, head_dim].
template <class T>
struct Cache {
    const T* keys;
    const T* values;
    // Position p lies in block table[p / block_size].
    const uint32_t* table;
    int kv_heads, kv_head, block_size;

    // The first element of a position.
    __device__ __forceinline__ size_t at(int position, int head_dim) const {
        const size_t block = table[position / block_size];
        return ((block * kv_heads + kv_head) * block_size + position % block_size) * head_dim;
    }
};

// The block table of a sequence.
__device__ __forceinline__ const uint32_t* table_of(const uint32_t* tables, int sequence, int table_stride) {
#ifdef PLANT_TABLE_STRIDE
    return tables + size_t(sequence) * (table_stride - 1);
#else
    return tables + size_t(sequence) * table_stride;
#endif
}

// The first position that `position` sees; a window of 0 is none.
__device__ __forceinline__ int first_seen(int position, int window) {
#ifdef PLANT_WINDOW
    return window > 0 && position > window ? position - window : 0;
#else
    return window > 0 && position >= window ? position + 1 - window : 0;
#endif
}

// A tile of rows: 16 for each of ROW_WARPS; the KEY_WARPS warps of the same rows share the positions of a tile between them.
template <class T, int HEAD_DIM, int ROW_WARPS, int KEY_WARPS>
struct Attention {
    static constexpr int THREADS = WARP_LANES * ROW_WARPS * KEY_WARPS;
    static constexpr int ROWS = 16 * ROW_WARPS;
    // Positions of a tile that a warp works on.
    static constexpr int KEYS = TILE / KEY_WARPS;
    // A 16-byte piece of a position's key or value.
    static constexpr int PIECE = 8, PIECES = HEAD_DIM / PIECE;
    static constexpr int TILE_ELEMENTS = TILE * HEAD_DIM;
    // Two tiles of keys and of values: one is read while the other is filled.
    static constexpr int SHARED_BYTES = 4 * TILE_ELEMENTS * 2;

    T* shared;
    int lane, row_warp, key_warp;
    // Positions of rows g and g + 8 of this warp, -1 for none.
    int position[2];
    uint32_t q[HEAD_DIM / 16][4];
    float out[HEAD_DIM / 8][4];
    // Of the scores in units of log2, and the sum of 2^(score - max): of this lane's columns until `finish`.
    float max[2], sum[2];

    // `row(i)` points to the query of row i of the tile, or is null; `position_of(i)` is its position.
    template <class Row, class Position>
    __device__ __forceinline__ Attention(void* memory, Row row, Position position_of) {
        shared = static_cast<T*>(memory);
        lane = threadIdx.x % WARP_LANES;
        row_warp = threadIdx.x / WARP_LANES / KEY_WARPS;
        key_warp = threadIdx.x / WARP_LANES % KEY_WARPS;
        const T* rows[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int index = row_index(i);
            rows[i] = row(index);
            position[i] = rows[i] == nullptr ? -1 : position_of(index);
            max[i] = MINUS_INFINITY;
            sum[i] = 0;
        }
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int element = k * 16 + lane % 4 * 2 + i / 2 * 8;
                const T* from = rows[i % 2];
                q[k][i] = from == nullptr ? 0 : *reinterpret_cast<const uint32_t*>(from + element);
            }
        }
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) out[n][i] = 0;
        }
    }

    // Row g (i = 0) or g + 8 (i = 1) of this warp in the tile.
    __device__ __forceinline__ int row_index(int i) const { return row_warp * 16 + lane / 4 + i * 8; }

    // Rows of eight pieces would lie in the same banks; the exclusive or spreads them.
    __device__ __forceinline__ T* piece(int stage, int values, int row, int index) const {
        return shared + (stage * 2 + values) * TILE_ELEMENTS + row * HEAD_DIM + (index ^ (row & 7)) * PIECE;
    }

    __device__ __forceinline__ void fetch(const Cache<T>& cache, int stage, int first, int begin, int end) {
        const int index = threadIdx.x % PIECES;
#pragma unroll
        for (int row = threadIdx.x / PIECES; row < TILE; row += THREADS / PIECES) {
            const int position = first + row;
            const bool inside = position >= begin && position < end;
            const size_t at = inside ? cache.at(position, HEAD_DIM) + index * PIECE : 0;
            copy_async(piece(stage, 0, row, index), cache.keys + at, inside);
            copy_async(piece(stage, 1, row, index), cache.values + at, inside);
        }
        commit_copies();
    }

    // All positions of [begin, end), tile by tile. Every row of the block sees [unmasked_begin, unmasked_end) whole.
    __device__ __forceinline__ void attend(const Cache<T>& cache, int begin, int end, int unmasked_begin, int unmasked_end,
                                           int window, float scale) {
        const int first_tile = begin / TILE, tiles = (end + TILE - 1) / TILE;
        if (begin < end) fetch(cache, first_tile % 2, first_tile * TILE, begin, end);
        for (int tile = first_tile; tile < tiles; tile++) {
            wait_copies();
            // Everybody's part of this tile is there, and nobody still reads the one before.
#ifndef PLANT_BARRIER
            __syncthreads();
#endif
            const int first = tile * TILE;
            if (tile + 1 < tiles) fetch(cache, (tile + 1) % 2, first + TILE, begin, end);
            const bool masked = first < unmasked_begin || first + TILE > unmasked_end;
            add_tile(tile % 2, first, masked, window, scale * LOG2_E);
        }
        wait_copies();
    }

    __device__ __forceinline__ void add_tile(int stage, int first, bool masked, int window, float scale) {
        const int key = key_warp * KEYS;
        float scores[KEYS / 8][4];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) scores[n][i] = 0;
        }
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n += 2) {
                // Both halves of k for eight keys, then for the next eight.
                uint32_t b[4];
                load_matrices(b, piece(stage, 0, key + n * 8 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
                multiply(scores[n], q[k], b, T());
                multiply(scores[n + 1], q[k], b + 2, T());
            }
        }
        float correction[2];
#pragma unroll
        for (int i = 0; i < 2; i++) correction[i] = soften(scores, i, first + key, masked, window, scale);
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) out[n][i] *= correction[i / 2];
        }
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
            // What a lane holds of two products is what it must hold of the left side of the next.
            const uint32_t a[4] = {pair(scores[2 * k][0], scores[2 * k][1], T()), pair(scores[2 * k][2], scores[2 * k][3], T()),
                                   pair(scores[2 * k + 1][0], scores[2 * k + 1][1], T()),
                                   pair(scores[2 * k + 1][2], scores[2 * k + 1][3], T())};
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; n += 2) {
                // Sixteen keys for eight elements of the values, then for the next eight.
                uint32_t b[4];
                load_transposed(b, piece(stage, 1, key + k * 16 + lane / 8 % 2 * 8 + lane % 8, n + lane / 16));
                multiply(out[n], a, b, T());
                multiply(out[n + 1], a, b + 2, T());
            }
        }
    }

    // Turns the scores of row i into 2^(score - max) and returns what earlier sums are multiplied with.
    __device__ __forceinline__ float soften(float (&scores)[KEYS / 8][4], int i, int first, bool masked, int window, float scale) {
        const int last_seen = position[i], seen = first_seen(position[i], window);
        float top = max[i];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int j = 2 * i; j < 2 * i + 2; j++) {
                const int at = first + n * 8 + lane % 4 * 2 + j % 2;
                const bool hidden = masked && (at > last_seen || at < seen);
                scores[n][j] = hidden ? MINUS_INFINITY : scores[n][j] * scale;
                top = fmaxf(top, scores[n][j]);
            }
        }
        top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
        top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
        // A row that has seen nothing yet: the difference of two infinities is not a number.
        const float base = top == MINUS_INFINITY ? 0 : top;
        const float correction = exp2_approx(max[i] - base);
        max[i] = top;
        sum[i] *= correction;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int j = 2 * i; j < 2 * i + 2; j++) {
                scores[n][j] = exp2_approx(scores[n][j] - base);
                sum[i] += scores[n][j];
            }
        }
        return correction;
    }

    // Adds up the sums of the four lanes of a row.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 1);
            sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 2);
        }
    }
};
