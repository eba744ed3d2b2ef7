#include "graph_attention/cuda_launch.cuh"

int case_fast::launch_f64(const Call &call) { return launch_as<double>(call); }
