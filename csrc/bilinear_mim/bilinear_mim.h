// Mutual information maximisation with a bilinear score (the paper's Eq. 9 to 12), and its gradients. Plain C; no torch.
//   S[p, q] = sigmoid(x_p^T W y_q), or x_p . y_q; c = positive[p]
//   side_y[p] = log(e^S[p, c] + sum over the negatives q of e^S[p, q]) - S[p, c]
//   side_x[p] = log(e^S[p, c] + sum over the negatives p' of e^S[p', c]) - S[p, c]
// Negatives of side_y are the rows q != c of y, those of side_x the rows p' of x with positive[p'] != c; or draws from these.
#pragma once

#include <stdint.h>

#include "common/types.h"

#ifdef __cplusplus
extern "C" {
#endif

enum case_fast_mim_score { CASE_FAST_BILINEAR_SIGMOID = 0, CASE_FAST_DOT = 1 };  // of the dot product, W is absent

// How drawn negatives are computed: rows gathered draw by draw, or products of whole matrices, some rows at a time. AUTO: what is
// faster at these sizes.
enum case_fast_mim_plan { CASE_FAST_MIM_AUTO = 0, CASE_FAST_MIM_GATHERED = 1, CASE_FAST_MIM_DENSE = 2 };

typedef struct case_fast_mim {
    int64_t pairs, rows;        // rows of x (P) and of y (Q)
    int32_t dim, dtype, score;  // score: a case_fast_mim_score
    int64_t negatives;          // draws for each pair and side, with replacement; -1: all negatives
    const int64_t *positive;    // (P): the row of y that belongs to each row of x
    uint64_t seed;              // of the draws, see case_fast_seed and case_fast_draw in common/philox.h
    const uint64_t *seed_at;    // or NULL
    int32_t plan;               // a case_fast_mim_plan
} case_fast_mim;

// Elements of `saved`, which forward writes for backward: about (P + Q) d, or 3 P d with draws, at most.
int64_t case_fast_bilinear_mim_saved(const case_fast_mim *mim);

// The plan that AUTO stands for at these sizes: DENSE, or GATHERED, or AUTO where nothing is drawn.
int case_fast_bilinear_mim_plan(const case_fast_mim *mim);

// x (P, d), y (Q, d), weight (d, d) or NULL; side_y, side_x, and logit (P), the positive's x^T W y. All contiguous.
//
// On the CPU: F32 and F64. Everything is checked before it is used, and where a check fails nothing has been written;
// BAD_INDICES: a `positive` outside [0, rows). Outputs are written whole, whatever stood there. No (P, Q) array exists at any
// time. The results are the same bits for any number of threads. A side without any negative is exactly 0, and so is its
// gradient.
int case_fast_bilinear_mim_forward_cpu(const case_fast_mim *mim, const void *x, const void *y, const void *weight, void *side_y,
                                       void *side_x, void *logit, void *saved, int threads);

// grad_side_y, grad_side_x (P); grad_x (P, d), grad_y (Q, d), grad_weight (d, d) or NULL.
int case_fast_bilinear_mim_backward_cpu(const case_fast_mim *mim, const void *x, const void *y, const void *weight,
                                        const void *saved, const void *grad_side_y, const void *grad_side_x, void *grad_x,
                                        void *grad_y, void *grad_weight, int threads);

#ifdef __cplusplus
}
#endif
