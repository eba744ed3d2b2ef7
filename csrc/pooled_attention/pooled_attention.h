// Attention of one query a sequence and head over rows that all heads share, keys and values at once, and its gradients. Plain C; no
// torch, no Python.
//
// Sequence s holds the rows n_j, j from cu[s] to cu[s + 1]; d is the length of a row and of a query.
//   score(s, h, j) = scale * q_(s, h) . n_j
//   lse_(s, h) = log sum_j e^score(s, h, j)
//   out_(s, h) = sum_j dropout(e^(score(s, h, j) - lse_(s, h))) n_j
// Without any row: out 0, lse -infinity. Dropout: case_fast_keep of common/philox.h with e = s * longest + the row's place in its
// sequence, where `longest` is the greatest difference of two neighbours in cu.
//
// On the CPU: F32 and F64. Offsets are checked before they are used, and on an error nothing has been written. Outputs are written
// whole, whatever stood there. The results are the same bits for any number of threads, and those of a sequence do not depend on the
// sequences beside it (but for dropout).
#pragma once

#include <stdint.h>

#include "common/types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct case_fast_pooled_attention {
    int64_t sequences, rows;              // s, T
    int32_t heads, dim, dtype, index_bits;  // index_bits 32 or 64
    const void *cu;                       // (s + 1)
    int64_t query_stride, query_head;     // elements from one sequence to the next, and from one head to the next, of query
    int64_t row_stride;                   // elements from one row to the next; strides are at least 0
    double scale, dropout_p;              // dropout_p in [0, 1], on the softmax weights
    uint64_t seed;                        // see case_fast_seed in common/philox.h
    const uint64_t *seed_at;              // or NULL
} case_fast_pooled_attention;

// query (s, H, d) and rows (T, d) with the strides above, their last dimension dense; out (s, H, d) contiguous; lse (s, H), kept for
// backward (NULL: not wanted).
int case_fast_pooled_attention_forward_cpu(const case_fast_pooled_attention *call, const void *query, const void *rows, void *out,
                                           void *lse, int threads);

// out, grad_query (s, H, d) and grad_rows (T, d) contiguous; grad_out (s, H, d) with strides as query has them.
int case_fast_pooled_attention_backward_cpu(const case_fast_pooled_attention *call, const void *query, const void *rows,
                                            const void *out, const void *lse, const void *grad_out, int64_t grad_out_stride,
                                            int64_t grad_out_head, void *grad_query, void *grad_rows, int threads);

#ifdef __cplusplus
}
#endif
