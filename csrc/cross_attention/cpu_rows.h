// The kernels of attention and of the cross-attention block, for the instruction set of the including file. See cpu.h.
//
// All products are of two kinds, and both read their operands as they lie: dots of rows (scores, projections; common/dots.h), and
// sums of rows (weights times values, and most gradients), whose sums run across vectors. In both an element's bits depend on the
// depth alone.
#pragma once

#include "common/dots.h"
#include "common/philox_vector.h"
#include "common/vector.h"
#include "cross_attention/cpu.h"

namespace {

#if CASE_FAST_VECTOR_BYTES == 64
constexpr int sum_rows = 5, sum_vectors = 5;  // 25 of 32 registers hold sums
#else
constexpr int sum_rows = 4, sum_vectors = 3;  // 12 of 16
#endif

// ---------------------------------------------------------------------------------------------------------------- products

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
void multiply_fresh(int64_t rows, int64_t columns, int64_t depth, const T *a, int64_t a_row, int64_t a_depth, const T *b, int64_t b_stride,
                    T *c, int64_t c_stride) {
    multiply(rows, columns, depth, a, a_row, a_depth, b, b_stride, c, c_stride, false);
}

// ----------------------------------------------------------------------------------------------------------------- dropout

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

// --------------------------------------------------------------------------------------------------------------- attention

template <class T>
CASE_FAST_INLINE T sum_of(Vector<T> x) {
    const Vector<T> all[4] = {x};
    T out[4];
    sums(all, out);
    return out[0];
}

// Scores of the first `visible` keys to softmax weights, the others to 0. A row holds whole vectors. Returns log-sum-exp.
template <class T>
CASE_FAST_INLINE T softmax(T *row, int64_t visible, int64_t padded, T scale) {
    constexpr int width = Lanes<T>::width;
    const Vector<T> zero = {};
    const T nothing = -T(INFINITY);
    if (visible <= 0) {
        for (int64_t j = 0; j < padded; j += width) store(row + j, zero);
        return nothing;
    }
    const int64_t whole = visible / width * width, end = (visible + width - 1) / width * width;
    Vector<T> tops = zero + nothing;
    const auto raise = [&](int64_t j) __attribute__((always_inline)) {
        const Vector<T> x = load(row + j);
        tops = x > tops ? x : tops;  // NaN: comes back through the sum
    };
    for (int64_t j = 0; j < whole; j += width) {
        store(row + j, load(row + j) * scale);
        raise(j);
    }
    if (whole < end) {
        for (int64_t j = whole; j < visible; ++j) row[j] *= scale;
        for (int64_t j = visible; j < end; ++j) row[j] = nothing;
        raise(whole);
    }
    T top = tops[0];
    for (int i = 1; i < width; ++i) top = tops[i] > top ? tops[i] : top;
    Vector<T> total = zero;
    for (int64_t j = 0; j < end; j += width) {
        const Vector<T> x = exp_nonpositive(load(row + j) - top);
        store(row + j, x);
        total += x;
    }
    const T sum = sum_of<T>(total), inverse = 1 / sum;
    for (int64_t j = 0; j < end; j += width) store(row + j, load(row + j) * inverse);
    for (int64_t j = end; j < padded; j += width) store(row + j, zero);
    return top + T(::log(double(sum)));
}

template <class T>
CASE_FAST_INLINE int64_t visible_keys(const Attention<T> &a, const Segment &s, int64_t row) {
    if (!a.causal) return s.keys;
    const int64_t seen = row + s.shift + 1;
    return seen < 0 ? 0 : least(seen, s.keys);
}

template <class T>
void drop_weights(const Attention<T> &a, int64_t row, int head, int64_t count, T *weights) {
    const T kept_scale = a.kept_scale;
    const uint64_t seed = a.seed, drop_below = a.drop_below, number = uint64_t((a.first + row) * a.longest);
    for (int64_t j = 0; j < count; j += Lanes<T>::width)
        store(weights + j, load(weights + j) * kept(number + uint64_t(j), uint32_t(head), seed, drop_below, kept_scale));
}

template <class T>
void forward(const Attention<T> &a, const Segment &s, int head, T *workspace) {
    const int64_t block = attention_row_block(s.rows, s.keys), padded = padded_keys(s.keys), offset = int64_t(head) * a.dim;
    const T *const key = a.key + s.key * a.key_stride + offset, *const value = a.value + s.key * a.value_stride + offset;
    for (int64_t first = 0; first < s.rows; first += block) {
        const int64_t count = least(block, s.rows - first), row = s.row + first, seen = visible_keys(a, s, first + count - 1);
        multiply_transposed(count, seen, a.dim, a.query + row * a.query_stride + offset, a.query_stride, key, a.key_stride, workspace,
                            padded);
        for (int64_t i = 0; i < count; ++i) {
            T *const weights = workspace + i * padded;
            const T lse = softmax(weights, visible_keys(a, s, first + i), padded, a.scale);
            if (a.lse) a.lse[(row + i) * a.heads + head] = lse;
            if (a.drop_below) drop_weights(a, row + i, head, seen, weights);
        }
        multiply(count, a.dim, seen, workspace, padded, 1, value, a.value_stride, a.out + row * a.out_stride + offset, a.out_stride, false);
    }
}

// Of one row: the scores p to W = P M, and the slopes g = grad_out value^T to S. (Whether there is dropout is known when this is
// compiled: GCC 12 gets a vector that is multiplied on a condition wrong.)
template <class T, bool dropping>
void weight_gradients(const Attention<T> &a, int64_t row, int head, int64_t visible, int64_t seen, T mean, T lse, T *p, T *g) {
    constexpr int width = Lanes<T>::width;
    const T scale = a.scale, kept_scale = a.kept_scale;
    const uint64_t seed = a.seed, drop_below = a.drop_below, number = uint64_t((a.first + row) * a.longest);
    for (int64_t j = 0; j < seen; j += width) {
        const Vector<T> least = {}, log_weight = load(p + j) * scale - lse, slope = load(g + j);
        // of scores beyond 1e6 the rounding of lse would make weights of any size; NaN goes through
        const Vector<T> weight = exp_nonpositive(log_weight > least ? least : log_weight);
        if constexpr (dropping) {
            const Vector<T> factor = kept(number + uint64_t(j), uint32_t(head), seed, drop_below, kept_scale);
            store(p + j, weight * factor);
            store(g + j, weight * (slope * factor - mean) * scale);
        } else {
            store(p + j, weight);
            store(g + j, weight * (slope - mean) * scale);
        }
    }
    for (int64_t j = visible; j < seen; ++j) p[j] = g[j] = 0;
}

// With P the weights, M what dropout multiplies them by, and W = P M:
//   grad_value = W^T grad_out; S = P (M (grad_out value^T) - grad_out . out) scale; grad_query = S key; grad_key = S^T query
template <class T>
void backward(const Attention<T> &a, const Segment &s, int head, T *workspace) {
    const int64_t block = attention_row_block(s.rows, s.keys), padded = padded_keys(s.keys), offset = int64_t(head) * a.dim;
    const T *const key = a.key + s.key * a.key_stride + offset, *const value = a.value + s.key * a.value_stride + offset;
    T *const weights = workspace, *const slopes = workspace + block * padded;
    T *const grad_key = a.grad_key + s.key * a.grad_key_stride + offset, *const grad_value = a.grad_value + s.key * a.grad_value_stride + offset;
    for (int64_t first = 0; first < s.rows; first += block) {
        const int64_t count = least(block, s.rows - first), row = s.row + first, seen = visible_keys(a, s, first + count - 1);
        const T *const query = a.query + row * a.query_stride + offset, *const grad_out = a.grad_out + row * a.out_stride + offset;
        multiply_transposed(count, seen, a.dim, query, a.query_stride, key, a.key_stride, weights, padded);
        multiply_transposed(count, seen, a.dim, grad_out, a.out_stride, value, a.value_stride, slopes, padded);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t visible = visible_keys(a, s, first + i);
            T mean;
            dot_tile<T, 1, 1>(a.dim, grad_out + i * a.out_stride, 0, a.out + (row + i) * a.out_stride + offset, 0, &mean, 0);
            const T lse = visible > 0 ? a.lse[(row + i) * a.heads + head] : T(0);
            const auto run = a.drop_below ? weight_gradients<T, true> : weight_gradients<T, false>;
            run(a, row + i, head, visible, seen, mean, lse, weights + i * padded, slopes + i * padded);
        }
        multiply(count, a.dim, seen, slopes, padded, 1, key, a.key_stride, a.grad_query + row * a.grad_query_stride + offset,
                 a.grad_query_stride, false);
        multiply(seen, a.dim, count, slopes, 1, padded, query, a.query_stride, grad_key, a.grad_key_stride, true);
        multiply(seen, a.dim, count, weights, 1, padded, grad_out, a.out_stride, grad_value, a.grad_value_stride, true);
    }
}

