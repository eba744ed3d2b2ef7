// The cross-attention block on the CPU: checks, the division into tasks, threads. The arithmetic is in cpu_kernels.cpp, that of the
// attention in common/attention_kernels.cpp.
//
// Forward: tasks are ranges of rows, where one thread takes its rows through all sources without waiting for another, unless rows
// are too few for that. Backward: the gradients of a key sequence and head are one task's, so that no sum depends on threads; of
// the block's weights, each element is one sum over all rows.
#include <cmath>
#include <cstddef>
#include <cstring>

#include "common/sequences.h"
#include "cross_attention/cpu.h"
#include "cross_attention/cross_attention.h"

namespace {

constexpr int64_t most_rows = 60;  // of a task: a multiple of all tiles
constexpr int64_t few_rows = 4;    // of a task: a tile of rows shares each weight that is read

template <class T>
const BlockKernels<T> &block_kernels() {
    return CASE_FAST_WIDEST(cross_attention).of<T>();
}

bool over_rows(const case_fast_source &s) { return s.key_weight != nullptr; }  // no keys and values are given, but what they are made of
int64_t lifted_row(const case_fast_cross_attention &c) { return int64_t(c.heads) * c.width; }

template <class T>
struct Saved {  // of one source
    T *normalised, *inverse_deviation, *query, *attended, *lse;
    T *lifted, *pooled;  // over rows: query and output of the attention, whose heads are as wide as rows
};
int64_t saved_elements(const case_fast_cross_attention &c, const case_fast_source &s) {
    const int64_t more = over_rows(s) ? 2 * lifted_row(c) : 0;
    return c.rows * (int64_t(c.width) + 1 + 2 * int64_t(c.heads) * c.dim + c.heads + more);
}
template <class T>
Saved<T> saved_of(const case_fast_cross_attention &c, const case_fast_source *sources, T *saved, int source) {
    const int64_t row = int64_t(c.heads) * c.dim;
    for (int i = 0; i < source; ++i) saved += saved_elements(c, sources[i]);
    T *const inverse = saved + c.rows * c.width, *const query = inverse + c.rows, *const attended = query + c.rows * row;
    T *const lse = attended + c.rows * row, *const lifted = lse + c.rows * c.heads;
    return {saved, inverse, query, attended, lse, lifted, lifted + c.rows * lifted_row(c)};
}

Keys keys_of(const case_fast_cross_attention &c, const case_fast_source &s) {
    return {s.key_sequences, s.keys, s.cu_key, s.key_of, s.key_length, c.index_bits == 64};
}

template <class T>
Attention<T> describe(const case_fast_cross_attention &c, const case_fast_source &s) {
    Attention<T> a = {};
    const bool over = over_rows(s);
    a.heads = c.heads;
    a.dim = over ? c.width : c.dim;
    a.query_stride = a.out_stride = int64_t(a.heads) * a.dim;
    a.key_stride = s.key_stride;
    a.value_stride = over ? s.key_stride : s.value_stride;
    a.key_head = over ? 0 : a.dim;
    a.longest = c.dropout_p > 0 ? keys_of(c, s).longest() : 0;
    a.scale = T(1 / std::sqrt(double(c.dim)));
    a.key = static_cast<const T *>(s.key);
    a.value = over ? a.key : static_cast<const T *>(s.value);
    set_dropout(a, c.dropout_p, case_fast_seed(s.seed, c.seed_at));
    return a;
}
// What the attention of a source reads and writes of what is kept of it.
template <class T>
void attend_to(Attention<T> &a, const case_fast_source &s, const Saved<T> &kept) {
    a.query = over_rows(s) ? kept.lifted : kept.query;
    a.out = over_rows(s) ? kept.pooled : kept.attended;
    a.lse = kept.lse;
}
// Of a source over rows: to = W^T of each head's part of from (rows, H, dim), or W of from (rows, H, width); weight (H, dim, width).
template <class T>
void lift(const case_fast_cross_attention &c, const void *weight, int64_t rows, const T *from, T *to) {
    const int64_t dim = c.dim, width = c.width, of_head = dim * width;
    for (int64_t head = 0; head < c.heads; ++head)
        block_kernels<T>().multiply(rows, width, dim, from + head * dim, c.heads * dim, 1, static_cast<const T *>(weight) + head * of_head, width,
                                    to + head * width, lifted_row(c));
}
template <class T>
void lower(const case_fast_cross_attention &c, const void *weight, int64_t rows, const T *from, T *to) {
    const int64_t dim = c.dim, width = c.width, of_head = dim * width;
    for (int64_t head = 0; head < c.heads; ++head)
        block_kernels<T>().multiply_transposed(rows, dim, width, from + head * width, lifted_row(c),
                                               static_cast<const T *>(weight) + head * of_head, width, to + head * dim, c.heads * dim);
}
ElementDropout output_dropout(const case_fast_cross_attention &c, const case_fast_source &s) {
    const uint64_t below = case_fast_drop_below(c.output_dropout_p);
    return {case_fast_seed(s.output_seed, c.seed_at), below, below && c.output_dropout_p < 1 ? 1 / (1 - c.output_dropout_p) : 1};
}

template <class T>
struct BlockForward {
    const case_fast_cross_attention &c;
    const case_fast_source *sources;
    const T *hidden;
    T *out, *saved;  // saved: NULL where nothing is to be kept
    int threads;
    const AttentionKernels<T> &attention = attention_kernels<T>();
    const BlockKernels<T> &kernel = block_kernels<T>();
    const int64_t width = c.width, row = int64_t(c.heads) * c.dim;
    const int64_t aligned_width = (width + 15) / 16 * 16, aligned_row = (row + 15) / 16 * 16;
    int64_t aligned_lifted = 0;  // where a source is over rows
    std::vector<Attention<T>> attentions = {};
    std::vector<std::vector<Owned>> segments = {};
    int64_t attention_size = 0;  // elements of workspace

