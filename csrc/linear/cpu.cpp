// Products of rows with weights on the CPU: checks, and the division into tasks. The arithmetic is in cpu_kernels.cpp.
//
// Every task makes some rows of a product, or some columns where they are more, whole, so no sum is divided. One operand is packed,
// by each task for itself, and the rows of the other are read as they lie: forward packs the weights, or x where it fills one panel, as
// backward does with the gradient.
#include <algorithm>
#include <atomic>
#include <utility>

#include "common/calls.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "linear/cpu.h"
#include "linear/linear.h"

namespace {

constexpr int64_t panel_rows = 16;         // of x that are packed in place of the weights: one vector, which they must half fill
constexpr int64_t few_products = 1 << 17;  // multiplications up to which waking a thread costs more than it takes

// kept: where backward keeps y or z, NULL for forward
int check(const case_fast_linear *call, const case_fast_linear_weight *weights, const void *x, const void *const *kept) {
    if (!call || !weights) return CASE_FAST_BAD_ARGUMENT;
    const case_fast_linear &c = *call;
    if (c.rows < 0 || c.groups < 0 || c.depth < 0 || c.x_row < 0 || c.x_group < 0 || c.sources < 1) return CASE_FAST_BAD_ARGUMENT;
    if ((c.dtype != CASE_FAST_F32 && c.dtype != CASE_FAST_F64) || c.activation < 0 || c.activation > CASE_FAST_TANH)
        return CASE_FAST_BAD_ARGUMENT;
    const bool rows = c.rows > 0 && c.groups > 0;
    bool any = false;
    for (int32_t s = 0; s < c.sources; ++s) {
        const case_fast_linear_weight &w = weights[s];
        if (w.outputs < 0 || w.group < 0 || w.row < 0 || w.column < 0 || w.y_row < 0 || w.y_group < 0) return CASE_FAST_BAD_ARGUMENT;
        if (w.outputs > 0 && c.groups > 0 && c.depth > 0 && !w.weight) return CASE_FAST_BAD_ARGUMENT;
        if (w.outputs > 0 && rows && !w.y) return CASE_FAST_BAD_ARGUMENT;
        any |= w.outputs > 0;
    }
    const bool reads_kept = kept && any && c.activation != CASE_FAST_IDENTITY;
    return rows && ((c.depth > 0 && !x) || (reads_kept && !*kept)) ? CASE_FAST_BAD_ARGUMENT : CASE_FAST_OK;
}

int64_t outputs_of(const case_fast_linear &c, const case_fast_linear_weight *weights) {
    int64_t outputs = 0;
    for (int32_t s = 0; s < c.sources; ++s) outputs += weights[s].outputs;
    return outputs;
}

// Calls run(task, worker) for each task; those of one worker do not overlap.
template <class Run>
void in_turn(int64_t workers, int64_t tasks, Run run) {
    std::atomic<int64_t> next{0};
    case_fast_parallel(int(workers), workers, [&](int64_t worker) {
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run(task, worker);
    });
}

// Calls run(group, begin, end) for the share of task `task` of `tasks` in the `length` rows of each of `groups` groups.
template <class Run>
void share(int64_t task, int64_t tasks, int64_t groups, int64_t length, Run run) {
    const int64_t total = groups * length, to = total * (task + 1) / tasks;
    for (int64_t at = total * task / tasks; at < to;) {
        const int64_t group = at / length, end = std::min(to, (group + 1) * length);
        run(group, at - group * length, end - group * length);
        at = end;
    }
}

int64_t workers_for(const case_fast_linear &c, int64_t outputs, int threads) {
    return c.rows * c.groups * outputs * std::max<int64_t>(c.depth, 1) > few_products ? std::max(threads, 1) : 1;
}

// Whether so many rows are packed, and the product is stored transposed.
bool fill_panel(int64_t rows, int64_t depth) { return rows > panel_rows / 2 && rows <= panel_rows && depth <= linear_transposed; }

// Outputs [begin, end) of all: calls part(weight, the number of its first output, from, to) for each weight that has some.
template <class Part>
void each_part(const case_fast_linear &c, const case_fast_linear_weight *weights, int64_t begin, int64_t end, Part part) {
    int64_t first = 0;
    for (int32_t s = 0; s < c.sources; first += weights[s++].outputs) {
        const int64_t from = std::max(begin - first, int64_t(0)), to = std::min(end - first, weights[s].outputs);
        if (from < to) part(weights[s], first, from, to);
    }
}

// Row `row` of a group of y or grad_y of a weight.
template <class T>
T *result_of(const case_fast_linear_weight &w, int64_t row, int64_t group) {
    return static_cast<T *>(w.y) + row * w.y_row + group * w.y_group;
}

template <class T>
int forward(const case_fast_linear &c, const case_fast_linear_weight *weights, const T *x, const T *bias, T *z, int threads) {
    const LinearKernels<T> &kernel = CASE_FAST_KERNELS(linear, T, c.bf16);
    const int64_t outputs = outputs_of(c, weights), stride = c.groups * outputs;
    if (c.rows == 0 || stride == 0) return CASE_FAST_OK;
    const bool wide = c.rows < outputs;
    const bool transposed = wide && fill_panel(c.rows, c.depth);
    const int64_t length = wide ? outputs : c.rows, workers = workers_for(c, outputs, threads);
    const int64_t most = kernel.scratch(transposed ? c.rows : outputs, c.depth);
    Workspace workspace;
    T *const scratch = workspace.take<T>(workers * most);
    LinearRows<T> *const all_parts = workspace.take<LinearRows<T>>(workers * c.sources);
    for (int32_t s = 0; s < c.sources; ++s) prepare_output(weights[s].y, size_t((c.rows - 1) * weights[s].y_row) * sizeof(T));
    if (z) prepare_output(z, size_t(c.rows) * size_t(stride) * sizeof(T));
    const auto of_weights = [&](int64_t group, int64_t begin, int64_t end, int64_t worker) {
        LinearRows<T> *const parts = all_parts + worker * c.sources;
        int64_t count = 0;
        each_part(c, weights, begin, end, [&](const case_fast_linear_weight &w, int64_t first, int64_t from, int64_t to) {
            const int64_t at = group * outputs + first + from;
            parts[count++] = {{static_cast<const T *>(w.weight) + group * w.group + from * w.row, w.row, w.column}, to - from,
                              result_of<T>(w, 0, group) + from, w.y_row, bias ? bias + at : nullptr, z ? z + at : nullptr, stride};
        });
        kernel.product({c.rows, c.depth, {x + group * c.x_group, c.x_row, 1}, true, false, c.activation}, parts, count,
                       scratch + worker * most);
    };
    const auto of_rows = [&](int64_t group, int64_t row, int64_t last_row, int64_t begin, int64_t end, int64_t worker) {
        each_part(c, weights, begin, end, [&](const case_fast_linear_weight &w, int64_t first, int64_t from, int64_t to) {
            const int64_t column = group * outputs + first + from;
            const LinearRows<T> rows = {{x + row * c.x_row + group * c.x_group, c.x_row, 1}, last_row - row,
                                        result_of<T>(w, row, group) + from, w.y_row, bias ? bias + column : nullptr,
                                        z ? z + row * stride + column : nullptr, stride};
            const LinearOperand<T> b = {static_cast<const T *>(w.weight) + group * w.group + from * w.row, w.row, w.column};
            kernel.product({to - from, c.depth, b, false, false, c.activation}, &rows, 1, scratch + worker * most);
        });
    };
    in_turn(workers, workers, [&](int64_t task, int64_t worker) {
        share(task, workers, c.groups, length, [&](int64_t group, int64_t begin, int64_t end) {
            if (transposed)
                of_weights(group, begin, end, worker);
            else if (wide)
                of_rows(group, 0, c.rows, begin, end, worker);
            else
                of_rows(group, begin, end, 0, outputs, worker);
        });
    });
    return CASE_FAST_OK;
}

bool rows_are_dense(const case_fast_linear &c, const case_fast_linear_weight &w) { return w.grad_column == 1 || c.depth <= 1; }

template <class T>
int backward(const case_fast_linear &c, const case_fast_linear_weight *weights, const T *x, const T *kept, T *grad_x, T *grad_bias,
             int threads) {
    const LinearKernels<T> &kernel = CASE_FAST_KERNELS(linear, T, c.bf16);
    const int64_t outputs = outputs_of(c, weights), stride = c.groups * outputs, workers = workers_for(c, outputs, threads);
    const int64_t blocks = (c.rows + linear_rows - 1) / linear_rows;
    const bool differs = c.activation != CASE_FAST_IDENTITY;
    int64_t most = grad_x ? kernel.scratch(c.depth, outputs) : 0, along = 0;  // along: outputs of weights whose rows are dense
    for (int32_t s = 0; s < c.sources; ++s) {
        const case_fast_linear_weight &w = weights[s];
        if (!w.grad) continue;
        const bool dense = rows_are_dense(c, w);
        along += dense ? w.outputs : 0;
        most = std::max(most, kernel.scratch(dense ? c.depth : w.outputs, c.rows));
    }
    Workspace workspace;
    T *const scratch = workspace.take<T>(workers * most);
    T *const differentiated = differs ? workspace.take<T>(c.rows * stride) : nullptr;
    T *const sums = grad_bias ? workspace.take<T>(blocks * stride) : nullptr;
    LinearRows<T> *const all_parts = workspace.take<LinearRows<T>>(workers * c.sources);
    if (grad_x) prepare_output(grad_x, size_t(c.rows) * size_t(c.groups) * size_t(c.depth) * sizeof(T));

    if (differs || grad_bias)
        in_turn(std::min(workers, std::max<int64_t>(blocks, 1)), blocks, [&](int64_t block, int64_t) {
            const int64_t row = block * linear_rows, rows = std::min(linear_rows, c.rows - row);
            for (int64_t group = 0; group < c.groups; ++group)
                each_part(c, weights, 0, outputs, [&](const case_fast_linear_weight &w, int64_t first, int64_t, int64_t) {
                    const int64_t column = group * outputs + first, at = row * stride + column;
                    kernel.differentiate(c.activation, rows, w.outputs, result_of<T>(w, row, group), w.y_row, differs ? kept + at : nullptr,
                                         differs ? differentiated + at : nullptr, stride,
                                         grad_bias ? sums + block * stride + column : nullptr);
                });
        });
    if (grad_bias) std::fill_n(grad_bias, stride, T(0));
    for (int64_t block = 0; grad_bias && block < blocks; ++block)
        for (int64_t j = 0; j < stride; ++j) grad_bias[j] += sums[block * stride + j];
    const auto grad_z = [&](const case_fast_linear_weight &w, int64_t first, int64_t row, int64_t group) {
        return differs ? differentiated + row * stride + group * outputs + first : result_of<T>(w, row, group);
    };
    const auto z_row = [&](const case_fast_linear_weight &w) { return differs ? stride : w.y_row; };

    // the gradients of weights whose rows are dense: their rows [begin, end), end to end
    const auto of_rows = [&](int64_t group, int64_t begin, int64_t end, int64_t worker) {
        LinearRows<T> *const parts = all_parts + worker * c.sources;
        int64_t count = 0, first = 0, place = 0;
        for (int32_t s = 0; s < c.sources; first += weights[s++].outputs) {
            const case_fast_linear_weight &w = weights[s];
            if (!w.grad || !rows_are_dense(c, w)) continue;
            const int64_t from = std::max(begin - place, int64_t(0)), to = std::min(end - place, w.outputs);
            place += w.outputs;
            if (from < to)
                parts[count++] = {{grad_z(w, first, 0, group) + from, 1, z_row(w)}, to - from,
                                  static_cast<T *>(w.grad) + group * w.grad_group + from * w.grad_row, w.grad_row, nullptr, nullptr, 0};
        }
        kernel.product({c.depth, c.rows, {x + group * c.x_group, 1, c.x_row}, false, false, CASE_FAST_IDENTITY}, parts, count,
                       scratch + worker * most);
    };
    // the gradient of a weight whose columns are dense: its columns [begin, end)
    const auto of_columns = [&](const case_fast_linear_weight &w, int64_t first, int64_t group, int64_t begin, int64_t end, int64_t worker) {
        const LinearRows<T> rows = {{x + group * c.x_group + begin, 1, c.x_row}, end - begin,
                                    static_cast<T *>(w.grad) + group * w.grad_group + begin * w.grad_column, w.grad_column, nullptr, nullptr, 0};
        kernel.product({w.outputs, c.rows, {grad_z(w, first, 0, group), 1, z_row(w)}, false, false, CASE_FAST_IDENTITY}, &rows, 1,
                       scratch + worker * most);
    };
    const bool transposed = c.rows < c.depth && c.sources == 1 && fill_panel(c.rows, outputs);
    const auto of_x = [&](int64_t group, int64_t row, int64_t last_row, int64_t begin, int64_t end, int64_t worker) {
        T *const to = grad_x + (row * c.groups + group) * c.depth + begin;
        bool more = false;
        const auto add = [&](LinearOperand<T> a, int64_t count, LinearOperand<T> b) {
            int64_t rows = last_row - row, columns = end - begin;
            if (transposed) std::swap(a, b), std::swap(rows, columns);
            const LinearRows<T> part = {a, rows, to, c.groups * c.depth, nullptr, nullptr, 0};
            kernel.product({columns, count, b, transposed, more, CASE_FAST_IDENTITY}, &part, 1, scratch + worker * most);
            more = true;
        };
        each_part(c, weights, 0, outputs, [&](const case_fast_linear_weight &w, int64_t first, int64_t, int64_t) {
            add({grad_z(w, first, row, group), z_row(w), 1}, w.outputs,
                {static_cast<const T *>(w.weight) + group * w.group + begin * w.column, w.column, w.row});
        });
        if (!more) add({x, 1, 1}, 0, {x, 1, 1});  // zeros
    };
    in_turn(workers, 3 * workers, [&](int64_t task, int64_t worker) {
        const int64_t part = task % workers;
        if (task < workers) {
            share(part, workers, c.groups, along, [&](int64_t group, int64_t begin, int64_t end) { of_rows(group, begin, end, worker); });
        } else if (task < 2 * workers) {
            int64_t first = 0;
            for (int32_t s = 0; s < c.sources; first += weights[s++].outputs)
                if (weights[s].grad && !rows_are_dense(c, weights[s]))
                    share(part, workers, c.groups, c.depth, [&](int64_t group, int64_t begin, int64_t end) {
                        of_columns(weights[s], first, group, begin, end, worker);
                    });
        } else if (grad_x) {
            const bool wide = c.rows < c.depth;
            share(part, workers, c.groups, wide ? c.depth : c.rows, [&](int64_t group, int64_t begin, int64_t end) {
                wide ? of_x(group, 0, c.rows, begin, end, worker) : of_x(group, begin, end, 0, c.depth, worker);
            });
        }
    });
    return CASE_FAST_OK;
}

}  // namespace

