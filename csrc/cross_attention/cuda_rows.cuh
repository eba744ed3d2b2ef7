// Few rows a sequence: a block takes one (row, head), and its warps share the keys; what each has summed is joined in the order
// of warps. Of a decoder's block also what stands before (layer norm, projection of one head) and after (output projection).
#pragma once

#include "cross_attention/cuda_tiles.cuh"

namespace case_fast::cross_attention {

template <class H> struct RowBlock {
    using A = typename H::A;
    static constexpr int WARPS = H::SIZE <= 6 ? 16 : 8, THREADS = WARPS * WARP;
    static constexpr int BLOCKS = 16 / WARPS;  // on a multiprocessor: registers for none to spill
    A peak[WARPS], total[WARPS];
    A sum[WARPS * WARP * H::SIZE];
};

// Calls store(d, out_d) for every dimension, each by one thread; lse by all threads. query: the row's, in every warp.
template <class H, class Store>
__device__ __forceinline__ typename H::A attend_row(const H &query, const Span &span, int visible, int64_t row, int head,
                                                    const Numbers &numbers, const Strided<const typename H::T> &key,
                                                    const Strided<const typename H::T> &value, RowBlock<H> &block, Store store) {
    using A = typename H::A;
    constexpr int AHEAD = H::AHEAD, WARPS = RowBlock<H>::WARPS;
    const int lane = static_cast<int>(threadIdx.x) & (WARP - 1), warp = static_cast<int>(threadIdx.x) / WARP, dim = numbers.dim;
    const int64_t number = row * numbers.longest_keys();
    const A scale = static_cast<A>(numbers.scale);
    H sum;
    sum.zero();
    A peak = minus_infinity<A>(), total = 0;
    for (int first = warp * AHEAD; first < visible; first += WARPS * AHEAD) {
        H keys[AHEAD], values[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            const int64_t from = static_cast<int64_t>(span.key) + (first + u < visible ? first + u : first);
            keys[u].load(key.row(from, head, dim), lane, dim);
            values[u].load(value.row(from, head, dim), lane, dim);
        }
        A score[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) score[u] = query.dot(keys[u]);
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) score[u] = warp_sum(score[u]) * scale;
        A next = peak;
#pragma unroll
        for (int u = 0; u < AHEAD; ++u)
            if (first + u < visible) next = larger(next, score[u]);
        const A shrink = peak == next ? A(1) : exponential(peak - next);
        total *= shrink;
        sum.scale(shrink);
        peak = next;
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            if (first + u >= visible) continue;
            A weight = exponential(score[u] - next);
            total += weight;
            if (numbers.dropout.drop_below) weight *= numbers.dropout.template factor<A>(number + first + u, head);
            sum.add(weight, values[u]);
        }
    }
    if (lane == 0) block.peak[warp] = peak, block.total[warp] = total;
#pragma unroll
    for (int i = 0; i < H::SIZE; ++i) block.sum[(warp * H::SIZE + i) * WARP + lane] = sum.x[i];
    __syncthreads();
    peak = lane < WARPS ? block.peak[lane] : minus_infinity<A>();  // from here on lane l has warp l's
    total = lane < WARPS ? block.total[lane] : A(0);
    const A highest = warp_max(peak);
    const A shrink = peak == highest ? A(1) : exponential(peak - highest);
    total = warp_sum(total * shrink);
    const A inverse = visible > 0 ? 1 / total : A(0);
    for (int at = threadIdx.x; at < H::SIZE * WARP; at += RowBlock<H>::THREADS) {  // whole warps
        A all = 0;
#pragma unroll 4
        for (int w = 0; w < WARPS; ++w) all += __shfl_sync(ALL, shrink, w) * block.sum[w * H::SIZE * WARP + at];
        const int i = at / WARP, d = (i / H::VEC * WARP + lane) * H::VEC + i % H::VEC;
        if (d < dim) store(d, span.bad ? not_a_number<A>() : all * inverse);
    }
    return visible > 0 ? highest + logarithm(total) : minus_infinity<A>();
}

