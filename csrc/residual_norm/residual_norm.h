// What a layer adds to its rows, with dropout, and the layer norm that follows. Plain C; no torch, no Python.
//   forward:  total = x + dropout(update), normed = (total - mean) / sqrt(variance + eps) * weight + bias
//   backward: of both, for x, update, weight and bias
//   drop:     to = base + dropout(from): where no norm follows, and its gradient
// dropout(u) = u 2^16 / (2^16 - k) where case_fast_half_word(seed, row, column) >= k, else 0, with k = floor(dropout_p 2^16).
//
// On the CPU: F32 and F64. Everything is checked before it is used, and on an error nothing has been written. Outputs are written
// whole, whatever stood there. The results are the same bits for any number of threads; a row's do not depend on the other rows.
#pragma once

#include <stdint.h>

#include "common/types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct case_fast_residual_norm {
    int64_t rows, width;      // n, d above 0; all arrays of rows are contiguous
    int32_t dtype;
    double eps, dropout_p;    // dropout_p in [0, 1)
    uint64_t seed;
    const uint64_t *seed_at;  // NULL, or what the seed is XORed with, modulo 2^63
} case_fast_residual_norm;

// x (n, d), update (n, d); weight, bias (d); total, normed (n, d); stats (2, n), mean and 1 / sqrt(variance + eps) of each row of total.
// update and total are NULL where nothing is added.
int case_fast_residual_norm_forward_cpu(const case_fast_residual_norm *call, const void *x, const void *update, const void *weight,
                                        const void *bias, void *total, void *normed, void *stats, int threads);

// total, stats: of forward; grad_total, which may be NULL for zeros, and grad_normed (n, d). grad_x, grad_update (n, d), which is NULL
// where it is not wanted; grad_weight, grad_bias (d).
int case_fast_residual_norm_backward_cpu(const case_fast_residual_norm *call, const void *total, const void *stats, const void *weight,
                                         const void *grad_total, const void *grad_normed, void *grad_x, void *grad_update,
                                         void *grad_weight, void *grad_bias, int threads);

// from, base, to (n, d); base may be NULL for zeros. eps is of no account.
int case_fast_residual_norm_drop_cpu(const case_fast_residual_norm *call, const void *from, const void *base, void *to, int threads);

#ifdef __cplusplus
}
#endif
