// What cpu.cpp hands to the kernels of the block around the attention, which are compiled once per instruction set: cpu_kernels.cpp.
#pragma once

#include <cstdint>

#include "common/kernels.h"

// Dropout of the elements of a matrix, by the number of each.
struct ElementDropout {
    uint64_t seed, drop_below;
    double kept_scale;
};

template <class T>
struct BlockKernels {
    // c (rows, columns) = a (rows, depth) b (columns, depth)^T
    void (*multiply_transposed)(int64_t rows, int64_t columns, int64_t depth, const T *a, int64_t a_stride, const T *b, int64_t b_stride,
                                T *c, int64_t c_stride);
    // c (rows, columns) = a b with b (depth, columns); a(i, k) = a[i * a_row + k * a_depth]
    void (*multiply)(int64_t rows, int64_t columns, int64_t depth, const T *a, int64_t a_row, int64_t a_depth, const T *b,
                     int64_t b_stride, T *c, int64_t c_stride);

    // out = x * weight + bias where x = (hidden - mean) / deviation; x and 1 / deviation are kept where asked for (not NULL)
    void (*normalise)(int64_t rows, int64_t width, const T *hidden, const T *weight, const T *bias, double eps, T *out, T *kept,
                      T *inverse_deviation);
    // grad += gradient of the normalised hidden rows; the gradients of weight and bias are summed into norm_grads (2, width)
    void (*normalise_backward)(int64_t rows, int64_t width, const T *kept, const T *inverse_deviation, const T *weight,
                               const T *grad_normed, T *grad, T *norm_grads);
    void (*scale_and_shift)(int64_t rows, int64_t width, const T *kept, const T *weight, const T *bias, T *out);
    // to = or += dropout(from), elements numbered from `first`
    void (*drop)(const ElementDropout &, int64_t first, int64_t count, const T *from, T *to, bool add);
};

CASE_FAST_DECLARE_KERNELS(KernelsOf<BlockKernels>, cross_attention);
