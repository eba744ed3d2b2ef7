// What the kernels need to know of a graph beside its CSR: where small graphs begin, or the edges by column.
#pragma once

#include "graph_attention/cuda.h"
#include "graph_attention/cuda_rows.cuh"

namespace case_fast::graph_attention {

// ---- small graphs: a batch is block-diagonal; where no edge passes from before a vertex to it or beyond, a graph may begin

constexpr int FIND_THREADS = 1024;

// One block. `capacity`: vertices of a group that fit.
static __global__ void __launch_bounds__(FIND_THREADS) find_graphs(Graph graph, int capacity, Groups *groups) {
    __shared__ int crossing[MOST_SMALL_VERTICES + 1];  // of a vertex: edges that pass from before it to it or beyond
    __shared__ int first[MOST_SMALL_VERTICES / WINDOW], sums[FIND_THREADS / WARP], largest;
    const int thread = threadIdx.x, lane = thread & (WARP - 1), warp = thread / WARP;
    for (int v = thread; v <= graph.vertices; v += FIND_THREADS) crossing[v] = 0;
    if (thread == 0) largest = 0;
    __syncthreads();
    for (int v = thread; v < graph.vertices; v += FIND_THREADS) {
        int begin, end, low = v, high = v;
        graph.span(v, begin, end);
        for (int e = begin; e < end; ++e) {
            const int k = graph.neighbour(e);
            if (k < 0) continue;
            low = k < low ? k : low;
            high = k > high ? k : high;
        }
        if (low == high) continue;
        atomicAdd(&crossing[low + 1], 1);  // integers: the order does not matter
        atomicAdd(&crossing[high + 1], -1);
    }
    __syncthreads();

    // Running sum over `crossing`: every thread its own four, then over threads.
    constexpr int MINE = MOST_SMALL_VERTICES / FIND_THREADS;
    int before[MINE], total = 0;
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
        const int v = thread * MINE + i;
        total += v < graph.vertices ? crossing[v] : 0;
        before[i] = total;
    }
    int inclusive = total;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const int other = __shfl_up_sync(ALL, inclusive, step);
        if (lane >= step) inclusive += other;
    }
    if (lane == WARP - 1) sums[warp] = inclusive;
    __syncthreads();
    int earlier = inclusive - total;
    for (int w = 0; w < warp; ++w) earlier += sums[w];
#pragma unroll
    for (int i = 0; i < MINE; ++i)
        if (thread * MINE + i < graph.vertices) crossing[thread * MINE + i] = earlier + before[i];
    __syncthreads();

    const int windows = (graph.vertices + WINDOW - 1) / WINDOW;
    for (int w = warp; w < windows; w += FIND_THREADS / WARP) {
        const int v = w * WINDOW + lane;
        const unsigned begins = __ballot_sync(ALL, v < graph.vertices && crossing[v] == 0);
        if (lane == 0) first[w] = begins ? w * WINDOW + __ffs(begins) - 1 : -1;
    }
    __syncthreads();
    for (int w = thread; w < windows; w += FIND_THREADS) {
        if (first[w] < 0) continue;
        int place = 0, next = w + 1;
        for (int i = 0; i < w; ++i) place += first[i] >= 0;
        while (next < windows && first[next] < 0) ++next;
        const int end = next < windows ? first[next] : graph.vertices;
        groups->start[place] = first[w];
        atomicMax(&largest, end - first[w]);
        if (next == windows) {
            groups->start[place + 1] = graph.vertices;
            groups->count = place + 1;
        }
    }
    __syncthreads();
    if (thread == 0) groups->fits = largest <= capacity;
}

// ---- large graphs: the edges by column, ascending within each, so that sums have a fixed order

constexpr int ORDER_THREADS = 256;
constexpr int SORT_HELD = 4;  // a warp sorts columns of up to 32 times this many edges in registers

static __global__ void __launch_bounds__(ORDER_THREADS) count_columns(Graph graph, int *count) {
    const int64_t edge = static_cast<int64_t>(blockIdx.x) * ORDER_THREADS + threadIdx.x;
    if (edge >= graph.edges) return;
    const int k = graph.neighbour(static_cast<int>(edge));
    if (k >= 0) atomicAdd(&count[k], 1);
}

