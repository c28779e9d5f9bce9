// The scheduler of the emulator: fibers, barriers, asynchronous copies, and the table of kernels that tests launch by name.
#include "emulator.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

// Pushes the registers a function must keep, swaps stacks, pops those of the other side.
asm(R"(
.text
.type eurus_switch,@function
eurus_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size eurus_switch,.-eurus_switch
)");
extern "C" void eurus_switch(void** save, void* to) __attribute__((visibility("hidden")));

#define NOT_SANITIZED __attribute__((no_sanitize("address"), noinline))

namespace emulator {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t SHARED_ARRAYS_BYTES = 48 << 10;
constexpr int THREADS_MAX = 1024;
constexpr int ROUNDS_MAX = 64;

enum class Wait { None, Warp, Block, Done };

struct Copy {
    void* to;
    const void* from;
    int bytes;
    int group;
};

struct Lane {
    void* stack;
    Dim3 index;
    int number;
    Wait wait;
    const char* file;
    int line;
    // Copies not made yet, and the number of the group that is open.
    std::vector<Copy> copies;
    int group;
};

struct Warp {
    uint64_t values[WARP];
    const void* rows[WARP];
    uint32_t a[WARP][4], b[WARP][2];
};

struct Random {
    uint64_t state;
    uint32_t below(uint32_t count) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        return uint32_t((state >> 32) * count >> 32);
    }
};

thread_local Lane* current;
thread_local Dim3 block_index, block_size, grid_size;
thread_local unsigned char* dynamic_shared;

// What one grid needs while it runs.
struct Grid {
    std::vector<Lane> lanes;
    std::vector<Warp> warps;
    unsigned char* stacks;
    unsigned char* arrays;
    std::vector<std::pair<const void*, size_t>> array_starts;
    size_t arrays_end;
    void* scheduler;
    Random random;
    const char* name;
    const void* kernel;
    Call call;
    void** arguments;
};
static thread_local Grid* grid;

[[noreturn]] static void fail(const char* what, const Lane& a, const Lane& b) {
    std::fprintf(stderr, "emulator: %s in %s: thread %d at %s:%d, thread %d at %s:%d\n", what, grid->name, a.number,
                 a.file ? a.file : "its end", a.line, b.number, b.file ? b.file : "its end", b.line);
    std::abort();
}

static Warp& own_warp() { return grid->warps[current->number / WARP]; }

NOT_SANITIZED static void pause(Wait wait, const char* file, int line) {
    current->wait = wait;
    current->file = file;
    current->line = line;
    eurus_switch(&current->stack, grid->scheduler);
}

Dim3 thread_index() { return current->index; }
int lane_index() { return current->number % WARP; }
void sync_block(const char* file, int line) { pause(Wait::Block, file, line); }
void sync_warp(const char* file, int line) { pause(Wait::Warp, file, line); }

uint64_t exchange(uint64_t value, int source, const char* file, int line) {
    if (source < 0 || source >= WARP) fail("a shuffle without the full mask or from no lane", *current, *current);
    Warp& warp = own_warp();
    warp.values[lane_index()] = value;
    sync_warp(file, line);
    value = warp.values[source];
    sync_warp(file, line);
    return value;
}

void* shared_array(const void* key, size_t bytes) {
    for (auto& [other, start] : grid->array_starts) {
        if (other == key) return grid->arrays + start;
    }
    const size_t start = grid->arrays_end;
    grid->arrays_end += (bytes + 15) / 16 * 16;
    if (grid->arrays_end > SHARED_ARRAYS_BYTES) fail("more than 48 KiB of shared arrays", *current, *current);
    grid->array_starts.push_back({key, start});
    return grid->arrays + start;
}

static void make(const Copy& copy) {
    if (copy.bytes == 0) {
        std::memset(copy.to, 0, 16);
    } else {
        std::memcpy(copy.to, copy.from, 16);
    }
}

void copy_async(void* to, const void* from, int bytes) {
    const Copy copy{to, from, bytes, current->group};
    // At once shows what still reads the target, late what reads the target too early.
    if (grid->random.below(2) == 0) {
        make(copy);
    } else {
        current->copies.push_back(copy);
    }
}

