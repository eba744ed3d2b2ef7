// The kernel of few rows a sequence, and how all are launched. Compiled once per storage type, CASE_FAST_STORAGE.
#include "common/attend_row.cuh"
#include "packed_attention/cuda.h"
#include "packed_attention/cuda_tiles.cuh"

namespace case_fast::packed_attention {

template <class H> __global__ void __launch_bounds__(RowBlock<H>::THREADS, RowBlock<H>::BLOCKS)
    row_forward(Sequences sequences, Numbers numbers, Forward<H> arrays) {
    using A = typename H::A;
    __shared__ RowBlock<H> block;
    numbers.dropout.read_seed();
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

template <class H> int launch_attention(const Call &call) {
    using T = typename H::T;
    using A = typename H::A;
    using K = Tiles<H>;
    const case_fast_packed_attention &c = *call.c;
    const cudaStream_t stream = static_cast<cudaStream_t>(call.stream);
    const Workspace space(c, call.backward);
    char *const memory = static_cast<char *>(call.workspace);
    const Sequences sequences{static_cast<int>(c.batch),
                              static_cast<int>(c.queries),
                              static_cast<int>(c.key_sequences),
                              static_cast<int>(c.keys),
                              c.index_bits == 64,
                              c.causal != 0,
                              c.cu_query,
                              c.cu_key,
                              c.key_of,
                              c.key_length,
                              call.flag};
    const auto *const longest = reinterpret_cast<int64_t *>(memory + space.longest);
    const Numbers numbers{c.heads, c.dim, c.scale, dropout_of(c.dropout_p, c.seed, c.seed_at), longest};
    const auto in = [](const void *x, int64_t stride) { return Strided<const T>{static_cast<const T *>(x), stride}; };
    const auto to = [](void *x, int64_t stride) { return Strided<T>{static_cast<T *>(x), stride}; };
    const int64_t inner = static_cast<int64_t>(c.heads) * c.dim;
    const auto query = in(call.query, c.query_stride), key = in(call.key, c.key_stride), value = in(call.value, c.value_stride);
    const dim3 query_tiles(static_cast<unsigned>(tile_places(c.queries, c.batch, K::ROWS)), c.heads);
    const dim3 key_tiles(static_cast<unsigned>(tile_places(c.keys, c.key_sequences, K::ROWS)), c.heads);
    if (c.dropout_p > 0)
        CASE_FAST_LAUNCH(find_longest, 1, FIND_THREADS, 0, stream, sequences,
                         reinterpret_cast<int64_t *>(memory + space.longest));
    if (!call.backward) {
        const Forward<H> arrays{query, key, value, to(const_cast<void *>(call.out), inner),
                                static_cast<A *>(const_cast<void *>(call.lse))};
        if (call.plan == CASE_FAST_ATTENTION_ROWS) {
            const dim3 grid(static_cast<unsigned>(c.queries), c.heads);
            CASE_FAST_LAUNCH((row_forward<H>), grid, RowBlock<H>::THREADS, 0, stream, sequences, numbers, arrays);
        } else {
            const int shared = K::shared_bytes(c.dim, 1, 2, 1);
            allow_shared(tile_forward<H>, shared);
            CASE_FAST_LAUNCH((tile_forward<H>), query_tiles, K::THREADS, shared, stream, sequences, numbers, arrays);
        }
        return launch_status();
    }
    const Backward<H> arrays{query,
                             key,
                             value,
                             in(call.out, inner),
                             in(call.grad_out, inner),
                             to(call.grad_query, call.grad_query_stride),
                             to(call.grad_key, call.grad_key_stride),
                             to(call.grad_value, call.grad_value_stride),
                             static_cast<const A *>(call.lse),
                             reinterpret_cast<A *>(memory + space.delta)};
    if (c.queries) {
        const int shared = K::shared_bytes(c.dim, 2, 2, 1);
        allow_shared(tile_grad_query<H>, shared);
        CASE_FAST_LAUNCH((tile_grad_query<H>), query_tiles, K::THREADS, shared, stream, sequences, numbers, arrays);
    }
    if (c.keys) {
        const int shared = K::shared_bytes(c.dim, 2, 2, 2);
        allow_shared(tile_grad_key<H>, shared);
        CASE_FAST_LAUNCH((tile_grad_key<H>), key_tiles, K::THREADS, shared, stream, sequences, numbers, arrays);
    }
    return launch_status();
}

template <class T> int launch_as(const Call &call) {
    const case_fast_packed_attention &c = *call.c;
    const int numbers =  // strides of gradients are 0 in forward
        at_once(sizeof(T),
                {c.dim, c.query_stride, c.key_stride, c.value_stride, call.grad_query_stride, call.grad_key_stride,
                 call.grad_value_stride},
                {call.query, call.key, call.value, call.out, call.grad_out, call.grad_query, call.grad_key, call.grad_value});
    return with_rows<T>(c.dim, numbers, [&](auto held) { return launch_attention<decltype(held)>(call); });
}

#ifdef CASE_FAST_STORAGE  // not where all are emulated at once
template int launch_as<CASE_FAST_STORAGE>(const Call &);
#endif

}  // namespace case_fast::packed_attention
