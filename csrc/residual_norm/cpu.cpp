// A residual and the norm that follows, on the CPU: checks, and the division into tasks. The arithmetic is in cpu_kernels.cpp.
//
// Tasks are blocks of rows whose size depends on the number of rows alone. So do the sums for the gradients of weight and bias, which
// each block makes for its rows and which are then added in the blocks' order.
#include <cmath>

#include "common/calls.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "common/workspace.h"
#include "residual_norm/cpu.h"
#include "residual_norm/residual_norm.h"

namespace {

constexpr int64_t few_elements = 1 << 13;  // up to which waking a thread costs more than it takes
constexpr int64_t most_blocks = 32, least_rows = 16, most_rows = 1024;  // most_rows: of a block, whatever most_blocks says

bool is_good(const case_fast_residual_norm *call) {
    if (!call) return false;
    const case_fast_residual_norm &c = *call;
    const bool numbers = std::isfinite(c.eps) && c.eps >= 0 && c.dropout_p >= 0 && c.dropout_p < 1;
    return c.rows >= 0 && c.width > 0 && numbers && (c.dtype == CASE_FAST_F32 || c.dtype == CASE_FAST_F64);
}

RowDropout dropout_of(const case_fast_residual_norm &c) {
    const uint32_t drop_below = uint32_t(c.dropout_p * 65536);
    return {65536.0 / (65536 - drop_below), case_fast_seed(c.seed, c.seed_at), drop_below};
}

struct Blocks {
    int64_t rows, each, count;

    explicit Blocks(int64_t rows)
        : rows(rows), each(std::clamp((rows + most_blocks - 1) / most_blocks, least_rows, most_rows)), count((rows + each - 1) / each) {}

    // body(block, its first row, the row after its last) for each block
    template <class Body>
    void run(int64_t width, int threads, Body body) const {
        case_fast_parallel(rows * width <= few_elements ? 1 : threads, count,
                           [&](int64_t block) { body(block, block * each, std::min(rows, (block + 1) * each)); });
    }
};

template <class T>
int forward(const case_fast_residual_norm &c, const void *x, const void *update, const void *weight, const void *bias, void *total,
            void *normed, void *stats, int threads) {
    const auto kernel = CASE_FAST_WIDEST(residual_norm).template of<T>().forward;
    const auto in = [](const void *array) { return static_cast<const T *>(array); };
    const auto out = [](void *array) { return static_cast<T *>(array); };
    const ResidualRows<T> a = {c.width,    dropout_of(c), c.eps,       in(x),      in(update),
                               in(weight), in(bias),      out(total),  out(normed), out(stats), out(stats) + c.rows};
    Blocks(c.rows).run(c.width, threads, [&](int64_t, int64_t begin, int64_t end) { kernel(a, begin, end); });
    return CASE_FAST_OK;
}

template <class T>
int backward(const case_fast_residual_norm &c, const void *total, const void *stats, const void *weight, const void *grad_total,
             const void *grad_normed, void *grad_x, void *grad_update, void *grad_weight, void *grad_bias, int threads) {
    const auto &kernels = CASE_FAST_WIDEST(residual_norm).template of<T>();
    const auto in = [](const void *array) { return static_cast<const T *>(array); };
    const auto out = [](void *array) { return static_cast<T *>(array); };
    const ResidualGradients<T> a = {c.width,    dropout_of(c),  in(total),       in(stats),  in(stats) + c.rows,
                                    in(weight), in(grad_total), in(grad_normed), out(grad_x), out(grad_update)};
    const Blocks blocks(c.rows);
    Workspace workspace;
    T *const parts = workspace.take<T>(2 * c.width * (blocks.count + 1)), *const sums = parts + 2 * c.width * blocks.count;
    blocks.run(c.width, threads, [&](int64_t block, int64_t begin, int64_t end) {
        kernels.backward(a, begin, end, parts + 2 * c.width * block);
    });
    if (blocks.count)
        kernels.join(blocks.count, 2 * c.width, parts, sums);
    else
        std::fill_n(sums, 2 * c.width, T(0));
    std::copy_n(sums, c.width, out(grad_weight));
    std::copy_n(sums + c.width, c.width, out(grad_bias));
    return CASE_FAST_OK;
}

template <class T>
int drop(const case_fast_residual_norm &c, const void *from, const void *base, void *to, int threads) {
    const auto kernel = CASE_FAST_WIDEST(residual_norm).template of<T>().drop;
    const RowDropout dropout = dropout_of(c);
    Blocks(c.rows).run(c.width, threads, [&](int64_t, int64_t begin, int64_t end) {
        kernel(dropout, c.width, static_cast<const T *>(from), static_cast<const T *>(base), static_cast<T *>(to), begin, end);
    });
    return CASE_FAST_OK;
}

}  // namespace

extern "C" int case_fast_residual_norm_forward_cpu(const case_fast_residual_norm *call, const void *x, const void *update,
                                                   const void *weight, const void *bias, void *total, void *normed, void *stats,
                                                   int threads) {
    if (!is_good(call) || missing({weight, bias}) || (call->rows > 0 && (missing({x, normed, stats}) || !update != !total)))
        return CASE_FAST_BAD_ARGUMENT;
    return guarded(call->dtype, [&](auto like) {
        return forward<decltype(like)>(*call, x, update, weight, bias, total, normed, stats, threads);
    });
}

extern "C" int case_fast_residual_norm_backward_cpu(const case_fast_residual_norm *call, const void *total, const void *stats,
                                                    const void *weight, const void *grad_total, const void *grad_normed, void *grad_x,
                                                    void *grad_update, void *grad_weight, void *grad_bias, int threads) {
    if (!is_good(call) || missing({weight, grad_weight, grad_bias}) ||
        (call->rows > 0 && missing({total, stats, grad_normed, grad_x})))
        return CASE_FAST_BAD_ARGUMENT;
    return guarded(call->dtype, [&](auto like) {
        return backward<decltype(like)>(*call, total, stats, weight, grad_total, grad_normed, grad_x, grad_update, grad_weight, grad_bias,
                                        threads);
    });
}

extern "C" int case_fast_residual_norm_drop_cpu(const case_fast_residual_norm *call, const void *from, const void *base, void *to,
                                                int threads) {
    if (!is_good(call) || (call->rows > 0 && missing({from, to}))) return CASE_FAST_BAD_ARGUMENT;
    return guarded(call->dtype, [&](auto like) { return drop<decltype(like)>(*call, from, base, to, threads); });
}
