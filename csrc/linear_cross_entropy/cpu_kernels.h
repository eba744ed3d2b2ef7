// The kernels of the linear cross-entropy, for the instruction set of the including file. See cpu.h for the data.
//
// Scores are made tile by tile, block_words words at a time for all rows, so that a block of `weight` is packed once. Many rows are
// a product of panels; few rows are dot products with the rows of `weight` as they lie, for reading those is then all the work.
// Either way a score's bits depend on its row and word alone.
#pragma once

#include "common/dots.h"
#include "common/gemm.h"
#include "common/vector.h"
#include "linear_cross_entropy/cpu.h"

namespace {

template <class T>
CASE_FAST_INLINE T greatest(Vector<T> x) {
    constexpr int width = Lanes<T>::width;
    T lanes[width];
    store(lanes, x);
#pragma GCC unroll 8
    for (int n = width / 2; n > 0; n /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i) lanes[i] = lanes[i + n] > lanes[i] ? lanes[i + n] : lanes[i];
    return lanes[0];
}

// ---- scores

// Scores, without bias, of rows [first, first + count) and words [begin, begin + words). Where not few, `first` begins a panel.
template <class E>
CASE_FAST_INLINE void products(const VocabularyRows<Sum<E>> &a, int64_t first, int64_t count, int64_t begin, int64_t words,
                               const Scratch<Sum<E>> &s) {
    const int64_t depth = elements<E>(a.dim);
    if (a.few)
        multiply_transposed(count, words, a.dim, a.hidden + first * a.dim, a.dim, a.weight + begin * a.dim, a.dim, s.tile, tile_stride);
    else
        multiply((const E *)a.hidden_rows + first * depth, (const E *)s.word_columns, count, words, depth, s.tile, tile_stride, false);
}

// Rows of words, which lie end to end, into the second cache: packing and products go through them in steps that the core does not
// foresee.
template <class T, int write>
CASE_FAST_INLINE void fetch(const T *from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i, write, 2);
}

template <class E>
CASE_FAST_INLINE void pack_words(const VocabularyRows<Sum<E>> &a, int64_t begin, int64_t words, const Scratch<Sum<E>> &s) {
    if (a.few) return;
    fetch<Sum<E>, 0>(a.weight + begin * a.dim, words * a.dim);
    pack_columns(a.weight + begin * a.dim, 1, a.dim, a.dim, words, (E *)s.word_columns);
}

// ---- the losses

// Whether there is a NaN; the first of a row is noted.
template <class T>
inline bool note_nan(RowSum<T> &sum, const T *z, int64_t count, int64_t first_word) {
    int64_t i = 0;
    while (i < count && z[i] == z[i]) ++i;
    if (i < count && !sum.nan) {
        sum.nan = true;
        sum.word = first_word + i;
    }
    return i < count;
}

// z += bias; takes the scores of `count` words into a row's sums. Returns their greatest; NaN where one is NaN. kept: a copy of z
// for backward, or NULL.
template <class T>
CASE_FAST_INLINE T absorb(RowSum<T> &sum, T *z, const T *bias, int64_t count, int64_t first_word, T *kept = nullptr) {
    constexpr int width = Lanes<T>::width;
    const int64_t full = count / width * width;
    T edge[width];  // what does not fill a vector
    for (int64_t i = 0; i < width; ++i) edge[i] = T(-INFINITY);
    for (int64_t i = full; i < count; ++i) edge[i - full] = z[i] += bias[i];
    Vector<T> peak = load(edge);
    peak = peak == peak ? peak : Vector<T>{} - T(INFINITY);
    const bool aligned = uintptr_t(kept) % CASE_FAST_VECTOR_BYTES == 0;
    for (int64_t i = 0; i < full; i += width) {
        const Vector<T> x = load(z + i) + load(bias + i);
        store(z + i, x);
        if (kept) aligned ? stream(kept + i, x) : store(kept + i, x);
        peak = x > peak ? x : peak;
    }
    for (int64_t i = full; kept && i < count; ++i) kept[i] = z[i];
    const T found = greatest<T>(peak);
    if (found > sum.top) {
        if (sum.sum != 0) sum.sum *= ::exp(double(sum.top) - double(found));
        sum.top = found;
        if (!sum.nan) {
            int64_t i = 0;
            while (z[i] != found) ++i;
            sum.word = first_word + i;
        }
    }
    if (sum.top == T(-INFINITY)) {  // all words forbidden so far, or NaN
        if (!note_nan(sum, z, count, first_word)) return found;
        sum.sum = double(NAN);
        return T(NAN);
    }
    const Vector<T> top = Vector<T>{} + sum.top;
    Vector<T> total[4] = {exp_nonpositive(load(edge) - top)};
    int64_t i = 0;
    for (; i + 4 * width <= full; i += 4 * width)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) total[j] += exp_nonpositive(load(z + i + j * width) - top);
    for (int j = 0; i < full; i += width, ++j) total[j] += exp_nonpositive(load(z + i) - top);
    T part[4];
    sums(total, part);
    const T here = (part[0] + part[1]) + (part[2] + part[3]);
    sum.sum += double(here);
    return here != here && note_nan(sum, z, count, first_word) ? T(NAN) : found;
}

