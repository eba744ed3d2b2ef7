// The row kernels of graph attention, for the instruction set that this is compiled for. See cpu.h for the data.
//
// Edges are taken four at a time: a group's loads hide each other's latency, and what is shared between its edges (the own
// row, the sum over edges) stays in registers. All sums run in an order that depends on the graph alone.
#include "common/philox.h"
#include "common/vector.h"
#include "graph_attention/cpu.h"

namespace {

constexpr int group = 4;
constexpr int64_t row_block = 16;  // rows done phase by phase, so that one row's scalar chain hides behind its neighbours

// Calls body(first, count) over [begin, end) in groups of four and a rest; count is known to the compiler.
template <class Body>
CASE_FAST_INLINE void each_group(int64_t begin, int64_t end, Body body) {
    for (; begin + group <= end; begin += group) body(begin, Constant<group>{});
    switch (end - begin) {
        case 3: return body(begin, Constant<3>{});
        case 2: return body(begin, Constant<2>{});
        case 1: return body(begin, Constant<1>{});
    }
}

// The members of GraphAttention that inner loops need: local, so that no store is thought to change them.
template <class T>
struct Shape {
    int64_t row, bias;  // elements in a vertex's row of all heads, and in a relation's row of `bias`
    int heads, dim;
    int64_t padded;
};
template <class T>
CASE_FAST_INLINE Shape<T> shape(const GraphAttention<T> &a) {
    return {int64_t(a.heads) * a.dim, int64_t(a.heads) * 2 * a.padded, a.heads, a.dim, a.padded};
}

template <class T>
CASE_FAST_INLINE void clear(T *row, int64_t count) {
    for (int64_t i = 0; i < count; ++i) row[i] = T(0);
}

// out[j] = (own + relation_query) . (other_j + relation_key), or own . other_j
template <class T, bool biased, int count>
CASE_FAST_INLINE void dots(int dim, int64_t padded, const T *own, const T *const other[group], const T *const bias[group],
                           T out[group]) {
    Vector<T> sum[group] = {};
    each_vector<T>(dim, [&](int64_t i, auto load, auto) __attribute__((always_inline)) {
        const Vector<T> x = load(own + i);
        for (int j = 0; j < count; ++j) {
            const Vector<T> y = load(other[j] + i);
            if (biased)
                sum[j] += (x + ::load(bias[j] + i)) * (y + ::load(bias[j] + padded + i));
            else
                sum[j] += x * y;
        }
    });
    sums(sum, out);
}

template <class T>
CASE_FAST_INLINE bool keeps(const GraphAttention<T> &a, int64_t e, int h) {
    return a.drop_below == 0 || case_fast_keep(a.seed, e, h, a.drop_below);
}
template <class T>
CASE_FAST_INLINE T dropped(const GraphAttention<T> &a, int64_t e, int h, T x) {
    return keeps(a, e, h) ? x * a.kept_scale : T(0);
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
CASE_FAST_INLINE void scores(const GraphAttention<T> &a, int64_t row, int64_t begin, int64_t end) {
    const Shape<T> s = shape(a);
    const T *const query = a.query + row * s.row, *const key = a.key, *const bias = a.bias;
    T *const weights = a.weights;
    const T scale = a.scale;
    each_group(begin, end, [&](int64_t e, auto count) __attribute__((always_inline)) {
        constexpr int n = decltype(count)::value;
        const T *other[group], *other_bias[group];
        for (int j = 0; j < n; ++j) other[j] = key + at(a.indices, e + j) * s.row;
        if (biased)
            for (int j = 0; j < n; ++j) other_bias[j] = bias + at(a.relation, e + j) * s.bias;
        for (int h = 0; h < s.heads; ++h) {
            T dot[group];
            dots<T, biased, n>(s.dim, s.padded, query + h * s.dim, other, other_bias, dot);
            for (int j = 0; j < n; ++j) {
                weights[(e + j) * s.heads + h] = scale * dot[j];
                other[j] += s.dim;
                if (biased) other_bias[j] += 2 * s.padded;
            }
        }
    });
}

// Scores to softmax weights, in place.
template <class T>
CASE_FAST_INLINE void softmax(T *weights, int heads, int64_t begin, int64_t end) {
    T *const first = weights + begin * heads, *const last = weights + end * heads;
    for (int h = 0; h < heads; ++h) {
        T top = first[h];
        for (T *w = first + h; w < last; w += heads) top = *w > top ? *w : top;  // NaN: comes back through the sum
        for (T *w = first + h; w < last; w += heads) *w -= top;
    }
    exponentials(first, last - first);
    for (int h = 0; h < heads; ++h) {
        T sum = 0;
        for (T *w = first + h; w < last; w += heads) sum += *w;
        const T inverse = 1 / sum;
        for (T *w = first + h; w < last; w += heads) *w *= inverse;
    }
}

template <class T>
CASE_FAST_INLINE void combine(const GraphAttention<T> &a, int64_t row, int64_t begin, int64_t end) {
    const Shape<T> s = shape(a);
    const T *const value = a.value, *const weights = a.weights;
    T *const out_row = a.out + row * s.row;
    if (begin == end) clear(out_row, s.row);
    each_group(begin, end, [&](int64_t e, auto count) __attribute__((always_inline)) {
        const bool fresh = e == begin;
        constexpr int n = decltype(count)::value;
        const T *other[group];
        for (int j = 0; j < n; ++j) other[j] = value + at(a.indices, e + j) * s.row;
        for (int h = 0; h < s.heads; ++h) {
            T *const out = out_row + h * s.dim;
            T w[group];
            for (int j = 0; j < n; ++j) w[j] = dropped(a, e + j, h, weights[(e + j) * s.heads + h]);
            each_vector<T>(s.dim, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
                Vector<T> sum = {};
                if (!fresh) sum = load(out + i);
                for (int j = 0; j < n; ++j) sum += w[j] * load(other[j] + i);
                store(out + i, sum);
            });
            for (int j = 0; j < n; ++j) other[j] += s.dim;
        }
    });
}

template <class T, bool biased>
void forward(const GraphAttention<T> &a, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block += row_block) {
        const int64_t block_end = block + row_block < end ? block + row_block : end;
        for (int64_t row = block; row < block_end; ++row)
            scores<T, biased>(a, row, at(a.indptr, row), at(a.indptr, row + 1));
        for (int64_t row = block; row < block_end; ++row) {
            const int64_t first = at(a.indptr, row), last = at(a.indptr, row + 1);
            if (first < last) softmax(a.weights, a.heads, first, last);
        }
        for (int64_t row = block; row < block_end; ++row) combine(a, row, at(a.indptr, row), at(a.indptr, row + 1));
    }
}

