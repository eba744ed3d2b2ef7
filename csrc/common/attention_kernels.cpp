// The kernels of attention, for the instruction set that this is compiled for. See attention.h for the data.
//
// All products are of two kinds, and both read their operands as they lie: dots of rows (scores; common/dots.h), and sums of rows
// (weights times values, and most gradients; common/sums.h).
#include "common/attention.h"

#include "common/dots.h"
#include "common/philox_vector.h"
#include "common/sums.h"

namespace {

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

}  // namespace

const KernelsOf<AttentionKernels> CASE_FAST_KERNELS_HERE(attention) = {
    {forward<float>, backward<float>},
    {forward<double>, backward<double>},
};
