// Sums of rows by segment. Plain C; no torch, no Python.
//   out_s = sum of x_i over the rows i with segment[i] = s, in ascending order of i; zeros where there are none
// The gradient, a gather of rows, is torch's own.
//
// On the CPU: F32 and F64. Everything is checked before it is used, and on an error nothing has been written. Outputs are written
// whole, whatever stood there. The results are the same bits for any number of threads, and those of adding the rows one after the
// other to zeros.
#pragma once

#include <stdint.h>

#include "common/types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct case_fast_segment_sum {
    int64_t rows, size, width;  // n, segments, elements of a row
    int64_t stride;             // elements from one row to the next of x, at least 0
    int32_t dtype, index_bits;  // index_bits 32 or 64
    const void *segment;        // (n), in any order
} case_fast_segment_sum;

// x (n, width), rows dense; out (size, width) contiguous.
int case_fast_segment_sum_forward_cpu(const case_fast_segment_sum *call, const void *x, void *out, int threads);

#ifdef __cplusplus
}
#endif
