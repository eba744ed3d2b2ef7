#include "cross_attention/cuda_launch.cuh"

CASE_FAST_LAUNCHES(f32, float)
