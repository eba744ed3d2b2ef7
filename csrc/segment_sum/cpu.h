// What cpu.cpp hands to the kernel, which is compiled once per instruction set: cpu_kernels.cpp.
#pragma once

#include <cstdint>

#include "common/kernels.h"

template <class T>
struct SegmentRows {
    int64_t rows, width, stride;  // stride: elements from one row of x to the next
    const void *segment;          // (rows)
    bool wide;                    // 64-bit numbers, not 32-bit ones
    const T *x;                   // (rows, width)
    T *out;                       // (size, width)
};

template <class T>
struct SegmentKernels {
    // Columns [first, last) of the sums of segments [begin, end), written whole, from the rows [from, to), which hold theirs.
    void (*forward)(const SegmentRows<T> &, int64_t begin, int64_t end, int64_t from, int64_t to, int64_t first, int64_t last);
};

CASE_FAST_DECLARE_KERNELS(KernelsOf<SegmentKernels>, segment_sum);