void commit_copies() { current->group++; }

void wait_copies(int pending) {
    auto& copies = current->copies;
    const auto complete = [&](const Copy& copy) { return copy.group < current->group - pending; };
    for (const Copy& copy : copies) {
        if (complete(copy)) make(copy);
    }
    copies.erase(std::remove_if(copies.begin(), copies.end(), complete), copies.end());
}

void product(float d[4], const uint32_t a[4], const uint32_t b[2], float (*widen)(uint16_t), const char* file, int line) {
    Warp& warp = own_warp();
    const int lane = lane_index();
    std::memcpy(warp.a[lane], a, sizeof warp.a[lane]);
    std::memcpy(warp.b[lane], b, sizeof warp.b[lane]);
    sync_warp(file, line);
    const auto half = [&](uint32_t pair, int odd) { return widen(odd ? pair >> 16 : pair & 0xffff); };
    float left[2][16], right[2][16];
    for (int k = 0; k < 16; k++) {
        for (int i = 0; i < 2; i++) {
            const int holder = k % 8 / 2;
            left[i][k] = half(warp.a[lane / 4 * 4 + holder][i + 2 * (k / 8)], k % 2);
            right[i][k] = half(warp.b[(lane % 4 * 2 + i) * 4 + holder][k / 8], k % 2);
        }
    }
    for (int i = 0; i < 4; i++) {
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += left[i / 2][k] * right[i % 2][k];
        d[i] += sum;
    }
    sync_warp(file, line);
}

void read_matrices(uint32_t out[4], const void* row, bool transposed, const char* file, int line) {
    Warp& warp = own_warp();
    const int lane = lane_index();
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("a matrix row that is not aligned to 16 bytes", *current, *current);
    warp.rows[lane] = row;
    sync_warp(file, line);
    for (int matrix = 0; matrix < 4; matrix++) {
        const auto element = [&](int row, int column) {
            return uint32_t(static_cast<const uint16_t*>(warp.rows[matrix * 8 + row])[column]);
        };
        const int major = lane / 4, minor = lane % 4 * 2;
        out[matrix] = transposed ? element(minor, major) | element(minor + 1, major) << 16
                                 : element(major, minor) | element(major, minor + 1) << 16;
    }
    sync_warp(file, line);
}

NOT_SANITIZED static void enter() {
    grid->call(grid->kernel, grid->arguments);
    if (!current->copies.empty()) fail("copies that nobody waited for", *current, *current);
    pause(Wait::Done, nullptr, 0);
    std::abort();
}

static void start(Lane& lane, int number) {
    lane.number = number;
    lane.index = Dim3{unsigned(number), 0, 0};
    lane.wait = Wait::None;
    lane.file = nullptr;
    lane.copies.clear();
    lane.group = 0;
    // Six registers, the entry, and the address it would return to.
    void** top = reinterpret_cast<void**>(grid->stacks + STACK_BYTES * (number + 1)) - 2;
    top[0] = reinterpret_cast<void*>(enter);
    lane.stack = top - 6;
}

// Runs the threads of a warp until all of them wait for others. Returns whether any of them ran.
NOT_SANITIZED static bool run(Lane* lanes) {
    bool ran = false;
    // An order of the lanes: an odd step visits all of them.
    const unsigned first = grid->random.below(WARP), step = 2 * grid->random.below(WARP / 2) + 1;
    for (unsigned i = 0; i < WARP; i++) {
        Lane& lane = lanes[(first + i * step) % WARP];
        if (lane.wait != Wait::None) continue;
        ran = true;
        current = &lane;
        eurus_switch(&grid->scheduler, lane.stack);
    }
    return ran;
}

// All threads of `lanes` wait for the same thing at the same line; then they may go on.
static void release(Lane* lanes, size_t count, Wait wait) {
    for (size_t i = 0; i < count; i++) {
        if (lanes[i].wait != wait || lanes[i].line != lanes[0].line || lanes[i].file != lanes[0].file) {
            fail(wait == Wait::Warp ? "a divergent warp" : "a divergent barrier", lanes[0], lanes[i]);
        }
    }
    for (size_t i = 0; i < count; i++) lanes[i].wait = Wait::None;
}

