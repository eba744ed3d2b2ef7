// The cross-attention block on CUDA: checks. Kernels: cuda_kernels.cu, common/attend_row.cuh.
#include "cross_attention/cuda.h"

#include <cmath>

namespace case_fast::cross_attention {
namespace {

bool served(const case_fast_cross_attention *c) {
    return c && good_kinds(c->dtype, c->index_bits, c->heads, c->dim, c->dropout_p) && c->output_dropout_p >= 0 &&
           c->output_dropout_p <= 1 && c->eps >= 0 && std::isfinite(c->eps) && few({c->batch, c->rows}) && c->rows < 65536 &&
           c->width > 0 && c->width <= 4096 && c->sources >= 0 && int64_t(c->heads) * c->dim < MOST && c->cu_hidden;
}

int run(const BlockCall &call, size_t workspace_bytes) {
    const case_fast_cross_attention *c = call.c;
    if (!served(c) || (c->sources && !call.sources) || (c->rows && missing({call.hidden, call.out})))
        return CASE_FAST_BAD_ARGUMENT;
    const int64_t inner = int64_t(c->heads) * c->dim;
    for (int i = 0; i < c->sources; ++i) {
        const case_fast_source &s = call.sources[i];
        int status = missing({s.cu_key, s.norm_weight, s.norm_bias, s.query_weight, s.output_weight}) ||
                             !few({s.keys, s.key_sequences}) || (!s.key_of && s.key_sequences != c->batch) ||
                             s.key_weight || s.value_weight ||
                             (s.keys && (missing({s.key, s.value}) || s.key_stride < inner || s.value_stride < inner))
                         ? CASE_FAST_BAD_ARGUMENT
                         : CASE_FAST_OK;
        if (!status) status = impossible(c->batch, c->rows, s.key_sequences, s.keys);
        if (status) return status + 16 * i;
    }
    const size_t needed = Workspace(*c).bytes;
    if (needed > workspace_bytes || (needed && !call.workspace)) return CASE_FAST_BAD_ARGUMENT;
    if (!c->rows) return CASE_FAST_OK;
    return with_storage(c->dtype, [&](auto like) { return launch_as<decltype(like)>(call); });
}

}  // namespace
}  // namespace case_fast::cross_attention

extern "C" size_t case_fast_cross_attention_workspace_cuda(const case_fast_cross_attention *call) {
    using namespace case_fast::cross_attention;
    return served(call) ? Workspace(*call).bytes : 0;
}

extern "C" int case_fast_cross_attention_forward_cuda(const case_fast_cross_attention *call, const case_fast_source *sources,
                                                      const void *hidden, void *out, void *workspace, size_t workspace_bytes,
                                                      int32_t *flag, void *stream) {
    using namespace case_fast::cross_attention;
    return run(BlockCall{call, sources, hidden, out, workspace, flag, stream}, workspace_bytes);
}

extern "C" int case_fast_cross_attention_drop_cuda(int64_t count, int dtype, double output_dropout_p, uint64_t output_seed,
                                                   const uint64_t *seed_at, const void *from, const void *base, void *to,
                                                   void *stream) {
    using namespace case_fast::cross_attention;
    if (count < 0 || count >= int64_t(INT32_MAX) * 256 || dtype < CASE_FAST_F32 || dtype > CASE_FAST_BF16)
        return CASE_FAST_BAD_ARGUMENT;
    if (!(output_dropout_p >= 0 && output_dropout_p <= 1) || (count && missing({from, to}))) return CASE_FAST_BAD_ARGUMENT;
    if (!count) return CASE_FAST_OK;
    const DropCall call{count, output_dropout_p, output_seed, seed_at, from, base, to, stream};
    return case_fast::with_storage(dtype, [&](auto like) { return launch_as<decltype(like)>(call); });
}
