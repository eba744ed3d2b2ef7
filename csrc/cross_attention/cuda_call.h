// A call on its way from the C interface (cuda.cu) to the kernels of its storage type.
#pragma once

#include "cross_attention/cuda.h"

namespace case_fast::cross_attention {

struct Workspace {  // places in it, in bytes
    size_t longest = 0, delta = 0, attended = 0, bytes = 0;
    size_t take(size_t size) {
        const size_t here = bytes;
        bytes += (size + 255) / 256 * 256;
        return here;
    }
    Workspace(const case_fast_attention &c, bool backward) {
        if (c.dropout_p > 0) longest = take(sizeof(int64_t));
        if (backward) delta = take(static_cast<size_t>(c.queries) * c.heads * (c.dtype == CASE_FAST_F64 ? 8 : 4));
    }
    explicit Workspace(const case_fast_cross_attention &c) {
        if (c.dropout_p > 0) longest = take(sizeof(int64_t));
        attended = take(static_cast<size_t>(c.rows) * c.heads * c.dim * (c.dtype == CASE_FAST_F64 ? 8 : 4));
    }
};

struct AttentionCall {  // the arguments of either pass
    const case_fast_attention *c;
    bool backward;
    int plan;  // forward's, chosen
    const void *query, *key, *value, *out, *lse, *grad_out;
    void *grad_query, *grad_key, *grad_value;
    int64_t grad_query_stride, grad_key_stride, grad_value_stride;
    void *workspace;
    int32_t *flag;
    void *stream;
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
    const void *from, *base;
    void *to, *stream;
};

// Launch the kernels for a call that was checked; return a case_fast_status. Each storage type's file defines its own.
#define CASE_FAST_LAUNCHES(type)              \
    int launch_##type(const AttentionCall &); \
    int launch_##type(const BlockCall &);     \
    int launch_##type(const DropCall &);
CASE_FAST_LAUNCHES(f32)
CASE_FAST_LAUNCHES(f64)
CASE_FAST_LAUNCHES(f16)
CASE_FAST_LAUNCHES(bf16)
#undef CASE_FAST_LAUNCHES

}  // namespace case_fast::cross_attention
