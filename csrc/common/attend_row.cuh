// Attention row by row: a warp takes a row's keys; or a block takes one (row, head), its warps share the keys, and what each has
// summed is joined in the order of warps.
#pragma once

#include "common/sequences.cuh"

namespace case_fast {

// What a warp has summed of one row over some of its keys.
template <class H> struct Attended {
    using A = typename H::A;
    H sum;
    A peak, total;

    // Over `visible` keys from the first: AHEAD of them at `first`, then those that lie `step` further, and so on.
    __device__ __forceinline__ void over(const H &query, const Span &span, int visible, int first, int step, int64_t row, int head,
                                         int lane, const Numbers &numbers, const Strided<const typename H::T> &key,
                                         const Strided<const typename H::T> &value) {
        constexpr int AHEAD = H::AHEAD;
        const int dim = numbers.dim;
        const int64_t number = row * numbers.longest_keys();
        const A scale = static_cast<A>(numbers.scale);
        sum.zero();
        peak = minus_infinity<A>(), total = 0;
        for (; first < visible; first += step) {
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
    }
};

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
    Attended<H> mine;
    mine.over(query, span, visible, warp * AHEAD, WARPS * AHEAD, row, head, lane, numbers, key, value);
    if (lane == 0) block.peak[warp] = mine.peak, block.total[warp] = mine.total;
#pragma unroll
    for (int i = 0; i < H::SIZE; ++i) block.sum[(warp * H::SIZE + i) * WARP + lane] = mine.sum.x[i];
    __syncthreads();
    const A peak = lane < WARPS ? block.peak[lane] : minus_infinity<A>();  // from here on lane l has warp l's
    A total = lane < WARPS ? block.total[lane] : A(0);
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

}  // namespace case_fast
