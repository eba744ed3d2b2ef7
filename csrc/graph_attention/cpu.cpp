// Graph attention on the CPU: checks, the division of the graph into tasks, threads. The arithmetic is in cpu_kernels.cpp.
//
// A batch of graphs is a block-diagonal graph. Backward finds its blocks - ranges of vertices that no edge leaves - and does
// each whole: rows (grad_query, score gradients), then columns (grad_key, grad_value), while the block is in cache. Where a
// block is large, all rows are done first, then all columns. Each output row is written by one task in one order, and relation
// gradients are summed per chunk and then over chunks, where the chunks depend on the graph alone: hence the same bits for any
// number of threads.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <vector>

#include "common/calls.h"
#include "common/indices.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "common/workspace.h"
#include "graph_attention/cpu.h"
#include "graph_attention/graph_attention.h"

namespace {

constexpr int64_t alignment = Workspace::alignment;  // bytes: of the padded rows too
constexpr int64_t largest_block = 4096;  // rows and edges; above, rows and columns are two passes over the whole graph
constexpr int64_t most_chunks = 32;

template <class T>
const RowKernels<T> &row_kernels() {
    return CASE_FAST_WIDEST(graph_attention).of<T>();
}

template <class I>
int check_contents(const case_fast_graph &g) {
    if (!rises(static_cast<const I *>(g.indptr), g.vertices + 1, g.edges)) return CASE_FAST_BAD_INDPTR;
    if (!all_within(static_cast<const I *>(g.indices), g.edges, g.vertices)) return CASE_FAST_BAD_INDICES;
    if (g.relations > 0 && !all_within(static_cast<const I *>(g.relation), g.edges, g.relations)) return CASE_FAST_BAD_RELATION;
    return CASE_FAST_OK;
}

int check(const case_fast_graph *graph, std::initializer_list<const void *> vertex_arrays,
          std::initializer_list<const void *> relation_arrays, const void *weights) {
    if (!graph) return CASE_FAST_BAD_ARGUMENT;
    const case_fast_graph &g = *graph;
    const bool sizes = g.vertices >= 0 && g.edges >= 0 && g.relations >= 0 && g.heads >= 1 && g.dim >= 1;
    const bool kinds = (g.dtype == CASE_FAST_F32 || g.dtype == CASE_FAST_F64) && (g.index_bits == 32 || g.index_bits == 64);
    if (!sizes || !kinds || !(g.dropout_p >= 0 && g.dropout_p <= 1) || !g.indptr) return CASE_FAST_BAD_ARGUMENT;
    if (g.dim > std::numeric_limits<int32_t>::max() - 64 || g.relations > std::numeric_limits<int32_t>::max()) return CASE_FAST_BAD_ARGUMENT;
    if (g.vertices > 0 && missing(vertex_arrays)) return CASE_FAST_BAD_ARGUMENT;
    if (g.edges > 0 && (!g.indices || !weights || (g.relations > 0 && !g.relation))) return CASE_FAST_BAD_ARGUMENT;
    if (g.relations > 0 && missing(relation_arrays)) return CASE_FAST_BAD_ARGUMENT;
    return g.index_bits == 64 ? check_contents<int64_t>(g) : check_contents<int32_t>(g);
}

template <class T>
GraphAttention<T> describe(const case_fast_graph &g, const void *query, const void *key, const void *value,
                           const void *relation_query, const void *relation_key, Workspace &workspace) {
    constexpr int32_t padding = alignment / sizeof(T);
    const bool wide = g.index_bits == 64;
    GraphAttention<T> a = {};
    a.vertices = g.vertices;
    a.edges = g.edges;
    a.relations = g.relations;
    a.heads = g.heads;
    a.dim = g.dim;
    a.padded = (g.dim + padding - 1) / padding * padding;
    a.indptr = {g.indptr, wide};
    a.indices = {g.indices, wide};
    a.relation = {g.relation, wide};
    a.scale = T(g.scale);
    a.drop_below = case_fast_drop_below(g.dropout_p);
    a.kept_scale = a.drop_below && g.dropout_p < 1 ? T(1 / (1 - g.dropout_p)) : T(1);
    a.seed = case_fast_seed(g.seed, g.seed_at);
    a.query = static_cast<const T *>(query);
    a.key = static_cast<const T *>(key);
    a.value = static_cast<const T *>(value);
    if (g.relations == 0) return a;

    const int64_t rows = g.relations * g.heads;
    T *const bias = workspace.take<T>(rows * 2 * a.padded);
    std::memset(bias, 0, size_t(rows) * 2 * size_t(a.padded) * sizeof(T));
    for (int64_t i = 0; i < rows; ++i) {
        std::memcpy(bias + 2 * i * a.padded, static_cast<const T *>(relation_query) + i * a.dim, size_t(a.dim) * sizeof(T));
        std::memcpy(bias + (2 * i + 1) * a.padded, static_cast<const T *>(relation_key) + i * a.dim, size_t(a.dim) * sizeof(T));
    }
    a.bias = bias;
    return a;
}

// Bounds of `parts` ranges of [0, vertices) with about equal counts of vertices and edges. offset(i) rises from 0.
template <class Offset>
std::vector<int64_t> even_ranges(int64_t vertices, int64_t edges, int64_t parts, Offset offset) {
    std::vector<int64_t> bounds(size_t(parts) + 1, 0);
    const int64_t work = vertices + edges;
    for (int64_t part = 1; part < parts; ++part) {
        const int64_t target = work / parts * part + work % parts * part / parts;
        int64_t low = bounds[size_t(part) - 1], high = vertices;
        while (low < high) {
            const int64_t middle = low + (high - low) / 2;
            if (middle + offset(middle) < target)
                low = middle + 1;
            else
                high = middle;
        }
        bounds[size_t(part)] = low;
    }
    bounds[size_t(parts)] = vertices;
    return bounds;
}

// Bounds of the smallest ranges of vertices that no edge leaves.
template <class I>
std::vector<int64_t> closed_blocks(const void *offsets, const void *neighbours, int64_t vertices) {
    const I *const indptr = static_cast<const I *>(offsets), *const indices = static_cast<const I *>(neighbours);
    std::vector<int64_t> bounds;  // the beginnings so far
    int64_t reach = -1;           // the last vertex known to belong to the present block
    for (int64_t row = 0; row < vertices; ++row) {
        I low = I(row), high = I(row);
        for (I e = indptr[row]; e < indptr[row + 1]; ++e) {
            low = std::min(low, indices[e]);
            high = std::max(high, indices[e]);
        }
        if (row > reach) bounds.push_back(row);
        while (bounds.back() > low) bounds.pop_back();  // an edge back joins blocks that seemed closed
        reach = std::max<int64_t>(reach, high);
    }
    bounds.push_back(vertices);
    return bounds;
}

// The edges of rows [begin, end), which must be those of columns [begin, end), sorted by column. Stable.
template <class T>
struct Transpose {
    const GraphAttention<T> &a;
    int64_t *column_end, *place_edge, *place_row;

