// y = x W^T for up to eight rows: each weight is read once, sums are float32. A row has the same bits whatever the number of rows.
#include "common.cuh"

constexpr int THREADS = 256;
// Outputs of a warp: the rows of x that it reads serve both.
constexpr int COLUMNS = 2;

// x [rows, k], weight [columns, k], y [rows, columns]; rows <= ROWS. Grid: columns / (2 * warps).
template <class T, int ROWS>
__device__ __forceinline__ void linear(T* y, const T* x, const T* weight, int rows, int columns, int k) {
    constexpr int COUNT = Vector<T>::COUNT;
    const int lane = threadIdx.x % WARP_LANES;
    const int first = (blockIdx.x * (THREADS / WARP_LANES) + threadIdx.x / WARP_LANES) * COLUMNS;
    const bool whole = k % COUNT == 0;
    float sums[ROWS][COLUMNS] = {};
    // Warps past the last column work on it once more and write nothing, so that no lane leaves the sums below.
    for (int i = lane * COUNT; i < k; i += WARP_LANES * COUNT) {
        float w[COLUMNS][COUNT];
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) load(weight + size_t(min(first + c, columns - 1)) * k, i, k, whole, w[c]);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (r >= rows) break;
            float a[COUNT];
            load(x + size_t(r) * k, i, k, whole, a);
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
#pragma unroll
                for (int j = 0; j < COUNT; j++) sums[r][c] = fmaf(a[j], w[c][j], sums[r][c]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const float sum = warp_sum(sums[r][c]);
            if (lane == 0 && r < rows && first + c < columns) y[size_t(r) * columns + first + c] = narrow<T>(sum);
        }
    }
}

#define LINEAR(T, suffix, ROWS)                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                        \
        linear_##suffix##_##ROWS(T* y, const T* x, const T* weight, int rows, int columns, int k) { \
        linear<T, ROWS>(y, x, weight, rows, columns, k);                                         \
    }                                                                                            \
    EXPORT(linear_##suffix##_##ROWS)
#define LINEARS(T, suffix) LINEAR(T, suffix, 1) LINEAR(T, suffix, 2) LINEAR(T, suffix, 4) LINEAR(T, suffix, 8)
EACH_TYPE(LINEARS)
