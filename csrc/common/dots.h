// Products of rows with rows, both as they lie in memory, on one thread, for the instruction set of the including file: scores of
// queries and keys, or of states and words, and projections by a weight as torch keeps it.
//
// Sums run along vectors and are folded at the end, in an order that depends on the depth alone: an element's bits do not depend on
// where in a tile, a block or a thread's share it lies.
//
// Like vector.h, nothing here may be shared by the linker between instruction sets.
#pragma once

#include "common/vector.h"

namespace {

#if CASE_FAST_VECTOR_BYTES == 64
constexpr int dot_rows = 4, dot_columns = 6;  // 24 of 32 registers hold sums
#else
constexpr int dot_rows = 3, dot_columns = 4;  // 12 of 16
#endif
constexpr int64_t first_cache = 28 << 10;  // bytes of one operand that are used again and again

#if CASE_FAST_VECTOR_BYTES == 64
CASE_FAST_INLINE __m512 halves(Vector<float> a, Vector<float> b) {  // (low a + high a, low b + high b)
    const __m512 x = (__m512)a, y = (__m512)b;
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xEE));
}
CASE_FAST_INLINE __m512 neighbours(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
}
#endif

// Sums of the lanes of `count` vectors, a multiple of 4; each in the order of `sums`.
template <int count, class T>
CASE_FAST_INLINE void all_sums(const Vector<T> *x, T *out) {
    int i = 0;
#if CASE_FAST_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
        for (; i + 8 <= count; i += 8, x += 8) {
            const __m512 low = neighbours(halves(x[0], x[4]), halves(x[1], x[5])), high = neighbours(halves(x[2], x[6]), halves(x[3], x[7]));
            const __m512 s = neighbours(low, high);  // 128-bit parts: 0-3 low, 0-3 high, 4-7 low, 4-7 high
            const __m512 both = _mm512_add_ps(_mm512_shuffle_f32x4(s, s, 0x08), _mm512_shuffle_f32x4(s, s, 0x0D));
            _mm256_storeu_ps(out + i, _mm512_castps512_ps256(both));
        }
#endif
    for (; i < count; i += 4, x += 4) sums(x, out + i);
}

// Keeps a vector in a register: GCC would load it anew for each use, and most rows cross cache lines.
#if defined(__x86_64__)
#define CASE_FAST_IN_REGISTER(x) __asm__("" : "+v"(x))
#else
#define CASE_FAST_IN_REGISTER(x) (void)(x)
#endif

template <class T, int rows, int columns>
CASE_FAST_INLINE void dot_tile(int64_t depth, const T *a, int64_t a_stride, const T *b, int64_t b_stride, T *c, int64_t c_stride) {
    constexpr int width = Lanes<T>::width, count = rows * columns, padded = (count + 3) / 4 * 4, half = (columns + 1) / 2;
    Vector<T> sum[padded] = {};
    const T *const next = b + columns * b_stride;  // the next tile's rows, from the third cache in decoding
    const T *const second = b + half * b_stride;  // two bases and three strides address all rows
    const auto step = [&](int64_t k, auto load) __attribute__((always_inline)) {
        Vector<T> x[rows];
        for (int i = 0; i < rows; ++i) x[i] = load(a + i * a_stride + k);
        for (int j = 0; j < columns; ++j) {
            Vector<T> y = load((j < half ? b + j * b_stride : second + (j - half) * b_stride) + k);
            if (rows > 1) CASE_FAST_IN_REGISTER(y);
            __builtin_prefetch(next + j * b_stride + k);
            for (int i = 0; i < rows; ++i) sum[i * columns + j] += x[i] * y;
        }
    };
    const int64_t full = depth / width * width;
    for (int64_t k = 0; k < full; k += width) step(k, [](const T *from) __attribute__((always_inline)) { return load(from); });
    if (full < depth) {
        const Tail<T> tail = make_tail<T>(int(depth - full));
        step(full, [tail](const T *from) __attribute__((always_inline)) { return load(from, tail); });
    }
    T out[padded];
    all_sums<padded, T>(sum, out);
    for (int i = 0; i < rows; ++i) __builtin_memcpy(c + i * c_stride, out + i * columns, columns * sizeof(T));
}

template <class T, int rows>
CASE_FAST_INLINE void dot_columns_of(int64_t columns, int64_t depth, const T *a, int64_t a_stride, const T *b, int64_t b_stride, T *c,
                                     int64_t c_stride) {
    int64_t j = 0;
    for (; j + dot_columns <= columns; j += dot_columns)
        dot_tile<T, rows, dot_columns>(depth, a, a_stride, b + j * b_stride, b_stride, c + j, c_stride);
    if (dot_columns > 4 && j + 4 <= columns) {
        dot_tile<T, rows, 4>(depth, a, a_stride, b + j * b_stride, b_stride, c + j, c_stride);
        j += 4;
    }
    for (; j < columns; ++j) dot_tile<T, rows, 1>(depth, a, a_stride, b + j * b_stride, b_stride, c + j, c_stride);
}

// c (rows, columns) = a (rows, depth) b (columns, depth)^T, depth above 0.
template <class T>
void multiply_transposed(int64_t rows, int64_t columns, int64_t depth, const T *a, int64_t a_stride, const T *b, int64_t b_stride, T *c,
                         int64_t c_stride) {
    int64_t block = first_cache / (depth * int64_t(sizeof(T))) / dot_columns * dot_columns;
    if (block < dot_columns) block = dot_columns;
    if (rows <= dot_rows) block = columns;
    for (int64_t j = 0; j < columns; j += block) {
        const int64_t count = least(block, columns - j);
        int64_t i = 0;
        for (; i + dot_rows <= rows; i += dot_rows)
            dot_columns_of<T, dot_rows>(count, depth, a + i * a_stride, a_stride, b + j * b_stride, b_stride, c + i * c_stride + j, c_stride);
        if (i < rows)
            with_constant<dot_rows - 1>(rows - i, [&](auto n) __attribute__((always_inline)) {
                dot_columns_of<T, decltype(n)::value>(count, depth, a + i * a_stride, a_stride, b + j * b_stride, b_stride,
                                                      c + i * c_stride + j, c_stride);
            });
    }
}

}  // namespace