extern "C" int case_fast_linear_forward_cpu(const case_fast_linear *call, const case_fast_linear_weight *weights, const void *x,
                                            const void *bias, void *z, int threads) {
    const int status = check(call, weights, x, nullptr);
    if (status != CASE_FAST_OK) return status;
    return guarded(call->dtype, [&](auto like) {
        using T = decltype(like);
        return forward<T>(*call, weights, static_cast<const T *>(x), static_cast<const T *>(bias), static_cast<T *>(z), threads);
    });
}

extern "C" int case_fast_linear_backward_cpu(const case_fast_linear *call, const case_fast_linear_weight *weights, const void *x,
                                             const void *kept, void *grad_x, void *grad_bias, int threads) {
    const int status = check(call, weights, x, &kept);
    if (status != CASE_FAST_OK) return status;
    for (int32_t s = 0; s < call->sources; ++s) {
        const case_fast_linear_weight &w = weights[s];
        if (!w.grad) continue;
        const bool dense = w.grad_column == 1 || w.grad_row == 1 || call->depth <= 1 || w.outputs <= 1;
        if (w.grad_group < 0 || w.grad_row < 0 || w.grad_column < 0 || !dense) return CASE_FAST_BAD_ARGUMENT;
    }
    return guarded(call->dtype, [&](auto like) {
        using T = decltype(like);
        return backward<T>(*call, weights, static_cast<const T *>(x), static_cast<const T *>(kept), static_cast<T *>(grad_x),
                           static_cast<T *>(grad_bias), threads);
    });
}
