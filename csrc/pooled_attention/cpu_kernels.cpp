// The kernels of pooled attention, for the instruction set that this is compiled for: all heads of a sequence at once, while its rows
// are in the first cache. They are the products of attention (common/dots.h, common/sums.h) with heads in place of query rows.
#include "pooled_attention/cpu.h"

#include "common/dots.h"
#include "common/softmax.h"
#include "common/sums.h"

namespace {

template <class T>
void forward(const PooledAttention<T> &a, const PooledSequence &s, T *weights) {
    const int64_t padded = padded_rows(s.rows), dim = a.dim;
    const int heads = a.heads;
    const T *const rows = a.rows + s.row * a.row_stride;
    const uint64_t number = uint64_t(s.number * a.longest);
    multiply_transposed(heads, s.rows, dim, a.query + s.number * a.query_stride, a.query_head, rows, a.row_stride, weights, padded);
    for (int head = 0; head < heads; ++head) {
        const T lse = softmax(weights + head * padded, s.rows, padded, a.scale);
        if (a.lse) a.lse[s.number * heads + head] = lse;
        if (a.drop_below) drop_weights(a, number, head, s.rows, weights + head * padded);
    }
    multiply(heads, dim, s.rows, weights, padded, 1, rows, a.row_stride, a.out + s.number * heads * dim, dim, false);
}

template <class T>
CASE_FAST_INLINE void copy(const T *from, int64_t count, T *to) {
    each_vector<T>(count, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) { store(to + i, load(from + i)); });
}

// With P the weights, M what dropout multiplies them by, W = P M and N the rows:
//   S = P (M (grad_out N^T) - grad_out . out) scale; grad_query = S N; grad_rows = W^T grad_out + S^T query
// Query, grad_out and query again lie one below the other, so that two products serve the first four of these.
template <class T>
void backward(const PooledAttention<T> &a, const PooledSequence &s, T *workspace) {
    const int64_t padded = padded_rows(s.rows), dim = a.dim, block = int64_t(a.heads) * dim;
    const int heads = a.heads;
    const T *const rows = a.rows + s.row * a.row_stride, *const out = a.out + s.number * block;
    const uint64_t number = uint64_t(s.number * a.longest);
    T *const query = workspace, *const grad_out = query + block, *const again = grad_out + block;
    T *const weights = again + block, *const slopes = weights + heads * padded;
    for (int head = 0; head < heads; ++head) {
        copy(a.query + s.number * a.query_stride + head * a.query_head, dim, query + head * dim);
        copy(a.grad_out + s.number * a.grad_out_stride + head * a.grad_out_head, dim, grad_out + head * dim);
    }
    copy(query, block, again);
    multiply_transposed(2 * int64_t(heads), s.rows, dim, query, dim, rows, a.row_stride, weights, padded);
    for (int head = 0; head < heads; ++head) {
        T mean;
        dot_tile<T, 1, 1>(dim, grad_out + head * dim, 0, out + head * dim, 0, &mean, 0);
        const T lse = s.rows > 0 ? a.lse[s.number * heads + head] : T(0);
        weight_gradients(a, number, head, s.rows, s.rows, mean, lse, weights + head * padded, slopes + head * padded);
    }
    multiply(heads, dim, s.rows, slopes, padded, 1, rows, a.row_stride, a.grad_query + s.number * block, dim, false);
    multiply(s.rows, dim, 2 * int64_t(heads), weights, 1, padded, grad_out, dim, a.grad_rows + s.row * dim, dim, false);
}

}  // namespace

const KernelsOf<PooledKernels> CASE_FAST_KERNELS_HERE(pooled_attention) = {
    {forward<float>, backward<float>},
    {forward<double>, backward<double>},
};
