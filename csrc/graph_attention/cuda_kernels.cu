// The kernels around cuda_rows.cuh, and how they are launched. Compiled once per storage type, CASE_FAST_STORAGE.
#include "graph_attention/cuda_order.cuh"

namespace case_fast::graph_attention {

constexpr int GRAPH_WARPS = 16;    // a block of the GRAPHS plan
constexpr int LONG_ROW = 512;      // edges: beyond, a row or column has a block of its own
constexpr int RELATIONS_HELD = 8;  // by a thread of relation_parts
constexpr int QUEUE = 2 * WARP;    // places of Searched

template <class H> struct Arrays {
    using T = typename H::T;
    using A = typename H::A;
    const T *query, *key, *value, *relation_query, *relation_key, *grad_out;
    T *out, *grad_query, *grad_key, *grad_value, *grad_relation_query, *grad_relation_key;
    A *weights, *dscore, *row_table, *column_table, *part;

    __device__ __forceinline__ Rows<T> rows(const T *x, const Graph &graph, int head) const {
        return {x + static_cast<int64_t>(head) * graph.dim, static_cast<int64_t>(graph.heads) * graph.dim, 0};
    }
    template <class Team>
    __device__ __forceinline__ void forward(const Graph &graph, const Team &team, int row, int head, const Rows<T> &k,
                                            const Rows<T> &v) const {
        row_forward<H>(graph, team, row, head, rows(query, graph, head), k, v, relation_query, relation_key, out,
                                  weights);
    }
    template <class Team>
    __device__ __forceinline__ void backward(const Graph &graph, const Team &team, int row, int head, const Rows<T> &k,
                                             const Rows<T> &v) const {
        row_backward<H>(graph, team, row, head, k, v, rows(grad_out, graph, head), relation_key, weights, dscore,
                                   grad_query, row_table);
    }
    template <class Team, class Source>
    __device__ __forceinline__ void column(const Graph &graph, const Team &team, const Source &source, int column, int head,
                                           const Rows<T> &q, const Rows<T> &g) const {
        column_backward<H>(graph, team, source, column, head, q, g, relation_query, weights, dscore, grad_key,
                                      grad_value, column_table);
    }
};

// ---- ROWS: warp w of block b has item 8 b + w of (row, head)

template <class H, Pass PASS>
__global__ void __launch_bounds__(ROW_WARPS *WARP, H::BLOCKS) all_rows(Graph graph, Arrays<H> arrays) {
    graph.read_seed();
    using A = typename H::A;
    using Block = WholeBlock<ROW_WARPS, A>;
    __shared__ A shared[Block::SHARED];
    const int lane = threadIdx.x & (WARP - 1), warp = threadIdx.x / WARP;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * ROW_WARPS,
                  items = static_cast<int64_t>(graph.vertices) * graph.heads;
    auto work = [&](int64_t item, const auto &team) {
        const int row = static_cast<int>(item / graph.heads), head = static_cast<int>(item % graph.heads);
        const auto k = arrays.rows(arrays.key, graph, head), v = arrays.rows(arrays.value, graph, head);
        if constexpr (PASS == FORWARD)
            arrays.forward(graph, team, row, head, k, v);
        else
            arrays.backward(graph, team, row, head, k, v);
    };
    bool is_long = false;  // of lane l: whether item l of this block is
    if (lane < ROW_WARPS && first + lane < items) {
        int begin, end;
        graph.span(static_cast<int>((first + lane) / graph.heads), begin, end);
        is_long = end - begin > LONG_ROW;
    }
    const unsigned longs = __ballot_sync(ALL, is_long);
    if (first + warp < items && !(longs >> warp & 1)) work(first + warp, OneWarp{lane});
    for (int w = 0; w < ROW_WARPS; ++w)
        if (longs >> w & 1) work(first + w, Block{lane, warp, shared});
}

template <class H>
__global__ void __launch_bounds__(ROW_WARPS *WARP, H::BLOCKS)
    all_columns(Graph graph, Arrays<H> arrays, const int *start, const int64_t *list) {
    graph.read_seed();
    using A = typename H::A;
    using Block = WholeBlock<ROW_WARPS, A>;
    __shared__ A shared[Block::SHARED];
    const int lane = threadIdx.x & (WARP - 1), warp = threadIdx.x / WARP;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * ROW_WARPS,
                  items = static_cast<int64_t>(graph.vertices) * graph.heads;
    auto work = [&](int64_t item, const auto &team, int warps) {
        const int column = static_cast<int>(item / graph.heads), head = static_cast<int>(item % graph.heads);
        const Listed source(list, start[column], start[column + 1], team.warp, warps, lane);
        arrays.column(graph, team, source, column, head, arrays.rows(arrays.query, graph, head),
                                          arrays.rows(arrays.grad_out, graph, head));
    };
    bool is_long = false;
    if (lane < ROW_WARPS && first + lane < items) {
        const int column = static_cast<int>((first + lane) / graph.heads);
        is_long = start[column + 1] - start[column] > LONG_ROW;
    }
    const unsigned longs = __ballot_sync(ALL, is_long);
    if (first + warp < items && !(longs >> warp & 1)) work(first + warp, OneWarp{lane}, 1);
    for (int w = 0; w < ROW_WARPS; ++w)
        if (longs >> w & 1) work(first + w, Block{lane, warp, shared}, ROW_WARPS);
}

// ---- GRAPHS: a block takes (group, head) after (group, head), with two of its arrays of rows in shared memory at a time

__host__ __device__ inline int64_t shared_row(int dim, int bytes) { return (static_cast<int64_t>(dim) * bytes + 15) / 16 * 16; }

template <class H>
__device__ void hold(char *shared, const typename H::T *x, const Graph &graph, int head, int first, int last, int64_t row_bytes) {
    const int lane = threadIdx.x & (WARP - 1), warp = threadIdx.x / WARP;
    for (int v = first + warp; v < last; v += GRAPH_WARPS) {
        H row;
        row.load(x + graph.at(v, head), lane, graph.dim);
        row.store(reinterpret_cast<typename H::T *>(shared + (v - first) * row_bytes), lane, graph.dim);
    }
}

template <class H, Pass PASS>
__global__ void __launch_bounds__(GRAPH_WARPS *WARP, 1) all_graphs(Graph graph, Arrays<H> arrays, const Groups *groups) {
    graph.read_seed();
    using T = typename H::T;
    CASE_FAST_DYNAMIC_SHARED(shared);
    __shared__ int queues[PASS == BACKWARD ? GRAPH_WARPS * QUEUE : 1];
    const int lane = threadIdx.x & (WARP - 1), warp = threadIdx.x / WARP;
    const OneWarp team{lane};
    if (!groups->fits) {  // rows by warps, as in the ROWS plan; columns follow in searched_columns
        const int64_t items = static_cast<int64_t>(graph.vertices) * graph.heads;
        for (int64_t item = static_cast<int64_t>(blockIdx.x) * GRAPH_WARPS + warp; item < items;
             item += static_cast<int64_t>(gridDim.x) * GRAPH_WARPS) {
            const int row = static_cast<int>(item / graph.heads), head = static_cast<int>(item % graph.heads);
            const auto k = arrays.rows(arrays.key, graph, head), v = arrays.rows(arrays.value, graph, head);
            if constexpr (PASS == FORWARD)
                arrays.forward(graph, team, row, head, k, v);
            else
                arrays.backward(graph, team, row, head, k, v);
        }
        return;
    }
    const int64_t row_bytes = shared_row(graph.dim, sizeof(T)), stride = row_bytes / static_cast<int64_t>(sizeof(T));
    for (int item = blockIdx.x; item < groups->count * graph.heads; item += gridDim.x) {
        const int head = item % graph.heads, first = groups->start[item / graph.heads],
                  last = groups->start[item / graph.heads + 1];
        char *second = shared + (last - first) * row_bytes;
        const Rows<T> one{reinterpret_cast<T *>(shared), stride, first}, two{reinterpret_cast<T *>(second), stride, first};
        hold<H>(shared, arrays.key, graph, head, first, last, row_bytes);
        hold<H>(second, arrays.value, graph, head, first, last, row_bytes);
        __syncthreads();
        for (int row = first + warp; row < last; row += GRAPH_WARPS) {
            if constexpr (PASS == FORWARD)
                arrays.forward(graph, team, row, head, one, two);
            else
                arrays.backward(graph, team, row, head, one, two);
        }
        __syncthreads();
        if constexpr (PASS == BACKWARD) {
            hold<H>(shared, arrays.query, graph, head, first, last, row_bytes);
            hold<H>(second, arrays.grad_out, graph, head, first, last, row_bytes);
            __syncthreads();
            int begin, end, ignored;
            graph.span(first, begin, ignored);
            graph.span(last - 1, ignored, end);
            for (int column = first + warp; column < last; column += GRAPH_WARPS) {
                const Searched source(graph, column, begin, end, first, last, lane, queues + warp * QUEUE);
                arrays.column(graph, team, source, column, head, one, two);
            }
            __syncthreads();
        }
    }
}

// The columns of a batch in which some graph did not fit.
template <class H>
__global__ void __launch_bounds__(ROW_WARPS *WARP, H::BLOCKS)
    searched_columns(Graph graph, Arrays<H> arrays, const Groups *groups) {
    __shared__ int queues[ROW_WARPS * QUEUE];
    if (groups->fits) return;
    graph.read_seed();
    const int lane = threadIdx.x & (WARP - 1), warp = threadIdx.x / WARP;
    const int64_t items = static_cast<int64_t>(graph.vertices) * graph.heads;
    for (int64_t item = static_cast<int64_t>(blockIdx.x) * ROW_WARPS + warp; item < items;
         item += static_cast<int64_t>(gridDim.x) * ROW_WARPS) {
        const int column = static_cast<int>(item / graph.heads), head = static_cast<int>(item % graph.heads);
        const Searched source(graph, column, 0, graph.edges, 0, graph.vertices, lane, queues + warp * QUEUE);
        arrays.column(graph, OneWarp{lane}, source, column, head, arrays.rows(arrays.query, graph, head),
                                          arrays.rows(arrays.grad_out, graph, head));
    }
}

// ---- gradients of the relations: sums over vertices of (table row) x (q or k, with its bias), by parts of the vertices, then
// over parts
//   drq_r = sum_k column_table[k, r] (k_k + rk_r)        drk_r = sum_i row_table[i, r] (q_i + rq_r)

template <class H> __global__ void __launch_bounds__(256) relation_parts(Graph graph, Arrays<H> arrays, int per_part) {
    using A = typename H::A;
    const int d = threadIdx.x, head = blockIdx.y, which = blockIdx.z & 1, r0 = (blockIdx.z >> 1) * RELATIONS_HELD;
    if (d >= graph.dim) return;
    const typename H::T *x = which ? arrays.query : arrays.key, *bias = which ? arrays.relation_query : arrays.relation_key;
    const A *table = which ? arrays.row_table : arrays.column_table;
    A b[RELATIONS_HELD], sum[RELATIONS_HELD];
#pragma unroll
    for (int u = 0; u < RELATIONS_HELD; ++u) {
        sum[u] = 0;
        b[u] = r0 + u < graph.relations ? widened(bias[graph.at(r0 + u, head) + d]) : A(0);
    }
    const int64_t first = static_cast<int64_t>(blockIdx.x) * per_part;
    const int64_t last = first + per_part < graph.vertices ? first + per_part : graph.vertices;
#pragma unroll 4
    for (int64_t v = first; v < last; ++v) {
        const A here = widened(x[graph.at(v, head) + d]);
        const A *amount = table + (v * graph.heads + head) * graph.relations + r0;
#pragma unroll
        for (int u = 0; u < RELATIONS_HELD; ++u)
            if (r0 + u < graph.relations) sum[u] += amount[u] * (here + b[u]);
    }
    A *part = arrays.part + (static_cast<int64_t>(blockIdx.x) * 2 + which) * graph.relations * graph.heads * graph.dim;
#pragma unroll
    for (int u = 0; u < RELATIONS_HELD; ++u)
        if (r0 + u < graph.relations) part[graph.at(r0 + u, head) + d] = sum[u];
}

template <class H> __global__ void __launch_bounds__(256) relation_sums(Graph graph, Arrays<H> arrays, int parts) {
    const int64_t size = static_cast<int64_t>(graph.relations) * graph.heads * graph.dim;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    if (i >= 2 * size) return;
    typename H::A sum = 0;
#pragma unroll 4
    for (int p = 0; p < parts; ++p) sum += arrays.part[p * 2 * size + i];
    (i < size ? arrays.grad_relation_query[i] : arrays.grad_relation_key[i - size]) = narrowed<typename H::T>(sum);
}

// ---- on the host

inline int blocks(int64_t items, int each) { return static_cast<int>((items + each - 1) / each); }

template <class H> struct Launch {
    Graph graph;
    Arrays<H> arrays;
    Workspace space;
    char *memory;
    int64_t items;
    cudaStream_t stream;

    template <class X> X *at(size_t place) const { return reinterpret_cast<X *>(memory + place); }

    template <Pass PASS> void graphs() const {
        int device = 0, processors = 1, shared = 48 << 10;
        cudaGetDevice(&device);
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
        cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        shared -= 8 << 10;  // for the kernel's own, and the 1 KiB that the system takes
        const int64_t row = 2 * shared_row(graph.dim, sizeof(typename H::T));
        if (graph.vertices * row < shared) shared = static_cast<int>(graph.vertices * row);
        cudaFuncSetAttribute(all_graphs<H, PASS>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
        Groups *groups = at<Groups>(space.groups);
        CASE_FAST_LAUNCH(find_graphs, 1, FIND_THREADS, 0, stream, graph, static_cast<int>(shared / row), groups);
        const int64_t most = static_cast<int64_t>(blocks(graph.vertices, WINDOW)) * graph.heads;
        const int needed = blocks(items, GRAPH_WARPS) > most ? blocks(items, GRAPH_WARPS) : static_cast<int>(most);
        const int grid = needed < processors ? needed : processors;
        CASE_FAST_LAUNCH((all_graphs<H, PASS>), grid, GRAPH_WARPS * WARP, shared, stream, graph, arrays, groups);
        if constexpr (PASS == BACKWARD) {
            const int few = blocks(items, ROW_WARPS) < 2 * processors ? blocks(items, ROW_WARPS) : 2 * processors;
            CASE_FAST_LAUNCH((searched_columns<H>), few, ROW_WARPS * WARP, 0, stream, graph, arrays, groups);
        }
    }
    template <Pass PASS> void rows() const {
        const int grid = blocks(items, ROW_WARPS);
        CASE_FAST_LAUNCH((all_rows<H, PASS>), grid, ROW_WARPS * WARP, 0, stream, graph, arrays);
        if constexpr (PASS == BACKWARD) {
            int *start = at<int>(space.start), *cursor = at<int>(space.cursor);
            int64_t *list = at<int64_t>(space.list);
            const int edge_blocks = blocks(graph.edges, ORDER_THREADS);
            cudaMemsetAsync(start, 0, (static_cast<size_t>(graph.vertices) + 1) * sizeof(int), stream);
            if (edge_blocks) CASE_FAST_LAUNCH(count_columns, edge_blocks, ORDER_THREADS, 0, stream, graph, start);
            CASE_FAST_LAUNCH(start_columns, 1, FIND_THREADS, 0, stream, graph.vertices, start, start, cursor);
            if (edge_blocks) CASE_FAST_LAUNCH(fill_columns, edge_blocks, ORDER_THREADS, 0, stream, graph, cursor, list);
            CASE_FAST_LAUNCH(sort_columns, blocks(graph.vertices, ORDER_THREADS / WARP), ORDER_THREADS, 0, stream, graph.vertices,
                             start, list);
            CASE_FAST_LAUNCH((all_columns<H>), grid, ROW_WARPS * WARP, 0, stream, graph, arrays, start, list);
        }
    }
    void relation_gradients() const {
        const dim3 grid(space.parts, graph.heads, 2 * blocks(graph.relations, RELATIONS_HELD));
        if (space.parts) CASE_FAST_LAUNCH((relation_parts<H>), grid, 256, 0, stream, graph, arrays, space.per_part);
        const int64_t size = 2 * static_cast<int64_t>(graph.relations) * graph.heads * graph.dim;
        CASE_FAST_LAUNCH((relation_sums<H>), blocks(size, 256), 256, 0, stream, graph, arrays, space.parts);
    }
};

template <class H> int launch(const Call &call) {
    const case_fast_graph *g = call.g;
    using T = typename H::T;
    using A = typename H::A;
    const Workspace space(*g, call.pass == BACKWARD, call.path);
    char *memory = static_cast<char *>(call.workspace);
    const double p = g->dropout_p;
    const Graph graph{static_cast<int>(g->vertices),
                      static_cast<int>(g->edges),
                      static_cast<int>(g->relations),
                      g->heads,
                      g->dim,
                      g->index_bits == 64,
                      g->indptr,
                      g->indices,
                      g->relation,
                      g->scale,
                      p < 1 ? 1 / (1 - p) : 0,
                      g->seed,
                      p > 0 ? case_fast_drop_below(p) : 0,
                      g->seed_at,
                      call.flag};
    auto in = [](const void *x) { return static_cast<const T *>(x); };
    auto to = [](void *x) { return static_cast<T *>(x); };
    auto sums = [&](size_t place) { return reinterpret_cast<A *>(memory + place); };
    const Arrays<H> arrays{in(call.query),
                           in(call.key),
                           in(call.value),
                           in(call.relation_query),
                           in(call.relation_key),
                           in(call.grad_out),
                           to(call.out),
                           to(call.grad_query),
                           to(call.grad_key),
                           to(call.grad_value),
                           to(call.grad_relation_query),
                           to(call.grad_relation_key),
                           static_cast<A *>(call.weights),
                           sums(space.dscore),
                           sums(space.row_table),
                           sums(space.column_table),
                           sums(space.part)};
    const Launch<H> kernels{
        graph, arrays, space, memory, g->vertices * g->heads, static_cast<cudaStream_t>(call.stream)};
    if (g->vertices) {
        if (call.pass == FORWARD)
            call.path == CASE_FAST_PLAN_GRAPHS ? kernels.template graphs<FORWARD>() : kernels.template rows<FORWARD>();
        else
            call.path == CASE_FAST_PLAN_GRAPHS ? kernels.template graphs<BACKWARD>() : kernels.template rows<BACKWARD>();
    }
    if (g->relations && call.pass == BACKWARD) kernels.relation_gradients();
    return launch_status();
}

template <class T> int launch_as(const Call &call) {
    const int numbers = at_once(sizeof(T), {call.g->dim},
                                {call.query, call.key, call.value, call.relation_query, call.relation_key, call.grad_out, call.out,
                                 call.grad_query, call.grad_key, call.grad_value});
    return with_rows<T>(call.g->dim, numbers, [&](auto held) { return launch<decltype(held)>(call); });
}

#ifdef CASE_FAST_STORAGE  // not where all are emulated at once
template int launch_as<CASE_FAST_STORAGE>(const Call &);
#endif

}  // namespace case_fast::graph_attention
