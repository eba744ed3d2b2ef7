// Pooled attention on the CPU: checks, and the division into tasks. The arithmetic is in cpu_kernels.cpp.
//
// A task is a range of sequences with about as many rows as the others': sequences differ in length.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/calls.h"
#include "common/indices.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "common/workspace.h"
#include "pooled_attention/cpu.h"
#include "pooled_attention/pooled_attention.h"

namespace {

constexpr int64_t least_products = 1 << 18;  // that are worth another thread
constexpr int64_t own_rows = 4;              // what a sequence costs beside its rows, in rows

struct Offsets {
    const void *cu;
    bool wide;
    int64_t operator[](int64_t s) const { return wide ? static_cast<const int64_t *>(cu)[s] : static_cast<const int32_t *>(cu)[s]; }
};

int64_t longest(const Offsets &cu, int64_t sequences) {
    int64_t most = 0;
    for (int64_t s = 0; s < sequences; ++s) most = std::max(most, cu[s + 1] - cu[s]);
    return most;
}

template <class T>
PooledAttention<T> describe(const case_fast_pooled_attention &c, const void *query, const void *rows, const void *out, const void *lse) {
    PooledAttention<T> a = {};
    a.heads = c.heads;
    a.dim = c.dim;
    a.query_stride = c.query_stride;
    a.query_head = c.query_head;
    a.row_stride = c.row_stride;
    a.scale = T(c.scale);
    a.seed = case_fast_seed(c.seed, c.seed_at);
    a.drop_below = case_fast_drop_below(c.dropout_p);
    a.kept_scale = a.drop_below && c.dropout_p < 1 ? T(1 / (1 - c.dropout_p)) : T(1);
    a.query = static_cast<const T *>(query);
    a.rows = static_cast<const T *>(rows);
    a.out = const_cast<T *>(static_cast<const T *>(out));  // backward only reads them
    a.lse = const_cast<T *>(static_cast<const T *>(lse));
    return a;
}

template <class T, class Kernel>
int run(const case_fast_pooled_attention &c, PooledAttention<T> &a, bool backward, Kernel kernel, int threads) {
    const Offsets cu = {c.cu, c.index_bits == 64};
    a.longest = longest(cu, c.sequences);
    const int64_t products = (c.rows + own_rows * c.sequences) * c.heads * c.dim * (backward ? 5 : 2);
    const int64_t most = std::min<int64_t>(8 * int64_t(threads), c.sequences);
    const int64_t parts = threads <= 1 ? 1 : std::max<int64_t>(1, std::min(products / least_products, most));
    Workspace workspace;
    Slots<T> slots(workspace, threads, pooled_workspace(a.longest, a.heads, a.dim, backward));
    const auto first = [&](int64_t part) {  // sequence of a part: where its share of all rows begins
        const int64_t share = (c.rows + own_rows * c.sequences) * part / parts;
        int64_t low = 0, high = c.sequences;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (cu[middle] + own_rows * middle < share)
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    };
    case_fast_parallel(threads, parts, [&](int64_t part) {
        const int64_t begin = first(part), end = first(part + 1);
        slots.with([&](T *memory) {
            for (int64_t s = begin; s < end; ++s) kernel(a, {s, cu[s], cu[s + 1] - cu[s]}, memory);
        });
    });
    return CASE_FAST_OK;
}

int check(const case_fast_pooled_attention *call, std::initializer_list<const void *> of_sequences, std::initializer_list<const void *> of_rows) {
    if (!call) return CASE_FAST_BAD_ARGUMENT;
    const case_fast_pooled_attention &c = *call;
    const bool kinds = (c.dtype == CASE_FAST_F32 || c.dtype == CASE_FAST_F64) && (c.index_bits == 32 || c.index_bits == 64);
    const bool sizes = c.sequences >= 0 && c.rows >= 0 && c.heads >= 1 && c.dim >= 1 &&
                       int64_t(c.heads) * c.dim <= std::numeric_limits<int32_t>::max();
    const bool strides = c.query_stride >= 0 && c.query_head >= 0 && c.row_stride >= 0;
    const bool numbers = c.dropout_p >= 0 && c.dropout_p <= 1 && std::isfinite(c.scale);
    if (!kinds || !sizes || !strides || !numbers || !c.cu) return CASE_FAST_BAD_ARGUMENT;
    if ((c.sequences > 0 && missing(of_sequences)) || (c.rows > 0 && missing(of_rows))) return CASE_FAST_BAD_ARGUMENT;
    const bool good = c.index_bits == 64 ? rises(static_cast<const int64_t *>(c.cu), c.sequences + 1, c.rows)
                                         : rises(static_cast<const int32_t *>(c.cu), c.sequences + 1, c.rows);
    return good ? CASE_FAST_OK : CASE_FAST_BAD_CU;
}

template <class T>
const PooledKernels<T> &kernels() {
    return CASE_FAST_WIDEST(pooled_attention).template of<T>();
}

}  // namespace

extern "C" int case_fast_pooled_attention_forward_cpu(const case_fast_pooled_attention *call, const void *query, const void *rows, void *out,
                                                      void *lse, int threads) {
    if (const int status = check(call, {query, out}, {rows})) return status;
    return guarded(call->dtype, [&](auto like) {
        using T = decltype(like);
        PooledAttention<T> a = describe<T>(*call, query, rows, out, lse);
        prepare_output(out, size_t(call->sequences) * size_t(call->heads) * size_t(call->dim) * sizeof(T));
        return run(*call, a, false, kernels<T>().forward, threads);
    });
}

extern "C" int case_fast_pooled_attention_backward_cpu(const case_fast_pooled_attention *call, const void *query, const void *rows,
                                                       const void *out, const void *lse, const void *grad_out, int64_t grad_out_stride,
                                                       int64_t grad_out_head, void *grad_query, void *grad_rows, int threads) {
    if (const int status = check(call, {query, out, lse, grad_out, grad_query}, {rows, grad_rows})) return status;
    if (grad_out_stride < 0 || grad_out_head < 0) return CASE_FAST_BAD_ARGUMENT;
    return guarded(call->dtype, [&](auto like) {
        using T = decltype(like);
        PooledAttention<T> a = describe<T>(*call, query, rows, out, lse);
        a.grad_out = static_cast<const T *>(grad_out);
        a.grad_out_stride = grad_out_stride;
        a.grad_out_head = grad_out_head;
        a.grad_query = static_cast<T *>(grad_query);
        a.grad_rows = static_cast<T *>(grad_rows);
        prepare_output(grad_query, size_t(call->sequences) * size_t(call->heads) * size_t(call->dim) * sizeof(T));
        prepare_output(grad_rows, size_t(call->rows) * size_t(call->dim) * sizeof(T));
        return run(*call, a, true, kernels<T>().backward, threads);
    });
}
