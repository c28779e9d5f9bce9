// A stand-in for NVIDIA's driver and for cuBLAS and cuRAND, as far as the server calls them: the host's memory is the device's, and
// kernels run in the emulator, at once, or whenever the graph is launched that a stream records. It exists for tests of the host's
// side. It shows no time and no overlap, and its device says what it is. src/ops/cuda/imports.rs loads it in builds with the feature `emulator` and when it is asked for by name, never as a GPU.
#include "emulator.h"

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

extern "C" const char* emulator_parameters(const char* name);
extern "C" int emulator_launch(const char* name, const unsigned* blocks, unsigned threads, size_t shared_bytes, uint64_t seed,
                               void** arguments);

namespace {

// Results of the driver, of cuBLAS and of cuRAND.
constexpr int SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_HANDLE = 400, ILLEGAL_STATE = 401, NOT_FOUND = 500,
              ILLEGAL_ADDRESS = 700, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901;
constexpr int BLAS_INVALID_VALUE = 7;

constexpr size_t ALIGNMENT = 256;
// Of the device: 4 GiB, or as many MiB as the variable says, for tests that fill it.
size_t memory_bytes() {
    static const char* const set = std::getenv("EURUS_EMULATOR_MIB");
    return (set ? std::strtoul(set, nullptr, 10) : 4096) << 20;
}
// Dynamic shared memory of a kernel that has not asked for more.
constexpr unsigned SHARED_BYTES = 48 << 10, SHARED_BYTES_MAX = 227 << 10;

struct Function {
    std::string name;
    unsigned shared_bytes = SHARED_BYTES;
};

using Work = std::function<int()>;

// What a stream recorded, and the memory that it allocates on its way: its addresses are the same each time it runs.
struct Graph {
    std::vector<Work> works;
    std::map<uint64_t, size_t> memory;
};

struct Stream {
    // What is recorded now.
    Graph* graph = nullptr;
    // Something was asked for that cannot be recorded.
    bool spoiled = false;
};

struct Blas {
    void* stream = nullptr;
};

std::mutex lock;
// What is allocated, by its first byte.
std::map<uint64_t, size_t> allocations;
size_t allocated_bytes;
std::map<std::string, Function> functions;
uint64_t launch_count;
thread_local void* current_context;
// The stream that records what this thread asks for.
thread_local Stream* recording;
// Handles are addresses of these.
int context, event, module, pool, generator;

// At once, or into the graph of a stream that records.
int enqueue(void* stream, Work work) {
    Stream* const to = static_cast<Stream*>(stream);
    if (to == nullptr || to->graph == nullptr) return work();
    if (to->spoiled) return CAPTURE_INVALIDATED;
    to->graph->works.push_back(std::move(work));
    return SUCCESS;
}

// For what a stream cannot record, or its thread may not do meanwhile: the recording is lost.
int unless_recording() {
    if (recording == nullptr) return SUCCESS;
    recording->spoiled = true;
    return CAPTURE_UNSUPPORTED;
}

bool inside(uint64_t address, size_t bytes) {
    const std::lock_guard<std::mutex> guard(lock);
    auto next = allocations.upper_bound(address);
    if (next == allocations.begin()) return false;
    const auto& [start, size] = *std::prev(next);
    return address - start <= size && bytes <= size - (address - start);
}

// Memory that is not the device's yet.
int reserve(uint64_t* out, size_t* size, size_t bytes) {
    *size = std::max((bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT, ALIGNMENT);
    if (*size > memory_bytes() - allocated_bytes) return OUT_OF_MEMORY;
    void* const memory = std::aligned_alloc(ALIGNMENT, *size);
    if (memory == nullptr) return OUT_OF_MEMORY;
    *out = reinterpret_cast<uint64_t>(memory);
    allocated_bytes += *size;
    return SUCCESS;
}

void give_back(uint64_t address, size_t size) {
    allocated_bytes -= size;
    std::free(reinterpret_cast<void*>(address));
}

// From now on the device's. It holds no number, so that what is read before it is written shows.
int begin(uint64_t address, size_t size) {
    std::memset(reinterpret_cast<void*>(address), 0xff, size);
    return allocations.emplace(address, size).second ? SUCCESS : INVALID_VALUE;
}

// From now on no more; 0 if it was not.
size_t end(uint64_t address) {
    const auto found = allocations.find(address);
    if (found == allocations.end()) return 0;
    const size_t size = found->second;
    std::memset(reinterpret_cast<void*>(address), 0xff, size);
    allocations.erase(found);
    return size;
}

int allocate(uint64_t* out, size_t bytes, void* stream) {
    const std::lock_guard<std::mutex> guard(lock);
    size_t size;
    if (const int status = reserve(out, &size, bytes)) return status;
    Graph* const graph = stream == nullptr ? nullptr : static_cast<Stream*>(stream)->graph;
    if (graph == nullptr) return begin(*out, size);
    graph->memory[*out] = size;
    return enqueue(stream, [address = *out, size] {
        const std::lock_guard<std::mutex> guard(lock);
        return begin(address, size);
    });
}

int release(uint64_t address, void* stream) {
    const std::lock_guard<std::mutex> guard(lock);
    Graph* const graph = stream == nullptr ? nullptr : static_cast<Stream*>(stream)->graph;
    if (graph == nullptr) {
        const size_t size = end(address);
        if (size > 0) give_back(address, size);
        return size > 0 ? SUCCESS : INVALID_VALUE;
    }
    // Not what was there before.
    if (graph->memory.count(address) == 0) return INVALID_VALUE;
    return enqueue(stream, [address] {
        const std::lock_guard<std::mutex> guard(lock);
        return end(address) > 0 ? SUCCESS : INVALID_VALUE;
    });
}

int copy(uint64_t to, uint64_t from, size_t bytes, bool to_device, bool from_device) {
    if ((to_device && !inside(to, bytes)) || (from_device && !inside(from, bytes))) return INVALID_VALUE;
    std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
    return SUCCESS;
}

template <class H>
int hand_out(void** out, H& handle) {
    *out = &handle;
    return SUCCESS;
}

}  // namespace

extern "C" {

int cuInit(unsigned) { return SUCCESS; }
int cuDeviceGetCount(int* count) { return *count = 1, SUCCESS; }
int cuDeviceGet(int* device, int ordinal) { return *device = 0, ordinal == 0 ? SUCCESS : INVALID_VALUE; }
int cuDeviceGetName(char* name, int size, int) { return std::snprintf(name, size, "emulator on the CPU, no GPU"), SUCCESS; }
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = memory_bytes(), SUCCESS; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    constexpr int MAJOR = 75, MINOR = 76, MEMORY_POOLS = 115;
    *value = attribute == MAJOR ? 9 : attribute == MINOR ? 0 : attribute == MEMORY_POOLS ? 1 : 0;
    return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void** out, int) { return hand_out(out, context); }
int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
int cuDeviceGetDefaultMemPool(void** out, int) { return hand_out(out, pool); }
int cuMemPoolSetAttribute(void* of, int, void*) { return of == &pool ? SUCCESS : INVALID_HANDLE; }
int cuCtxGetCurrent(void** out) { return *out = current_context, SUCCESS; }
int cuCtxSetCurrent(void* to) { return current_context = to, SUCCESS; }
int cuCtxSynchronize() { return unless_recording(); }

int cuStreamCreate(void** out, unsigned) { return hand_out(out, *new Stream); }
int cuStreamDestroy_v2(void* stream) { return delete static_cast<Stream*>(stream), SUCCESS; }
int cuStreamSynchronize(void*) { return unless_recording(); }
int cuStreamWaitEvent(void*, void*, unsigned) { return SUCCESS; }
int cuStreamIsCapturing(void* stream, int* status) {
    const Stream* const of = static_cast<Stream*>(stream);
    *status = of == nullptr || of->graph == nullptr ? 0 : of->spoiled ? 2 : 1;
    return SUCCESS;
}
int cuStreamBeginCapture_v2(void* stream, int) {
    Stream* const from = static_cast<Stream*>(stream);
    if (from == nullptr || from->graph != nullptr || recording != nullptr) return ILLEGAL_STATE;
    from->graph = new Graph;
    from->spoiled = false;
    return recording = from, SUCCESS;
}
int cuGraphDestroy(void*);
int cuStreamEndCapture(void* stream, void** out) {
    Stream* const from = static_cast<Stream*>(stream);
    *out = nullptr;
    if (from != recording) return ILLEGAL_STATE;
    recording = nullptr;
    Graph* const graph = std::exchange(from->graph, nullptr);
    if (from->spoiled) return cuGraphDestroy(graph), CAPTURE_INVALIDATED;
    return hand_out(out, *graph);
}
// A graph and what is launched of it are one here.
int cuGraphInstantiateWithFlags(void** out, void* graph, unsigned long long) { return *out = graph, unless_recording(); }
int cuGraphExecDestroy(void*) { return SUCCESS; }
int cuGraphDestroy(void* handle) {
    Graph* const graph = static_cast<Graph*>(handle);
    const std::lock_guard<std::mutex> guard(lock);
    for (const auto& [address, size] : graph->memory) {
        end(address);
        give_back(address, size);
    }
    return delete graph, SUCCESS;
}
int cuGraphLaunch(void* graph, void*) {
    for (const Work& work : static_cast<Graph*>(graph)->works) {
        if (const int status = work()) return status;
    }
    return SUCCESS;
}
int cuEventCreate(void** out, unsigned) { return hand_out(out, event); }
int cuEventDestroy_v2(void*) { return SUCCESS; }
int cuEventRecord(void*, void*) { return SUCCESS; }
int cuEventSynchronize(void*) { return SUCCESS; }
int cuEventQuery(void*) { return SUCCESS; }

int cuMemGetInfo_v2(size_t* free, size_t* total) {
    const std::lock_guard<std::mutex> guard(lock);
    return *free = memory_bytes() - allocated_bytes, *total = memory_bytes(), SUCCESS;
}
int cuMemAllocAsync(uint64_t* out, size_t bytes, void* stream) { return allocate(out, bytes, stream); }
int cuMemAlloc_v2(uint64_t* out, size_t bytes) {
    const int status = unless_recording();
    return status ? status : allocate(out, bytes, nullptr);
}
int cuMemFreeAsync(uint64_t address, void* stream) { return release(address, stream); }
int cuMemFree_v2(uint64_t address) {
    const int status = unless_recording();
    return status ? status : release(address, nullptr);
}
int cuMemsetD8Async(uint64_t to, unsigned char byte, size_t bytes, void* stream) {
    return enqueue(stream, [=] {
        if (!inside(to, bytes)) return INVALID_VALUE;
        return std::memset(reinterpret_cast<void*>(to), byte, bytes), SUCCESS;
    });
}
// A driver lets a graph read or write the host's memory whenever it is launched: no graph of the server may.
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void*) {
    const int status = unless_recording();
    return status ? status : copy(to, reinterpret_cast<uint64_t>(from), bytes, true, false);
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void*) {
    const int status = unless_recording();
    return status ? status : copy(reinterpret_cast<uint64_t>(to), from, bytes, false, true);
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
    return enqueue(stream, [=] { return copy(to, from, bytes, true, true); });
}