// One block: count (vertices) -> start (vertices + 1), and a second copy that fill_columns advances. start may be count.
static __global__ void __launch_bounds__(FIND_THREADS) start_columns(int vertices, const int *count, int *start, int *cursor) {
    __shared__ int sums[FIND_THREADS / WARP];
    const int thread = threadIdx.x, lane = thread & (WARP - 1), warp = thread / WARP;
    const int each = (vertices + FIND_THREADS - 1) / FIND_THREADS;
    const int64_t from = static_cast<int64_t>(thread) * each, to = from + each < vertices ? from + each : vertices;
    int total = 0;
#pragma unroll 8
    for (int64_t v = from; v < to; ++v) total += count[v];
    int inclusive = total;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const int other = __shfl_up_sync(ALL, inclusive, step);
        if (lane >= step) inclusive += other;
    }
    if (lane == WARP - 1) sums[warp] = inclusive;
    __syncthreads();
    int earlier = inclusive - total;
    for (int w = 0; w < warp; ++w) earlier += sums[w];
#pragma unroll 8
    for (int64_t v = from; v < to; ++v) {
        const int here = count[v];
        start[v] = cursor[v] = earlier;
        earlier += here;
    }
    if (thread == FIND_THREADS - 1) start[vertices] = earlier;  // each thread ends where the next begins; the last, at the end
}

static __global__ void __launch_bounds__(ORDER_THREADS) fill_columns(Graph graph, int *cursor, int64_t *list) {
    const int64_t edge = static_cast<int64_t>(blockIdx.x) * ORDER_THREADS + threadIdx.x;
    if (edge >= graph.edges) return;
    const int64_t k = graph.read(graph.indices, edge);
    if (k < 0 || k >= graph.vertices) return;
    const int e = static_cast<int>(edge);
    list[atomicAdd(&cursor[k], 1)] = edge_and_row(e, graph.row_of(e, 0, graph.vertices));  // in any order: sort_columns follows
}

// A warp a column; columns beyond a warp's registers by the whole block, one after the other.
static __global__ void __launch_bounds__(ORDER_THREADS, 4) sort_columns(int vertices, const int *start, int64_t *list) {
    constexpr int WARPS = ORDER_THREADS / WARP;
    const int lane = threadIdx.x & (WARP - 1), warp = threadIdx.x / WARP;
    const int64_t block_first = static_cast<int64_t>(blockIdx.x) * WARPS, column = block_first + warp;
    const int begin = column < vertices ? start[column] : 0, size = column < vertices ? start[column + 1] - begin : 0;
    if (size > 1 && size <= SORT_HELD * WARP) {
        int64_t mine[SORT_HELD];
        int rank[SORT_HELD];
#pragma unroll
        for (int i = 0; i < SORT_HELD; ++i) {
            mine[i] = i * WARP + lane < size ? list[begin + i * WARP + lane] : 0;
            rank[i] = 0;
        }
#pragma unroll
        for (int i = 0; i < SORT_HELD; ++i) {
            const int there = size - i * WARP < WARP ? size - i * WARP : WARP;
            for (int j = 0; j < there; ++j) {
                const int64_t other = __shfl_sync(ALL, mine[i], j);
#pragma unroll
                for (int m = 0; m < SORT_HELD; ++m) rank[m] += other < mine[m];
            }
        }
#pragma unroll
        for (int i = 0; i < SORT_HELD; ++i)
            if (i * WARP + lane < size) list[begin + rank[i]] = mine[i];
    }
    for (int w = 0; w < WARPS; ++w) {
        if (block_first + w >= vertices) return;
        const int from = start[block_first + w], many = start[block_first + w + 1] - from;
        if (many <= SORT_HELD * WARP) continue;
        // Bitonic, all comparisons ascending: places beyond the end count as infinite and never move.
        for (int64_t width = 2; width < 2 * static_cast<int64_t>(many); width *= 2) {
            for (int64_t step = width / 2; step; step /= 2) {
                for (int i = threadIdx.x; i < many; i += ORDER_THREADS) {
                    const int64_t other = step == width / 2 ? i ^ (width - 1) : i ^ step;
                    if (other <= i || other >= many) continue;
                    const int64_t a = list[from + i], b = list[from + other];
                    if (b < a) list[from + i] = b, list[from + other] = a;
                }
                __syncthreads();
            }
        }
    }
}

}  // namespace case_fast::graph_attention
