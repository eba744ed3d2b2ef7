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

// The blocks that belong to these counters, in place of c[0] .. c[3], as case_fast_philox_block; high halves are of no account.
CASE_FAST_INLINE void random_blocks(Words c[4], uint64_t seed) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const Words a = times(c[0], 0xD2511F53u), b = times(c[2], 0xCD9E8D57u);
        c[0] = (b >> 32) ^ c[1] ^ uint64_t(k0);
        c[1] = b;
        c[2] = (a >> 32) ^ c[3] ^ uint64_t(k1);
        c[3] = a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

// Word 0 of each.
CASE_FAST_INLINE Words random_words(Words c0, Words c1, Words c2, Words c3, uint64_t seed) {
    Words c[4] = {c0, c1, c2, c3};
    random_blocks(c, seed);
    return c[0] & 0xFFFFFFFFu;
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

// ---- both halves of all four words of a counter, for neighbours in a row: residual_norm

constexpr int drawn_at_once = 8 * word_lanes;  // columns: four vectors of float, eight of double

// What dropout multiplies the columns first .. first + drawn_at_once of a row by, first a multiple of 8: 0 or kept_scale. It is 0 where
// case_fast_half_word is less than drop_below.
template <class T>
CASE_FAST_INLINE void kept_columns(uint64_t row, uint64_t first, uint64_t seed, uint32_t drop_below, T kept_scale, Vector<T> *out) {
    constexpr int width = Lanes<T>::width;
    const Words zero = {};
    Words eights = {};  // a constant; unpacking takes even lanes to one vector and odd ones to another, so that each has neighbours
    for (int i = 0; i < word_lanes; ++i) eights[i] = uint64_t(i / 2 + i % 2 * (word_lanes / 2));
    Words c[4] = {zero + row, zero + (row >> 32), eights + first / 8, zero + 1};
    random_blocks(c, seed);
#if CASE_FAST_VECTOR_BYTES == 64
    const __m512i low = _mm512_mask_shuffle_epi32((__m512i)c[0], 0xAAAA, (__m512i)c[1], _MM_PERM_CCAA);
    const __m512i high = _mm512_mask_shuffle_epi32((__m512i)c[2], 0xAAAA, (__m512i)c[3], _MM_PERM_CCAA);
    const __m512i below = _mm512_set1_epi16(short(drop_below));
    const uint64_t keep = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(low, high), below) |
                          uint64_t(_mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(low, high), below)) << 32;
    for (int v = 0; v < drawn_at_once / width; ++v) {
        if constexpr (sizeof(T) == 4)
            out[v] = (Vector<T>)_mm512_maskz_mov_ps(__mmask16(keep >> v * width), _mm512_set1_ps(kept_scale));
        else
            out[v] = (Vector<T>)_mm512_maskz_mov_pd(__mmask8(keep >> v * width), _mm512_set1_pd(kept_scale));
    }
#elif CASE_FAST_VECTOR_BYTES == 32
    const __m256i low = _mm256_blend_epi32((__m256i)c[0], _mm256_slli_epi64((__m256i)c[1], 32), 0xAA);
    const __m256i high = _mm256_blend_epi32((__m256i)c[2], _mm256_slli_epi64((__m256i)c[3], 32), 0xAA);
    const __m256i words[2] = {_mm256_unpacklo_epi64(low, high), _mm256_unpackhi_epi64(low, high)}, below = _mm256_set1_epi16(short(drop_below));
    for (int v = 0; v < drawn_at_once / width; ++v) {
        const int first_lane = v * width % 16;  // of 16 columns
        const __m256i of = words[v * width / 16], keep = _mm256_cmpeq_epi16(_mm256_max_epu16(of, below), of);
        const __m128i eight = first_lane < 8 ? _mm256_castsi256_si128(keep) : _mm256_extracti128_si256(keep, 1);
        if constexpr (sizeof(T) == 4)
            out[v] = (Vector<T>)_mm256_and_ps((__m256)_mm256_cvtepi16_epi32(eight), _mm256_set1_ps(kept_scale));
        else
            out[v] = (Vector<T>)_mm256_and_pd((__m256d)_mm256_cvtepi16_epi64(first_lane % 8 ? _mm_unpackhi_epi64(eight, eight) : eight),
                                              _mm256_set1_pd(kept_scale));
    }
#else
    for (int column = 0; column < drawn_at_once; ++column) {
        int lane = 0;
        while (eights[lane] != uint64_t(column / 8)) ++lane;
        const uint32_t word = uint32_t(c[column / 2 % 4][lane]), half = column % 2 ? word >> 16 : word & 0xFFFFu;
        out[column / width][column % width] = half >= drop_below ? kept_scale : T(0);
    }
#endif
}

}  // namespace