int cuModuleLoadData(void** out, const void* image) {
    // The magic number of a fatbin: the emulator has its own code of every kernel, but the image must be one.
    uint32_t magic;
    std::memcpy(&magic, image, sizeof magic);
    if (const int status = unless_recording()) return status;
    return magic == 0xba55ed50u ? hand_out(out, module) : INVALID_VALUE;
}
int cuModuleUnload(void*) { return SUCCESS; }
int cuModuleGetFunction(void** out, void* of, const char* name) {
    if (of != &module) return INVALID_HANDLE;
    if (emulator_parameters(name) == nullptr) return NOT_FOUND;
    const std::lock_guard<std::mutex> guard(lock);
    Function& function = functions[name];
    function.name = name;
    return hand_out(out, function);
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
    constexpr int MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;
    if (attribute != MAX_DYNAMIC_SHARED_SIZE_BYTES || value < 0 || unsigned(value) > SHARED_BYTES_MAX) return INVALID_VALUE;
    static_cast<Function*>(function)->shared_bytes = unsigned(value);
    return SUCCESS;
}
int cuLaunchKernel(void* handle, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y, unsigned threads_z,
                   unsigned shared_bytes, void* stream, void** arguments, void** extra) {
    const Function& function = *static_cast<Function*>(handle);
    if (threads_y != 1 || threads_z != 1 || extra != nullptr || shared_bytes > function.shared_bytes) return INVALID_VALUE;
    const std::string parameters = emulator_parameters(function.name.c_str());
    std::vector<uint64_t> values(parameters.size());
    for (size_t i = 0; i < parameters.size(); i++) std::memcpy(&values[i], arguments[i], parameters[i] == 'A' ? 8 : 4);
    return enqueue(stream, [=, name = function.name]() mutable {
        std::vector<void*> places;
        for (size_t i = 0; i < parameters.size(); i++) {
            places.push_back(&values[i]);
            if (parameters[i] == 'A' && !inside(values[i], 1)) {
                std::fprintf(stderr, "emulator: argument %zu of %s is no memory of the device\n", i, name.c_str());
                return ILLEGAL_ADDRESS;
            }
        }
        const unsigned blocks[3] = {x, y, z};
        const int status = emulator_launch(name.c_str(), blocks, threads, shared_bytes, launch_count++, places.data());
        return status == 0 ? SUCCESS : INVALID_VALUE;
    });
}

