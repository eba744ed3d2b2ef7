#include "graph_attention/cuda_launch.cuh"

int case_fast::launch_f16(const Call &call) { return launch_as<__half>(call); }
