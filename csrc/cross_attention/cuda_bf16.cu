#include "cross_attention/cuda_launch.cuh"

CASE_FAST_LAUNCHES(bf16, __nv_bfloat16)
