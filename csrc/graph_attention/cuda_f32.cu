#include "graph_attention/cuda_launch.cuh"

int case_fast::launch_f32(const Call &call) { return launch_as<float>(call); }
