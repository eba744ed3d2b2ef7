// Products of rows with weights on the CPU: checks, and the division into tasks. The arithmetic is in cpu_kernels.cpp.
//
// Every task makes some rows of a product, whole, so no sum is divided. The operand with fewer rows is packed, by each task for
// itself, and the other is read as it lies: by rows of x, or transposed by rows of the weights.
#include <algorithm>

#include "common/calls.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "linear/cpu.h"
#include "linear/linear.h"

namespace {

constexpr int64_t few_products = 1 << 17;  // multiplications up to which waking a thread costs more than it takes

int check(const case_fast_linear *call, const case_fast_linear_weight *weights, std::initializer_list<const void *> arrays) {
    if (!call) return CASE_FAST_BAD_ARGUMENT;
    const case_fast_linear &c = *call;
    if (c.rows < 0 || c.groups < 0 || c.depth < 0 || c.x_row < 0 || c.x_group < 0 || c.sources < 1 || !weights)
        return CASE_FAST_BAD_ARGUMENT;
    if ((c.dtype != CASE_FAST_F32 && c.dtype != CASE_FAST_F64) || c.activation < 0 || c.activation > CASE_FAST_TANH)
        return CASE_FAST_BAD_ARGUMENT;
    int64_t outputs = 0;
    for (int32_t s = 0; s < c.sources; ++s) {
        const case_fast_linear_weight &w = weights[s];
        if (w.outputs < 0 || w.group < 0 || w.row < 0 || w.column < 0) return CASE_FAST_BAD_ARGUMENT;
        if (w.outputs > 0 && c.groups > 0 && c.depth > 0 && !w.weight) return CASE_FAST_BAD_ARGUMENT;
        outputs += w.outputs;
    }
    return c.rows > 0 && c.groups > 0 && outputs > 0 && missing(arrays) ? CASE_FAST_BAD_ARGUMENT : CASE_FAST_OK;
}

int64_t outputs_of(const case_fast_linear &c, const case_fast_linear_weight *weights) {
    int64_t outputs = 0;
    for (int32_t s = 0; s < c.sources; ++s) outputs += weights[s].outputs;
    return outputs;
}

// Calls run(group, begin, end, task) for each task's share of the `length` rows of each of `groups` groups.
template <class Run>
void share(int64_t tasks, int threads, int64_t groups, int64_t length, Run run) {
    const int64_t total = groups * length;
    case_fast_parallel(threads, tasks, [&](int64_t task) {
        const int64_t from = total * task / tasks, to = total * (task + 1) / tasks;
        for (int64_t at = from; at < to;) {
            const int64_t group = at / length, end = std::min(to, (group + 1) * length);
            run(group, at - group * length, end - group * length, task);
            at = end;
        }
    });
}

template <class T>
int forward(const case_fast_linear &c, const case_fast_linear_weight *weights, const T *x, const T *bias, T *y, T *z, int threads) {
    const LinearKernels<T> &kernel = CASE_FAST_WIDEST(linear).template of<T>();
    const int64_t outputs = outputs_of(c, weights), stride = c.groups * outputs;
    if (c.rows == 0 || stride == 0) return CASE_FAST_OK;
    const bool transposed = c.rows < outputs && c.depth <= linear_transposed;
    const int64_t length = transposed ? outputs : c.rows;
    const bool shares = c.rows * stride * std::max<int64_t>(c.depth, 1) > few_products;
    const int64_t tasks = shares ? std::max<int64_t>(1, std::min<int64_t>(threads, c.groups * length)) : 1;
    int64_t most = transposed ? kernel.scratch(c.rows, c.depth) : 0;
    for (int32_t s = 0; s < c.sources && !transposed; ++s) most = std::max(most, kernel.scratch(weights[s].outputs, c.depth));
    Workspace workspace;
    T *const scratch = workspace.take<T>(tasks * most);
    LinearRows<T> *const all_parts = workspace.take<LinearRows<T>>(tasks * c.sources);
    prepare_output(y, size_t(c.rows) * size_t(stride) * sizeof(T));
    if (z) prepare_output(z, size_t(c.rows) * size_t(stride) * sizeof(T));
    share(tasks, threads, c.groups, length, [&](int64_t group, int64_t begin, int64_t end, int64_t task) {
        T *const memory = scratch + task * most;
        LinearRows<T> *const parts = all_parts + task * c.sources;
        int64_t count = 0;
        int64_t first = 0;  // output of the whole of each weight
        for (int32_t s = 0; s < c.sources; ++s) {
            const case_fast_linear_weight &w = weights[s];
            const T *const weight = static_cast<const T *>(w.weight) + group * w.group;
            const int64_t at = group * outputs + first;
            if (transposed) {
                const int64_t from = std::max(begin - first, int64_t(0)), to = std::min(end - first, w.outputs);
                if (from < to)
                    parts[count++] = {{weight + from * w.row, w.row, w.column}, to - from, y + at + from, bias ? bias + at + from : nullptr,
                                     z ? z + at + from : nullptr};
            } else if (w.outputs > 0) {
                const LinearRows<T> rows = {{x + begin * c.x_row + group * c.x_group, c.x_row, 1}, end - begin, y + begin * stride + at,
                                            bias ? bias + at : nullptr, z ? z + begin * stride + at : nullptr};
                kernel.product({w.outputs, c.depth, {weight, w.row, w.column}, stride, false, false, c.activation}, &rows, 1, memory);
            }
            first += w.outputs;
        }
        if (transposed)
            kernel.product({c.rows, c.depth, {x + group * c.x_group, c.x_row, 1}, stride, true, false, c.activation}, parts, count,
                           memory);
    });
    return CASE_FAST_OK;
}

}  // namespace

extern "C" int case_fast_linear_forward_cpu(const case_fast_linear *call, const case_fast_linear_weight *weights, const void *x,
                                            const void *bias, void *y, void *z, int threads) {
    const int status = check(call, weights, {y});
    if (status != CASE_FAST_OK) return status;
    if (call->depth > 0 && call->rows > 0 && call->groups > 0 && !x) return CASE_FAST_BAD_ARGUMENT;
    return guarded(call->dtype, [&](auto like) {
        using T = decltype(like);
        return forward<T>(*call, weights, static_cast<const T *>(x), static_cast<const T *>(bias), static_cast<T *>(y),
                          static_cast<T *>(z), threads);
    });
}