int cuGetErrorName(int error, const char** name) {
    switch (error) {
        case SUCCESS: return *name = "CUDA_SUCCESS", SUCCESS;
        case INVALID_VALUE: return *name = "CUDA_ERROR_INVALID_VALUE", SUCCESS;
        case OUT_OF_MEMORY: return *name = "CUDA_ERROR_OUT_OF_MEMORY", SUCCESS;
        case INVALID_HANDLE: return *name = "CUDA_ERROR_INVALID_HANDLE", SUCCESS;
        case ILLEGAL_STATE: return *name = "CUDA_ERROR_ILLEGAL_STATE", SUCCESS;
        case NOT_FOUND: return *name = "CUDA_ERROR_NOT_FOUND", SUCCESS;
        case ILLEGAL_ADDRESS: return *name = "CUDA_ERROR_ILLEGAL_ADDRESS", SUCCESS;
        case CAPTURE_UNSUPPORTED: return *name = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", SUCCESS;
        case CAPTURE_INVALIDATED: return *name = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", SUCCESS;
        default: return *name = nullptr, INVALID_VALUE;
    }
}
int cuGetErrorString(int error, const char** text) { return cuGetErrorName(error, text); }

int cublasCreate_v2(void** out) { return hand_out(out, *new Blas); }
int cublasDestroy_v2(void* blas) { return delete static_cast<Blas*>(blas), SUCCESS; }
int cublasSetStream_v2(void* blas, void* stream) { return static_cast<Blas*>(blas)->stream = stream, SUCCESS; }

}  // extern "C"