// d loss / d weight
template <class T>
CASE_FAST_INLINE void weight_gradients(const GraphAttention<T> &a, int64_t row, int64_t begin, int64_t end) {
    const Shape<T> s = shape(a);
    const T *const grad_out = a.grad_out + row * s.row, *const value = a.value;
    T *const score_grad = a.score_grad;
    each_group(begin, end, [&](int64_t e, auto count) __attribute__((always_inline)) {
        constexpr int n = decltype(count)::value;
        const T *other[group];
        for (int j = 0; j < n; ++j) other[j] = value + at(a.indices, e + j) * s.row;
        for (int h = 0; h < s.heads; ++h) {
            T dot[group];
            dots<T, false, n>(s.dim, s.padded, grad_out + h * s.dim, other, other, dot);
            for (int j = 0; j < n; ++j) {
                score_grad[(e + j) * s.heads + h] = dropped(a, e + j, h, dot[j]);
                other[j] += s.dim;
            }
        }
    });
}

// In place: scale * weight * (d loss / d weight - sum over the row of weight * d loss / d weight)
template <class T>
CASE_FAST_INLINE void softmax_gradients(const GraphAttention<T> &a, int64_t begin, int64_t end) {
    const int64_t heads = a.heads;
    const T *const weights = a.weights;
    T *const grads = a.score_grad;
    const T scale = a.scale;
    for (int h = 0; h < heads; ++h) {
        T mean = 0;
        for (int64_t i = begin * heads + h; i < end * heads; i += heads) mean += weights[i] * grads[i];
        for (int64_t i = begin * heads + h; i < end * heads; i += heads) grads[i] = scale * weights[i] * (grads[i] - mean);
    }
}