    void describe_sources() {
        for (int i = 0; i < c.sources; ++i) {
            attentions.push_back(describe<T>(c, sources[i]));
            if (over_rows(sources[i])) aligned_lifted = (lifted_row(c) + 15) / 16 * 16;
            segments.push_back(segments_of(keys_of(c, sources[i]), c.cu_hidden, c.batch, false));
            for (const Segment &s : segments.back()) attention_size = std::max(attention_size, attention_workspace(most_rows, s.keys, false));
        }
    }
    // What is kept of a source from row `begin` on. Where nothing is to be kept, queries and attended rows lie in `memory`.
    Saved<T> kept_of(int source, int64_t begin, T *memory, int64_t rows) const {
        T *const attended = memory + rows * aligned_row, *const lifted = attended + rows * aligned_row;
        if (!saved) return {nullptr, nullptr, memory, attended, nullptr, lifted, lifted + rows * aligned_lifted};
        Saved<T> kept = saved_of(c, sources, saved, source);
        kept.normalised += begin * width;
        kept.inverse_deviation += begin;
        kept.query += begin * row;
        kept.attended += begin * row;
        kept.lse += begin * c.heads;
        kept.lifted += begin * lifted_row(c);
        kept.pooled += begin * lifted_row(c);
        return kept;
    }
    void normalise(int source, int64_t rows, const T *state, T *normed, const Saved<T> &kept) const {
        const case_fast_source &s = sources[source];
        kernel.normalise(rows, width, state, static_cast<const T *>(s.norm_weight), static_cast<const T *>(s.norm_bias), c.eps, normed,
                         kept.normalised, kept.inverse_deviation);
    }
    Attention<T> attention_of(int source, int64_t begin, const Saved<T> &kept) const {
        Attention<T> a = attentions[size_t(source)];
        attend_to(a, sources[source], kept);
        a.first = begin;
        return a;
    }

