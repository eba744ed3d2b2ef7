// How the kernels are launched. One file a storage type compiles them: cuda_f32.cu and so on.
#pragma once

#include <cmath>
#include <initializer_list>

#include "cross_attention/cuda_rows.cuh"

namespace case_fast::cross_attention {

constexpr int ALLOWED_SHARED = 24 << 10;  // bytes beside a kernel's own that need not be asked for: 48 KiB together

template <class Kernel> void allow_shared(Kernel kernel, int bytes) {
    if (bytes > ALLOWED_SHARED) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
inline int status() { return cudaGetLastError() == cudaSuccess ? CASE_FAST_OK : CASE_FAST_CUDA_ERROR; }
inline bool aligned(std::initializer_list<const void *> arrays, size_t bytes) {
    for (const void *x : arrays)
        if (reinterpret_cast<uintptr_t>(x) % bytes) return false;
    return true;
}

template <class H> int launch_attention(const AttentionCall &call) {
    using T = typename H::T;
    using A = typename H::A;
    using K = Tiles<H>;
    const case_fast_attention &c = *call.c;
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
    const Numbers numbers{c.heads, c.dim, c.scale, dropout_of(c.dropout_p, c.seed), longest};
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
        return status();
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
    return status();
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
        const Numbers numbers{c.heads, c.dim, 1 / std::sqrt(static_cast<double>(c.dim)), dropout_of(c.dropout_p, s.seed),
                              longest};
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
                         dropout_of(c.output_dropout_p, s.output_seed), attended, in(s.output_weight), hidden, out);
        hidden = out;
    }
    return status();
}

// Pairs of numbers where every row starts at a pair and fits three of them a lane; else one by one.
template <class T> int launch_as(const AttentionCall &call) {
    const case_fast_attention &c = *call.c;
    bool pairs = c.dim % 2 == 0 && c.dim <= 192;
    for (const int64_t stride : {c.query_stride, c.key_stride, c.value_stride}) pairs = pairs && stride % 2 == 0;
    if (call.backward)
        for (const int64_t stride : {call.grad_query_stride, call.grad_key_stride, call.grad_value_stride})
            pairs = pairs && stride % 2 == 0;
    pairs = pairs &&
            aligned({call.query, call.key, call.value, call.out, call.grad_out, call.grad_query, call.grad_key, call.grad_value},
                    2 * sizeof(T));
    if constexpr (sizeof(T) < 8) {
        if (pairs) return launch_attention<Held<T, 2, 3>>(call);
    }
    return launch_attention<Held<T, 1, 8>>(call);
}

template <class T> int launch_as(const BlockCall &call) {
    const case_fast_cross_attention &c = *call.c;
    bool pairs = c.dim % 2 == 0 && c.dim <= 192 && c.width % 2 == 0;
    for (int i = 0; i < c.sources; ++i) {
        const case_fast_source &s = call.sources[i];
        pairs = pairs && s.key_stride % 2 == 0 && s.value_stride % 2 == 0 &&
                aligned({s.key, s.value, s.query_weight, s.output_weight}, 2 * sizeof(T));
    }
    if constexpr (sizeof(T) < 8) {
        if (pairs) return launch_block<Held<T, 2, 3>>(call);
    }
    return launch_block<Held<T, 1, 8>>(call);
}

template <class T> int launch_as(const DropCall &call) {
    const unsigned grid = static_cast<unsigned>((call.count + DROP_THREADS - 1) / DROP_THREADS);
    CASE_FAST_LAUNCH((drop_elements<T>), grid, DROP_THREADS, 0, static_cast<cudaStream_t>(call.stream), call.count,
                     dropout_of(call.p, call.seed), static_cast<const T *>(call.from), static_cast<const T *>(call.base),
                     static_cast<T *>(call.to));
    return status();
}

}  // namespace case_fast::cross_attention

#define CASE_FAST_LAUNCHES(type, T)                                                                         \
    int case_fast::cross_attention::launch_##type(const AttentionCall &call) { return launch_as<T>(call); } \
    int case_fast::cross_attention::launch_##type(const BlockCall &call) { return launch_as<T>(call); }     \
    int case_fast::cross_attention::launch_##type(const DropCall &call) { return launch_as<T>(call); }