// The span of the sequence that holds this row; bad where none does.
__device__ __forceinline__ Span span_of_row(const Sequences &sequences, int row, int lane) {
    const int s = last_at_most(sequences.batch, row, lane, [&](int s) { return sequences.read(sequences.cu_query, s); });
    Span span = sequences.span(s);
    if (row < span.row || row >= span.row + span.rows) span.bad = true;
    if (span.bad) span.keys = 0;
    return span;
}

template <class H> __global__ void __launch_bounds__(RowBlock<H>::THREADS, RowBlock<H>::BLOCKS)
    row_forward(Sequences sequences, Numbers numbers, Forward<H> arrays) {
    using A = typename H::A;
    __shared__ RowBlock<H> block;
    const int lane = static_cast<int>(threadIdx.x) & (WARP - 1), row = static_cast<int>(blockIdx.x),
              head = static_cast<int>(blockIdx.y), dim = numbers.dim;
    sequences.check();
    const Span span = span_of_row(sequences, row, lane);
    H query;
    query.load(arrays.query.row(row, head, dim), lane, dim);
    typename H::T *const out = arrays.out.row(row, head, dim);
    const A lse = attend_row(query, span, span.visible(row - span.row, sequences.causal), row, head, numbers, arrays.key,
                             arrays.value, block, [&](int d, A x) { out[d] = narrowed<typename H::T>(x); });
    if (arrays.lse && threadIdx.x == 0) arrays.lse[static_cast<int64_t>(row) * numbers.heads + head] = lse;
}

// ---- a decoder's block, for few rows

template <class H> struct Projected {  // of one source
    using T = typename H::T;
    const T *hidden, *norm_weight, *norm_bias, *query_weight;
    Strided<const T> key, value;
    int width;
    double eps;
    typename H::A *attended;  // (rows, heads, dim)
};

// Attention of one (row, head) of layer_norm(hidden) query_weight^T.
template <class H> __global__ void __launch_bounds__(RowBlock<H>::THREADS, RowBlock<H>::BLOCKS)
    block_attend(Sequences sequences, Numbers numbers, Projected<H> arrays) {
    using T = typename H::T;
    using A = typename H::A;
    using Pack = typename H::Pack;
    constexpr int WARPS = RowBlock<H>::WARPS, THREADS = RowBlock<H>::THREADS, VEC = H::VEC, AHEAD = H::AHEAD;
    CASE_FAST_DYNAMIC_SHARED(memory);
    __shared__ RowBlock<H> block;
    __shared__ A projected[WARP * H::SIZE];
    A *const normed = reinterpret_cast<A *>(memory);  // (width)
    const int lane = static_cast<int>(threadIdx.x) & (WARP - 1), warp = static_cast<int>(threadIdx.x) / WARP,
              row = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y), dim = numbers.dim, width = arrays.width;
    sequences.check();
    const Span span = span_of_row(sequences, row, lane);

    const WholeBlock<WARPS, A> team{lane, warp, block.sum};
    const T *const hidden = arrays.hidden + static_cast<int64_t>(row) * width;
    A sum = 0;
    for (int k = threadIdx.x; k < width; k += THREADS) {
        const A x = widened(hidden[k]);
        normed[k] = x;
        sum += x;
    }
    const A mean = team.sum(warp_sum(sum)) / width;
    sum = 0;
    for (int k = threadIdx.x; k < width; k += THREADS) sum += (normed[k] - mean) * (normed[k] - mean);  // this thread's own
    const A inverse = static_cast<A>(1 / sqrt(static_cast<double>(team.sum(warp_sum(sum))) / width + arrays.eps));
    for (int k = threadIdx.x; k < width; k += THREADS)
        normed[k] = (normed[k] - mean) * inverse * widened(arrays.norm_weight[k]) + widened(arrays.norm_bias[k]);
    __syncthreads();

    const T *const weight = arrays.query_weight + static_cast<int64_t>(head) * dim * width;
    for (int first = warp * AHEAD; first < dim; first += WARPS * AHEAD) {
        A dot[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) dot[u] = 0;
#pragma unroll 2
        for (int k = lane * VEC; k < width; k += WARP * VEC) {
            Pack pack[AHEAD];
#pragma unroll
            for (int u = 0; u < AHEAD; ++u)
                pack[u] = *reinterpret_cast<const Pack *>(weight +
                                                          static_cast<int64_t>(first + u < dim ? first + u : first) * width + k);
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                const A x = normed[k + i];
#pragma unroll
                for (int u = 0; u < AHEAD; ++u) dot[u] += x * widened(pack[u].x[i]);
            }
        }
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            dot[u] = warp_sum(dot[u]);
            if (lane == 0 && first + u < dim) projected[first + u] = dot[u];
        }
    }
    __syncthreads();
    H query;
