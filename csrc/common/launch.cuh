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

// ---- how rows are read

// How many numbers, 4 at most, can be read at once everywhere in arrays whose rows have these lengths and lie so far apart.
inline int at_once(size_t number_bytes, std::initializer_list<int64_t> lengths, std::initializer_list<const void *> arrays) {
    int numbers = 4;
    for (const int64_t length : lengths)
        while (length % numbers) numbers /= 2;
    while (!aligned(arrays, numbers * number_bytes)) numbers /= 2;
    return numbers;
}

// run(H()) for the way H that a warp holds rows of `dim` numbers of which `numbers` can be read at once: up to 128 by fours, which
// are 16 bytes of float32, up to 192 by pairs (a head of 150 float32 is 600 bytes, no multiple of 16), else one by one.
template <class T, class Run> int with_rows(int dim, int numbers, Run run) {
    if constexpr (sizeof(T) < 8) {
        if (numbers == 4 && dim <= 128) return run(Held<T, 4, 1>());
        if (numbers >= 2 && dim <= 192) return run(Held<T, 2, 3>());
    }
    return run(Held<T, 1, 8>());
}

// ---- attention of packed sequences: what the host can check

constexpr int64_t MOST = INT32_MAX - 4096;  // rows and sequences, so that a tile may count a little beyond the end

inline bool good_kinds(int dtype, int index_bits, int heads, int dim, double dropout_p) {
    return dtype >= CASE_FAST_F32 && dtype <= CASE_FAST_BF16 && (index_bits == 32 || index_bits == 64) && heads > 0 &&
           heads < 65536 && dim > 0 && dim <= 256 && dropout_p >= 0 && dropout_p <= 1;
}
inline bool few(std::initializer_list<int64_t> counts) {
    for (const int64_t count : counts)
        if (count < 0 || count >= MOST) return false;
    return true;
}

// What offsets of no sequences must be wrong about, whatever they hold.
inline int impossible(int64_t batch, int64_t rows, int64_t key_sequences, int64_t keys) {
    if (batch == 0 && rows > 0) return CASE_FAST_BAD_CU_QUERY;
    if (key_sequences == 0 && keys > 0) return CASE_FAST_BAD_CU_KEY;
    return batch > 0 && key_sequences == 0 ? CASE_FAST_BAD_KEY_OF : CASE_FAST_OK;
}

}  // namespace case_fast