    void build(int64_t begin, int64_t end) const {
        const int64_t first = at(a.indptr, begin), last = at(a.indptr, end);
        // column_end[k] counts, then is where column k's next edge goes
        for (int64_t k = begin; k < end; ++k) column_end[k] = 0;
        for (int64_t e = first; e < last; ++e) ++column_end[at(a.indices, e)];
        int64_t sum = first;
        for (int64_t k = begin; k < end; ++k) {
            const int64_t count = column_end[k];
            column_end[k] = sum;
            sum += count;
        }
        for (int64_t row = begin; row < end; ++row)
            for (int64_t e = at(a.indptr, row); e < at(a.indptr, row + 1); ++e) {
                const int64_t p = column_end[at(a.indices, e)]++;
                place_edge[p] = e;
                place_row[p] = row;
            }
    }
};

template <class T>
int forward(const case_fast_graph &g, const void *query, const void *key, const void *value, const void *relation_query,
            const void *relation_key, void *out, void *weights, int threads) {
    Workspace workspace;
    GraphAttention<T> a = describe<T>(g, query, key, value, relation_query, relation_key, workspace);
    a.out = static_cast<T *>(out);
    prepare_output(out, size_t(g.vertices) * size_t(g.heads) * size_t(g.dim) * sizeof(T));
    a.weights = static_cast<T *>(weights);
    const RowKernels<T> &kernel = row_kernels<T>();
    const int64_t parts = threads <= 1 ? 1 : std::max<int64_t>(1, std::min<int64_t>(8 * threads, (g.vertices + g.edges) / 256));
    const auto bounds = even_ranges(g.vertices, g.edges, parts, [&](int64_t i) { return at(a.indptr, i); });
    case_fast_parallel(threads, parts, [&](int64_t i) { kernel.forward(a, bounds[size_t(i)], bounds[size_t(i) + 1]); });
    return CASE_FAST_OK;
}

template <class T>
int backward(const case_fast_graph &g, const void *query, const void *key, const void *value, const void *relation_query,
             const void *relation_key, const void *weights, const void *grad_out, void *grad_query, void *grad_key,
             void *grad_value, void *grad_relation_query, void *grad_relation_key, int threads) {
    Workspace workspace;
    GraphAttention<T> a = describe<T>(g, query, key, value, relation_query, relation_key, workspace);
    a.weights = const_cast<T *>(static_cast<const T *>(weights));  // backward only reads them
    a.grad_out = static_cast<const T *>(grad_out);
    a.grad_query = static_cast<T *>(grad_query);
    a.grad_key = static_cast<T *>(grad_key);
    a.grad_value = static_cast<T *>(grad_value);
    for (void *const gradient : {grad_query, grad_key, grad_value})
        prepare_output(gradient, size_t(g.vertices) * size_t(g.heads) * size_t(g.dim) * sizeof(T));
    const RowKernels<T> &kernel = row_kernels<T>();

    Transpose<T> transpose = {a, workspace.take<int64_t>(g.vertices), workspace.take<int64_t>(g.edges),
                              workspace.take<int64_t>(g.edges)};
    a.column_end = transpose.column_end;
    a.place_edge = transpose.place_edge;
    a.place_row = transpose.place_row;
    a.score_grad = workspace.take<T>(g.edges * g.heads);

    const auto row_edges = [&](int64_t i) { return at(a.indptr, i); };
    const auto blocks = a.indptr.wide ? closed_blocks<int64_t>(g.indptr, g.indices, g.vertices)
                                      : closed_blocks<int32_t>(g.indptr, g.indices, g.vertices);
    bool small = true;
    for (size_t i = 0; i + 1 < blocks.size(); ++i)
        small &= blocks[i + 1] - blocks[i] + row_edges(blocks[i + 1]) - row_edges(blocks[i]) <= largest_block;

    // Few enough chunks that their partial sums stay below the inputs in size.
    int64_t chunks = std::min<int64_t>((g.vertices + g.edges) / 256, most_chunks);
    if (g.relations) chunks = std::min<int64_t>(chunks, g.vertices / (2 * g.relations));
    if (small) chunks = std::min<int64_t>(chunks, int64_t(blocks.size()) - 1);
    chunks = std::max<int64_t>(chunks, 1);
    const int64_t rows = g.relations * g.heads, stride = (rows * 2 * a.padded + rows + 15) / 16 * 16;
    T *const partials = workspace.take<T>(chunks * stride);
    const auto partial = [&](int64_t chunk) { return partials + chunk * stride; };

    if (small) {
        auto bounds = even_ranges(g.vertices, g.edges, chunks, row_edges);
        for (int64_t &bound : bounds) bound = *std::lower_bound(blocks.begin(), blocks.end(), bound);
        case_fast_parallel(threads, chunks, [&](int64_t i) {
            std::memset(partial(i), 0, size_t(stride) * sizeof(T));
            auto block = std::lower_bound(blocks.begin(), blocks.end(), bounds[size_t(i)]);
            for (; *block < bounds[size_t(i) + 1]; ++block) {
                transpose.build(block[0], block[1]);
                kernel.backward_rows(a, block[0], block[1], partial(i));
                kernel.backward_columns(a, block[0], block[1], row_edges(block[0]), partial(i));
            }
        });
    } else {
        transpose.build(0, g.vertices);
        const auto column_begin = [&](int64_t k) { return k ? a.column_end[k - 1] : 0; };
        auto bounds = even_ranges(g.vertices, g.edges, chunks, row_edges);
        case_fast_parallel(threads, chunks, [&](int64_t i) {
            std::memset(partial(i), 0, size_t(stride) * sizeof(T));
            kernel.backward_rows(a, bounds[size_t(i)], bounds[size_t(i) + 1], partial(i));
        });
        bounds = even_ranges(g.vertices, g.edges, chunks, column_begin);
        case_fast_parallel(threads, chunks, [&](int64_t i) {
            kernel.backward_columns(a, bounds[size_t(i)], bounds[size_t(i) + 1], column_begin(bounds[size_t(i)]), partial(i));
        });
    }
    case_fast_parallel(threads, rows, [&](int64_t row) {
        kernel.reduce(a, partials, chunks, stride, row, static_cast<T *>(grad_relation_query), static_cast<T *>(grad_relation_key));
    });
    return CASE_FAST_OK;
}

}  // namespace

