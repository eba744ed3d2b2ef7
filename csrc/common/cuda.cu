#include <cuda_runtime.h>

#include <cstdio>

#include "common/cuda.h"

extern "C" void case_fast_cuda_report(case_fast_cuda_info *info) {
    *info = {};
    info->compiled = 1;
    for (int list[] = {__CUDA_ARCH_LIST__}, i = 0; i < int(sizeof list / sizeof *list); ++i)
        if (i < CASE_FAST_MAX_ARCHITECTURES) info->architectures[info->architecture_count++] = list[i] / 10;
    info->runtime_version = CUDART_VERSION;

    int driver = 0;
    cudaDriverGetVersion(&driver);
    cudaError_t error = cudaGetDeviceCount(&info->device_count);
    if (error == cudaSuccess && info->device_count > 0) return;
    info->device_count = 0;
    // Without any driver the runtime would speak of one that is too old.
    const char *why = driver == 0 ? "no CUDA driver is installed" : cudaGetErrorString(error ? error : cudaErrorNoDevice);
    std::snprintf(info->status, sizeof info->status, "%s", why);
    cudaGetLastError();  // take the error off this thread, or the next launch check would find it
}
