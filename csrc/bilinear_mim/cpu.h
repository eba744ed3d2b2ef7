// What cpu.cpp hands to the kernels, which are compiled once per instruction set: cpu_kernels.cpp.
//
// Scores are f(z), z = a_i . b_j: a are the rows of x and b those of y, one of the two already multiplied by W. Panels: see
// common/gemm.h.
#pragma once

#include <cstdint>

#include "common/kernels.h"

// Scores of a chunk of rows of a with a chunk of rows of b. `dot`: f(z) = z, and sums are relative to a maximum; else f is the
// sigmoid, and no maximum is needed since 0 < f < 1.
template <class T>
struct MimTile {
    int64_t rows, columns, dim;
    bool dot;
    int64_t first_column;      // of the chunk of b
    const int64_t *positive;   // (rows): the row of b that each row of a is paired with; no negative
    const T *a_rows, *b_rows;  // row panels of a; column panels of b transposed
    T *scores;                 // column panels, each (rows rounded up to whole row panels, panel width)

    // forward: running sums over negatives
    T *logit;                     // (rows): z of the pair, written by the tile that holds it
    T *row_max, *row_sum;         // (rows, lanes): a row's columns are dealt out to lanes; row_max where dot
    T *column_max, *column_sum;   // (columns); column_max where dot

    // backward: d loss / d z is f'(z) * (row_scale e^(f - row_top) + column_scale e^(f - column_top)), f'(z) * pair_scale at pairs
    const T *row_scale, *row_top, *pair_scale;  // (rows); tops where dot, else 0
    const T *column_scale, *column_top;         // (columns)
    const T *a_columns, *b_columns;             // column panels of a and b
    T *grad_a, *grad_b;                         // (rows, dim), (columns, dim)
    bool add_a, add_b;                          // or written for the first time
};

template <class T>
struct MimKernels {
    int row_width, column_width, lanes;  // of row panels, column panels, vectors
    // common/gemm.h
    void (*pack_rows)(const T *a, int64_t row_stride, int64_t depth_stride, int64_t rows, int64_t depth, T *panels);
    void (*pack_columns)(const T *b, int64_t depth_stride, int64_t column_stride, int64_t depth, int64_t columns, T *panels);
    void (*multiply)(const T *row_panels, const T *column_panels, int64_t rows, int64_t columns, int64_t depth, T *c,
                     int64_t c_stride, bool add);
    void (*multiply_unpacked)(const T *row_panels, const T *b, int64_t b_stride, int64_t rows, int64_t columns, int64_t depth,
                              T *c, int64_t c_stride, bool add);
    void (*multiply_few)(const T *in, int64_t count, const T *matrix, int64_t d, T *out, T *work);  // in times its transpose
    // all negatives
    void (*forward_tile)(const MimTile<T> &);
    void (*backward_tile)(const MimTile<T> &);
    void (*join_lanes)(const T *max, const T *sum, int64_t rows, bool dot, T *top, T *total);
    // `count` parts of `columns` columns, part_stride apart
    void (*join_columns)(const T *max, const T *sum, int64_t count, int64_t part_stride, int64_t columns, bool dot, T *top,
                         T *total);
    // sampled negatives
    void (*draw)(uint64_t seed, uint32_t pair, uint32_t side, uint32_t n, int64_t count, int32_t *out);
    void (*dots)(const T *own, const T *others, const int32_t *list, int64_t count, int64_t dim, T *z);
    void (*sum_of)(const T *z, int64_t count, bool dot, T *top, T *total);               // of e^(f - top)
    void (*gradients)(T *z, int64_t count, bool dot, T top, T scale);                    // z becomes f'(z) scale e^(f - top)
    void (*combine)(T *out, const T *others, const int32_t *list, const T *scale, int64_t count, int64_t dim);
    // out += sum of scale[i] * others[list[i]]
};

CASE_FAST_DECLARE_KERNELS(KernelsOf<MimKernels>, bilinear_mim);