template <class E>
void forward(const VocabularyRows<Sum<E>> &a, int64_t begin, int64_t end, RowSum<Sum<E>> *sums, const Scratch<Sum<E>> &s) {
    using T = Sum<E>;
    const int64_t block = even_block(a.rows, block_rows);
    for (int64_t v = begin; v < end; v += block_words) {
        const int64_t words = least(block_words, end - v);
        pack_words<E>(a, v, words, s);
        for (int64_t first = 0; first < a.rows; first += block) {
            const int64_t count = least(block, a.rows - first);
            T *const kept = a.kept ? a.kept + v * a.kept_rows + (a.kept_first + first) * words : nullptr;
            products<E>(a, first, count, v, words, s);
            for (int64_t i = 0; i < count; ++i) {
                const T *const z = s.tile + i * tile_stride;
                absorb(sums[first + i], s.tile + i * tile_stride, a.bias + v, words, v, kept ? kept + i * words : nullptr);
                for (int64_t m = a.target_begin[first + i]; m < a.target_end[first + i]; ++m)
                    if (a.target[m] >= v && a.target[m] < v + words) a.target_score[m] = z[a.target[m] - v];
            }
        }
    }
    if (a.kept) stream_fence();
}

template <class T>
void scores(const VocabularyRows<T> &a, int64_t first, int64_t count, int64_t begin, int64_t end, RowSum<T> *sums, T *highest,
            const Scratch<T> &s) {
    products<T>(a, first, count, begin, end - begin, s);
    for (int64_t i = 0; i < count; ++i)
        highest[i] = absorb(sums[i], s.tile + i * tile_stride, a.bias + begin, end - begin, begin);
}

// ---- their gradients

// out = scale e^(z + bias - lse), and bias_sum += that. bias NULL: z holds it.
template <class T, bool biased>
CASE_FAST_INLINE void soften(const T *z, const T *bias, T top, T log_sum, T scale, int64_t count, T *out, T *bias_sum) {
    constexpr int width = Lanes<T>::width;
    const auto step = [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
        Vector<T> x = load(z + i);
        if (biased) x += load(bias + i);
        const Vector<T> gradient = scale * exp_nonpositive((x - top) - log_sum);
        store(out + i, gradient);
        store(bias_sum + i, load(bias_sum + i) + gradient);
    };
    int64_t i = 0;
    for (; i + width <= count; i += width)
        step(
            i, [](const T *from) __attribute__((always_inline)) { return load(from); },
            [](T *to, Vector<T> x) __attribute__((always_inline)) { store(to, x); });
    if (i < count) {
        const Tail<T> tail = make_tail<T>(int(count - i));
        step(
            i, [tail](const T *from) __attribute__((always_inline)) { return load(from, tail); },
            [tail](T *to, Vector<T> x) __attribute__((always_inline)) { store(to, x, tail); });
    }
}

// d loss / d z of a tile, in place or from the scores kept.
template <class T>
CASE_FAST_INLINE void soften_tile(const VocabularyRows<T> &a, int64_t first, int64_t count, int64_t v, int64_t words,
                                  const Scratch<T> &s) {
    constexpr int64_t few = 32;  // rows summed by themselves: one running sum over many rows loses digits
    T *const bias_sum = s.bias_sum + block_words;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t row = first + i;
        T *const out = s.tile + i * tile_stride;
        for (int64_t j = 0; j < words && i % few == 0; ++j) bias_sum[j] = T(0);
        if (a.kept_scores)
            soften<T, false>(a.kept_scores + v * a.kept_rows + a.kept_row[row] * words, nullptr, a.top[row], a.log_sum[row],
                             a.scale[row], words, out, bias_sum);
        else
            soften<T, true>(out, a.bias + v, a.top[row], a.log_sum[row], a.scale[row], words, out, bias_sum);
        for (int64_t m = a.target_begin[row]; m < a.target_end[row]; ++m)
            if (a.target[m] >= v && a.target[m] < v + words) {
                out[a.target[m] - v] -= a.grad_nll[m];
                bias_sum[a.target[m] - v] -= a.grad_nll[m];
            }
        if (i % few == few - 1 || i == count - 1)
            for (int64_t j = 0; j < words; ++j) s.bias_sum[j] += bias_sum[j];
    }
}

