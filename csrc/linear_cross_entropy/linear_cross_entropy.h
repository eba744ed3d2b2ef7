// The vocabulary at the end of a decoder: losses of target words, their gradients, and the most probable words. Plain C; no torch,
// no Python.
//   z_tv = hidden_t . weight_v + bias_v        lse_t = log sum_v e^z_tv
//   nll_m = lse_t - z_ty for each target word y = target[m] of row t
//   d loss / d z_tv = sum over the targets m of t of grad_nll_m (e^(z_tv - lse_t) - [target_m = v])
//
// On the CPU: F32 and F64. Everything is checked before it is used, and where a check fails nothing has been written. Outputs are
// written whole, whatever stood there. The results are the same bits for any number of threads, and those of a row do not depend
// on the other rows, but on whether they are more than 24.
//
// Where a call allows it and the processor has the instructions (AVX512_BF16), the factors of the products of F32 are rounded to
// bfloat16, to the nearest, ties to even, but the scores of 24 rows or fewer are F32; so are all sums.
#pragma once

#include <stdint.h>

#include "common/types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct case_fast_linear_cross_entropy {
    int64_t rows, vocabulary, targets;  // T, V > 0, M
    int32_t dim, dtype, index_bits;     // index_bits 32 or 64: target and cu_target alike
    int32_t bf16;                       // whether factors of F32 may be rounded to bfloat16
    const void *target;                 // (M)
    const void *cu_target;              // (T + 1): the targets of row t are target[cu_target[t]:cu_target[t + 1]]; NULL: M == T
} case_fast_linear_cross_entropy;

// hidden (T, d), weight (V, d), bias (V), all contiguous. nll (M); prediction (T): the word with the greatest score, the lowest
// among equals, NaN counting as greatest; state (T, 2) for backward: the greatest score, and lse less that.
// kept: T * V elements that backward may read, in an order of its own; NULL: backward computes the scores again.
int case_fast_linear_cross_entropy_forward_cpu(const case_fast_linear_cross_entropy *call, const void *hidden, const void *weight,
                                          const void *bias, void *nll, int64_t *prediction, void *state, void *kept, int threads);

// kept, state: of forward. grad_nll (M); grad_hidden (T, d), grad_weight (V, d), grad_bias (V), each NULL where not wanted. A row
// whose targets all have gradient 0 takes no part.
int case_fast_linear_cross_entropy_backward_cpu(const case_fast_linear_cross_entropy *call, const void *hidden, const void *weight,
                                           const void *bias, const void *state, const void *kept, const void *grad_nll,
                                           void *grad_hidden, void *grad_weight, void *grad_bias, int threads);

// The k <= V words of greatest score in each row, the greatest first, the lowest among equals: log_probability and word (T, k).
int case_fast_top_words_cpu(int64_t rows, int64_t vocabulary, int64_t k, int32_t dim, int32_t dtype, const void *hidden,
                                 const void *weight, const void *bias, void *log_probability, int64_t *word, int threads);

#ifdef __cplusplus
}
#endif
