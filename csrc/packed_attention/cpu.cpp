// Packed attention on the CPU: checks, the division into tasks, threads. The arithmetic is in common/attention_kernels.cpp.
//
// Forward: tasks are ranges of query rows. Backward: the gradients of a key sequence and head are one task's, so that no sum depends
// on threads.
#include <cmath>

#include "common/sequences.h"
#include "packed_attention/packed_attention.h"

namespace {

template <class T>
Attention<T> describe(const case_fast_packed_attention &c, const Keys &keys, const void *query, const void *key, const void *value) {
    Attention<T> a = {};
    a.heads = c.heads;
    a.dim = c.dim;
    a.causal = c.causal != 0;
    a.query_stride = c.query_stride;
    a.key_stride = c.key_stride;
    a.value_stride = c.value_stride;
    a.key_head = c.dim;
    a.out_stride = int64_t(c.heads) * c.dim;
    a.longest = c.dropout_p > 0 ? keys.longest() : 0;
    a.scale = T(c.scale);
    a.query = static_cast<const T *>(query);
    a.key = static_cast<const T *>(key);
    a.value = static_cast<const T *>(value);
    set_dropout(a, c.dropout_p, case_fast_seed(c.seed, c.seed_at));
    return a;
}

template <class T>
int attend(const case_fast_packed_attention &c, const Keys &keys, const void *query, const void *key, const void *value, void *out, void *lse,
            int threads) {
    const AttentionKernels<T> &kernel = attention_kernels<T>();
    Attention<T> a = describe<T>(c, keys, query, key, value);
    a.out = static_cast<T *>(out);
    a.lse = static_cast<T *>(lse);
    const auto segments = segments_of(keys, c.cu_query, c.batch, a.causal);

    std::vector<Segment> pieces;
    std::vector<int64_t> costs;
    int64_t work = 0, workspace_size = 0;
    for (const Segment &s : segments) {
        const int64_t block = attention_row_block(s.rows, s.keys);
        workspace_size = std::max(workspace_size, attention_workspace(s.rows, s.keys, false));
        for (int64_t row = s.row; row < s.row + s.rows; row += block) {
            const int64_t rows = std::min(block, s.row + s.rows - row), shift = s.shift + row - s.row;
            const int64_t seen = a.causal ? std::clamp<int64_t>(shift + rows, 0, s.keys) : s.keys;
            pieces.push_back({row, rows, s.key, s.keys, shift});
            costs.push_back(rows * (seen + 4));
            work += costs.back() * a.out_stride * 2;
        }
    }
    Workspace workspace;
    Slots<T> slots(workspace, threads, workspace_size);
    prepare_output(out, size_t(c.queries * a.out_stride) * sizeof(T));
    const int64_t parts = threads <= 1 ? 1 : std::clamp<int64_t>(work / least_work, 1, std::min<int64_t>(8 * int64_t(threads), int64_t(pieces.size()) + 1));
    const auto bounds = even_ranges(costs, parts);
    case_fast_parallel(threads, parts, [&](int64_t part) {
        slots.with([&](T *memory) {
            for (int64_t i = bounds[size_t(part)]; i < bounds[size_t(part) + 1]; ++i)
                for (int head = 0; head < a.heads; ++head) kernel.forward(a, pieces[size_t(i)], head, memory);
        });
    });
    return CASE_FAST_OK;
}

template <class T>
int backward(const case_fast_packed_attention &c, const Keys &keys, Attention<T> a, int threads) {
    const AttentionBackward<T> work(a, keys, c.cu_query, c.batch, threads);
    Workspace workspace;
    Slots<T> slots(workspace, threads, work.workspace());
    prepare_output(a.grad_query, size_t(c.queries * a.grad_query_stride) * sizeof(T));
    case_fast_parallel(threads, work.tasks(), [&](int64_t task) { slots.with([&](T *memory) { work.run(task, memory); }); });
    return CASE_FAST_OK;
}

int check(const case_fast_packed_attention *call, std::initializer_list<const void *> query_arrays, std::initializer_list<const void *> key_arrays,
          Keys *keys) {
    if (!call) return CASE_FAST_BAD_ARGUMENT;
    const case_fast_packed_attention &c = *call;
    const int64_t row = int64_t(c.heads) * c.dim;
    if (!good_kinds(c.dtype, c.index_bits, c.heads, c.dim) || c.batch < 0 || c.queries < 0 || !c.cu_query) return CASE_FAST_BAD_ARGUMENT;
    if (!(c.dropout_p >= 0 && c.dropout_p <= 1) || !std::isfinite(c.scale)) return CASE_FAST_BAD_ARGUMENT;
    if (c.query_stride < row || c.key_stride < row || c.value_stride < row) return CASE_FAST_BAD_ARGUMENT;
    if (c.queries > 0 && missing(query_arrays)) return CASE_FAST_BAD_ARGUMENT;
    if (c.keys > 0 && missing(key_arrays)) return CASE_FAST_BAD_ARGUMENT;
    *keys = {c.key_sequences, c.keys, c.cu_key, c.key_of, c.key_length, c.index_bits == 64};
    const int status = check(*keys, c.batch);
    return status ? status : check_rows(c.cu_query, keys->wide, c.batch, c.queries);
}

template <class T>
Attention<T> describe_backward(const case_fast_packed_attention &c, const Keys &keys, const void *query, const void *key, const void *value,
                               const void *out, const void *lse, const void *grad_out) {
    Attention<T> a = describe<T>(c, keys, query, key, value);
    a.out = const_cast<T *>(static_cast<const T *>(out));  // backward only reads them
    a.lse = const_cast<T *>(static_cast<const T *>(lse));
    a.grad_out = static_cast<const T *>(grad_out);
    return a;
}

}  // namespace

extern "C" int case_fast_packed_attention_forward_cpu(const case_fast_packed_attention *call, const void *query, const void *key,
                                                      const void *value, void *out, void *lse, int threads) {
    Keys keys;
    if (const int status = check(call, {query, out}, {key, value}, &keys)) return status;
    return guarded(call->dtype, [&](auto like) { return attend<decltype(like)>(*call, keys, query, key, value, out, lse, threads); });
}

extern "C" int case_fast_packed_attention_backward_cpu(const case_fast_packed_attention *call, const void *query, const void *key,
                                                       const void *value, const void *out, const void *lse, const void *grad_out,
                                                       void *grad_query, int64_t grad_query_stride, void *grad_key,
                                                       int64_t grad_key_stride, void *grad_value, int64_t grad_value_stride,
                                                       int threads) {
    Keys keys;
    if (const int status = check(call, {query, out, lse, grad_out, grad_query}, {key, value, grad_key, grad_value}, &keys)) return status;
    const int64_t row = int64_t(call->heads) * call->dim;
    if (grad_query_stride < row || grad_key_stride < row || grad_value_stride < row) return CASE_FAST_BAD_ARGUMENT;
    return guarded(call->dtype, [&](auto like) {
        using T = decltype(like);
        Attention<T> a = describe_backward<T>(*call, keys, query, key, value, out, lse, grad_out);
        a.grad_query = static_cast<T *>(grad_query);
        a.grad_key = static_cast<T *>(grad_key);
        a.grad_value = static_cast<T *>(grad_value);
        a.grad_query_stride = grad_query_stride;
        a.grad_key_stride = grad_key_stride;
        a.grad_value_stride = grad_value_stride;
        return backward(*call, keys, a, threads);
    });
}
