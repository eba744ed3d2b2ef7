// Products of rows with weights, their gradients, and what follows a product. Plain C; no torch, no Python.
//   forward:  z_ig = W_g x_ig + b_g      y = f(z), f: identity, max(z, 0), z Phi(z) or tanh(z)
//   backward: grad_z = grad_y f'(z)      grad_x_ig = W_g^T grad_z_ig      grad_W_g = sum over i of grad_z_ig x_ig^T
//             grad_b_g = sum over i of grad_z_ig
// W_g is made of one weight or of several end to end, each with N_s outputs; there are N in all.
//
// On the CPU: F32 and F64. Everything is checked before it is used, and on an error nothing has been written. Outputs are written
// whole, whatever stood there. The results are the same bits for any number of threads; those of a row of y and grad_x do not
// depend on the other rows.
//
// Where a call allows it and the processor has the instructions (AVX512_BF16), the factors of the products of F32 are rounded to
// bfloat16, to the nearest, ties to even; all else, sums too, is F32.
#pragma once

#include <stdint.h>

#include "common/types.h"

#ifdef __cplusplus
extern "C" {
#endif

enum case_fast_activation { CASE_FAST_IDENTITY = 0, CASE_FAST_RELU = 1, CASE_FAST_GELU = 2, CASE_FAST_TANH = 3 };

typedef struct case_fast_linear {
    int64_t rows, groups, depth;  // n, G, K
    int64_t x_row, x_group;       // elements of x from one row, or group, to the next; those of a row lie together
    int32_t sources;              // weights
    int32_t dtype, activation;
    int32_t bf16;                 // whether factors of F32 may be rounded to bfloat16
} case_fast_linear;

typedef struct case_fast_linear_weight {
    int64_t outputs;             // N_s
    int64_t group, row, column;  // elements from one to the next
    const void *weight;          // (G, N_s, K)
    void *grad;                  // backward: as weight; NULL where not wanted
    int64_t grad_group, grad_row, grad_column;  // one of the latter two is 1
    void *y;                     // (n, G, N_s): y of forward; of backward grad_y, which is only read
    int64_t y_row, y_group;      // elements from one to the next; those of a row lie together
} case_fast_linear_weight;

// x (n, G, K); bias (G, N), or NULL. z (n, G, N): for backward where f is the Gaussian unit; NULL: not wanted.
int case_fast_linear_forward_cpu(const case_fast_linear *call, const case_fast_linear_weight *weights, const void *x, const void *bias,
                                 void *z, int threads);

// kept (n, G, N): y where f is max(z, 0) or tanh, z where it is the Gaussian unit, else not read. grad_x (n, G, K), grad_bias (G, N) and
// the gradient of each weight: NULL where not wanted.
int case_fast_linear_backward_cpu(const case_fast_linear *call, const case_fast_linear_weight *weights, const void *x, const void *kept,
                                  void *grad_x, void *grad_bias, int threads);

#ifdef __cplusplus
}
#endif
