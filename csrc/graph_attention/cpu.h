// What cpu.cpp hands to the row kernels, which are compiled once per instruction set: cpu_kernels.cpp.
#pragma once

#include <cstdint>

#include "common/kernels.h"

// 32- or 64-bit integers behind one pointer.
struct Indices {
    const void *data;
    bool wide;
};
__attribute__((always_inline)) static inline int64_t at(const Indices &list, int64_t i) {
    return list.wide ? static_cast<const int64_t *>(list.data)[i] : static_cast<const int32_t *>(list.data)[i];
}

template <class T>
struct GraphAttention {
    int64_t vertices, edges, relations;
    int32_t heads, dim, padded;  // padded: dim rounded up to 64 bytes
    Indices indptr, indices, relation;
    T scale, kept_scale;                  // kept_scale: 1 / (1 - dropout_p)
    uint64_t seed, drop_below;            // drop_below 0: no dropout
    const T *query, *key, *value, *bias;  // (V, H, D); bias: (R, H, 2, padded) relation_query, relation_key, zero-filled
    T *out, *weights;                     // (V, H, D), (E, H)

    // backward only
    const T *grad_out;
    T *grad_query, *grad_key, *grad_value;
    // The edges sorted by neighbour, stably: those that end in vertex k have places from column_end[k - 1] (0 for
    // k = 0) up to column_end[k].
    const int64_t *column_end;               // (V)
    const int64_t *place_edge, *place_row;   // (E): place -> the edge, the vertex that it starts from
    T *score_grad;                           // (E, H): scale * d loss / d score
};

// Partial sums of the relation gradients over a chunk's edges: (R, H, 2, padded) in the layout of `bias`, then (R, H), the sums
// of score_grad. The gradient of relation_query is slot 0 plus that sum times relation_key; likewise slot 1.
template <class T>
struct RowKernels {
    void (*forward)(const GraphAttention<T> &, int64_t begin, int64_t end);                       // out, weights
    void (*backward_rows)(const GraphAttention<T> &, int64_t begin, int64_t end, T *partial);     // grad_query, score_grad, slot 1, sums
    void (*backward_columns)(const GraphAttention<T> &, int64_t begin, int64_t end, int64_t place, T *partial);
    // grad_key, grad_value, slot 0; `place` is where column `begin` begins
    void (*reduce)(const GraphAttention<T> &, const T *partials, int64_t chunks, int64_t stride, int64_t row,
                   T *grad_relation_query, T *grad_relation_key);  // row of (R * H)
};

CASE_FAST_DECLARE_KERNELS(KernelsOf<RowKernels>, graph_attention);
