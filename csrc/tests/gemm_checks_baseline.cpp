#define CASE_FAST_GEMM_CHECKS
#include "gemm_checks.h"

const GemmChecks gemm_checks_baseline = CASE_FAST_GEMM_CHECKS_HERE;