    // Each thread takes its rows through all sources, without waiting for another.
    void by_rows() const {
        std::vector<int64_t> costs(size_t(c.rows), 1 + int64_t(c.sources) * width);  // of a row, in keys
        for (const auto &all : segments)
            for (const Segment &s : all)
                for (int64_t r = s.row; r < s.row + s.rows; ++r) costs[size_t(r)] += 2 * s.keys;
        int64_t parts = (c.rows + most_rows - 1) / most_rows;
        if (threads > 1) parts = std::max(parts, std::min(c.rows / few_rows, int64_t(threads) * (c.rows >= 64 * int64_t(threads) ? 4 : 1)));
        parts = std::max<int64_t>(parts, 1);
        const auto bounds = even_ranges(costs, parts);
        int64_t most = 1;
        for (size_t i = 0; i + 1 < bounds.size(); ++i) most = std::max(most, bounds[i + 1] - bounds[i]);

        Workspace workspace;
        Slots<T> slots(workspace, threads, attention_size + most * (2 * aligned_width + 2 * aligned_row + 2 * aligned_lifted));
        case_fast_parallel(threads, parts, [&](int64_t part) {
            const int64_t begin = bounds[size_t(part)], rows = bounds[size_t(part) + 1] - begin;
            if (rows == 0) return;
            slots.with([&](T *memory) {
                T *const weights = memory, *const normed = weights + attention_size, *const projected = normed + rows * aligned_width;
                T *const state = out + begin * width;
                std::memcpy(state, hidden + begin * width, size_t(rows * width) * sizeof(T));
                for (int i = 0; i < c.sources; ++i) {
                    const case_fast_source &s = sources[i];
                    const Saved<T> kept = kept_of(i, begin, projected + rows * aligned_width, rows);
                    normalise(i, rows, state, normed, kept);
                    kernel.multiply_transposed(rows, row, width, normed, width, static_cast<const T *>(s.query_weight), width, kept.query, row);
                    if (over_rows(s)) lift(c, s.key_weight, rows, kept.query, kept.lifted);
                    const Attention<T> a = attention_of(i, begin, kept);
                    each_part(segments[size_t(i)], begin, begin + rows, [&](Segment segment) {
                        segment.row -= begin;
                        for (int head = 0; head < c.heads; ++head) attention.forward(a, segment, head, weights);
                    });
                    if (over_rows(s)) lower(c, s.value_weight, rows, kept.pooled, kept.attended);
                    kernel.multiply_transposed(rows, width, row, kept.attended, row, static_cast<const T *>(s.output_weight), row, projected,
                                               width);
                    kernel.drop(output_dropout(c, s), begin * width, rows * width, projected, state, true);
                }
            });
        });
    }

