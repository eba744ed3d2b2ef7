// What cpu.cpp hands to the kernels, which are compiled once per instruction set: cpu_kernels.cpp.
#pragma once

#include <cstdint>

#include "common/kernels.h"

template <class T>
struct PooledAttention {
    int32_t heads, dim;
    int64_t query_stride, query_head, row_stride;
    int64_t longest;                // the weights' numbers for dropout: sequence * longest + place of the row
    T scale, kept_scale;            // kept_scale: 1 / (1 - dropout_p)
    uint64_t seed, drop_below;      // drop_below 0: no dropout
    const T *query, *rows;
    T *out, *lse;  // backward only reads them; lse NULL: not wanted

    // backward only
    const T *grad_out;
    int64_t grad_out_stride, grad_out_head;
    T *grad_query, *grad_rows;
};

struct PooledSequence {
    int64_t number, row, rows;  // its place, its first row, how many
};

// Elements of workspace for a sequence of so many rows.
__attribute__((always_inline)) static inline int64_t padded_rows(int64_t rows) { return (rows + 15) / 16 * 16; }
__attribute__((always_inline)) static inline int64_t pooled_workspace(int64_t rows, int64_t heads, int64_t dim, bool backward) {
    return backward ? heads * (2 * padded_rows(rows) + 3 * dim) : heads * padded_rows(rows);
}

template <class T>
struct PooledKernels {
    void (*forward)(const PooledAttention<T> &, const PooledSequence &, T *workspace);   // out, lse
    void (*backward)(const PooledAttention<T> &, const PooledSequence &, T *workspace);  // grad_query, grad_rows
};
CASE_FAST_DECLARE_KERNELS(KernelsOf<PooledKernels>, pooled_attention);
