// What cpu.cpp hands to the kernels, which are compiled once per instruction set: cpu_kernels.cpp.
#pragma once

#include <cstdint>

#include "common/kernels.h"

struct RowDropout {
    double kept_scale;
    uint64_t seed;
    uint32_t drop_below;  // 0: all are kept
};

template <class T>
struct ResidualRows {
    int64_t width;
    RowDropout dropout;
    double eps;
    const T *x, *update, *weight, *bias;  // update NULL: nothing is added
    T *total, *normed, *mean, *inverse;   // inverse: of the standard deviation
};

template <class T>
struct ResidualGradients {
    int64_t width;
    RowDropout dropout;
    const T *total, *mean, *inverse, *weight, *grad_total, *grad_normed;  // grad_total NULL: zeros
    T *grad_x, *grad_update;                                              // grad_update NULL: not wanted
};

template <class T>
struct ResidualKernels {
    // Of the rows [begin, end).
    void (*forward)(const ResidualRows<T> &, int64_t begin, int64_t end);
    // The same, and their part (2, width) of the gradients of weight and bias, written whole.
    void (*backward)(const ResidualGradients<T> &, int64_t begin, int64_t end, T *part);
    // to = base + dropout(from); base may be NULL.
    void (*drop)(const RowDropout &, int64_t width, const T *from, const T *base, T *to, int64_t begin, int64_t end);
    // out (count) = the sum of `parts` arrays of so many, end to end, in their order.
    void (*join)(int64_t parts, int64_t count, const T *part, T *out);
};

CASE_FAST_DECLARE_KERNELS(KernelsOf<ResidualKernels>, residual_norm);