template <class T, bool biased>
CASE_FAST_INLINE void query_gradients(const GraphAttention<T> &a, int64_t row, int64_t begin, int64_t end, T *partial) {
    const Shape<T> s = shape(a);
    const T *const query_row = a.query + row * s.row, *const key = a.key, *const score_grad = a.score_grad;
    T *const grad_row = a.grad_query + row * s.row;
    T *const totals = biased ? partial + a.relations * s.bias : nullptr;
    const int64_t to_partial = partial - a.bias;
    if (begin == end) clear(grad_row, s.row);
    each_group(begin, end, [&](int64_t e, auto count) __attribute__((always_inline)) {
        const bool fresh = e == begin;
        constexpr int n = decltype(count)::value;
        const T *other[group], *bias[group];
        for (int j = 0; j < n; ++j) other[j] = key + at(a.indices, e + j) * s.row;
        if (biased)
            for (int j = 0; j < n; ++j) {
                const int64_t relation = at(a.relation, e + j);
                bias[j] = a.bias + relation * s.bias + s.padded;
                for (int h = 0; h < s.heads; ++h) totals[relation * s.heads + h] += score_grad[(e + j) * s.heads + h];
            }
        for (int h = 0; h < s.heads; ++h) {
            const T *const query = query_row + h * s.dim;
            T *const grad_query = grad_row + h * s.dim;
            T grad[group];
            for (int j = 0; j < n; ++j) grad[j] = score_grad[(e + j) * s.heads + h];
            each_vector<T>(s.dim, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
                Vector<T> sum = {};
                if (!fresh) sum = load(grad_query + i);
                const Vector<T> x = load(query + i);
                for (int j = 0; j < n; ++j) {
                    Vector<T> y = load(other[j] + i);
                    if (biased) {
                        y += ::load(bias[j] + i);
                        T *const to = const_cast<T *>(bias[j]) + to_partial + i;
                        ::store(to, ::load(to) + grad[j] * x);
                    }
                    sum += grad[j] * y;
                }
                store(grad_query + i, sum);
            });
            for (int j = 0; j < n; ++j) {
                other[j] += s.dim;
                if (biased) bias[j] += 2 * s.padded;
            }
        }
    });
}

template <class T, bool biased>
void backward_rows(const GraphAttention<T> &a, int64_t begin, int64_t end, T *partial) {
    for (int64_t block = begin; block < end; block += row_block) {
        const int64_t block_end = block + row_block < end ? block + row_block : end;
        for (int64_t row = block; row < block_end; ++row)
            weight_gradients(a, row, at(a.indptr, row), at(a.indptr, row + 1));
        for (int64_t row = block; row < block_end; ++row) softmax_gradients(a, at(a.indptr, row), at(a.indptr, row + 1));
        for (int64_t row = block; row < block_end; ++row)
            query_gradients<T, biased>(a, row, at(a.indptr, row), at(a.indptr, row + 1), partial);
    }
}

