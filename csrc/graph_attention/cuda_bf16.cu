#include "graph_attention/cuda_launch.cuh"

int case_fast::launch_bf16(const Call &call) { return launch_as<__nv_bfloat16>(call); }
