#include <cstdio>

#include "common/cuda.h"

extern "C" void case_fast_cuda_report(case_fast_cuda_info *info) {
    *info = {};
    std::snprintf(info->status, sizeof info->status, "CUDA code is not compiled in: %s", CASE_FAST_CUDA_ABSENT);
}