// C = or += A B for A (rows, depth) in the tile, element (i, k) at i * row + k * column, and B in column panels.
template <class E, int64_t row, int64_t column>
CASE_FAST_INLINE void multiply_scores(const Scratch<Sum<E>> &s, int64_t rows, int64_t depth, const E *b, int64_t columns,
                                      Product<Sum<E>> c, bool add) {
    constexpr int64_t height = Tile<E>::rows, width = Tile<E>::columns;
    const int64_t deep = elements<E>(depth);
    const Right<E> right = {b, width * deep, width};
    if constexpr (Element<E>::numbers == 1) {
        multiply_tiles<E, height, true>({s.tile, row, column}, {row, column, INT64_MAX, 0}, right, c, rows, columns, deep, add);
    } else {
        E *const panels = (E *)s.rounded;
        pack_rows(s.tile, row, column, rows, depth, panels);
        multiply_tiles<E, height, true>({panels, deep, height}, {1, height, INT64_MAX, 0}, right, c, rows, columns, deep, add);
    }
}

template <class E>
void backward(const VocabularyRows<Sum<E>> &a, int64_t begin, int64_t end, Sum<E> *grad_hidden, const Scratch<Sum<E>> &s) {
    using T = Sum<E>;
    constexpr int64_t width = Tile<E>::columns;
    const int64_t dim = a.dim, padded = packed_columns<E>(dim, 1), block = even_block(a.rows, block_rows);
    for (int64_t v = begin; v < end; v += block_words) {
        const int64_t words = least(block_words, end - v);
        if (!a.kept_scores) pack_words<E>(a, v, words, s);
        if (grad_hidden) {
            fetch<T, 0>(a.weight + v * dim, words * dim);
            pack_columns(a.weight + v * dim, dim, 1, words, dim, (E *)s.word_rows);
        }
        for (int64_t i = 0; i < words; ++i) s.bias_sum[i] = T(0);
        if (a.grad_weight) fetch<T, 1>(a.grad_weight + v * dim, words * dim);
        for (int64_t first = 0; first < a.rows; first += block) {
            const int64_t count = least(block, a.rows - first);
            if (!a.kept_scores) products<E>(a, first, count, v, words, s);
            soften_tile(a, first, count, v, words, s);
            if (a.grad_weight)
                multiply_scores<E, 1, tile_stride>(s, words, count, (const E *)a.hidden_columns + elements<E>(first) * padded, dim,
                                                   {a.grad_weight + v * dim, dim, width}, a.more || first > 0);
            if (grad_hidden)
                multiply_scores<E, tile_stride, 1>(s, count, words, (const E *)s.word_rows, dim, {grad_hidden + first * dim, dim, width},
                                                   v > begin);
        }
        if (a.grad_bias)
            for (int64_t i = 0; i < words; ++i) a.grad_bias[v + i] = a.more ? a.grad_bias[v + i] + s.bias_sum[i] : s.bias_sum[i];
    }
}

// ---- panels and scratch

template <class E>
int64_t row_panels(int64_t rows, int64_t dim) {
    return packed_rows<E>(rows, elements<E>(dim));
}
template <class E>
int64_t column_panels(int64_t rows, int64_t dim) {
    return elements<E>(rows) * packed_columns<E>(dim, 1);
}
template <class E>
void pack_hidden_rows(const Sum<E> *hidden, int64_t rows, int64_t dim, Sum<E> *panels) {
    pack_rows(hidden, dim, 1, rows, dim, (E *)panels);
}
template <class E>
void pack_hidden_columns(const Sum<E> *hidden, int64_t rows, int64_t dim, Sum<E> *panels) {
    pack_columns(hidden, dim, 1, rows, dim, (E *)panels);
}

template <class E>
Scratch<Sum<E>> scratch(Sum<E> *memory, int64_t dim, int64_t *size) {
    static_assert(sizeof(E) == sizeof(Sum<E>), "panels and sums share it");
    int64_t used = 0;
    const auto take = [&](int64_t count) {
        Sum<E> *const found = memory ? memory + used : nullptr;
        used += (count + 63) / 64 * 64;
        return found;
    };
    Scratch<Sum<E>> s;
    s.tile = take(block_rows * tile_stride);
    s.word_columns = take(packed_columns<E>(block_words, elements<E>(dim)));
    s.word_rows = take(packed_columns<E>(dim, elements<E>(block_words)));
    s.bias_sum = take(2 * block_words);
    s.rounded = take(Element<E>::numbers == 1 ? 0 : block_rows * block_words / 2);
    *size = used;
    return s;
}

template <class E>
constexpr VocabularyKernels<Sum<E>> vocabulary_kernels() {
    return {row_panels<E>, column_panels<E>, pack_hidden_rows<E>, pack_hidden_columns<E>, scratch<E>, forward<E>, backward<E>, scores<Sum<E>>};
}

}  // namespace
