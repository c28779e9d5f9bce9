// Draws one token from each row of logits by the rule of the operation: temperature, top-k, top-p, min-p, one uniform number.
// One block for each row. Probabilities are summed as integers, so sums have no order and a token depends on its row alone.
#include "common.cuh"

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / WARP_LANES;
constexpr uint32_t NO_TOKEN = 0xffffffffu;
// A probability in units of the largest one, times this. Rows of up to 2^19 entries add up below 2^63.
constexpr double UNITS = 17592186044416.0;  // 2^44

// How one row is drawn from; the number is a function of seed and counter.
struct Draw {
    uint64_t seed, counter;
    float temperature, top_p, min_p;
    uint32_t top_k;
};

// In the order of larger logits, then lower ids: everything up to and including this entry.
struct Cut {
    uint32_t key, id;
};

// Larger logits have larger keys; both zeros have one.
__device__ __forceinline__ uint32_t key_of(float logit) {
    const uint32_t bits = __float_as_uint(logit == 0 ? 0.0f : logit);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ bool inside(Cut cut, uint32_t key, uint32_t id) {
    return key > cut.key || (key == cut.key && id <= cut.id);
}

// Philox4x32-10, and of its words a number in [0, 1) with 53 bits.
__device__ __forceinline__ double uniform(uint64_t seed, uint64_t counter) {
    uint32_t c[4] = {uint32_t(counter), uint32_t(counter >> 32), 0, 0};
    uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
    for (int round = 0; round < 10; round++) {
        const uint64_t even = uint64_t(0xD2511F53u) * c[0], odd = uint64_t(0xCD9E8D57u) * c[2];
        c[0] = uint32_t(odd >> 32) ^ c[1] ^ key[0];
        c[2] = uint32_t(even >> 32) ^ c[3] ^ key[1];
        c[1] = uint32_t(odd);
        c[3] = uint32_t(even);
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return double((c[0] | uint64_t(c[1]) << 32) >> 11) / 9007199254740992.0;
}

// What the threads of a block share while they draw.
struct Scratch {
    unsigned long long* histogram;  // [256]
    unsigned long long* sums;       // [WARPS]
    // A digit or an id, and a sum.
    uint32_t* found;
    unsigned long long* before;
};

// A warp's running sum: what this lane and those before it hold.
__device__ __forceinline__ unsigned long long running_sum(unsigned long long x) {
    const int lane = threadIdx.x % WARP_LANES;
    for (int distance = 1; distance < WARP_LANES; distance *= 2) {
        const unsigned long long other = __shfl_up_sync(ALL_LANES, x, distance);
        if (lane >= distance) x += other;
    }
    return x;
}

// The lowest id at which the sum of `amount(id)` over ids reaches `wanted(sum over all ids)`, which must lie in [1, sum].
template <class Amount, class Wanted>
__device__ __forceinline__ uint32_t locate(int vocab, Amount amount, Wanted wanted_of, Scratch scratch) {
    const int warp = threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES;
    const int part = (vocab + THREADS - 1) / THREADS * WARP_LANES;
    const int begin = warp * part, end = min(vocab, begin + part);
    unsigned long long sum = 0;
    for (int id = begin + lane; id < end; id += WARP_LANES) sum += amount(id);
    sum = warp_sum(sum);
    if (lane == 0) scratch.sums[warp] = sum;
    __syncthreads();
    unsigned long long total = 0, before = 0;
    for (int i = 0; i < WARPS; i++) total += scratch.sums[i];
    for (int i = 0; i < warp; i++) before += scratch.sums[i];
    const unsigned long long wanted = wanted_of(total);
    if (before < wanted && wanted <= before + sum) {
        for (int first = begin; before < wanted; first += WARP_LANES) {
            const unsigned long long own = first + lane < end ? amount(first + lane) : 0;
            const unsigned long long running = before + running_sum(own);
            if (running >= wanted && running - own < wanted) *scratch.found = first + lane;
            before = __shfl_sync(ALL_LANES, running, WARP_LANES - 1);
        }
    }
    __syncthreads();
    // Whoever writes it next has passed another barrier.
    return *scratch.found;
}

// The shortest part of `within`, from the best entry on, whose `amount(logit)` add up to `wanted`, at least 1 and at most the sum.
template <class T, class Amount>
__device__ __forceinline__ Cut select(const T* row, int vocab, Cut within, unsigned long long wanted, Amount amount, Scratch scratch) {
    uint32_t key = 0;
    // Eight bits of the key at a time, from the highest: the amounts by the next digit of those that agree so far.
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < 256; i += THREADS) scratch.histogram[i] = 0;
        __syncthreads();
        const uint32_t known = shift == 24 ? 0 : ~0u << (shift + 8);
        for (int id = threadIdx.x; id < vocab; id += THREADS) {
            const float logit = widen(row[id]);
            const uint32_t own = key_of(logit);
            if ((own & known) == key && inside(within, own, id)) {
                atomicAdd(&scratch.histogram[own >> shift & 255], amount(logit));
            }
        }
        __syncthreads();
        if (threadIdx.x < WARP_LANES) {
            // Lane 0 has the eight highest digits.
            const int highest = 255 - int(threadIdx.x) * 8;
            unsigned long long sum = 0;
            for (int i = 0; i < 8; i++) sum += scratch.histogram[highest - i];
            const unsigned long long running = running_sum(sum);
            unsigned long long before = running - sum;
            if (before < wanted && wanted <= running) {
                int digit = highest;
                while (before + scratch.histogram[digit] < wanted) before += scratch.histogram[digit--];
                *scratch.found = digit;
                *scratch.before = before;
            }
        }
        __syncthreads();
        key |= *scratch.found << shift;
        wanted -= *scratch.before;
        __syncthreads();
    }
    // Of the entries with this logit, those with the lowest ids, as many as are needed.
    const auto tie = [&](int id) -> unsigned long long {
        const float logit = widen(row[id]);
        return key_of(logit) == key && inside(within, key, id) ? amount(logit) : 0;
    };
    const unsigned long long rest = wanted;
    return Cut{key, locate(vocab, tie, [&](unsigned long long) { return rest; }, scratch)};
}