    // Rows too few for two tasks, and keys and values given: each thread has its columns of the products and its share of the keys, and waits for the others
    // in between.
    void by_columns() const {
        Workspace workspace;
        const int64_t rows = c.rows, heads = c.heads;
        T *const shared = workspace.take<T>(2 * rows * aligned_row);
        Slots<T> slots(workspace, threads, std::max(attention_size, rows * aligned_width));
        const auto column = [this](int64_t part, int64_t columns) { return std::min((columns * part / threads + 7) / 8 * 8, columns); };
        std::vector<std::vector<int64_t>> shares;  // of a source's segments and heads, for each thread
        for (const auto &all : segments) {
            std::vector<int64_t> costs;
            for (const Segment &segment : all) costs.insert(costs.end(), size_t(heads), 8 + segment.keys + segment.rows);
            shares.push_back(even_ranges(costs, threads));
        }
        std::memcpy(out, hidden, size_t(rows * width) * sizeof(T));
        for (int i = 0; i < c.sources; ++i) {
            const case_fast_source &s = sources[i];
            const Saved<T> kept = kept_of(i, 0, shared, rows);
            case_fast_parallel(threads, threads, [&](int64_t part) {
                slots.with([&](T *normed) {
                    const int64_t begin = column(part, row), columns = column(part + 1, row) - begin;
                    normalise(i, rows, out, normed, part == 0 ? kept : Saved<T>{});
                    kernel.multiply_transposed(rows, columns, width, normed, width, static_cast<const T *>(s.query_weight) + begin * width, width,
                                               kept.query + begin, row);
                });
            });
            const Attention<T> a = attention_of(i, 0, kept);
            const auto &share = shares[size_t(i)];
            case_fast_parallel(threads, threads, [&](int64_t part) {
                slots.with([&](T *weights) {
                    for (int64_t task = share[size_t(part)]; task < share[size_t(part) + 1]; ++task)
                        attention.forward(a, segments[size_t(i)][size_t(task / heads)], int(task % heads), weights);
                });
            });
            case_fast_parallel(threads, threads, [&](int64_t part) {
                slots.with([&](T *projected) {
                    const int64_t begin = column(part, width), columns = column(part + 1, width) - begin;
                    kernel.multiply_transposed(rows, columns, row, kept.attended, row, static_cast<const T *>(s.output_weight) + begin * row, row,
                                               projected, columns);
                    for (int64_t r = 0; r < rows; ++r)
                        kernel.drop(output_dropout(c, s), r * width + begin, columns, projected + r * columns, out + r * width + begin, true);
                });
            });
        }
    }
};

template <class T>
int block_forward(const case_fast_cross_attention &c, const case_fast_source *sources, const void *hidden, void *out, void *saved, int threads) {
    BlockForward<T> block = {c, sources, static_cast<const T *>(hidden), static_cast<T *>(out), static_cast<T *>(saved), threads};
    block.describe_sources();
    const bool one_task = c.rows < 2 * few_rows && block.aligned_lifted == 0;  // by rows
    if (threads > 1 && one_task && 2 * c.rows * c.sources * c.heads * c.dim * c.width >= least_work)
        block.by_columns();
    else
        block.by_rows();
    return CASE_FAST_OK;
}

template <class T>
int block_backward(const case_fast_cross_attention &c, const case_fast_source *sources, const void *saved, const void *grad_out, void *grad_hidden,
             const case_fast_source_gradients *gradients, int threads) {
    const BlockKernels<T> &kernel = block_kernels<T>();
    const int64_t width = c.width, row = int64_t(c.heads) * c.dim;
    const int64_t chunks = (c.rows + most_rows - 1) / most_rows;
    const auto chunk_rows = [&](int64_t chunk) { return std::min(most_rows, c.rows - chunk * most_rows); };

    std::vector<Keys> keys;
    keys.reserve(size_t(c.sources));
    for (int i = 0; i < c.sources; ++i) keys.push_back(keys_of(c, sources[i]));
    std::vector<Attention<T>> attentions;
    attentions.reserve(size_t(c.sources));
    std::vector<AttentionBackward<T>> works;
    works.reserve(size_t(c.sources));
    int64_t slot_size = most_rows * width;
    for (int i = 0; i < c.sources; ++i) {
        attentions.push_back(describe<T>(c, sources[i]));
        works.emplace_back(attentions.back(), keys[size_t(i)], c.cu_hidden, c.batch, threads);
        slot_size = std::max(slot_size, works.back().workspace());
    }
    Workspace workspace;
    Slots<T> slots(workspace, threads, slot_size);
    T *const grad_projected = workspace.take<T>(c.rows * width), *const normed = workspace.take<T>(c.rows * width);
    T *const grad_attended = workspace.take<T>(c.rows * row), *const grad_query = workspace.take<T>(c.rows * row);
    const int64_t lifted = std::any_of(sources, sources + c.sources, over_rows) ? c.rows * lifted_row(c) : 0;
    T *const grad_pooled = workspace.take<T>(lifted), *const grad_lifted = workspace.take<T>(lifted);
    T *const norm_grads = workspace.take<T>(chunks * 2 * width);
    T *const grad = static_cast<T *>(grad_hidden);
    std::copy_n(static_cast<const T *>(grad_out), c.rows * width, grad);

    for (int i = c.sources - 1; i >= 0; --i) {
        const case_fast_source &s = sources[i];
        const case_fast_source_gradients &g = gradients[i];
        const Saved<T> kept = saved_of(c, sources, const_cast<T *>(static_cast<const T *>(saved)), i);  // backward only reads it
        const bool over = over_rows(s);
        const T *const query_weight = static_cast<const T *>(s.query_weight), *const output_weight = static_cast<const T *>(s.output_weight);
        case_fast_parallel(threads, chunks, [&](int64_t chunk) {
            const int64_t begin = chunk * most_rows, rows = chunk_rows(chunk);
            kernel.drop(output_dropout(c, s), begin * width, rows * width, grad + begin * width, grad_projected + begin * width, false);
            kernel.multiply(rows, row, width, grad_projected + begin * width, width, 1, output_weight, row, grad_attended + begin * row, row);
            if (over) lift(c, s.value_weight, rows, grad_attended + begin * row, grad_pooled + begin * lifted_row(c));
        });
        Attention<T> &a = attentions[size_t(i)];
        attend_to(a, s, kept);
        a.grad_out = over ? grad_pooled : grad_attended;
        a.grad_query = over ? grad_lifted : grad_query;
        a.grad_key = static_cast<T *>(g.key);
        a.grad_value = static_cast<T *>(over ? g.key : g.value);
        a.grad_query_stride = a.query_stride;
        a.grad_key_stride = a.grad_value_stride = over ? width : row;
        const AttentionBackward<T> &work = works[size_t(i)];
        case_fast_parallel(threads, work.tasks(), [&](int64_t task) { slots.with([&](T *memory) { work.run(task, memory); }); });
        case_fast_parallel(threads, chunks, [&](int64_t chunk) {
            slots.with([&](T *grad_normed) {
                const int64_t begin = chunk * most_rows, rows = chunk_rows(chunk);
                const T *const weight = static_cast<const T *>(s.norm_weight);
                T *const partial = norm_grads + chunk * 2 * width;
                std::fill_n(partial, 2 * width, T(0));
                if (over) lower(c, s.key_weight, rows, grad_lifted + begin * lifted_row(c), grad_query + begin * row);
                kernel.scale_and_shift(rows, width, kept.normalised + begin * width, weight, static_cast<const T *>(s.norm_bias),
                                       normed + begin * width);
                kernel.multiply(rows, width, row, grad_query + begin * row, row, 1, query_weight, width, grad_normed, width);
                kernel.normalise_backward(rows, width, kept.normalised + begin * width, kept.inverse_deviation + begin, weight, grad_normed,
                                          grad + begin * width, partial);
            });
        });
        const int64_t output_tasks = (width + most_rows - 1) / most_rows, query_tasks = (row + most_rows - 1) / most_rows;
        const int64_t of_head = (c.dim + most_rows - 1) / most_rows, over_tasks = over ? 2 * c.heads * of_head : 0;
        case_fast_parallel(threads, over_tasks + output_tasks + query_tasks + 1, [&](int64_t number) {
            const int64_t task = number - over_tasks;
            if (task < 0) {  // key_weight, then value_weight, head by head
                const bool of_value = number >= over_tasks / 2;
                const int64_t head = number / of_head % c.heads, first = number % of_head * most_rows, at = head * c.dim + first;
                kernel.multiply(std::min(most_rows, c.dim - first), width, c.rows, (of_value ? grad_attended : kept.query) + at, 1, row,
                                (of_value ? kept.pooled : grad_lifted) + head * width, lifted_row(c),
                                static_cast<T *>(of_value ? g.value_weight : g.key_weight) + at * width, width);
            } else if (task < output_tasks) {
                const int64_t first = task * most_rows, rows = std::min(most_rows, width - first);
                kernel.multiply(rows, row, c.rows, grad_projected + first, 1, width, kept.attended, row,
                                static_cast<T *>(g.output_weight) + first * row, row);
            } else if (task < output_tasks + query_tasks) {
                const int64_t first = (task - output_tasks) * most_rows, rows = std::min(most_rows, row - first);
                kernel.multiply(rows, width, c.rows, grad_query + first, 1, row, normed, width,
                                static_cast<T *>(g.query_weight) + first * width, width);
            } else {
                T *const both[] = {static_cast<T *>(g.norm_weight), static_cast<T *>(g.norm_bias)};
                for (int64_t j = 0; j < 2 * width; ++j) {
                    T sum = 0;
                    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += norm_grads[chunk * 2 * width + j];
                    both[j / width][j % width] = sum;
                }
            }
        });
    }
    return CASE_FAST_OK;
}

int check(const case_fast_cross_attention *call, const case_fast_source *sources, std::initializer_list<const void *> row_arrays) {
    if (!call) return CASE_FAST_BAD_ARGUMENT;
    const case_fast_cross_attention &c = *call;
    const int64_t row = int64_t(c.heads) * c.dim;
    if (!good_kinds(c.dtype, c.index_bits, c.heads, c.dim) || c.batch < 0 || c.rows < 0 || c.width < 1 || c.sources < 0) return CASE_FAST_BAD_ARGUMENT;
    if (!(c.dropout_p >= 0 && c.dropout_p <= 1) || !(c.output_dropout_p >= 0 && c.output_dropout_p <= 1)) return CASE_FAST_BAD_ARGUMENT;
    if (!(c.eps >= 0 && std::isfinite(c.eps)) || !c.cu_hidden || (c.sources > 0 && !sources)) return CASE_FAST_BAD_ARGUMENT;
    if (c.rows > 0 && missing(row_arrays)) return CASE_FAST_BAD_ARGUMENT;
    const bool wide = c.index_bits == 64;
    if (const int status = check_rows(c.cu_hidden, wide, c.batch, c.rows)) return status;
    for (int i = 0; i < c.sources; ++i) {
        const case_fast_source &s = sources[i];
        int status = missing({s.norm_weight, s.norm_bias, s.query_weight, s.output_weight}) ? CASE_FAST_BAD_ARGUMENT : CASE_FAST_OK;
        const bool over = over_rows(s), strides = over ? s.key_stride >= c.width : s.key_stride >= row && s.value_stride >= row;
        if (over != (s.value_weight != nullptr) || lifted_row(c) > std::numeric_limits<int32_t>::max()) status = CASE_FAST_BAD_ARGUMENT;
        if (s.keys > 0 && (missing({s.key, over ? s.key : s.value}) || !strides)) status = CASE_FAST_BAD_ARGUMENT;
        if (!status) status = check(keys_of(c, s), c.batch);
        if (status) return status + 16 * i;
    }
    return CASE_FAST_OK;
}

}  // namespace

