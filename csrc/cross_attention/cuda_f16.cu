#include "cross_attention/cuda_launch.cuh"

CASE_FAST_LAUNCHES(f16, __half)
