// Sums of rows on one thread, for the instruction set of the including file: weights times values, and most gradients. Operands are
// read as they lie, and sums run across vectors; an element's bits depend on the depth alone. Products of rows with rows: dots.h.
#pragma once

#include "common/vector.h"

namespace {

#if CASE_FAST_VECTOR_BYTES == 64
constexpr int sum_rows = 5, sum_vectors = 5;  // 25 of 32 registers hold sums
#else
constexpr int sum_rows = 4, sum_vectors = 3;  // 12 of 16
#endif

// c (rows, vectors) = or += a b. The last vector goes through `tail` where it is not full.
template <class T, int rows, int vectors, bool tailed>
CASE_FAST_INLINE void sum_tile(int64_t depth, const T *a, int64_t a_row, int64_t a_depth, const T *b, int64_t b_stride, T *c, int64_t c_stride,
                               bool add, Tail<T> tail) {
    constexpr int width = Lanes<T>::width;
    const auto get = [tail](const T *from, int v) __attribute__((always_inline)) {
        return tailed && v == vectors - 1 ? load(from + v * width, tail) : load(from + v * width);
    };
    Vector<T> sum[rows][vectors] = {};
    if (add)
        for (int i = 0; i < rows; ++i)
            for (int v = 0; v < vectors; ++v) sum[i][v] = get(c + i * c_stride, v);
    for (int64_t k = 0; k < depth; ++k, a += a_depth, b += b_stride) {
        Vector<T> y[vectors];
        for (int v = 0; v < vectors; ++v) {
            y[v] = get(b, v);
            if (rows == 1) __builtin_prefetch(b + 8 * b_stride + v * width);
        }
        for (int i = 0; i < rows; ++i) {
            const T x = a[i * a_row];
            for (int v = 0; v < vectors; ++v) sum[i][v] += x * y[v];
        }
    }
    for (int i = 0; i < rows; ++i)
        for (int v = 0; v < vectors; ++v) {
            if (tailed && v == vectors - 1)
                store(c + i * c_stride + v * width, sum[i][v], tail);
            else
                store(c + i * c_stride + v * width, sum[i][v]);
        }
}

template <class T, int vectors, bool tailed>
void sum_panel(int64_t rows, int64_t depth, const T *a, int64_t a_row, int64_t a_depth, const T *b, int64_t b_stride, T *c, int64_t c_stride,
               bool add, Tail<T> tail) {
    int64_t i = 0;
    for (; i + sum_rows <= rows; i += sum_rows)
        sum_tile<T, sum_rows, vectors, tailed>(depth, a + i * a_row, a_row, a_depth, b, b_stride, c + i * c_stride, c_stride, add, tail);
    if (i < rows)
        with_constant<sum_rows - 1>(rows - i, [&](auto n) __attribute__((always_inline)) {
            sum_tile<T, decltype(n)::value, vectors, tailed>(depth, a + i * a_row, a_row, a_depth, b, b_stride, c + i * c_stride, c_stride,
                                                             add, tail);
        });
}

template <class T>
void multiply(int64_t rows, int64_t columns, int64_t depth, const T *a, int64_t a_row, int64_t a_depth, const T *b, int64_t b_stride, T *c,
              int64_t c_stride, bool add) {
    constexpr int width = Lanes<T>::width, panel = sum_vectors * width;
    constexpr int64_t piece = first_cache / (panel * int64_t(sizeof(T)));
    for (int64_t k = 0; k == 0 || k < depth; k += piece) {
        const int64_t count = least(piece, depth - k);
        for (int64_t j = 0; j < columns; j += panel) {
            const T *const from = b + k * b_stride + j, *const left = a + k * a_depth;
            if (j + panel <= columns) {
                sum_panel<T, sum_vectors, false>(rows, count, left, a_row, a_depth, from, b_stride, c + j, c_stride, add || k, Tail<T>{});
            } else {
                const int64_t vectors = (columns - j + width - 1) / width;
                const int last = int(columns - j - (vectors - 1) * width);
                with_constant<sum_vectors>(vectors, [&](auto n) __attribute__((always_inline)) {
                    constexpr int v = decltype(n)::value;
                    if (v < sum_vectors && last == width)
                        sum_panel<T, v, false>(rows, count, left, a_row, a_depth, from, b_stride, c + j, c_stride, add || k, Tail<T>{});
                    else
                        sum_panel<T, v, true>(rows, count, left, a_row, a_depth, from, b_stride, c + j, c_stride, add || k,
                                              make_tail<T>(last));
                });
            }
        }
    }
}

template <class T>
CASE_FAST_INLINE T sum_of(Vector<T> x) {
    const Vector<T> all[4] = {x};
    T out[4];
    sums(all, out);
    return out[0];
}

}  // namespace