extern "C" int case_fast_graph_attention_forward_cpu(const case_fast_graph *graph, const void *query, const void *key,
                                                     const void *value, const void *relation_query, const void *relation_key,
                                                     void *out, void *weights, int threads) {
    const int status = check(graph, {query, key, value, out}, {relation_query, relation_key}, weights);
    if (status != CASE_FAST_OK) return status;
    return guarded(graph->dtype, [&](auto like) {
        return forward<decltype(like)>(*graph, query, key, value, relation_query, relation_key, out, weights, threads);
    });
}

extern "C" int case_fast_graph_attention_backward_cpu(const case_fast_graph *graph, const void *query, const void *key,
                                                      const void *value, const void *relation_query, const void *relation_key,
                                                      const void *weights, const void *grad_out, void *grad_query,
                                                      void *grad_key, void *grad_value, void *grad_relation_query,
                                                      void *grad_relation_key, int threads) {
    const int status = check(graph, {query, key, value, grad_out, grad_query, grad_key, grad_value},
                             {relation_query, relation_key, grad_relation_query, grad_relation_key}, weights);
    if (status != CASE_FAST_OK) return status;
    return guarded(graph->dtype, [&](auto like) {
        return backward<decltype(like)>(*graph, query, key, value, relation_query, relation_key, weights, grad_out, grad_query,
                                        grad_key, grad_value, grad_relation_query, grad_relation_key, threads);
    });
}
