// Philox for several counters at once, for the instruction set of the including file. Like vector.h, nothing here may be shared by
// the linker between instruction sets.
#pragma once

#include "common/philox.h"
#include "common/vector.h"

namespace {

typedef uint64_t Words __attribute__((vector_size(CASE_FAST_VECTOR_BYTES)));
constexpr int word_lanes = CASE_FAST_VECTOR_BYTES / 8;

CASE_FAST_INLINE Words times(Words x, uint32_t factor) {  // of the low half of each lane
#if CASE_FAST_VECTOR_BYTES == 64
    return (Words)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(factor));
#elif CASE_FAST_VECTOR_BYTES == 32
    return (Words)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
#elif defined(__x86_64__)
    return (Words)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(factor));
#else
    return (x & 0xFFFFFFFFu) * uint64_t(factor);
#endif
}

// Word 0 of the blocks that belong to these counters, as case_fast_philox; high halves of c0 .. c3 are of no account.
CASE_FAST_INLINE Words random_words(Words c0, Words c1, Words c2, Words c3, uint64_t seed) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const Words a = times(c0, 0xD2511F53u), b = times(c2, 0xCD9E8D57u);
        c0 = (b >> 32) ^ c1 ^ uint64_t(k0);
        c1 = b;
        c2 = (a >> 32) ^ c3 ^ uint64_t(k1);
        c3 = a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c0 & 0xFFFFFFFFu;
}

CASE_FAST_INLINE Words consecutive(uint64_t first) {
    Words lanes = {};
    for (int i = 0; i < word_lanes; ++i) lanes[i] = uint64_t(i);  // a constant
    return lanes + first;
}

// Of the counters (e, e's high half, h, 0), for the consecutive numbers from e on.
CASE_FAST_INLINE Words random_words(uint64_t e, uint32_t h, uint64_t seed) {
    const Words c0 = consecutive(e), zero = {};
    return random_words(c0, c0 >> 32, zero + uint64_t(h), zero, seed);
}

// What dropout multiplies elements e, e + 1, ... by: 0 or kept_scale.
CASE_FAST_INLINE Vector<double> kept(uint64_t e, uint32_t h, uint64_t seed, uint64_t drop_below, double kept_scale) {
    const Vector<double> zero = {};
    return random_words(e, h, seed) >= drop_below ? zero + kept_scale : zero;
}
CASE_FAST_INLINE Vector<float> kept(uint64_t e, uint32_t h, uint64_t seed, uint64_t drop_below, float kept_scale) {
    const Words low = random_words(e, h, seed), high = random_words(e + word_lanes, h, seed);
#if CASE_FAST_VECTOR_BYTES == 64
    const __m512i below = _mm512_set1_epi64(int64_t(drop_below));
    const unsigned first = _mm512_cmpge_epu64_mask((__m512i)low, below), second = _mm512_cmpge_epu64_mask((__m512i)high, below);
    return (Vector<float>)_mm512_maskz_mov_ps(__mmask16(first | second << 8), _mm512_set1_ps(kept_scale));
#else
    Vector<float> out = {};
    for (int i = 0; i < word_lanes; ++i) {
        out[i] = low[i] >= drop_below ? kept_scale : 0.0f;
        out[i + word_lanes] = high[i] >= drop_below ? kept_scale : 0.0f;
    }
    return out;
#endif
}

}  // namespace
