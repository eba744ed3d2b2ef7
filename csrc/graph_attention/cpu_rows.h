// The row kernels of graph attention, for the instruction set of the including file. See cpu.h for the data.
//
// Edges are taken four at a time: a group's loads hide each other's latency, and what is shared between its edges (the own
// row, the sum over edges) stays in registers. All sums run in an order that depends on the graph alone.
#pragma once

#include "common/philox.h"
#include "common/vector.h"
#include "graph_attention/cpu.h"

namespace {

constexpr int group = 4;

struct Edges {  // a group's offsets, in elements
    int64_t row[group];   // into (V, H, D): the vertex at the other end
    int64_t bias[group];  // into (R, H, 2, padded)
};

// Calls body(i, load, store) for each vector of a row; the last, if not full, goes through masked loads and stores.
template <class T, class Body>
CASE_FAST_INLINE void each_vector(int dim, Body body) {
    constexpr int width = Lanes<T>::width;
    const int full = dim / width * width;
    for (int i = 0; i < full; i += width)
        body(
            i, [](const T *from) __attribute__((always_inline)) { return load(from); },
            [](T *to, Vector<T> x) __attribute__((always_inline)) { store(to, x); });
    if (full < dim) {
        const Tail<T> tail = make_tail<T>(dim - full);
        body(
            full, [tail](const T *from) __attribute__((always_inline)) { return load(from, tail); },
            [tail](T *to, Vector<T> x) __attribute__((always_inline)) { store(to, x, tail); });
    }
}

// Runs body(first, std integral constant count) over [begin, end) in groups of four and a rest.
template <int n>
struct Count {
    static constexpr int value = n;
};
template <class Body>
CASE_FAST_INLINE void each_group(int64_t begin, int64_t end, Body body) {
    int64_t i = begin;
    for (; i + group <= end; i += group) body(i, Count<group>{});
    switch (end - i) {
        case 3: return body(i, Count<3>{});
        case 2: return body(i, Count<2>{});
        case 1: return body(i, Count<1>{});
    }
}

template <class T>
CASE_FAST_INLINE int64_t row_offset(const GraphAttention<T> &a, int64_t vertex, int h) {
    return (vertex * a.heads + h) * a.dim;
}
template <class T>
CASE_FAST_INLINE int64_t bias_offset(const GraphAttention<T> &a, int64_t relation, int h) {
    return (relation * a.heads + h) * 2 * a.padded;
}

// out[j] = (own + relation_query) . (other_j + relation_key), or own . other_j
template <class T, bool biased, int count>
CASE_FAST_INLINE void dots(const GraphAttention<T> &a, const T *own, const T *other, const Edges &edges, T out[group]) {
    Vector<T> sum[group] = {};
    each_vector<T>(a.dim, [&](int i, auto load, auto) __attribute__((always_inline)) {
        const Vector<T> x = load(own + i);
        for (int j = 0; j < count; ++j) {
            const Vector<T> y = load(other + i + edges.row[j]);
            if (biased) {
                const T *bias = a.bias + i + edges.bias[j];
                sum[j] += (x + ::load(bias)) * (y + ::load(bias + a.padded));
            } else {
                sum[j] += x * y;
            }
        }
    });
    sums(sum, out);
}

template <class T>
CASE_FAST_INLINE bool keeps(const GraphAttention<T> &a, int64_t e, int h) {
    return a.drop_below == 0 || case_fast_keep(a.seed, e, h, a.drop_below);
}

CASE_FAST_INLINE void exponentials(float *x, int64_t count) {
    constexpr int width = Lanes<float>::width;
    int64_t i = 0;
    for (; i + width <= count; i += width) store(x + i, exp_nonpositive(load(x + i)));
    if (i < count) {
        const Tail<float> tail = make_tail<float>(int(count - i));
        store(x + i, exp_nonpositive(load(x + i, tail)), tail);
    }
}
CASE_FAST_INLINE void exponentials(double *x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) x[i] = ::exp(x[i]);
}

template <class T, bool biased>
CASE_FAST_INLINE void score_row(const GraphAttention<T> &a, int64_t row, int64_t begin, int64_t end) {
    for (int h = 0; h < a.heads; ++h)
        each_group(begin, end, [&](int64_t e, auto count) __attribute__((always_inline)) {
            constexpr int n = decltype(count)::value;
            Edges edges;
            for (int j = 0; j < n; ++j) {
                edges.row[j] = row_offset(a, at(a.indices, e + j), h);
                if (biased) edges.bias[j] = bias_offset(a, at(a.relation, e + j), h);
            }
            T dot[group];
            dots<T, biased, n>(a, a.query + row_offset(a, row, h), a.key, edges, dot);
            for (int j = 0; j < n; ++j) a.weights[(e + j) * a.heads + h] = a.scale * dot[j];
        });
}

