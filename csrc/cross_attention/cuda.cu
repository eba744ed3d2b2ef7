// Attention and the cross-attention block on CUDA: checks, choice of the plan. Kernels: cuda_tiles.cuh, cuda_rows.cuh.
#include "cross_attention/cuda.h"

#include <cmath>
#include <initializer_list>

#include "cross_attention/cuda_call.h"

namespace case_fast::cross_attention {
namespace {

constexpr int64_t MOST = INT32_MAX - 4096;  // rows and sequences, so that a tile may count a little beyond the end
constexpr int FEW_ROWS = 4;                 // of a sequence, on average: beyond, keys are better read once for several rows

bool missing(std::initializer_list<const void *> arrays) {
    for (const void *x : arrays)
        if (!x) return true;
    return false;
}
bool good_kinds(int dtype, int index_bits, int heads, int dim, double dropout_p) {
    return dtype >= CASE_FAST_F32 && dtype <= CASE_FAST_BF16 && (index_bits == 32 || index_bits == 64) && heads > 0 &&
           heads < 65536 && dim > 0 && dim <= 256 && dropout_p >= 0 && dropout_p <= 1;
}
bool few(std::initializer_list<int64_t> counts) {
    for (const int64_t count : counts)
        if (count < 0 || count >= MOST) return false;
    return true;
}

bool served(const case_fast_attention *c) {
    return c && good_kinds(c->dtype, c->index_bits, c->heads, c->dim, c->dropout_p) && std::isfinite(c->scale) &&
           few({c->batch, c->queries, c->key_sequences, c->keys, c->batch + c->queries, c->key_sequences + c->keys}) &&
           c->cu_query && c->cu_key && (c->key_of || c->key_sequences == c->batch);
}
bool served(const case_fast_cross_attention *c) {
    return c && good_kinds(c->dtype, c->index_bits, c->heads, c->dim, c->dropout_p) && c->output_dropout_p >= 0 &&
           c->output_dropout_p <= 1 && c->eps >= 0 && std::isfinite(c->eps) && few({c->batch, c->rows}) && c->rows < 65536 &&
           c->width > 0 && c->width <= 4096 && c->sources >= 0 && int64_t(c->heads) * c->dim < MOST && c->cu_hidden;
}

// What offsets of no sequences must be wrong about, whatever they hold.
int impossible(int64_t batch, int64_t rows, int64_t key_sequences, int64_t keys) {
    if (batch == 0 && rows > 0) return CASE_FAST_BAD_CU_QUERY;
    if (key_sequences == 0 && keys > 0) return CASE_FAST_BAD_CU_KEY;
    return batch > 0 && key_sequences == 0 ? CASE_FAST_BAD_KEY_OF : CASE_FAST_OK;
}

template <class C> int launched(int dtype, const C &call) {
    switch (dtype) {
        case CASE_FAST_F32:
            return launch_f32(call);
        case CASE_FAST_F64:
            return launch_f64(call);
        case CASE_FAST_F16:
            return launch_f16(call);
        default:
            return launch_bf16(call);
    }
}

int run(AttentionCall call, size_t workspace_bytes) {
    const case_fast_attention *c = call.c;
    if (!served(c) || call.plan < CASE_FAST_ATTENTION_AUTO || call.plan > CASE_FAST_ATTENTION_TILES)
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
    if (call.plan == CASE_FAST_ATTENTION_AUTO)
        call.plan = c->queries <= FEW_ROWS * c->batch ? CASE_FAST_ATTENTION_ROWS : CASE_FAST_ATTENTION_TILES;
    return c->queries || (call.backward && c->keys) ? launched(c->dtype, call) : CASE_FAST_OK;
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
                             (s.keys && (missing({s.key, s.value}) || s.key_stride < inner || s.value_stride < inner))
                         ? CASE_FAST_BAD_ARGUMENT
                         : CASE_FAST_OK;
        if (!status) status = impossible(c->batch, c->rows, s.key_sequences, s.keys);
        if (status) return status + 16 * i;
    }
    const size_t needed = Workspace(*c).bytes;
    if (needed > workspace_bytes || (needed && !call.workspace)) return CASE_FAST_BAD_ARGUMENT;
    return c->rows ? launched(c->dtype, call) : CASE_FAST_OK;
}

}  // namespace
}  // namespace case_fast::cross_attention

extern "C" size_t case_fast_packed_attention_workspace_cuda(const case_fast_attention *call, int backward) {
    using namespace case_fast::cross_attention;
    return served(call) ? Workspace(*call, backward != 0).bytes : 0;
}

extern "C" int case_fast_packed_attention_forward_cuda(const case_fast_attention *call, const void *query, const void *key,
                                                       const void *value, void *out, void *lse, int plan, void *workspace,
                                                       size_t workspace_bytes, int32_t *flag, void *stream) {
    using namespace case_fast::cross_attention;
    return run(AttentionCall{call, false, plan, query, key, value, out, lse, nullptr, nullptr, nullptr, nullptr, 0, 0, 0,
                             workspace, flag, stream},
               workspace_bytes);
}

extern "C" int case_fast_packed_attention_backward_cuda(const case_fast_attention *call, const void *query, const void *key,
                                                        const void *value, const void *out, const void *lse, const void *grad_out,
                                                        void *grad_query, int64_t grad_query_stride, void *grad_key,
                                                        int64_t grad_key_stride, void *grad_value, int64_t grad_value_stride,
                                                        void *workspace, size_t workspace_bytes, int32_t *flag, void *stream) {
    using namespace case_fast::cross_attention;
    return run(AttentionCall{call, true, CASE_FAST_ATTENTION_TILES, query, key, value, out, lse, grad_out, grad_query, grad_key,
                             grad_value, grad_query_stride, grad_key_stride, grad_value_stride, workspace, flag, stream},
               workspace_bytes);
}

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
                                                   const void *from, const void *base, void *to, void *stream) {
    using namespace case_fast::cross_attention;
    if (count < 0 || count >= int64_t(INT32_MAX) * 256 || dtype < CASE_FAST_F32 || dtype > CASE_FAST_BF16)
        return CASE_FAST_BAD_ARGUMENT;
    if (!(output_dropout_p >= 0 && output_dropout_p <= 1) || (count && missing({from, to}))) return CASE_FAST_BAD_ARGUMENT;
    return count ? launched(dtype, DropCall{count, output_dropout_p, output_seed, from, base, to, stream}) : CASE_FAST_OK;
}
