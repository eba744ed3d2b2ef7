// Attention of packed sequences on the CPU: what a family hands to its kernels, attention_kernels.cpp, which are compiled once per
// instruction set.
#pragma once

#include <cstdint>

#include "common/kernels.h"

template <class T>
struct Attention {
    int32_t heads, dim;
    bool causal;
    int64_t query_stride, key_stride, value_stride, out_stride;  // from row to row, of all heads
    int64_t key_head;  // from head to head of key and value, and of their gradients: dim, or 0 where all heads share them
    int64_t first, longest;  // the weights' numbers for dropout: (first + row) * longest + place of the key
    T scale, kept_scale;                                         // kept_scale: 1 / (1 - dropout_p)
    uint64_t seed, drop_below;                                   // drop_below 0: no dropout
    const T *query, *key, *value;
    T *out, *lse;  // backward only reads them; lse NULL: not wanted

    // backward only
    const T *grad_out;
    T *grad_query, *grad_key, *grad_value;
    int64_t grad_query_stride, grad_key_stride, grad_value_stride;
};

// Consecutive query rows that attend to the same keys.
struct Segment {
    int64_t row, rows;   // rows of query
    int64_t key, keys;   // rows of key and value
    int64_t shift;       // causal: the i-th row sees the keys 0 .. i + shift
};

// Rows are done in blocks whose weights stay in the second cache. Elements of workspace for a segment of so many rows and keys:
__attribute__((always_inline)) static inline int64_t attention_row_block(int64_t rows, int64_t keys) {
    int64_t block = (int64_t(24) << 10) / (keys > 0 ? keys : 1);
    block = block < 15 ? 15 : block > 60 ? 60 : block;
    return rows < block ? rows : block;
}
__attribute__((always_inline)) static inline int64_t padded_keys(int64_t keys) { return (keys + 15) / 16 * 16; }
__attribute__((always_inline)) static inline int64_t attention_workspace(int64_t rows, int64_t keys, bool backward) {
    return (backward ? 2 : 1) * attention_row_block(rows, keys) * padded_keys(keys);
}

// One head of a segment.
template <class T>
struct AttentionKernels {
    void (*forward)(const Attention<T> &, const Segment &, int head, T *workspace);   // out, lse
    void (*backward)(const Attention<T> &, const Segment &, int head, T *workspace);  // grad_query; grad_key, grad_value: added to, and may be one
};
CASE_FAST_DECLARE_KERNELS(KernelsOf<AttentionKernels>, attention);
