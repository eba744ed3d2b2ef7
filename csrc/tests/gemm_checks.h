// common/gemm.h for each instruction set, checked and timed by test_common.cpp and bench_common.cpp.
#pragma once

#include <cstdint>

#include "common/kernels.h"

struct GemmChecks {
    int (*check)();  // number of products compared; ends the program at the first that is wrong
    double (*float_rate)(int64_t rows, int64_t columns, int64_t depth);  // Gflop per second of this thread's CPU time, packing apart
    double (*double_rate)(int64_t rows, int64_t columns, int64_t depth);
};
CASE_FAST_DECLARE_KERNELS(GemmChecks, gemm_checks);
extern const GemmChecks gemm_checks_bf16;  // with products of bfloat16