// Scores to softmax weights, in place.
template <class T>
CASE_FAST_INLINE void softmax_row(const GraphAttention<T> &a, int64_t begin, int64_t end) {
    T *const first = a.weights + begin * a.heads, *const last = a.weights + end * a.heads;
    for (int h = 0; h < a.heads; ++h) {
        T top = first[h];
        for (T *w = first + h; w < last; w += a.heads) top = *w > top ? *w : top;  // NaN: comes back through the sum
        for (T *w = first + h; w < last; w += a.heads) *w -= top;
    }
    exponentials(first, last - first);
    for (int h = 0; h < a.heads; ++h) {
        T sum = 0;
        for (T *w = first + h; w < last; w += a.heads) sum += *w;
        for (T *w = first + h; w < last; w += a.heads) *w /= sum;
    }
}

template <class T>
CASE_FAST_INLINE void combine_row(const GraphAttention<T> &a, int64_t row, int64_t begin, int64_t end) {
    for (int h = 0; h < a.heads; ++h) {
        T *const out = a.out + row_offset(a, row, h);
        if (begin == end)
            each_vector<T>(a.dim, [&](int i, auto, auto store) __attribute__((always_inline)) { store(out + i, Vector<T>{}); });
        each_group(begin, end, [&](int64_t e, auto count) __attribute__((always_inline)) {
            constexpr int n = decltype(count)::value;
            int64_t other[group];
            T w[group];
            for (int j = 0; j < n; ++j) {
                other[j] = row_offset(a, at(a.indices, e + j), h);
                w[j] = keeps(a, e + j, h) ? a.weights[(e + j) * a.heads + h] * a.kept_scale : T(0);
            }
            const bool fresh = e == begin;
            each_vector<T>(a.dim, [&](int i, auto load, auto store) __attribute__((always_inline)) {
                Vector<T> sum = {};
                if (!fresh) sum = load(out + i);
                for (int j = 0; j < n; ++j) sum += w[j] * load(a.value + i + other[j]);
                store(out + i, sum);
            });
        });
    }
}

template <class T, bool biased>
void forward(const GraphAttention<T> &a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const int64_t first = at(a.indptr, row), last = at(a.indptr, row + 1);
        if (first < last) {
            score_row<T, biased>(a, row, first, last);
            softmax_row(a, first, last);
        }
        combine_row(a, row, first, last);
    }
}

// place_weight; place_grad = scale * weight * (d loss / d weight - sum over the row of weight * d loss / d weight)
template <class T>
CASE_FAST_INLINE void score_gradients(const GraphAttention<T> &a, int64_t row, int64_t begin, int64_t end) {
    for (int h = 0; h < a.heads; ++h) {
        T mean = 0;
        each_group(begin, end, [&](int64_t e, auto count) __attribute__((always_inline)) {
            constexpr int n = decltype(count)::value;
            Edges edges;
            for (int j = 0; j < n; ++j) edges.row[j] = row_offset(a, at(a.indices, e + j), h);
            T dot[group];
            dots<T, false, n>(a, a.grad_out + row_offset(a, row, h), a.value, edges, dot);
            for (int j = 0; j < n; ++j) {
                const T weight = a.weights[(e + j) * a.heads + h];
                const int64_t at_place = a.place[e + j] * a.heads + h;
                const bool kept = keeps(a, e + j, h);
                const T grad = kept ? dot[j] * a.kept_scale : T(0);
                a.place_weight[at_place] = kept ? weight * a.kept_scale : T(0);
                a.place_grad[at_place] = grad;
                mean += weight * grad;
            }
        });
        for (int64_t e = begin; e < end; ++e) {
            T &grad = a.place_grad[a.place[e] * a.heads + h];
            grad = a.scale * a.weights[e * a.heads + h] * (grad - mean);
        }
    }
}