namespace {

template <class T>
float element(uint64_t start, size_t index) {
    return widen(reinterpret_cast<const T*>(start)[index]);
}

// C = A B of one batch, all in columns, of which each begins `ld` elements after the one before.
struct Product {
    int m, n, k;
    bool a_turned, b_turned;
    uint64_t a, b, c;
    int lda, ldb, ldc;

    template <class T>
    int run() const {
        const auto bytes = [](int ld, int columns, int rows) { return (size_t(columns - 1) * ld + rows) * sizeof(T); };
        if (!inside(a, a_turned ? bytes(lda, m, k) : bytes(lda, k, m)) ||
            !inside(b, b_turned ? bytes(ldb, k, n) : bytes(ldb, n, k)) || !inside(c, bytes(ldc, n, m))) {
            return BLAS_INVALID_VALUE;
        }
        for (int j = 0; j < n; j++) {
            for (int i = 0; i < m; i++) {
                float sum = 0;
                for (int l = 0; l < k; l++) {
                    const float left = element<T>(a, a_turned ? size_t(i) * lda + l : size_t(l) * lda + i);
                    sum = fmaf(left, element<T>(b, b_turned ? size_t(l) * ldb + j : size_t(j) * ldb + l), sum);
                }
                reinterpret_cast<T*>(c)[size_t(j) * ldc + i] = narrow<T>(sum);
            }
        }
        return SUCCESS;
    }
};

}  // namespace

extern "C" {

// Sums in float32 in order of k; alpha is 1 and beta 0, as everywhere in the server.
int cublasGemmStridedBatchedEx(void* blas, int a_operation, int b_operation, int m, int n, int k, const void* alpha, const void* a,
                               int a_type, int lda, long long a_stride, const void* b, int b_type, int ldb, long long b_stride,
                               const void* beta, void* c, int c_type, int ldc, long long c_stride, int count, int, int) {
    constexpr int R_32F = 0, R_16F = 2, R_16BF = 14;
    float scales[2];
    std::memcpy(&scales[0], alpha, sizeof(float));
    std::memcpy(&scales[1], beta, sizeof(float));
    const bool sizes = m > 0 && n > 0 && k > 0 && lda >= (a_operation ? k : m) && ldb >= (b_operation ? n : k) && ldc >= m;
    if (a_type != b_type || a_type != c_type || !sizes || scales[0] != 1 || scales[1] != 0) return BLAS_INVALID_VALUE;
    const size_t size = a_type == R_32F ? 4 : 2;
    for (int i = 0; i < count; i++) {
        const auto at = [&](const void* start, long long stride) { return reinterpret_cast<uint64_t>(start) + i * stride * size; };
        const Product product{m,   n,   k, a_operation != 0, b_operation != 0, at(a, a_stride), at(b, b_stride), at(c, c_stride),
                              lda, ldb, ldc};
        const int status = enqueue(static_cast<Blas*>(blas)->stream, [=] {
            return a_type == R_32F    ? product.run<float>()
                   : a_type == R_16F  ? product.run<f16>()
                   : a_type == R_16BF ? product.run<bf16>()
                                      : BLAS_INVALID_VALUE;
        });
        if (status != SUCCESS) return status;
    }
    return SUCCESS;
}

// candle makes a generator with each device; nothing is drawn from it.
int curandCreateGenerator(void** out, int) { return hand_out(out, generator); }
int curandDestroyGenerator(void*) { return SUCCESS; }
int curandSetStream(void*, void*) { return SUCCESS; }
int curandSetPseudoRandomGeneratorSeed(void*, unsigned long long) { return SUCCESS; }

}  // extern "C"
