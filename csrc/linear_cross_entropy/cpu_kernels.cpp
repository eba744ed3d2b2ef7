// The kernels of the linear cross-entropy, for the instruction set that this is compiled for. See cpu.h for the data.
//
// Scores are made tile by tile, block_words words at a time for all rows, so that a block of `weight` is packed once. Many rows are
// a product of panels; few rows are dot products with the rows of `weight` as they lie, for reading those is then all the work.
// Either way a score's bits depend on its row and word alone.
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
template <class T>
CASE_FAST_INLINE void products(const VocabularyRows<T> &a, int64_t first, int64_t count, int64_t begin, int64_t words, T *tile,
                               int64_t stride, const Scratch<T> &s) {
    if (a.few)
        multiply_transposed(count, words, a.dim, a.hidden + first * a.dim, a.dim, a.weight + begin * a.dim, a.dim, tile, stride);
    else
        multiply(a.hidden_rows + first * a.dim, s.word_columns, count, words, a.dim, tile, stride, false);
}

// Rows of words, which lie end to end, into the second cache: packing and products go through them in steps that the core does not
// foresee.
template <class T, int write>
CASE_FAST_INLINE void fetch(const T *from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i, write, 2);
}

template <class T>
CASE_FAST_INLINE void pack_words(const VocabularyRows<T> &a, int64_t begin, int64_t words, const Scratch<T> &s) {
    if (a.few) return;
    fetch<T, 0>(a.weight + begin * a.dim, words * a.dim);
    pack_columns(a.weight + begin * a.dim, 1, a.dim, a.dim, words, s.word_columns);
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

template <class T>
void forward(const VocabularyRows<T> &a, int64_t begin, int64_t end, RowSum<T> *sums, const Scratch<T> &s) {
    const int64_t block = even_block(a.rows, block_rows);
    for (int64_t v = begin; v < end; v += block_words) {
        const int64_t words = least(block_words, end - v);
        pack_words(a, v, words, s);
        for (int64_t first = 0; first < a.rows; first += block) {
            const int64_t count = least(block, a.rows - first);
            T *const kept = a.kept ? a.kept + v * a.kept_rows + (a.kept_first + first) * words : nullptr;
            products(a, first, count, v, words, s.tile, tile_stride, s);
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
    products(a, first, count, begin, end - begin, s.tile, tile_stride, s);
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

template <class T>
void backward(const VocabularyRows<T> &a, int64_t begin, int64_t end, T *grad_hidden, const Scratch<T> &s) {
    constexpr int64_t height = Tile<T>::rows, width = Tile<T>::columns;
    const int64_t dim = a.dim, padded = packed_columns<T>(dim, 1), block = even_block(a.rows, block_rows);
    for (int64_t v = begin; v < end; v += block_words) {
        const int64_t words = least(block_words, end - v);
        if (!a.kept_scores) pack_words(a, v, words, s);
        if (grad_hidden) {
            fetch<T, 0>(a.weight + v * dim, words * dim);
            pack_columns(a.weight + v * dim, dim, 1, words, dim, s.word_rows);
        }
        for (int64_t i = 0; i < words; ++i) s.bias_sum[i] = T(0);
        if (a.grad_weight) fetch<T, 1>(a.grad_weight + v * dim, words * dim);
        for (int64_t first = 0; first < a.rows; first += block) {
            const int64_t count = least(block, a.rows - first);
            if (!a.kept_scores) products(a, first, count, v, words, s.tile, tile_stride, s);
            soften_tile(a, first, count, v, words, s);
            if (a.grad_weight) {
                multiply_tiles<T, height, true>({s.tile, 1, tile_stride}, {1, tile_stride, INT64_MAX, 0},
                                                {a.hidden_columns + first * padded, width * count, width},
                                                {a.grad_weight + v * dim, dim, width}, words, dim, count, a.more || first > 0);
            }
            if (grad_hidden) {
                multiply_tiles<T, height, true>({s.tile, tile_stride, 1}, {tile_stride, 1, INT64_MAX, 0},
                                                {s.word_rows, width * words, width}, {grad_hidden + first * dim, dim, width}, count,
                                                dim, words, v > begin);
            }
        }
        if (a.grad_bias)
            for (int64_t i = 0; i < words; ++i) a.grad_bias[v + i] = a.more ? a.grad_bias[v + i] + s.bias_sum[i] : s.bias_sum[i];
    }
}

// ---- panels and scratch

template <class T>
int64_t row_panels(int64_t rows, int64_t dim) {
    return packed_rows<T>(rows, dim);
}
template <class T>
int64_t column_panels(int64_t rows, int64_t dim) {
    return rows * packed_columns<T>(dim, 1);
}
template <class T>
void pack_hidden_rows(const T *hidden, int64_t rows, int64_t dim, T *panels) {
    pack_rows(hidden, dim, 1, rows, dim, panels);
}
template <class T>
void pack_hidden_columns(const T *hidden, int64_t rows, int64_t dim, T *panels) {
    pack_columns(hidden, dim, 1, rows, dim, panels);
}

template <class T>
Scratch<T> scratch(T *memory, int64_t dim, int64_t *elements) {
    int64_t used = 0;
    const auto take = [&](int64_t count) {
        T *const found = memory ? memory + used : nullptr;
        used += (count + 63) / 64 * 64;
        return found;
    };
    Scratch<T> s;
    s.tile = take(block_rows * tile_stride);
    s.word_columns = take(packed_columns<T>(block_words, dim));
    s.word_rows = take(packed_columns<T>(dim, block_words));
    s.bias_sum = take(2 * block_words);
    *elements = used;
    return s;
}

template <class T>
constexpr VocabularyKernels<T> vocabulary_kernels() {
    return {row_panels<T>, column_panels<T>, pack_hidden_rows<T>, pack_hidden_columns<T>, scratch<T>, forward<T>, backward<T>, scores<T>};
}

}  // namespace

const KernelsOf<VocabularyKernels> CASE_FAST_KERNELS_HERE(linear_cross_entropy) = {vocabulary_kernels<float>(),
                                                                                   vocabulary_kernels<double>()};
