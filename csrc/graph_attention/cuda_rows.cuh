// One row, and one column, of graph_attention: what a warp (or a whole block) does. Equations in graph_attention.h; with
// p the weights, p' those after dropout, and g the gradient of out:
//   dp_e = dropout(g_i . v_k)        dscore_e = scale p_e (dp_e - sum over the row of p dp)
//   dq_i = sum over the row of dscore (k_k + rk_r)        dk_k = sum over the column of dscore (q_i + rq_r)
//   dv_k = sum over the column of p' g_i
// A warp takes 32 edges at a time, one a lane: indices, scores and weights are worked on by lanes, rows by all lanes together.
#pragma once

#include "common/device.cuh"
#include "common/philox.h"
#include "graph_attention/graph_attention.h"

namespace case_fast::graph_attention {

struct Graph {  // passed to kernels by value
    int vertices, edges, relations, heads, dim;
    bool wide;  // 64-bit indices
    const void *indptr, *indices, *relation;
    double scale, kept_scale;
    uint64_t seed, drop_below;  // drop_below 0: no dropout
    const uint64_t *seed_at;
    int32_t *flag;

    // First in every kernel that drops.
    __device__ __forceinline__ void read_seed() {
        if (drop_below) seed = case_fast_seed(seed, seed_at);
    }

