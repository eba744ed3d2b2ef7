// Packed attention on CUDA: checks, choice of the plan. Kernels: cuda_kernels.cu, cuda_tiles.cuh, common/attend_row.cuh.
#include "packed_attention/cuda.h"

#include <cmath>

namespace case_fast::packed_attention {
namespace {

// Of a sequence, on average; by counts, not measured. FEW_KEYS: two steps of a warp, which has nothing to share with others, and
// which a tile for 16 rows and 32 keys would leave idle. FEW_ROWS: beyond, keys are better read once for several rows.
constexpr int FEW_KEYS = 8, FEW_ROWS = 4;

int chosen(const case_fast_packed_attention &c) {
    if (c.keys <= FEW_KEYS * c.key_sequences) return CASE_FAST_ATTENTION_WARPS;
    return c.queries <= FEW_ROWS * c.batch ? CASE_FAST_ATTENTION_ROWS : CASE_FAST_ATTENTION_TILES;
}

bool served(const case_fast_packed_attention *c) {
    return c && good_kinds(c->dtype, c->index_bits, c->heads, c->dim, c->dropout_p) && std::isfinite(c->scale) &&
           few({c->batch, c->queries, c->key_sequences, c->keys, c->batch + c->queries, c->key_sequences + c->keys}) &&
           c->cu_query && c->cu_key && (c->key_of || c->key_sequences == c->batch);
}

int run(Call call, size_t workspace_bytes) {
    const case_fast_packed_attention *c = call.c;
    if (!served(c) || call.plan < CASE_FAST_ATTENTION_AUTO || call.plan > CASE_FAST_ATTENTION_WARPS)
        return CASE_FAST_BAD_ARGUMENT;
    const int64_t inner = int64_t(c->heads) * c->dim;
    if (c->query_stride < inner || c->key_stride < inner || c->value_stride < inner) return CASE_FAST_BAD_ARGUMENT;
    if (c->queries && missing({call.query, call.out})) return CASE_FAST_BAD_ARGUMENT;
    if (c->keys && missing({call.key, call.value})) return CASE_FAST_BAD_ARGUMENT;
    if (call.backward) {
        if (call.grad_query_stride < inner || call.grad_key_stride < inner || call.grad_value_stride < inner)
            return CASE_FAST_BAD_ARGUMENT;
        if (c->queries && missing({call.lse, call.grad_out, call.grad_query})) return CASE_FAST_BAD_ARGUMENT;
        if (c->keys && missing({call.grad_key, call.grad_value})) return CASE_FAST_BAD_ARGUMENT;
    }
    const size_t needed = Workspace(*c, call.backward).bytes;
    if (needed > workspace_bytes || (needed && !call.workspace)) return CASE_FAST_BAD_ARGUMENT;
    if (const int status = impossible(c->batch, c->queries, c->key_sequences, c->keys)) return status;
    if (call.plan == CASE_FAST_ATTENTION_AUTO) call.plan = chosen(*c);
    if (!c->queries && !(call.backward && c->keys)) return CASE_FAST_OK;
    return with_storage(c->dtype, [&](auto like) { return launch_as<decltype(like)>(call); });
}

}  // namespace
}  // namespace case_fast::packed_attention

extern "C" size_t case_fast_packed_attention_workspace_cuda(const case_fast_packed_attention *call, int backward) {
    using namespace case_fast::packed_attention;
    return served(call) ? Workspace(*call, backward != 0).bytes : 0;
}

extern "C" int case_fast_packed_attention_forward_cuda(const case_fast_packed_attention *call, const void *query, const void *key,
                                                       const void *value, void *out, void *lse, int plan, void *workspace,
                                                       size_t workspace_bytes, int32_t *flag, void *stream) {
    using namespace case_fast::packed_attention;
    return run(Call{call, false, plan, query, key, value, out, lse, nullptr, nullptr, nullptr, nullptr, 0, 0, 0,
                             workspace, flag, stream},
               workspace_bytes);
}

extern "C" int case_fast_packed_attention_backward_cuda(const case_fast_packed_attention *call, const void *query, const void *key,
                                                        const void *value, const void *out, const void *lse, const void *grad_out,
                                                        void *grad_query, int64_t grad_query_stride, void *grad_key,
                                                        int64_t grad_key_stride, void *grad_value, int64_t grad_value_stride,
                                                        void *workspace, size_t workspace_bytes, int32_t *flag, void *stream) {
    using namespace case_fast::packed_attention;
    return run(Call{call, true, CASE_FAST_ATTENTION_TILES, query, key, value, out, lse, grad_out, grad_query, grad_key,
                             grad_value, grad_query_stride, grad_key_stride, grad_value_stride, workspace, flag, stream},
               workspace_bytes);
}
