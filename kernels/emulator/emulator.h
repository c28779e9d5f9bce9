// Enough of CUDA to compile the kernels with g++ and run them on a CPU: one fiber for each CUDA thread, blocks one after the other.
// Barriers and shuffles are real. Warps run in an order drawn from a seed and drift as far apart as the barriers let them, and
// shared memory starts as NaN, so a missing barrier or an unwritten element shows in the result.
// Not emulated: time, memory coalescing, bank conflicts, weak memory order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#ifndef __x86_64__
#error "the emulator switches stacks on x86-64 only"
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Dim3 {
    unsigned x, y, z;
};

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

namespace emulator {

constexpr int WARP = 32;

// A CUDA thread.
struct Lane;
extern thread_local Lane* current;
extern thread_local Dim3 block_index, block_size, grid_size;
extern thread_local unsigned char* dynamic_shared;

Dim3 thread_index();
int lane_index();
// Waits for all threads of the block, which must have come to the same line.
void sync_block(const char* file, int line);
// Waits for all threads of the warp, which must have come to the same line.
void sync_warp(const char* file, int line);
// Hands `value` to the warp and returns what lane `source` has handed over.
uint64_t exchange(uint64_t value, int source, const char* file, int line);
// Shared memory of the block for the array that `key` stands for, the same for all threads.
void* shared_array(const void* key, size_t bytes);

// Copies 16 bytes to shared memory, zeros for a `bytes` of 0, at some moment between now and the wait.
void copy_async(void* to, const void* from, int bytes);
void commit_copies();
// Waits until at most `pending` committed groups of this thread are not complete.
void wait_copies(int pending);

// What the warp's tensor core instructions do with the registers of each lane.
void product(float d[4], const uint32_t a[4], const uint32_t b[2], float (*widen)(uint16_t), const char* file, int line);
void read_matrices(uint32_t out[4], const void* row, bool transposed, const char* file, int line);

// The kernels of this library by name, to be called with an array of pointers to the arguments, as the driver does.
using Call = void (*)(const void* kernel, void** arguments);
struct Register {
    // `parameters`: for each of them A for an address and N for a number.
    Register(const char* name, const void* kernel, Call call, std::string parameters);
};

template <class... A, size_t... I>
void call_with(const void* kernel, void** arguments, std::index_sequence<I...>) {
    reinterpret_cast<void (*)(A...)>(const_cast<void*>(kernel))(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
}
template <class... A>
Register registration(const char* name, void (*kernel)(A...)) {
    Call call = [](const void* kernel, void** arguments) {
        call_with<A...>(kernel, arguments, std::make_index_sequence<sizeof...(A)>());
    };
    return Register(name, reinterpret_cast<const void*>(kernel), call, {(std::is_pointer_v<A> ? 'A' : 'N')...});
}

template <class T>
T shuffle(unsigned mask, T value, int source, const char* file, int line) {
    static_assert(sizeof(T) <= 8, "shuffled values have at most 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = exchange(bits, mask == 0xffffffffu ? source : -1, file, line);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

}  // namespace emulator

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)
#define __syncthreads() emulator::sync_block(__FILE__, __LINE__)
#define __syncwarp() emulator::sync_warp(__FILE__, __LINE__)
#define __shfl_sync(mask, value, source) emulator::shuffle(mask, value, source, __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, flip) \
    emulator::shuffle(mask, value, emulator::lane_index() ^ (flip), __FILE__, __LINE__)
// A lane without a source keeps its own value.
#define __shfl_up_sync(mask, value, distance) \
    emulator::shuffle(mask, value, \
                      emulator::lane_index() < (distance) ? emulator::lane_index() : emulator::lane_index() - (distance), \
                      __FILE__, __LINE__)

#define SHARED(T, name, count)             \
    static const char name##_key = 0;      \
    T* const name = static_cast<T*>(emulator::shared_array(&name##_key, sizeof(T) * (count)))
#define DYNAMIC_SHARED(name) unsigned char* const name = emulator::dynamic_shared
#define EXPORT(name) static const emulator::Register registered_##name = emulator::registration(#name, name);

// Threads of a block share one thread of the machine.
template <class T>
T atomicAdd(T* sum, T term) {
    const T before = *sum;
    *sum += term;
    return before;
}
template <class T>
T atomicMin(T* least, T value) {
    const T before = *least;
    *least = std::min(before, value);
    return before;
}

inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
inline float widen(f16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
    // The exponent's offset differs by 112; the product is exact, subnormal numbers included.
    const float value = __uint_as_float(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
    const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
    return __uint_as_float(__float_as_uint(value) | sign | special);
}
template <class T>
T narrow(float x);
template <>
inline float narrow<float>(float x) {
    return x;
}
template <>
inline bf16 narrow<bf16>(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (x != x) return bf16{0x7fff};
    return bf16{uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline f16 narrow<f16>(float x) {
    const _Float16 half = static_cast<_Float16>(x);
    f16 out;
    std::memcpy(&out.bits, &half, 2);
    return out;
}

inline float exp2_approx(float x) { return exp2f(x); }

using std::max;
using std::min;
