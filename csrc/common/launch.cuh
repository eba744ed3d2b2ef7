// What the host side of every family's CUDA code shares: storage types, the workspace, the launch.
#pragma once

#include <initializer_list>

#include "common/calls.h"
#include "common/device.cuh"
#include "common/types.h"

namespace case_fast {

// run(T()) for the type T that numbers of a dtype are stored as.
template <class Run> int with_storage(int dtype, Run run) {
    switch (dtype) {
        case CASE_FAST_F32:
            return run(float());
        case CASE_FAST_F64:
            return run(double());
        case CASE_FAST_F16:
            return run(__half());
        default:
            return run(__nv_bfloat16());
    }
}

struct Places {  // of arrays in a workspace, in bytes
    size_t bytes = 0;
    size_t take(size_t size) {
        const size_t here = bytes;
        bytes += (size + 255) / 256 * 256;
        return here;
    }
};

constexpr int ALLOWED_SHARED = 24 << 10;  // bytes beside a kernel's own that need not be asked for: 48 KiB together

template <class Kernel> void allow_shared(Kernel kernel, int bytes) {
    if (bytes > ALLOWED_SHARED) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
inline int launch_status() { return cudaGetLastError() == cudaSuccess ? CASE_FAST_OK : CASE_FAST_CUDA_ERROR; }
inline bool aligned(std::initializer_list<const void *> arrays, size_t bytes) {
    for (const void *x : arrays)
        if (reinterpret_cast<uintptr_t>(x) % bytes) return false;
    return true;
}

}  // namespace case_fast