#pragma unroll
    for (int i = 0; i < H::SIZE; ++i) {
        const int d = (i / VEC * WARP + lane) * VEC + i % VEC;
        query.x[i] = d < dim ? projected[d] : A(0);
    }
    A *const out = arrays.attended + (static_cast<int64_t>(row) * numbers.heads + head) * dim;
    attend_row(query, span, span.visible(row - span.row, false), row, head, numbers, arrays.key, arrays.value, block,
               [&](int d, A x) { out[d] = x; });
}

constexpr int PROJECT_WARPS = 8, PROJECT_ROWS = 8;

// out = hidden + dropout(attended output_weight^T); a warp a column and PROJECT_ROWS rows. out may be hidden.
template <class H> __global__ void __launch_bounds__(PROJECT_WARPS *WARP, 2)
    block_project(int rows, int width, int inner, Dropout dropout, const typename H::A *attended, const typename H::T *weight,
                  const typename H::T *hidden, typename H::T *out) {
    using T = typename H::T;
    using A = typename H::A;
    using Pack = typename H::Pack;
    constexpr int VEC = H::VEC;
    struct alignas(sizeof(A) * VEC) Wide {
        A x[VEC];
    };
    const int lane = static_cast<int>(threadIdx.x) & (WARP - 1);
    const int column = static_cast<int>(blockIdx.x) * PROJECT_WARPS + static_cast<int>(threadIdx.x) / WARP;
    const int first = static_cast<int>(blockIdx.y) * PROJECT_ROWS;
    if (column >= width) return;
    A dot[PROJECT_ROWS];
#pragma unroll
    for (int r = 0; r < PROJECT_ROWS; ++r) dot[r] = 0;
#pragma unroll 2
    for (int k = lane * VEC; k < inner; k += WARP * VEC) {
        const Pack pack = *reinterpret_cast<const Pack *>(weight + static_cast<int64_t>(column) * inner + k);
#pragma unroll
        for (int r = 0; r < PROJECT_ROWS; ++r) {
            const int row = first + r < rows ? first + r : first;
            const Wide x = *reinterpret_cast<const Wide *>(attended + static_cast<int64_t>(row) * inner + k);
#pragma unroll
            for (int i = 0; i < VEC; ++i) dot[r] += x.x[i] * widened(pack.x[i]);
        }
    }
    A mine = 0;  // of lane r, row first + r
#pragma unroll
    for (int r = 0; r < PROJECT_ROWS; ++r) {
        const A whole = warp_sum(dot[r]);
        if (lane == r) mine = whole;
    }
    if (lane >= PROJECT_ROWS || first + lane >= rows) return;
    const int64_t number = static_cast<int64_t>(first + lane) * width + column;
    if (dropout.drop_below) mine *= dropout.template factor<A>(number, 0);
    out[number] = narrowed<T>(widened(hidden[number]) + mine);
}

constexpr int DROP_THREADS = 256;

template <class T> __global__ void __launch_bounds__(DROP_THREADS)
    drop_elements(int64_t count, Dropout dropout, const T *from, const T *base, T *to) {
    const int64_t e = static_cast<int64_t>(blockIdx.x) * DROP_THREADS + threadIdx.x;
    if (e >= count) return;
    Sum<T> x = widened(from[e]);
    if (dropout.drop_below) x *= dropout.template factor<Sum<T>>(e, 0);
    if (base) x += widened(base[e]);
    to[e] = narrowed<T>(x);
}

}  // namespace case_fast::cross_attention
