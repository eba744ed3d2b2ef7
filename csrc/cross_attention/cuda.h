// What cuda.cu hands to the kernels, which are compiled once per storage type: cuda_kernels.cu.
#pragma once

#include "common/launch.cuh"
#include "cross_attention/cross_attention.h"

namespace case_fast::cross_attention {

struct Workspace : Places {
    size_t longest = 0, attended = 0;
    explicit Workspace(const case_fast_cross_attention &c) {
        if (c.dropout_p > 0) longest = take(sizeof(int64_t));
        attended = take(static_cast<size_t>(c.rows) * c.heads * c.dim * (c.dtype == CASE_FAST_F64 ? 8 : 4));
    }
};

struct BlockCall {
    const case_fast_cross_attention *c;
    const case_fast_source *sources;
    const void *hidden;
    void *out, *workspace;
    int32_t *flag;
    void *stream;
};

struct DropCall {
    int64_t count;
    double p;
    uint64_t seed;
    const uint64_t *seed_at;
    const void *from, *base;
    void *to, *stream;
};

// Launch the kernels of a call that was checked; a case_fast_status. cuda_kernels.cu, compiled once per storage type T.
template <class T> int launch_as(const BlockCall &call);
template <class T> int launch_as(const DropCall &call);

}  // namespace case_fast::cross_attention
