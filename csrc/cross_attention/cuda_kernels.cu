// A decoder's block for few rows: what stands before the attention of a row (layer norm, projection of one head) in one kernel with
// it, and what stands after (output projection); and how they are launched. Compiled once per storage type, CASE_FAST_STORAGE.
#include <cmath>
#include <type_traits>

#include "common/attend_row.cuh"
#include "cross_attention/cuda.h"

namespace case_fast::cross_attention {

// Rows of weights, by fours where heads are read by more than one number: `width` and `inner` are then multiples of 4.
template <class H> constexpr int AT_ONCE = H::VEC > 1 ? 4 : 1;
template <class N> struct alignas(sizeof(N) * 4) Four {
    N x[4];
};
template <class N> struct One {
    N x[1];
};
template <class H, class N> using Some = std::conditional_t<(AT_ONCE<H> > 1), Four<N>, One<N>>;

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
    using Weights = Some<H, T>;
    using Sums = Some<H, A>;
    constexpr int WARPS = RowBlock<H>::WARPS, THREADS = RowBlock<H>::THREADS, VEC = H::VEC, AHEAD = H::AHEAD, EACH = AT_ONCE<H>;
    CASE_FAST_DYNAMIC_SHARED(memory);
    __shared__ RowBlock<H> block;
    __shared__ A projected[WARP * H::SIZE];
    numbers.dropout.read_seed();
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
        for (int k = lane * EACH; k < width; k += WARP * EACH) {
            Weights rows[AHEAD];
#pragma unroll
            for (int u = 0; u < AHEAD; ++u) {
                const int64_t row = first + u < dim ? first + u : first;
                rows[u] = *reinterpret_cast<const Weights *>(weight + row * width + k);
            }
            const Sums x = *reinterpret_cast<const Sums *>(normed + k);
#pragma unroll
            for (int i = 0; i < EACH; ++i)
#pragma unroll
                for (int u = 0; u < AHEAD; ++u) dot[u] += x.x[i] * widened(rows[u].x[i]);
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
    using Weights = Some<H, T>;
    using Sums = Some<H, A>;
    constexpr int EACH = AT_ONCE<H>;
    const int lane = static_cast<int>(threadIdx.x) & (WARP - 1);
    const int column = static_cast<int>(blockIdx.x) * PROJECT_WARPS + static_cast<int>(threadIdx.x) / WARP;
    const int first = static_cast<int>(blockIdx.y) * PROJECT_ROWS;
    if (column >= width) return;
    dropout.read_seed();
    A dot[PROJECT_ROWS];
#pragma unroll
    for (int r = 0; r < PROJECT_ROWS; ++r) dot[r] = 0;
#pragma unroll 2
    for (int k = lane * EACH; k < inner; k += WARP * EACH) {
        const Weights weights = *reinterpret_cast<const Weights *>(weight + static_cast<int64_t>(column) * inner + k);
#pragma unroll
        for (int r = 0; r < PROJECT_ROWS; ++r) {
            const int row = first + r < rows ? first + r : first;
            const Sums x = *reinterpret_cast<const Sums *>(attended + static_cast<int64_t>(row) * inner + k);
#pragma unroll
            for (int i = 0; i < EACH; ++i) dot[r] += x.x[i] * widened(weights.x[i]);
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
    dropout.read_seed();
    Sum<T> x = widened(from[e]);
    if (dropout.drop_below) x *= dropout.template factor<Sum<T>>(e, 0);
    if (base) x += widened(base[e]);
    to[e] = narrowed<T>(x);
}

template <class H> int launch_block(const BlockCall &call) {
    using T = typename H::T;
    using A = typename H::A;
    const case_fast_cross_attention &c = *call.c;
    const cudaStream_t stream = static_cast<cudaStream_t>(call.stream);
    const Workspace space(c);
    char *const memory = static_cast<char *>(call.workspace);
    int64_t *const longest = reinterpret_cast<int64_t *>(memory + space.longest);
    A *const attended = reinterpret_cast<A *>(memory + space.attended);
    const int inner = c.heads * c.dim, shared = c.width * static_cast<int>(sizeof(A)), rows = static_cast<int>(c.rows);
    const auto in = [](const void *x) { return static_cast<const T *>(x); };
    const T *hidden = in(call.hidden);
    T *const out = static_cast<T *>(call.out);
    for (int i = 0; i < c.sources; ++i) {
        const case_fast_source &s = call.sources[i];
        const Sequences sequences{static_cast<int>(c.batch),
                                  rows,
                                  static_cast<int>(s.key_sequences),
                                  static_cast<int>(s.keys),
                                  c.index_bits == 64,
                                  false,
                                  c.cu_hidden,
                                  s.cu_key,
                                  s.key_of,
                                  s.key_length,
                                  call.flag};
        const Numbers numbers{c.heads, c.dim, 1 / std::sqrt(static_cast<double>(c.dim)),
                              dropout_of(c.dropout_p, s.seed, c.seed_at), longest};
        const Projected<H> arrays{hidden,
                                  in(s.norm_weight),
                                  in(s.norm_bias),
                                  in(s.query_weight),
                                  {in(s.key), s.key_stride},
                                  {in(s.value), s.value_stride},
                                  c.width,
                                  c.eps,
                                  attended};
        if (c.dropout_p > 0) CASE_FAST_LAUNCH(find_longest, 1, FIND_THREADS, 0, stream, sequences, longest);
        allow_shared(block_attend<H>, shared);
        CASE_FAST_LAUNCH((block_attend<H>), dim3(rows, c.heads), RowBlock<H>::THREADS, shared, stream, sequences, numbers,
                         arrays);
        const dim3 grid((c.width + PROJECT_WARPS - 1) / PROJECT_WARPS, (rows + PROJECT_ROWS - 1) / PROJECT_ROWS);
        CASE_FAST_LAUNCH((block_project<H>), grid, PROJECT_WARPS * WARP, 0, stream, rows, c.width, inner,
                         dropout_of(c.output_dropout_p, s.output_seed, c.seed_at), attended, in(s.output_weight), hidden, out);
        hidden = out;
    }
    return launch_status();
}

template <class T> int launch_as(const BlockCall &call) {
    const case_fast_cross_attention &c = *call.c;
    int numbers = 4;
    for (int i = 0; i < c.sources; ++i) {
        const case_fast_source &s = call.sources[i];
        const int of_keys = at_once(sizeof(T), {c.dim, s.key_stride, s.value_stride}, {s.key, s.value});
        const int of_weights = at_once(sizeof(T), {c.width, c.heads * c.dim}, {s.query_weight, s.output_weight});
        const int both = of_weights == 4 ? of_keys : 1;  // see AT_ONCE
        numbers = both < numbers ? both : numbers;
    }
    return with_rows<T>(c.dim, numbers, [&](auto held) { return launch_block<decltype(held)>(call); });
}

template <class T> int launch_as(const DropCall &call) {
    const unsigned grid = static_cast<unsigned>((call.count + DROP_THREADS - 1) / DROP_THREADS);
    CASE_FAST_LAUNCH((drop_elements<T>), grid, DROP_THREADS, 0, static_cast<cudaStream_t>(call.stream), call.count,
                     dropout_of(call.p, call.seed, call.seed_at), static_cast<const T *>(call.from), static_cast<const T *>(call.base),
                     static_cast<T *>(call.to));
    return launch_status();
}

#ifdef CASE_FAST_STORAGE  // not where all are emulated at once
template int launch_as<CASE_FAST_STORAGE>(const BlockCall &);
template int launch_as<CASE_FAST_STORAGE>(const DropCall &);
#endif

}  // namespace case_fast::cross_attention