// logits [R, vocab], draws [R], tokens [R]: NO_TOKEN where a logit is not a number or plus infinity, or none is finite.
template <class T>
__device__ __forceinline__ void sample(uint32_t* tokens, const T* logits, const Draw* draws, int vocab) {
    SHARED(unsigned long long, histogram, 256);
    SHARED(unsigned long long, sums, WARPS);
    SHARED(unsigned long long, before, 1);
    SHARED(float, maxima, WARPS);
    SHARED(uint32_t, found, 1);
    const Scratch scratch{histogram, sums, found, before};
    const T* row = logits + size_t(blockIdx.x) * vocab;
    const Draw draw = draws[blockIdx.x];
    float max = MINUS_INFINITY;
    bool broken = false;
    for (int id = threadIdx.x; id < vocab; id += THREADS) {
        const float logit = widen(row[id]);
        broken |= !(logit < INFINITY);
        max = fmaxf(max, logit);
    }
    max = block_max(max, maxima);
    const bool refused = block_sum(broken ? 1ull : 0ull, sums) > 0 || max == MINUS_INFINITY;
    if (refused) {
        if (threadIdx.x == 0) tokens[blockIdx.x] = NO_TOKEN;
        return;
    }
    // Through double precision, so that every library rounds to the same float.
    const auto weight = [&](float logit) { return double(float(exp(double((logit - max) / draw.temperature)))); };
    const auto units = [&](float logit) { return static_cast<unsigned long long>(weight(logit) * UNITS); };
    uint32_t token;
    if (draw.temperature == 0) {
        const auto largest = [&](int id) -> unsigned long long { return widen(row[id]) == max ? 1 : 0; };
        token = locate(vocab, largest, [](unsigned long long) { return 1ull; }, scratch);
    } else {
        Cut cut{0, NO_TOKEN};
        if (draw.top_k > 0 && draw.top_k < uint32_t(vocab)) {
            cut = select(row, vocab, cut, draw.top_k, [](float) { return 1ull; }, scratch);
        }
        if (draw.top_p < 1) {
            unsigned long long total = 0;
            for (int id = threadIdx.x; id < vocab; id += THREADS) {
                const float logit = widen(row[id]);
                if (inside(cut, key_of(logit), id)) total += units(logit);
            }
            total = block_sum(total, sums);
            const auto share = static_cast<unsigned long long>(ceil(double(draw.top_p) * double(total)));
            cut = select(row, vocab, cut, min(share == 0 ? 1ull : share, total), units, scratch);
        }
        const auto amount = [&](int id) -> unsigned long long {
            const float logit = widen(row[id]);
            return inside(cut, key_of(logit), id) && weight(logit) >= double(draw.min_p) ? units(logit) : 0;
        };
        const double at = uniform(draw.seed, draw.counter);
        // The sum must exceed its share, and a product that was rounded up to the total means the last token.
        const auto exceeding = [&](unsigned long long total) {
            return min(static_cast<unsigned long long>(at * double(total)) + 1, total);
        };
        token = locate(vocab, amount, exceeding, scratch);
    }
    if (threadIdx.x == 0) tokens[blockIdx.x] = token;
}

#define SAMPLE(T, suffix)                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS)                                     \
        sample_##suffix(uint32_t* tokens, const T* logits, const Draw* draws, int vocab) {    \
        sample<T>(tokens, logits, draws, vocab);                                              \
    }                                                                                         \
    EXPORT(sample_##suffix)
EACH_TYPE(SAMPLE)