static void run_block() {
    auto& lanes = grid->lanes;
    for (size_t i = 0; i < lanes.size(); i++) start(lanes[i], int(i));
    std::vector<unsigned> ready(grid->warps.size());
    for (size_t i = 0; i < ready.size(); i++) ready[i] = unsigned(i);
    for (;;) {
        if (ready.empty()) {
            if (std::all_of(lanes.begin(), lanes.end(), [](const Lane& lane) { return lane.wait == Wait::Done; })) return;
            release(lanes.data(), lanes.size(), Wait::Block);
            for (size_t i = 0; i < grid->warps.size(); i++) ready.push_back(unsigned(i));
        }
        const unsigned choice = grid->random.below(unsigned(ready.size()));
        Lane* warp = &lanes[ready[choice] * WARP];
        for (unsigned rounds = 1 + grid->random.below(ROUNDS_MAX); rounds > 0; rounds--) {
            run(warp);
            if (std::none_of(warp, warp + WARP, [](const Lane& lane) { return lane.wait == Wait::Warp; })) {
                ready.erase(ready.begin() + choice);
                break;
            }
            release(warp, WARP, Wait::Warp);
        }
    }
}

struct Kernel {
    const void* kernel;
    Call call;
    std::string parameters;
};
static std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

Register::Register(const char* name, const void* kernel, Call call, std::string parameters) {
    kernels()[name] = Kernel{kernel, call, parameters};
}

}  // namespace emulator

// A letter for each parameter of a kernel, A for an address and N for a number; null where there is no kernel of that name.
extern "C" const char* emulator_parameters(const char* name) {
    const auto found = emulator::kernels().find(name);
    return found == emulator::kernels().end() ? nullptr : found->second.parameters.c_str();
}

// Runs a grid of one-dimensional blocks. Returns 0, or 1 where the kernel is not known or the limits of a GPU are exceeded.
extern "C" int emulator_launch(const char* name, const unsigned* blocks, unsigned threads, size_t shared_bytes, uint64_t seed,
                               void** arguments) {
    using namespace emulator;
    const auto found = kernels().find(name);
    const bool fits = threads > 0 && threads <= THREADS_MAX && threads % WARP == 0 && shared_bytes <= (227 << 10);
    const bool full = blocks[0] > 0 && blocks[1] > 0 && blocks[2] > 0;
    if (found == kernels().end() || !fits || !full || blocks[1] > 65535 || blocks[2] > 65535) return 1;
    Grid own{};
    grid = &own;
    own.lanes.resize(threads);
    own.warps.resize(threads / WARP);
    own.random.state = (seed + 1) * 0x9e3779b97f4a7c15u;
    own.name = name;
    own.kernel = found->second.kernel;
    own.call = found->second.call;
    own.arguments = arguments;
    const size_t stacks_bytes = STACK_BYTES * threads;
    void* stacks = mmap(nullptr, stacks_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) return 1;
    own.stacks = static_cast<unsigned char*>(stacks);
    // Of exactly this size, so that the address sanitiser sees the end.
    dynamic_shared = static_cast<unsigned char*>(std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128));
    own.arrays = static_cast<unsigned char*>(std::aligned_alloc(128, SHARED_ARRAYS_BYTES));
    block_size = Dim3{threads, 1, 1};
    grid_size = Dim3{blocks[0], blocks[1], blocks[2]};
    for (unsigned z = 0; z < blocks[2]; z++) {
        for (unsigned y = 0; y < blocks[1]; y++) {
            for (unsigned x = 0; x < blocks[0]; x++) {
                block_index = Dim3{x, y, z};
                if (shared_bytes > 0) std::memset(dynamic_shared, 0xff, shared_bytes);
                std::memset(own.arrays, 0xff, SHARED_ARRAYS_BYTES);
                own.array_starts.clear();
                own.arrays_end = 0;
                run_block();
            }
        }
    }
    std::free(own.arrays);
    std::free(dynamic_shared);
    munmap(stacks, stacks_bytes);
    grid = nullptr;
    return 0;
}