extern "C" int64_t case_fast_cross_attention_saved(const case_fast_cross_attention *call, const case_fast_source *sources) {
    int64_t sum = 0;
    for (int i = 0; i < call->sources; ++i) sum += saved_elements(*call, sources[i]);
    return sum;
}

extern "C" int case_fast_cross_attention_forward_cpu(const case_fast_cross_attention *call, const case_fast_source *sources,
                                                     const void *hidden, void *out, void *saved, int threads) {
    if (const int status = check(call, sources, {hidden, out})) return status;
    return guarded(call->dtype, [&](auto like) { return block_forward<decltype(like)>(*call, sources, hidden, out, saved, threads); });
}

extern "C" int case_fast_cross_attention_backward_cpu(const case_fast_cross_attention *call, const case_fast_source *sources,
                                                      const void *saved, const void *grad_out, void *grad_hidden,
                                                      const case_fast_source_gradients *gradients, int threads) {
    if (const int status = check(call, sources, {grad_out, grad_hidden})) return status;
    if (call->sources > 0 && (!gradients || (call->rows > 0 && !saved))) return CASE_FAST_BAD_ARGUMENT;
    for (int i = 0; i < call->sources; ++i) {
        const case_fast_source_gradients &g = gradients[i];
        const bool over = over_rows(sources[i]);
        if (missing({g.norm_weight, g.norm_bias, g.query_weight, g.output_weight}) || (over && missing({g.key_weight, g.value_weight})) ||
            (sources[i].keys > 0 && missing({g.key, over ? g.key : g.value})))
            return CASE_FAST_BAD_ARGUMENT + 16 * i;
    }
    return guarded(call->dtype, [&](auto like) {
        return block_backward<decltype(like)>(*call, sources, saved, grad_out, grad_hidden, gradients, threads);
    });
}
