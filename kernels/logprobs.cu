// The log-probability of one target in each row of logits, the entropy of the row, and whether the target is its largest entry.
// One block for each row, one pass over it.
#include "common.cuh"

constexpr int THREADS = 512;

// Terms e^(x - max) of a part of a row: their sum, and the sum of (x - max) e^(x - max).
struct Terms {
    float max, sum, products;
};

__device__ __forceinline__ Terms moved(Terms terms, float max) {
    // Nothing was added yet where the maximum is still minus infinity.
    if (terms.max == MINUS_INFINITY) return Terms{max, 0, 0};
    const float shift = terms.max - max, factor = expf(shift);
    return Terms{max, terms.sum * factor, factor == 0 ? 0 : (terms.products + terms.sum * shift) * factor};
}

// logits [R, vocab], targets [R], scores [R, 3] as in the operation: log-probability, entropy in nats, 1 for the largest. No numbers
// where a logit is none or plus infinity, or none is finite, and no log-probability of a target outside of the vocabulary.
template <class T>
__device__ __forceinline__ void target_scores(float* scores, const T* logits, const uint32_t* targets, int vocab) {
    constexpr int COUNT = Vector<T>::COUNT;
    SHARED(float, maxima, THREADS / WARP_LANES);
    SHARED(double, sums, THREADS / WARP_LANES);
    const T* row = logits + size_t(blockIdx.x) * vocab;
    const bool whole = vocab % COUNT == 0;
    Terms own{MINUS_INFINITY, 0, 0};
    bool broken = false;
    for (int i = threadIdx.x * COUNT; i < vocab; i += THREADS * COUNT) {
        float x[COUNT];
        load(row, i, vocab, whole, x);
        float max = own.max;
#pragma unroll
        for (int j = 0; j < COUNT; j++) max = i + j < vocab ? fmaxf(max, x[j]) : max;
        if (max != own.max) own = moved(own, max);
#pragma unroll
        for (int j = 0; j < COUNT; j++) {
            // Far below, both terms are nothing, and minus infinity times zero would not be a number.
            broken |= !(x[j] < INFINITY);
            if (i + j < vocab && x[j] - max > -88.0f) {
                const float term = expf(x[j] - max);
                own.sum += term;
                own.products = fmaf(x[j] - max, term, own.products);
            }
        }
    }
    const float max = block_max(own.max, maxima);
    own = moved(own, max);
    const double sum = block_sum(double(own.sum), sums);
    const double products = block_sum(double(own.products), sums);
    // Sums of entries that are no numbers would not show them all.
    const bool refused = block_sum(broken ? 1.0f : 0.0f, maxima) > 0 || max == MINUS_INFINITY;
    if (threadIdx.x == 0) {
        const uint32_t id = targets[blockIdx.x];
        const float target = id < uint32_t(vocab) ? widen(row[id]) : NAN;
        const double log_sum = log(sum);
        float* out = scores + size_t(blockIdx.x) * 3;
        out[0] = refused ? NAN : float(double(target - max) - log_sum);
        out[1] = refused ? NAN : float(log_sum - products / sum);
        out[2] = refused ? NAN : target == max ? 1.0f : 0.0f;
    }
}

#define TARGET_SCORES(T, suffix)                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS)                                           \
        target_scores_##suffix(float* scores, const T* logits, const uint32_t* targets, int vocab) { \
        target_scores<T>(scores, logits, targets, vocab);                                           \
    }                                                                                               \
    EXPORT(target_scores_##suffix)
EACH_TYPE(TARGET_SCORES)
