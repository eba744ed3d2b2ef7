// What cuda.cu hands to the kernels, which are compiled once per storage type: cuda_kernels.cu.
#pragma once

#include "common/launch.cuh"
#include "packed_attention/packed_attention.h"

namespace case_fast::packed_attention {

struct Workspace : Places {
    size_t longest = 0, delta = 0;
    Workspace(const case_fast_packed_attention &c, bool backward) {
        if (c.dropout_p > 0) longest = take(sizeof(int64_t));
        if (backward) delta = take(static_cast<size_t>(c.queries) * c.heads * (c.dtype == CASE_FAST_F64 ? 8 : 4));
    }
};

struct Call {  // the arguments of either pass
    const case_fast_packed_attention *c;
    bool backward;
    int plan;  // forward's, chosen
    const void *query, *key, *value, *out, *lse, *grad_out;
    void *grad_query, *grad_key, *grad_value;
    int64_t grad_query_stride, grad_key_stride, grad_value_stride;
    void *workspace;
    int32_t *flag;
    void *stream;
};

// Launches the kernels of a call that was checked; a case_fast_status. cuda_kernels.cu, compiled once per storage type T.
template <class T> int launch_as(const Call &call);

}  // namespace case_fast::packed_attention
