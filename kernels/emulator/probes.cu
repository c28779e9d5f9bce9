// Kernels with what the emulator must refuse or show; tests run them, no server does.
#include "../common.cuh"

extern "C" __global__ void probe_divergent_barrier(int* out) {
    if (threadIdx.x < 32) __syncthreads();
    out[threadIdx.x] = 1;
}
EXPORT(probe_divergent_barrier)

extern "C" __global__ void probe_divergent_warp(int* out) {
    if (threadIdx.x % 2 == 0) __syncwarp();
    out[threadIdx.x] = 1;
}
EXPORT(probe_divergent_warp)

// Every thread reads what its neighbour in another warp wrote before the barrier.
extern "C" __global__ void probe_neighbour(int* out) {
    SHARED(int, values, 1024);
    const int count = blockDim.x;
    for (int round = 0; round < 4; round++) {
        values[threadIdx.x] = threadIdx.x + round;
        __syncthreads();
        out[round * count + threadIdx.x] = values[(threadIdx.x + 32) % count];
        __syncthreads();
    }
}
EXPORT(probe_neighbour)

// Shared memory that nobody wrote.
extern "C" __global__ void probe_unwritten(float* out) {
    SHARED(float, values, 32);
    DYNAMIC_SHARED(memory);
    out[threadIdx.x] = values[threadIdx.x];
    out[32 + threadIdx.x] = reinterpret_cast<float*>(memory)[threadIdx.x];
}
EXPORT(probe_unwritten)

// Reads past the end of its memory, for the address sanitiser.
extern "C" __global__ void probe_overrun(int* out) { out[threadIdx.x] = out[threadIdx.x + 1]; }
EXPORT(probe_overrun)
