// What cpu.cpp hands to the kernels, which are compiled once per instruction set: cpu_kernels.cpp.
#pragma once

#include <cstdint>

#include "common/kernels.h"
#include "linear/linear.h"

// A matrix whose element (i, k) lies at data + i * lane + k * depth; i is a row of A, or a column of B.
template <class T>
struct LinearOperand {
    const T *data;
    int64_t lane, depth;
};

// Some rows of A, and where their products go.
template <class T>
struct LinearRows {
    LinearOperand<T> a;
    int64_t rows;
    T *c;            // (rows, columns), or (columns, rows) where transposed
    int64_t stride;  // from one row of c to the next
    const T *bias;   // of columns, or of rows where transposed; NULL: none
    T *z;            // what f is applied to, as c; NULL: not wanted
    int64_t z_stride;
};

// C = f(A B + bias) for A of several parts.
template <class T>
struct LinearProduct {
    int64_t columns, depth;
    LinearOperand<T> b;
    bool transposed;  // depth is at most `linear_transposed`
    bool add;         // to what stands in c
    int32_t activation;
};

constexpr int64_t linear_piece = 192;        // most depth that is summed up in registers, in elements of common/gemm.h
constexpr int64_t linear_transposed = 1152;  // most depth of a product that is stored transposed

constexpr int64_t linear_rows = 32;  // whose gradients of bias are summed one after the other

template <class T>
struct LinearKernels {
    int64_t (*scratch)(int64_t columns, int64_t depth);  // numbers that products of so many or fewer need room for
    void (*product)(const LinearProduct<T> &, const LinearRows<T> *parts, int64_t count, T *scratch);
    // grad_z (rows, columns) = grad_y f', where f is not the identity; sums (columns): of the rows of grad_z; NULL: not wanted.
    // y_stride, stride: from one row to the next of grad_y, and of kept and grad_z
    void (*differentiate)(int32_t activation, int64_t rows, int64_t columns, const T *grad_y, int64_t y_stride, const T *kept, T *grad_z,
                          int64_t stride, T *sums);
};

CASE_FAST_DECLARE_KERNELS(KernelsOf<LinearKernels>, linear);
CASE_FAST_DECLARE_BF16_KERNELS(LinearKernels, linear);