// ---------------------------------------------------------------------------------------------------- rows of hidden states

// Calls body(i, load, store) for each vector of a row; the last, if not full, goes through masked loads and stores.
template <class T, class Body>
CASE_FAST_INLINE void each_vector(int64_t count, Body body) {
    constexpr int width = Lanes<T>::width;
    const int64_t full = count / width * width;
    for (int64_t i = 0; i < full; i += width)
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

template <class T>
void normalise(int64_t rows, int64_t width, const T *hidden, const T *weight, const T *bias, double eps, T *out, T *kept_rows,
               T *inverse_deviation) {
    for (int64_t r = 0; r < rows; ++r, hidden += width, out += width) {
        Vector<T> total = {};
        each_vector<T>(width, [&](int64_t i, auto load, auto) __attribute__((always_inline)) { total += load(hidden + i); });
        const T mean = sum_of<T>(total) / T(width);
        const int64_t whole = width / Lanes<T>::width * Lanes<T>::width;
        total = Vector<T>{};
        for (int64_t i = 0; i < whole; i += Lanes<T>::width) {
            const Vector<T> x = load(hidden + i) - mean;
            total += x * x;
        }
        T squares = sum_of<T>(total);
        for (int64_t i = whole; i < width; ++i) squares += (hidden[i] - mean) * (hidden[i] - mean);
        const T inverse = T(1 / ::sqrt(double(squares) / double(width) + eps));
        each_vector<T>(width, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
            const Vector<T> x = (load(hidden + i) - mean) * inverse;
            if (kept_rows) store(kept_rows + r * width + i, x);
            store(out + i, x * load(weight + i) + load(bias + i));
        });
        if (inverse_deviation) inverse_deviation[r] = inverse;
    }
}