template <class T, bool biased>
void backward_columns(const GraphAttention<T> &a, int64_t begin, int64_t end, int64_t place, T *partial) {
    const Shape<T> s = shape(a);
    const T *const query = a.query, *const grad_out = a.grad_out, *const weights = a.weights, *const score_grad = a.score_grad;
    const int64_t *const place_row = a.place_row, *const place_edge = a.place_edge;
    const int64_t to_partial = partial - a.bias, to_grad_out = grad_out - query;
    for (int64_t column = begin, first = place, last; column < end; ++column, first = last) {
        last = a.column_end[column];
        const T *const key_row = a.key + column * s.row;
        T *const grad_key_row = a.grad_key + column * s.row, *const grad_value_row = a.grad_value + column * s.row;
        if (first == last) {
            clear(grad_key_row, s.row);
            clear(grad_value_row, s.row);
        }
        each_group(first, last, [&](int64_t p, auto count) __attribute__((always_inline)) {
            const bool fresh = p == first;
            constexpr int n = decltype(count)::value;
            const T *other[group], *bias[group];
            for (int j = 0; j < n; ++j) other[j] = query + place_row[p + j] * s.row;
            if (biased)
                for (int j = 0; j < n; ++j) bias[j] = a.bias + at(a.relation, place_edge[p + j]) * s.bias;
            for (int h = 0; h < s.heads; ++h) {
                const T *const key = key_row + h * s.dim;
                T *const grad_key = grad_key_row + h * s.dim, *const grad_value = grad_value_row + h * s.dim;
                T grad[group], weight[group];
                for (int j = 0; j < n; ++j) {
                    const int64_t e = place_edge[p + j];
                    grad[j] = score_grad[e * s.heads + h];
                    weight[j] = dropped(a, e, h, weights[e * s.heads + h]);
                }
                each_vector<T>(s.dim, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
                    Vector<T> key_sum = {}, value_sum = {};
                    if (!fresh) {
                        key_sum = load(grad_key + i);
                        value_sum = load(grad_value + i);
                    }
                    const Vector<T> x = load(key + i);
                    for (int j = 0; j < n; ++j) {
                        Vector<T> y = load(other[j] + i);
                        value_sum += weight[j] * load(other[j] + to_grad_out + i);
                        if (biased) {
                            y += ::load(bias[j] + i);
                            T *const to = const_cast<T *>(bias[j]) + to_partial + i;
                            ::store(to, ::load(to) + grad[j] * x);
                        }
                        key_sum += grad[j] * y;
                    }
                    store(grad_key + i, key_sum);
                    store(grad_value + i, value_sum);
                });
                for (int j = 0; j < n; ++j) {
                    other[j] += s.dim;
                    if (biased) bias[j] += 2 * s.padded;
                }
            }
        });
    }
}

// Row `row` of the relation gradients: the chunks' partial sums, in order.
template <class T>
void reduce(const GraphAttention<T> &a, const T *partials, int64_t chunks, int64_t stride, int64_t row, T *grad_relation_query,
            T *grad_relation_key) {
    const int64_t rows = a.relations * a.heads, padded = a.padded;
    T total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += partials[c * stride + rows * 2 * padded + row];
    for (int slot = 0; slot < 2; ++slot) {
        T *const out = (slot ? grad_relation_key : grad_relation_query) + row * a.dim;
        const T *const other = a.bias + (2 * row + 1 - slot) * padded, *const partial = partials + (2 * row + slot) * padded;
        each_vector<T>(a.dim, [&](int64_t i, auto, auto store) __attribute__((always_inline)) {
            Vector<T> sum = {};
            if (total != 0) sum = total * load(other + i);  // 0 where no edge has the relation, be its row NaN
            for (int64_t c = 0; c < chunks; ++c) sum += load(partial + c * stride + i);
            store(out + i, sum);
        });
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

}  // namespace

const KernelsOf<RowKernels> CASE_FAST_KERNELS_HERE(graph_attention) = {
    {forward_any<float>, backward_rows_any<float>, backward_columns_any<float>, reduce<float>},
    {forward_any<double>, backward_rows_any<double>, backward_columns_any<double>, reduce<double>},
};