    __device__ __forceinline__ int64_t read(const void *array, int64_t at) const {
        return wide ? static_cast<const int64_t *>(array)[at] : static_cast<const int32_t *>(array)[at];
    }
    __device__ void report(int status) const {
        if (flag) *static_cast<volatile int32_t *>(flag) = status;
    }
    // An index in [0, size), or -1 and the flag.
    __device__ __forceinline__ int bounded(const void *array, int64_t at, int size, int status) const {
        const int64_t found = read(array, at);
        if (found >= 0 && found < size) return static_cast<int>(found);
        report(status);
        return -1;
    }
    __device__ __forceinline__ int neighbour(int edge) const { return bounded(indices, edge, vertices, CASE_FAST_BAD_INDICES); }
    __device__ __forceinline__ int relation_of(int edge) const {
        return bounded(relation, edge, relations, CASE_FAST_BAD_RELATION);
    }
    __device__ __forceinline__ void span(int row, int &begin, int &end) const {
        const int64_t from = read(indptr, row), to = read(indptr, row + 1);
        if (from < 0 || to < from || to > edges || (row == 0 && from) || (row == vertices - 1 && to != edges))
            report(CASE_FAST_BAD_INDPTR);
        begin = static_cast<int>(from < 0 ? 0 : from > edges ? edges : from);
        end = static_cast<int>(to < begin ? begin : to > edges ? edges : to);
    }
    // The row that an edge stands in, among rows [first, last).
    __device__ int row_of(int edge, int first, int last) const {
        while (last - first > 1) {
            const int middle = first + (last - first) / 2;
            if (read(indptr, middle) <= edge)
                first = middle;
            else
                last = middle;
        }
        return first;
    }
    template <class A> __device__ __forceinline__ A dropped(A x, int edge, int head) const {
        if (!drop_below) return x;
        return case_fast_keep(seed, edge, head, drop_below) ? x * static_cast<A>(kept_scale) : A(0);
    }
    __device__ __forceinline__ int64_t at(int64_t vertex, int head) const { return (vertex * heads + head) * dim; }
};

// The rows that `index` names (one a lane, and a vertex that exists in every lane), AHEAD at a time: use(j, rows j, j + 1, ...).
template <class H, class Use>
__device__ __forceinline__ void each_row(const Rows<typename H::T> &rows, int index, int count, int lane, int dim, Use use) {
    for (int j = 0; j < count; j += H::AHEAD) {
        H row[H::AHEAD];
#pragma unroll
        for (int u = 0; u < H::AHEAD; ++u) row[u].load(rows[__shfl_sync(ALL, index, (j + u) & (WARP - 1))], lane, dim);
        use(j, row);
    }
}

// Adds row `r` of a (R, heads, dim) tensor.
template <class H>
__device__ __forceinline__ void add_relation(H &to, const typename H::T *bias, const Graph &graph, int r, int head, int lane) {
    H row;
    row.load(bias + graph.at(r < 0 ? 0 : r, head), lane, graph.dim);
    to.add(row);
}

template <class H, class Team>
__device__ void row_forward(const Graph &graph, const Team &team, int row, int head, const Rows<typename H::T> &query,
                            const Rows<typename H::T> &key, const Rows<typename H::T> &value, const typename H::T *relation_query,
                            const typename H::T *relation_key, typename H::T *out, typename H::A *weights) {
    using A = typename H::A;
    const int lane = team.lane, dim = graph.dim;
    const bool related = graph.relations > 0;  // branches on it stand outside unrolled loops
    int begin, end;
    graph.span(row, begin, end);
    const bool once = Team::WARPS == 1 && end - begin <= WARP;  // the weights stay in registers
    const A scale = static_cast<A>(graph.scale);
    H q, sum;
    q.load(query[row], lane, dim);
    sum.zero();
    A peak = minus_infinity<A>(), total = 0, kept = 0;
    for (int base = begin + team.warp * WARP; base < end; base += Team::WARPS * WARP) {
        const int count = end - base < WARP ? end - base : WARP, edge = base + lane;
        const bool here = lane < count;
        const int k = here ? graph.neighbour(edge) : -1;
        const int r = related && here ? graph.relation_of(edge) : 0;
        A score = not_a_number<A>();  // a bad index must show
        each_row<H>(key, k < 0 ? row : k, count, lane, dim, [&](int j, H(&rows)[H::AHEAD]) {
            A part[H::AHEAD];
            if (related) {
#pragma unroll
                for (int u = 0; u < H::AHEAD; ++u) {
                    const int relation = __shfl_sync(ALL, r, (j + u) & (WARP - 1));
                    H left = q;
                    add_relation(left, relation_query, graph, relation, head, lane);
                    add_relation(rows[u], relation_key, graph, relation, head, lane);
                    part[u] = left.dot(rows[u]);
                }
            } else {
#pragma unroll
                for (int u = 0; u < H::AHEAD; ++u) part[u] = q.dot(rows[u]);
            }
#pragma unroll
            for (int u = 0; u < H::AHEAD; ++u) part[u] = warp_sum(part[u]);
#pragma unroll
            for (int u = 0; u < H::AHEAD; ++u)
                if (lane == j + u && k >= 0 && r >= 0) score = part[u] * scale;
        });
        const A next = larger(peak, warp_max(here ? score : minus_infinity<A>()));
        const A weight = here ? exponential(score - next) : A(0);
        const A shrink = exponential(peak - next);
        total = total * shrink + warp_sum(weight);
        kept = weight;
        if (here && !once) weights[static_cast<int64_t>(edge) * graph.heads + head] = score;  // not yet: the sum is not known
        const A dropped = here ? graph.dropped(weight, edge, head) : A(0);
        sum.scale(shrink);
        each_row<H>(value, k < 0 ? row : k, count, lane, dim, [&](int j, H(&rows)[H::AHEAD]) {
#pragma unroll
            for (int u = 0; u < H::AHEAD; ++u) {
                const A factor = __shfl_sync(ALL, dropped, (j + u) & (WARP - 1));
                if (j + u < count) sum.add(factor, rows[u]);  // the spare row may hold NaN
            }
        });
        peak = next;
    }
    if (begin == end) {
        sum.store(out + graph.at(row, head), lane, dim);
        return;
    }
    const A highest = team.max(peak);
    if (Team::WARPS > 1) {
        const A shrink = exponential(peak - highest);
        total = team.sum(total * shrink);
        sum.scale(shrink);
        team.sum_rows(sum);
    }
    sum.scale(1 / total);
    if (team.warp == 0) sum.store(out + graph.at(row, head), lane, dim);
    for (int edge = begin + team.warp * WARP + lane; edge < end; edge += Team::WARPS * WARP) {
        A &place = weights[static_cast<int64_t>(edge) * graph.heads + head];  // what this lane wrote above
        place = (once ? kept : exponential(place - highest)) / total;
    }
}

template <class A> struct OneNumber {  // as the warps of a team sum it
    static constexpr int SIZE = 1;
    A x[1];
};

// Sums of dscore by relation, lane l for relation first + l: what one edge adds.
template <class A> __device__ __forceinline__ void count_relation(A &sum, A dscore, int relation, int first, int lane) {
    if (relation == first + lane) sum += dscore;
}

template <class H, class Team>
__device__ void row_backward(const Graph &graph, const Team &team, int row, int head, const Rows<typename H::T> &key,
                             const Rows<typename H::T> &value, const Rows<typename H::T> &grad_out,
                             const typename H::T *relation_key, const typename H::A *weights, typename H::A *dscore,
                             typename H::T *grad_query, typename H::A *table) {
    using A = typename H::A;
    const int lane = team.lane, dim = graph.dim;
    const bool related = graph.relations > 0;  // branches on it stand outside unrolled loops
    int begin, end;
    graph.span(row, begin, end);
    H g;
    g.load(grad_out[row], lane, dim);
    A mean = 0, dp = 0;
    const bool once = Team::WARPS == 1 && end - begin <= WARP;  // dp stays in registers
    for (int base = begin + team.warp * WARP; base < end; base += Team::WARPS * WARP) {
        const int count = end - base < WARP ? end - base : WARP, edge = base + lane;
        const bool here = lane < count;
        const int k = here ? graph.neighbour(edge) : -1;
        dp = 0;
        each_row<H>(value, k < 0 ? row : k, count, lane, dim, [&](int j, H(&rows)[H::AHEAD]) {
            A part[H::AHEAD];
#pragma unroll
            for (int u = 0; u < H::AHEAD; ++u) part[u] = g.dot(rows[u]);
#pragma unroll
            for (int u = 0; u < H::AHEAD; ++u) part[u] = warp_sum(part[u]);
#pragma unroll
            for (int u = 0; u < H::AHEAD; ++u)
                if (lane == j + u && k >= 0) dp = part[u];
        });
        A p = 0;
        if (here) {
            const int64_t place = static_cast<int64_t>(edge) * graph.heads + head;
            dp = graph.dropped(dp, edge, head);
            p = weights[place];
            if (!once) dscore[place] = dp;  // not yet: the mean is not known
        } else {
            dp = 0;
        }
        mean += warp_sum(p * dp);
    }
    mean = team.sum(mean);
    H sum;
    sum.zero();
    A by_relation = 0;
    for (int base = begin + team.warp * WARP; base < end; base += Team::WARPS * WARP) {
        const int count = end - base < WARP ? end - base : WARP, edge = base + lane;
        const bool here = lane < count;
        const int k = here ? graph.neighbour(edge) : -1;
        const int r = related && here ? graph.relation_of(edge) : 0;
        A ds = 0;
        if (here) {
            const int64_t place = static_cast<int64_t>(edge) * graph.heads + head;
            ds = weights[place] * ((once ? dp : dscore[place]) - mean) * static_cast<A>(graph.scale);
            dscore[place] = ds;
        }
        each_row<H>(key, k < 0 ? row : k, count, lane, dim, [&](int j, H(&rows)[H::AHEAD]) {
            if (related) {
#pragma unroll
                for (int u = 0; u < H::AHEAD; ++u) {
                    const int relation = __shfl_sync(ALL, r, (j + u) & (WARP - 1));
                    const A factor = __shfl_sync(ALL, ds, (j + u) & (WARP - 1));
                    add_relation(rows[u], relation_key, graph, relation, head, lane);
                    if (j + u < count) count_relation(by_relation, factor, relation, 0, lane);
                }
            }
#pragma unroll
            for (int u = 0; u < H::AHEAD; ++u) {
                const A factor = __shfl_sync(ALL, ds, (j + u) & (WARP - 1));
                if (j + u < count) sum.add(factor, rows[u]);
            }
        });
    }
    team.sum_rows(sum);
    if (team.warp == 0) sum.store(grad_query + graph.at(row, head), lane, dim);
    if (related) {
        A *mine = table + (static_cast<int64_t>(row) * graph.heads + head) * graph.relations;
        for (int first = 0; first < graph.relations; first += WARP) {
            for (int base = begin + team.warp * WARP; first && base < end; base += Team::WARPS * WARP) {
                const bool here = base + lane < end;
                const int r = here ? graph.relation_of(base + lane) : -1;
                const A ds = here ? dscore[static_cast<int64_t>(base + lane) * graph.heads + head] : A(0);  // this lane wrote it
                for (int j = 0; j < WARP; ++j)
                    count_relation(by_relation, __shfl_sync(ALL, ds, j), __shfl_sync(ALL, r, j), first, lane);
            }
            OneNumber<A> sums = {{by_relation}};
            team.sum_rows(sums);
            if (team.warp == 0 && first + lane < graph.relations) mine[first + lane] = sums.x[0];
            by_relation = 0;
        }
    }
}

// ---- the edges of a column, ascending, 32 at a time: `next` gives this lane's edge and row, and how many lanes have one.

// An edge and its row in one word, ordered by edge.
__device__ inline int64_t edge_and_row(int edge, int row) {
    return static_cast<int64_t>(edge) << 32 | static_cast<uint32_t>(row);
}

struct Listed {  // from the list that cuda_order.cuh makes
    const int64_t *list;
    int begin, end, step, lane, position;
    __device__ Listed(const int64_t *list, int begin, int end, int warp, int warps, int lane)
        : list(list), begin(begin + warp * WARP), end(end), step(warps * WARP), lane(lane), position(this->begin) {}
    __device__ void rewind() { position = begin; }
    __device__ __forceinline__ int next(int &edge, int &row) {
        if (position >= end) return 0;
        const int count = end - position < WARP ? end - position : WARP;
        const int64_t both = lane < count ? list[position + lane] : 0;
        edge = static_cast<int>(both >> 32), row = static_cast<int>(both & 0x7FFFFFFF);
        position += step;
        return count;
    }
};

struct Searched {  // by looking at every edge of [begin, end), which stand in rows [first, last)
    const Graph &graph;
    int column, begin, end, first, last, lane, position, held = 0;
    int *queue;  // 64 places of shared memory for this warp
    __device__ Searched(const Graph &graph, int column, int begin, int end, int first, int last, int lane, int *queue)
        : graph(graph),
          column(column),
          begin(begin),
          end(end),
          first(first),
          last(last),
          lane(lane),
          position(begin),
          queue(queue) {}
    __device__ void rewind() { position = begin, held = 0; }
    __device__ int next(int &edge, int &row) {
        while (held < WARP && position < end) {
            const int at = position + lane;
            const bool match = at < end && graph.read(graph.indices, at) == column;
            const unsigned matches = __ballot_sync(ALL, match);
            if (match) queue[held + __popc(matches & ((1u << lane) - 1))] = at;
            held += __popc(matches);
            position += WARP;
        }
        __syncwarp();
        const int count = held < WARP ? held : WARP;
        edge = lane < count ? queue[lane] : begin;
        const int later = lane + WARP < held ? queue[lane + WARP] : 0;
        __syncwarp();
        if (lane + WARP < held) queue[lane] = later;
        held -= count;
        __syncwarp();
        row = count ? graph.row_of(edge, first, last) : first;
        return count;
    }
};

template <class H, class Team, class Source>
__device__ void column_backward(const Graph &graph, const Team &team, Source source, int column, int head,
                                const Rows<typename H::T> &query, const Rows<typename H::T> &grad_out,
                                const typename H::T *relation_query, const typename H::A *weights, const typename H::A *dscore,
                                typename H::T *grad_key, typename H::T *grad_value, typename H::A *table) {
    using A = typename H::A;
    const int lane = team.lane, dim = graph.dim;
    const bool related = graph.relations > 0;  // branches on it stand outside unrolled loops
    H sum_key, sum_value;
    sum_key.zero(), sum_value.zero();
    A by_relation = 0;
    int edge, row;
    while (const int count = source.next(edge, row)) {
        const bool here = lane < count;
        const int64_t place = static_cast<int64_t>(edge) * graph.heads + head;
        const A ds = here ? dscore[place] : A(0);
        const A p = here ? graph.dropped(weights[place], edge, head) : A(0);
        const int r = related && here ? graph.relation_of(edge) : 0;
        const int from = here ? row : column;
        each_row<H>(query, from, count, lane, dim, [&](int j, H(&rows)[H::AHEAD]) {
            if (related) {
#pragma unroll
                for (int u = 0; u < H::AHEAD; ++u) {
                    const int relation = __shfl_sync(ALL, r, (j + u) & (WARP - 1));
                    const A factor = __shfl_sync(ALL, ds, (j + u) & (WARP - 1));
                    add_relation(rows[u], relation_query, graph, relation, head, lane);
                    if (j + u < count) count_relation(by_relation, factor, relation, 0, lane);
                }
            }
#pragma unroll
            for (int u = 0; u < H::AHEAD; ++u) {
                const A factor = __shfl_sync(ALL, ds, (j + u) & (WARP - 1));
                if (j + u < count) sum_key.add(factor, rows[u]);
            }
        });
        each_row<H>(grad_out, from, count, lane, dim, [&](int j, H(&rows)[H::AHEAD]) {
#pragma unroll
            for (int u = 0; u < H::AHEAD; ++u) {
                const A factor = __shfl_sync(ALL, p, (j + u) & (WARP - 1));
                if (j + u < count) sum_value.add(factor, rows[u]);
            }
        });
    }
    team.sum_rows(sum_key);
    team.sum_rows(sum_value);
    if (team.warp == 0) {
        sum_key.store(grad_key + graph.at(column, head), lane, dim);
        sum_value.store(grad_value + graph.at(column, head), lane, dim);
    }
    if (related) {
        A *mine = table + (static_cast<int64_t>(column) * graph.heads + head) * graph.relations;
        for (int first = 0; first < graph.relations; first += WARP) {
            source.rewind();
            while (first) {
                const int count = source.next(edge, row);
                if (!count) break;
                const A ds = lane < count ? dscore[static_cast<int64_t>(edge) * graph.heads + head] : A(0);
                const int r = lane < count ? graph.relation_of(edge) : -1;
                for (int j = 0; j < WARP; ++j)
                    count_relation(by_relation, __shfl_sync(ALL, ds, j), __shfl_sync(ALL, r, j), first, lane);
            }
            OneNumber<A> sums = {{by_relation}};
            team.sum_rows(sums);
            if (team.warp == 0 && first + lane < graph.relations) mine[first + lane] = sums.x[0];
            by_relation = 0;
        }
    }
}

}  // namespace case_fast::graph_attention
