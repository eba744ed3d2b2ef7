// Vectors of float or double, as wide as the flags of the including file allow: 64, 32 or 16 bytes.
//
// The same kernels are compiled once per instruction set, so nothing here may be shared by the linker between those files:
// all lies in an anonymous namespace, and an including file uses no inline function of the standard library.
#pragma once

#include <math.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define CASE_FAST_VECTOR_BYTES 64
#elif defined(__AVX2__) && defined(__FMA__)
#define CASE_FAST_VECTOR_BYTES 32
#else
#define CASE_FAST_VECTOR_BYTES 16
#endif

#define CASE_FAST_INLINE __attribute__((always_inline)) static inline

namespace {

template <class T>
struct Lanes {
    typedef T Vector __attribute__((vector_size(CASE_FAST_VECTOR_BYTES)));
    typedef T Unaligned __attribute__((vector_size(CASE_FAST_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
    static constexpr int width = CASE_FAST_VECTOR_BYTES / int(sizeof(T));
};
template <class T>
using Vector = typename Lanes<T>::Vector;

// A number that the compiler knows, as an argument.
template <int n>
struct Constant {
    static constexpr int value = n;
};

// body(Constant<n>) for the n in 1 .. most that equals `count`
template <int most, class Body>
CASE_FAST_INLINE void with_constant(int64_t count, Body body) {
    if constexpr (most == 1)
        body(Constant<1>{});
    else if (count == most)
        body(Constant<most>{});
    else
        with_constant<most - 1>(count, body);
}

CASE_FAST_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The first `count` lanes of a vector, 0 <= count < width: the end of a row.
template <class T>
struct Tail {
    int count;
#if CASE_FAST_VECTOR_BYTES == 64
    unsigned mask;
#elif CASE_FAST_VECTOR_BYTES == 32
    __m256i mask;
#endif
};

template <class T>
CASE_FAST_INLINE Tail<T> make_tail(int count) {
    Tail<T> tail;
    tail.count = count;
#if CASE_FAST_VECTOR_BYTES == 64
    tail.mask = (1u << count) - 1;
#elif CASE_FAST_VECTOR_BYTES == 32
    alignas(32) int32_t words[8];
    for (int i = 0; i < 8; ++i) words[i] = i < count * int(sizeof(T) / 4) ? -1 : 0;
    tail.mask = _mm256_load_si256((const __m256i *)words);
#endif
    return tail;
}

template <class T>
CASE_FAST_INLINE Vector<T> load(const T *from) {
    return *(const typename Lanes<T>::Unaligned *)from;
}

template <class T>
CASE_FAST_INLINE void store(T *to, Vector<T> x) {
    *(typename Lanes<T>::Unaligned *)to = x;
}

// Past the caches, for what is read much later: `to` is aligned to a vector. Before another thread reads: stream_fence().
template <class T>
CASE_FAST_INLINE void stream(T *to, Vector<T> x) {
#if CASE_FAST_VECTOR_BYTES == 64
    _mm512_stream_si512((__m512i *)to, (__m512i)x);
#elif CASE_FAST_VECTOR_BYTES == 32
    _mm256_stream_si256((__m256i *)to, (__m256i)x);
#else
    store(to, x);
#endif
}
CASE_FAST_INLINE void stream_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

#if CASE_FAST_VECTOR_BYTES == 64
CASE_FAST_INLINE Vector<float> load(const float *from, Tail<float> tail) {
    return (Vector<float>)_mm512_maskz_loadu_ps((__mmask16)tail.mask, from);
}
CASE_FAST_INLINE Vector<double> load(const double *from, Tail<double> tail) {
    return (Vector<double>)_mm512_maskz_loadu_pd((__mmask8)tail.mask, from);
}
CASE_FAST_INLINE void store(float *to, Vector<float> x, Tail<float> tail) {
    _mm512_mask_storeu_ps(to, (__mmask16)tail.mask, (__m512)x);
}
CASE_FAST_INLINE void store(double *to, Vector<double> x, Tail<double> tail) {
    _mm512_mask_storeu_pd(to, (__mmask8)tail.mask, (__m512d)x);
}
#elif CASE_FAST_VECTOR_BYTES == 32
CASE_FAST_INLINE Vector<float> load(const float *from, Tail<float> tail) {
    return (Vector<float>)_mm256_maskload_ps(from, tail.mask);
}
CASE_FAST_INLINE Vector<double> load(const double *from, Tail<double> tail) {
    return (Vector<double>)_mm256_maskload_pd(from, tail.mask);
}
CASE_FAST_INLINE void store(float *to, Vector<float> x, Tail<float> tail) { _mm256_maskstore_ps(to, tail.mask, (__m256)x); }
CASE_FAST_INLINE void store(double *to, Vector<double> x, Tail<double> tail) {
    _mm256_maskstore_pd(to, tail.mask, (__m256d)x);
}
#else
template <class T>
CASE_FAST_INLINE Vector<T> load(const T *from, Tail<T> tail) {
    Vector<T> x = {};
    for (int i = 0; i < tail.count; ++i) x[i] = from[i];
    return x;
}
template <class T>
CASE_FAST_INLINE void store(T *to, Vector<T> x, Tail<T> tail) {
    for (int i = 0; i < tail.count; ++i) to[i] = x[i];
}
#endif

// Sums of the lanes of four vectors. Each sum's order of additions does not depend on the other three vectors.
#if CASE_FAST_VECTOR_BYTES == 64
CASE_FAST_INLINE __m256 fold(Vector<float> x) {
    return _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
}
CASE_FAST_INLINE __m256d fold(Vector<double> x) {
    return _mm256_add_pd(_mm512_castpd512_pd256((__m512d)x), _mm512_extractf64x4_pd((__m512d)x, 1));
}
#elif CASE_FAST_VECTOR_BYTES == 32
CASE_FAST_INLINE __m256 fold(Vector<float> x) { return (__m256)x; }
CASE_FAST_INLINE __m256d fold(Vector<double> x) { return (__m256d)x; }
#endif
#if CASE_FAST_VECTOR_BYTES >= 32
CASE_FAST_INLINE void sums(const Vector<float> x[4], float out[4]) {
    const __m256 ab = _mm256_hadd_ps(fold(x[0]), fold(x[1])), cd = _mm256_hadd_ps(fold(x[2]), fold(x[3]));
    const __m256 s = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
CASE_FAST_INLINE void sums(const Vector<double> x[4], double out[4]) {
    const __m256d ab = _mm256_hadd_pd(fold(x[0]), fold(x[1])), cd = _mm256_hadd_pd(fold(x[2]), fold(x[3]));
    _mm256_storeu_pd(out, _mm256_add_pd(_mm256_permute2f128_pd(ab, cd, 0x20), _mm256_permute2f128_pd(ab, cd, 0x31)));
}
#else
template <class T>
CASE_FAST_INLINE void sums(const Vector<T> x[4], T out[4]) {
    for (int i = 0; i < 4; ++i) {
        out[i] = x[i][0] + x[i][1];
        if (Lanes<T>::width == 4) out[i] += x[i][Lanes<T>::width - 2] + x[i][Lanes<T>::width - 1];
    }
}
#endif

// p 2^n for a whole n in [-252, 0], given as n + 1.5 * 2^23, which any number of that size is rounded to by adding it; rounded once
// where it is denormal.
CASE_FAST_INLINE Vector<float> times_two_to(Vector<float> p, Vector<float> shifted) {
#if CASE_FAST_VECTOR_BYTES == 64
    return (Vector<float>)_mm512_scalef_ps((__m512)p, (__m512)(shifted - 12582912.0f));
#else
    typedef int32_t Bits __attribute__((vector_size(CASE_FAST_VECTOR_BYTES)));
    const Bits whole = (Bits)shifted - 0x4B400000, half = whole >> 1;  // a product of two normal numbers
    return p * (Vector<float>)((half + 127) << 23) * (Vector<float>)((whole - half + 127) << 23);
#endif
}

// e^x for x <= 0 or NaN, within 1.5 units in the last place, through the denormals to 0.
CASE_FAST_INLINE Vector<float> exp_nonpositive(Vector<float> x) {
    const Vector<float> zero = {};
    x = x < -104.0f ? zero - 104.0f : x;                // false for NaN, which goes through
    const Vector<float> shifted = x * 1.44269504f + 12582912.0f;
    const Vector<float> n = shifted - 12582912.0f;
    const Vector<float> r = (x - n * 0.693145751953125f) - n * 1.42860677e-6f;  // ln 2 in two parts
    Vector<float> p = zero + 1.3888889e-3f;
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * (r * r) + r;
    p = p + 1.0f;
    return times_two_to(p, shifted);
}

// e^x for 0 <= x <= 1 or NaN, within 1.5 units in the last place: a minimax polynomial about 0.5.
CASE_FAST_INLINE Vector<float> exp_of_fraction(Vector<float> x) {
    const Vector<float> zero = {}, t = x - 0.5f;
    Vector<float> p = zero + 0.002272064746f;
    p = p * t + 0.01388086890f;
    p = p * t + 0.06870780359f;
    p = p * t + 0.2747695774f;
    p = p * t + 0.8243594693f;
    p = p * t + 1.648721790f;
    return p * t + 1.648721288f;
}

// double goes through the C library, lane by lane: it serves gradient checks, not speed.
CASE_FAST_INLINE Vector<double> exp_nonpositive(Vector<double> x) {
    for (int i = 0; i < Lanes<double>::width; ++i) x[i] = ::exp(x[i]);
    return x;
}
CASE_FAST_INLINE Vector<double> exp_of_fraction(Vector<double> x) { return exp_nonpositive(x); }

// Calls body(i, load, store) for each vector of a row; the last, if not full, goes through masked loads and stores.
template <class T, class Integer, class Body>
CASE_FAST_INLINE void each_vector(Integer count, Body body) {
    constexpr int width = Lanes<T>::width;
    const Integer full = count / width * width;
    for (Integer i = 0; i < full; i += width)
        body(
            i, [](const T *from) __attribute__((always_inline)) { return load(from); },
            [](T *to, Vector<T> x) __attribute__((always_inline)) { store(to, x); });
    if (full < count) {
        const Tail<T> tail = make_tail<T>(int(count - full));
        body(
            full, [tail](const T *from) __attribute__((always_inline)) { return load(from, tail); },
            [tail](T *to, Vector<T> x) __attribute__((always_inline)) { store(to, x, tail); });
    }
}

}  // namespace
