// Philox4x32-10 (Salmon et al., SC 2011): random words as a pure function of a counter and a key, on CPU and CUDA alike.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define CASE_FAST_BOTH __host__ __device__
#else
#define CASE_FAST_BOTH
#endif

// The block that belongs to (counter, key), in place of the counter c[0] .. c[3].
CASE_FAST_BOTH static inline void case_fast_philox_block(uint32_t c[4], uint64_t key) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
        c[0] = (uint32_t)(b >> 32) ^ c[1] ^ k0;
        c[1] = (uint32_t)b;
        c[2] = (uint32_t)(a >> 32) ^ c[3] ^ k1;
        c[3] = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

// Word 0 of it.
CASE_FAST_BOTH static inline uint32_t case_fast_philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
    uint32_t c[4] = {c0, c1, c2, c3};
    case_fast_philox_block(c, key);
    return c[0];
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

// What decides, of 16 bits, whether residual_norm keeps an element of what a layer adds. Both halves of all four words of a counter serve
// neighbours in a row, where attention weights take a counter each: an eighth of the rounds, which would be most of the work. The last
// number keeps the counters apart from those of attention weights under the same seed.
CASE_FAST_BOTH static inline uint32_t case_fast_half_word(uint64_t seed, int64_t row, int64_t column) {
    uint32_t c[4] = {(uint32_t)row, (uint32_t)((uint64_t)row >> 32), (uint32_t)(column / 8), 1};
    case_fast_philox_block(c, seed);
    return c[column / 2 % 4] >> (column % 2 * 16) & 0xFFFFu;
}

// Draw `slot` of pair `pair` on side 0 (rows of y) or 1 (rows of x): one of n rows, by number.
CASE_FAST_BOTH static inline uint32_t case_fast_draw(uint64_t seed, uint32_t pair, uint32_t side, uint32_t slot, uint32_t n) {
    return (uint32_t)((uint64_t)case_fast_philox(slot, pair, side, 0, seed) * n >> 32);
}