template <class T, bool biased>
void backward_rows(const GraphAttention<T> &a, int64_t begin, int64_t end, T *partial) {
    T *const counts = biased ? partial + a.relations * a.heads * 2 * a.padded : nullptr;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t first = at(a.indptr, row), last = at(a.indptr, row + 1);
        score_gradients(a, row, first, last);
        for (int h = 0; h < a.heads; ++h) {
            const T *const query = a.query + row_offset(a, row, h);
            T *const grad_query = a.grad_query + row_offset(a, row, h);
            if (first == last)
                each_vector<T>(a.dim, [&](int i, auto, auto store) __attribute__((always_inline)) { store(grad_query + i, Vector<T>{}); });
            each_group(first, last, [&](int64_t e, auto count) __attribute__((always_inline)) {
                constexpr int n = decltype(count)::value;
                Edges edges;
                T grad[group];
                for (int j = 0; j < n; ++j) {
                    edges.row[j] = row_offset(a, at(a.indices, e + j), h);
                    grad[j] = a.place_grad[a.place[e + j] * a.heads + h];
                    if (biased) {
                        const int64_t relation = at(a.relation, e + j);
                        edges.bias[j] = bias_offset(a, relation, h);
                        counts[relation * a.heads + h] += grad[j];
                    }
                }
                const bool fresh = e == first;
                each_vector<T>(a.dim, [&](int i, auto load, auto store) __attribute__((always_inline)) {
                    Vector<T> sum = {};
                    if (!fresh) sum = load(grad_query + i);
                    const Vector<T> x = load(query + i);
                    for (int j = 0; j < n; ++j) {
                        Vector<T> y = load(a.key + i + edges.row[j]);
                        if (biased) {
                            const int64_t slot = edges.bias[j] + a.padded + i;
                            y += ::load(a.bias + slot);
                            ::store(partial + slot, ::load(partial + slot) + grad[j] * x);
                        }
                        sum += grad[j] * y;
                    }
                    store(grad_query + i, sum);
                });
            });
        }
    }
}

template <class T, bool biased>
void backward_columns(const GraphAttention<T> &a, int64_t begin, int64_t end, int64_t place, T *partial) {
    for (int64_t column = begin, first = place, last; column < end; ++column, first = last) {
        last = a.column_end[column];
        for (int h = 0; h < a.heads; ++h) {
            const int64_t own = row_offset(a, column, h);
            const T *const key = a.key + own;
            T *const grad_key = a.grad_key + own, *const grad_value = a.grad_value + own;
            if (first == last)
                each_vector<T>(a.dim, [&](int i, auto, auto store) __attribute__((always_inline)) {
                    store(grad_key + i, Vector<T>{});
                    store(grad_value + i, Vector<T>{});
                });
            each_group(first, last, [&](int64_t p, auto count) __attribute__((always_inline)) {
                constexpr int n = decltype(count)::value;
                Edges edges;
                T grad[group], weight[group];
                for (int j = 0; j < n; ++j) {
                    edges.row[j] = row_offset(a, a.place_row[p + j], h);
                    if (biased) edges.bias[j] = bias_offset(a, a.place_relation[p + j], h);
                    grad[j] = a.place_grad[(p + j) * a.heads + h];
                    weight[j] = a.place_weight[(p + j) * a.heads + h];
                }
                const bool fresh = p == first;
                each_vector<T>(a.dim, [&](int i, auto load, auto store) __attribute__((always_inline)) {
                    Vector<T> key_sum = {}, value_sum = {};
                    if (!fresh) {
                        key_sum = load(grad_key + i);
                        value_sum = load(grad_value + i);
                    }
                    const Vector<T> x = load(key + i);
                    for (int j = 0; j < n; ++j) {
                        Vector<T> y = load(a.query + i + edges.row[j]);
                        value_sum += weight[j] * load(a.grad_out + i + edges.row[j]);
                        if (biased) {
                            const int64_t slot = edges.bias[j] + i;
                            y += ::load(a.bias + slot);
                            ::store(partial + slot, ::load(partial + slot) + grad[j] * x);
                        }
                        key_sum += grad[j] * y;
                    }
                    store(grad_key + i, key_sum);
                    store(grad_value + i, value_sum);
                });
            });
        }
    }
}

template <class T>
void forward_any(const GraphAttention<T> &a, int64_t begin, int64_t end) {
    a.relations ? forward<T, true>(a, begin, end) : forward<T, false>(a, begin, end);
}
template <class T>
void backward_rows_any(const GraphAttention<T> &a, int64_t begin, int64_t end, T *partial) {
    a.relations ? backward_rows<T, true>(a, begin, end, partial) : backward_rows<T, false>(a, begin, end, partial);
}
template <class T>
void backward_columns_any(const GraphAttention<T> &a, int64_t begin, int64_t end, int64_t place, T *partial) {
    a.relations ? backward_columns<T, true>(a, begin, end, place, partial)
                : backward_columns<T, false>(a, begin, end, place, partial);
}

#define CASE_FAST_GRAPH_ATTENTION_KERNELS                                        \
    {                                                                            \
        {forward_any<float>, backward_rows_any<float>, backward_columns_any<float>}, \
        {forward_any<double>, backward_rows_any<double>, backward_columns_any<double>}, \
    }

}  // namespace
