#define CASE_FAST_GEMM_CHECKS
#include "gemm_checks.h"

const GemmChecks gemm_checks_avx512 = CASE_FAST_GEMM_CHECKS_HERE;