template <class T>
void scale_and_shift(int64_t rows, int64_t width, const T *kept_rows, const T *weight, const T *bias, T *out) {
    for (int64_t r = 0; r < rows; ++r, kept_rows += width, out += width)
        each_vector<T>(width, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
            store(out + i, load(kept_rows + i) * load(weight + i) + load(bias + i));
        });
}

// With x the normalised row and g = grad_normed * weight: grad += (g - mean(g) - x mean(g x)) / deviation
template <class T>
void normalise_backward(int64_t rows, int64_t width, const T *kept_rows, const T *inverse_deviation, const T *weight, const T *grad_normed,
                        T *grad, T *norm_grads) {
    for (int64_t r = 0; r < rows; ++r, kept_rows += width, grad_normed += width, grad += width) {
        Vector<T> total = {}, along = {};
        each_vector<T>(width, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
            const Vector<T> x = load(kept_rows + i), given = load(grad_normed + i), g = given * load(weight + i);
            total += g;
            along += g * x;
            store(norm_grads + i, load(norm_grads + i) + given * x);
            store(norm_grads + width + i, load(norm_grads + width + i) + given);
        });
        const T mean = sum_of<T>(total) / T(width), slope = sum_of<T>(along) / T(width), inverse = inverse_deviation[r];
        each_vector<T>(width, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
            const Vector<T> g = load(grad_normed + i) * load(weight + i);
            store(grad + i, load(grad + i) + (g - mean - load(kept_rows + i) * slope) * inverse);
        });
    }
}

template <class T, bool dropping, bool add>
void drop_as(const ElementDropout &d, int64_t first, int64_t count, const T *from, T *to) {
    const T kept_scale = T(d.kept_scale);
    const uint64_t seed = d.seed, drop_below = d.drop_below;  // local, so that no store is thought to change them
    each_vector<T>(count, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
        Vector<T> x = load(from + i);
        if constexpr (dropping) x *= kept(uint64_t(first + i), 0, seed, drop_below, kept_scale);
        if constexpr (add) x += load(to + i);
        store(to + i, x);
    });
}
template <class T>
void drop(const ElementDropout &d, int64_t first, int64_t count, const T *from, T *to, bool add) {
    const auto run = d.drop_below ? (add ? drop_as<T, true, true> : drop_as<T, true, false>)
                                  : (add ? drop_as<T, false, true> : drop_as<T, false, false>);
    run(d, first, count, from, to);
}

#define CASE_FAST_ATTENTION_KERNELS(T)                                                                                        \
    {                                                                                                                         \
        forward<T>, backward<T>, multiply_transposed<T>, multiply_fresh<T>, normalise<T>, normalise_backward<T>,              \
            scale_and_shift<T>, drop<T>                                                                                       \
    }
#define CASE_FAST_CROSS_ATTENTION_KERNELS {CASE_FAST_ATTENTION_KERNELS(float), CASE_FAST_ATTENTION_KERNELS(double)}

}  // namespace
