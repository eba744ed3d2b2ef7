// Philox4x32-10 (Salmon et al., SC 2011): random words as a pure function of a counter and a key, on CPU and CUDA alike.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define CASE_FAST_BOTH __host__ __device__
#else
#define CASE_FAST_BOTH
#endif

// Word 0 of the block that belongs to (counter, key).
CASE_FAST_BOTH static inline uint32_t case_fast_philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c0;
}

// The key of a call, from a number and, where it is not NULL, the place of another that is read when the kernel runs: what a
// captured or queued call drops then follows what stands there by then.
CASE_FAST_BOTH static inline uint64_t case_fast_seed(uint64_t seed, const uint64_t *seed_at) {
    return seed_at ? (seed ^ *seed_at) & 0x7FFFFFFFFFFFFFFFu : seed;
}

// floor(p * 2^32): a word below it is dropped. 64 bits, for p = 1 drops every word.
CASE_FAST_BOTH static inline uint64_t case_fast_drop_below(double p) { return (uint64_t)(p * 4294967296.0); }

// Whether dropout keeps the attention weight of edge e (its place in `indices`) and head h.
CASE_FAST_BOTH static inline int case_fast_keep(uint64_t seed, int64_t e, int32_t h, uint64_t drop_below) {
    return case_fast_philox((uint32_t)e, (uint32_t)((uint64_t)e >> 32), (uint32_t)h, 0, seed) >= drop_below;
}

// Draw `slot` of pair `pair` on side 0 (rows of y) or 1 (rows of x): one of n rows, by number.
CASE_FAST_BOTH static inline uint32_t case_fast_draw(uint64_t seed, uint32_t pair, uint32_t side, uint32_t slot, uint32_t n) {
    return (uint32_t)((uint64_t)case_fast_philox(slot, pair, side, 0, seed) * n >> 32);
}
