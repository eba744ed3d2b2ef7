// The kernels of attention, for the instruction set that this is compiled for. See attention.h for the data.
//
// All products are of two kinds, and both read their operands as they lie: dots of rows (scores; common/dots.h), and sums of rows
// (weights times values, and most gradients; common/sums.h).
#include "common/attention.h"

#include "common/dots.h"
#include "common/softmax.h"
#include "common/sums.h"

namespace {

template <class T>
CASE_FAST_INLINE int64_t visible_keys(const Attention<T> &a, const Segment &s, int64_t row) {
    if (!a.causal) return s.keys;
    const int64_t seen = row + s.shift + 1;
    return seen < 0 ? 0 : least(seen, s.keys);
}

template <class T>
CASE_FAST_INLINE uint64_t number_of(const Attention<T> &a, int64_t row) {
    return uint64_t((a.first + row) * a.longest);
}

template <class T>
void forward(const Attention<T> &a, const Segment &s, int head, T *workspace) {
    const int64_t block = attention_row_block(s.rows, s.keys), padded = padded_keys(s.keys), offset = int64_t(head) * a.dim;
    const int64_t of_key = int64_t(head) * a.key_head;
    const T *const key = a.key + s.key * a.key_stride + of_key, *const value = a.value + s.key * a.value_stride + of_key;
    for (int64_t first = 0; first < s.rows; first += block) {
        const int64_t count = least(block, s.rows - first), row = s.row + first, seen = visible_keys(a, s, first + count - 1);
        multiply_transposed(count, seen, a.dim, a.query + row * a.query_stride + offset, a.query_stride, key, a.key_stride, workspace,
                            padded);
        for (int64_t i = 0; i < count; ++i) {
            T *const weights = workspace + i * padded;
            const T lse = softmax(weights, visible_keys(a, s, first + i), padded, a.scale);
            if (a.lse) a.lse[(row + i) * a.heads + head] = lse;
            if (a.drop_below) drop_weights(a, number_of(a, row + i), head, seen, weights);
        }
        multiply(count, a.dim, seen, workspace, padded, 1, value, a.value_stride, a.out + row * a.out_stride + offset, a.out_stride, false);
    }
}

// With P the weights, M what dropout multiplies them by, and W = P M:
//   grad_value = W^T grad_out; S = P (M (grad_out value^T) - grad_out . out) scale; grad_query = S key; grad_key = S^T query
template <class T>
void backward(const Attention<T> &a, const Segment &s, int head, T *workspace) {
    const int64_t block = attention_row_block(s.rows, s.keys), padded = padded_keys(s.keys), offset = int64_t(head) * a.dim;
    const int64_t of_key = int64_t(head) * a.key_head;
    const T *const key = a.key + s.key * a.key_stride + of_key, *const value = a.value + s.key * a.value_stride + of_key;
    T *const weights = workspace, *const slopes = workspace + block * padded;
    T *const grad_key = a.grad_key + s.key * a.grad_key_stride + of_key, *const grad_value = a.grad_value + s.key * a.grad_value_stride + of_key;
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
            weight_gradients(a, number_of(a, row + i), head, visible, seen, mean, lse, weights + i * padded, slopes + i * padded);
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
