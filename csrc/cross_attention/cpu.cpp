// Attention and the cross-attention block on the CPU: checks, the division into tasks, threads. The arithmetic is in cpu_rows.h.
//
// Forward: tasks are ranges of query rows; of the block too, where one thread takes its rows through all sources without
// waiting for another, unless rows are too few for that. Backward: the gradients of a key sequence and head are one task's, so
// that no sum depends on threads; of the block's weights, each element is one sum over all rows.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "common/indices.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "common/simd.h"
#include "common/workspace.h"
#include "cross_attention/cpu.h"
#include "cross_attention/cross_attention.h"

namespace {

constexpr int64_t most_rows = 60;        // of a task: a multiple of all tiles
constexpr int64_t few_rows = 4;          // of a task of the block: a tile of rows shares each weight that is read
constexpr int64_t least_work = 1 << 18;  // products that are worth another thread

const CrossAttentionKernels &kernels() {
#if defined(__x86_64__)
    const case_fast_simd level = case_fast_simd_level();
    if (level == CASE_FAST_AVX512) return cross_attention_avx512;
    if (level == CASE_FAST_AVX2) return cross_attention_avx2;
#endif
    return cross_attention_baseline;
}
template <class T>
const AttentionKernels<T> &kernels_of() {
    if constexpr (std::is_same_v<T, float>)
        return kernels().f32;
    else
        return kernels().f64;
}

// As many equal workspaces as threads; a running task holds one.
template <class T>
class Slots {
public:
    Slots(Workspace &workspace, int threads, int64_t elements)
        : count_(std::max(threads, 1)), size_((elements + 15) / 16 * 16), data_(workspace.take<T>(count_ * size_)),
          busy_(new std::atomic<bool>[size_t(count_)]) {
        for (int64_t i = 0; i < count_; ++i) busy_[size_t(i)].store(false, std::memory_order_relaxed);
    }
    template <class Task>
    void with(Task task) {
        for (int64_t i = 0;; i = (i + 1) % count_)
            if (!busy_[size_t(i)].exchange(true, std::memory_order_acquire)) {
                task(data_ + i * size_);
                return busy_[size_t(i)].store(false, std::memory_order_release);
            }
    }

private:
    int64_t count_, size_;
    T *data_;
    std::unique_ptr<std::atomic<bool>[]> busy_;
};

// Bounds of `parts` ranges of [0, costs.size()) with about equal sums of costs.
std::vector<int64_t> even_ranges(const std::vector<int64_t> &costs, int64_t parts) {
    const int64_t total = std::max<int64_t>(1, [&] {
        int64_t sum = 0;
        for (int64_t cost : costs) sum += cost;
        return sum;
    }());
    std::vector<int64_t> bounds = {0};
    int64_t sum = 0;
    for (size_t i = 0; i < costs.size(); ++i) {
        // a part ends where its share is reached, the element that crosses it going to the nearer side
        while (int64_t(bounds.size()) < parts && double(sum) + double(costs[i]) / 2 >= double(total) * double(bounds.size()) / double(parts))
            bounds.push_back(int64_t(i));
        sum += costs[i];
    }
    while (int64_t(bounds.size()) <= parts) bounds.push_back(int64_t(costs.size()));
    return bounds;
}

// ------------------------------------------------------------------------------------------------------ sequences, segments

int64_t at(const void *list, bool wide, int64_t i) {
    return wide ? static_cast<const int64_t *>(list)[i] : static_cast<const int32_t *>(list)[i];
}

struct Keys {
    int64_t sequences, rows;
    const void *cu, *of, *length;
    bool wide;

    int64_t begin(int64_t s) const { return at(cu, wide, s); }
    int64_t rows_of(int64_t s) const { return begin(s + 1) - begin(s); }
    int64_t length_of(int64_t s) const { return length ? at(length, wide, s) : rows_of(s); }
    int64_t longest() const {
        int64_t most = 0;
        for (int64_t s = 0; s < sequences; ++s) most = std::max(most, rows_of(s));
        return most;
    }
};

template <class I>
int check_keys(const Keys &k, int64_t batch) {
    if (!rises(static_cast<const I *>(k.cu), k.sequences + 1, k.rows)) return CASE_FAST_BAD_CU_KEY;
    if (k.of && !all_within(static_cast<const I *>(k.of), batch, k.sequences)) return CASE_FAST_BAD_KEY_OF;
    for (int64_t s = 0; k.length && s < k.sequences; ++s)
        if (k.length_of(s) < 0 || k.length_of(s) > k.rows_of(s)) return CASE_FAST_BAD_KEY_LENGTH;
    return CASE_FAST_OK;
}
int check(const Keys &k, int64_t batch) {
    if (k.sequences < 0 || k.rows < 0 || !k.cu || (!k.of && k.sequences != batch)) return CASE_FAST_BAD_ARGUMENT;
    return k.wide ? check_keys<int64_t>(k, batch) : check_keys<int32_t>(k, batch);
}
int check_rows(const void *cu, bool wide, int64_t batch, int64_t rows) {
    const bool good = wide ? rises(static_cast<const int64_t *>(cu), batch + 1, rows) : rises(static_cast<const int32_t *>(cu), batch + 1, rows);
    return good ? CASE_FAST_OK : CASE_FAST_BAD_CU_QUERY;
}
bool missing(std::initializer_list<const void *> arrays) {
    return std::any_of(arrays.begin(), arrays.end(), [](const void *array) { return array == nullptr; });
}
bool good_kinds(int32_t dtype, int32_t index_bits, int32_t heads, int32_t dim) {
    return (dtype == CASE_FAST_F32 || dtype == CASE_FAST_F64) && (index_bits == 32 || index_bits == 64) && heads >= 1 && dim >= 1 &&
           int64_t(heads) * dim <= std::numeric_limits<int32_t>::max();
}

struct Owned : Segment {
    int64_t sequence;  // the key sequence
};

// All query rows in order. Neighbours with the same keys are one segment, unless each has its own end.
std::vector<Owned> segments_of(const Keys &k, const void *cu_query, int64_t batch, bool causal) {
    std::vector<Owned> segments;
    segments.reserve(size_t(batch));
    for (int64_t s = 0; s < batch; ++s) {
        const int64_t row = at(cu_query, k.wide, s), rows = at(cu_query, k.wide, s + 1) - row;
        const int64_t sequence = k.of ? at(k.of, k.wide, s) : s, keys = k.length_of(sequence);
        if (rows == 0) continue;
        if (!causal && !segments.empty() && segments.back().sequence == sequence)
            segments.back().rows += rows;
        else
            segments.push_back({{row, rows, k.begin(sequence), keys, keys - rows}, sequence});
    }
    return segments;
}

// Calls body(segment) for the parts of segments that lie in rows [begin, end).
template <class Body>
void each_part(const std::vector<Owned> &segments, int64_t begin, int64_t end, Body body) {
    auto s = std::upper_bound(segments.begin(), segments.end(), begin, [](int64_t row, const Segment &x) { return row < x.row + x.rows; });
    for (; s != segments.end() && s->row < end; ++s) {
        Segment part = *s;
        part.row = std::max(s->row, begin);
        part.rows = std::min(s->row + s->rows, end) - part.row;
        part.shift += part.row - s->row;
        body(part);
    }
}

// ---------------------------------------------------------------------------------------------------------------- attention

template <class T>
void set_dropout(Attention<T> &a, double dropout_p, uint64_t seed) {
    a.seed = seed;
    a.drop_below = case_fast_drop_below(dropout_p);
    a.kept_scale = a.drop_below && dropout_p < 1 ? T(1 / (1 - dropout_p)) : T(1);
}

template <class T>
Attention<T> describe(const case_fast_attention &c, const Keys &keys, const void *query, const void *key, const void *value) {
    Attention<T> a = {};
    a.heads = c.heads;
    a.dim = c.dim;
    a.causal = c.causal != 0;
    a.query_stride = c.query_stride;
    a.key_stride = c.key_stride;
    a.value_stride = c.value_stride;
    a.out_stride = int64_t(c.heads) * c.dim;
    a.longest = c.dropout_p > 0 ? keys.longest() : 0;
    a.scale = T(c.scale);
    a.query = static_cast<const T *>(query);
    a.key = static_cast<const T *>(key);
    a.value = static_cast<const T *>(value);
    set_dropout(a, c.dropout_p, c.seed);
    return a;
}

template <class T>
int attend(const case_fast_attention &c, const Keys &keys, const void *query, const void *key, const void *value, void *out, void *lse,
            int threads) {
    const AttentionKernels<T> &kernel = kernels_of<T>();
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

// grad_query of all segments, grad_key and grad_value of all key sequences. The arrays of `a` are whole.
template <class T>
struct AttentionBackward {
    const Attention<T> &a;
    const Keys &keys;
    std::vector<Owned> segments;  // by key sequence
    std::vector<int64_t> first;   // of a key sequence: its first segment

    AttentionBackward(const Attention<T> &attention, const Keys &k, const void *cu_query, int64_t batch)
        : a(attention), keys(k), segments(segments_of(k, cu_query, batch, attention.causal)), first(size_t(k.sequences) + 1, 0) {
        if (keys.of)
            std::stable_sort(segments.begin(), segments.end(), [](const Owned &x, const Owned &y) { return x.sequence < y.sequence; });
        for (const Owned &s : segments) ++first[size_t(s.sequence) + 1];
        for (size_t s = 1; s < first.size(); ++s) first[s] += first[s - 1];
    }
    int64_t workspace() const {
        int64_t most = 0;
        for (const Segment &s : segments) most = std::max(most, attention_workspace(s.rows, s.keys, true));
        return most;
    }
    int64_t tasks() const { return keys.sequences * a.heads; }
    void run(int64_t task, T *memory) const {
        const int64_t sequence = task / a.heads, head = task % a.heads, offset = head * a.dim;
        for (int64_t row = keys.begin(sequence); row < keys.begin(sequence + 1); ++row) {
            std::fill_n(a.grad_key + row * a.grad_key_stride + offset, a.dim, T(0));
            std::fill_n(a.grad_value + row * a.grad_value_stride + offset, a.dim, T(0));
        }
        for (int64_t s = first[size_t(sequence)]; s < first[size_t(sequence) + 1]; ++s)
            kernels_of<T>().backward(a, segments[size_t(s)], int(head), memory);
    }
};

template <class T>
int backward(const case_fast_attention &c, const Keys &keys, Attention<T> a, int threads) {
    const AttentionBackward<T> work(a, keys, c.cu_query, c.batch);
    Workspace workspace;
    Slots<T> slots(workspace, threads, work.workspace());
    prepare_output(a.grad_query, size_t(c.queries * a.grad_query_stride) * sizeof(T));
    case_fast_parallel(threads, work.tasks(), [&](int64_t task) { slots.with([&](T *memory) { work.run(task, memory); }); });
    return CASE_FAST_OK;
}

int check(const case_fast_attention *call, std::initializer_list<const void *> query_arrays, std::initializer_list<const void *> key_arrays,
          Keys *keys) {
    if (!call) return CASE_FAST_BAD_ARGUMENT;
    const case_fast_attention &c = *call;
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

// ------------------------------------------------------------------------------------------------------ cross-attention block

template <class T>
struct Saved {  // of one source
    T *normalised, *inverse_deviation, *query, *attended, *lse;
};
int64_t saved_elements(const case_fast_cross_attention &c) {
    return c.rows * (int64_t(c.width) + 1 + 2 * int64_t(c.heads) * c.dim + c.heads);
}
template <class T>
Saved<T> saved_of(const case_fast_cross_attention &c, T *saved, int64_t source) {
    const int64_t row = int64_t(c.heads) * c.dim;
    T *const normalised = saved + source * saved_elements(c), *const inverse = normalised + c.rows * c.width;
    T *const query = inverse + c.rows, *const attended = query + c.rows * row;
    return {normalised, inverse, query, attended, attended + c.rows * row};
}

Keys keys_of(const case_fast_cross_attention &c, const case_fast_source &s) {
    return {s.key_sequences, s.keys, s.cu_key, s.key_of, s.key_length, c.index_bits == 64};
}

template <class T>
Attention<T> describe(const case_fast_cross_attention &c, const case_fast_source &s) {
    Attention<T> a = {};
    a.heads = c.heads;
    a.dim = c.dim;
    a.query_stride = a.out_stride = int64_t(c.heads) * c.dim;
    a.key_stride = s.key_stride;
    a.value_stride = s.value_stride;
    a.longest = c.dropout_p > 0 ? keys_of(c, s).longest() : 0;
    a.scale = T(1 / std::sqrt(double(c.dim)));
    a.key = static_cast<const T *>(s.key);
    a.value = static_cast<const T *>(s.value);
    set_dropout(a, c.dropout_p, s.seed);
    return a;
}
ElementDropout output_dropout(const case_fast_cross_attention &c, const case_fast_source &s) {
    const uint64_t below = case_fast_drop_below(c.output_dropout_p);
    return {s.output_seed, below, below && c.output_dropout_p < 1 ? 1 / (1 - c.output_dropout_p) : 1};
}

template <class T>
struct BlockForward {
    const case_fast_cross_attention &c;
    const case_fast_source *sources;
    const T *hidden;
    T *out, *saved;  // saved: NULL where nothing is to be kept
    int threads;
    const AttentionKernels<T> &kernel = kernels_of<T>();
    const int64_t width = c.width, row = int64_t(c.heads) * c.dim;
    const int64_t aligned_width = (width + 15) / 16 * 16, aligned_row = (row + 15) / 16 * 16;
    std::vector<Attention<T>> attentions = {};
    std::vector<std::vector<Owned>> segments = {};
    int64_t attention_size = 0;  // elements of workspace

    void describe_sources() {
        for (int i = 0; i < c.sources; ++i) {
            attentions.push_back(describe<T>(c, sources[i]));
            segments.push_back(segments_of(keys_of(c, sources[i]), c.cu_hidden, c.batch, false));
            for (const Segment &s : segments.back()) attention_size = std::max(attention_size, attention_workspace(most_rows, s.keys, false));
        }
    }
    // What is kept of a source from row `begin` on. Where nothing is to be kept, queries and attended rows lie in `memory`.
    Saved<T> kept_of(int source, int64_t begin, T *memory, int64_t rows) const {
        if (!saved) return {nullptr, nullptr, memory, memory + rows * aligned_row, nullptr};
        Saved<T> kept = saved_of(c, saved, source);
        kept.normalised += begin * width;
        kept.inverse_deviation += begin;
        kept.query += begin * row;
        kept.attended += begin * row;
        kept.lse += begin * c.heads;
        return kept;
    }
    void normalise(int source, int64_t rows, const T *state, T *normed, const Saved<T> &kept) const {
        const case_fast_source &s = sources[source];
        kernel.normalise(rows, width, state, static_cast<const T *>(s.norm_weight), static_cast<const T *>(s.norm_bias), c.eps, normed,
                         kept.normalised, kept.inverse_deviation);
    }
    Attention<T> attention_of(int source, int64_t begin, const Saved<T> &kept) const {
        Attention<T> a = attentions[size_t(source)];
        a.query = kept.query;
        a.out = kept.attended;
        a.lse = kept.lse;
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
        Slots<T> slots(workspace, threads, attention_size + most * (2 * aligned_width + 2 * aligned_row));
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
                    const Attention<T> a = attention_of(i, begin, kept);
                    each_part(segments[size_t(i)], begin, begin + rows, [&](Segment segment) {
                        segment.row -= begin;
                        for (int head = 0; head < c.heads; ++head) kernel.forward(a, segment, head, weights);
                    });
                    kernel.multiply_transposed(rows, width, row, kept.attended, row, static_cast<const T *>(s.output_weight), row, projected,
                                               width);
                    kernel.drop(output_dropout(c, s), begin * width, rows * width, projected, state, true);
                }
            });
        });
    }

    // Rows too few for two tasks: each thread has its columns of the products and its share of the keys, and waits for the others
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
                        kernel.forward(a, segments[size_t(i)][size_t(task / heads)], int(task % heads), weights);
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
    const bool one_task = c.rows < 2 * few_rows;  // by rows
    if (threads > 1 && one_task && 2 * c.rows * c.sources * c.heads * c.dim * c.width >= least_work)
        block.by_columns();
    else
        block.by_rows();
    return CASE_FAST_OK;
}

template <class T>
int block_backward(const case_fast_cross_attention &c, const case_fast_source *sources, const void *saved, const void *grad_out, void *grad_hidden,
             const case_fast_source_gradients *gradients, int threads) {
    const AttentionKernels<T> &kernel = kernels_of<T>();
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
        works.emplace_back(attentions.back(), keys[size_t(i)], c.cu_hidden, c.batch);
        slot_size = std::max(slot_size, works.back().workspace());
    }
    Workspace workspace;
    Slots<T> slots(workspace, threads, slot_size);
    T *const grad_projected = workspace.take<T>(c.rows * width), *const normed = workspace.take<T>(c.rows * width);
    T *const grad_attended = workspace.take<T>(c.rows * row), *const grad_query = workspace.take<T>(c.rows * row);
    T *const norm_grads = workspace.take<T>(chunks * 2 * width);
    T *const grad = static_cast<T *>(grad_hidden);
    std::copy_n(static_cast<const T *>(grad_out), c.rows * width, grad);

    for (int i = c.sources - 1; i >= 0; --i) {
        const case_fast_source &s = sources[i];
        const case_fast_source_gradients &g = gradients[i];
        const Saved<T> kept = saved_of(c, const_cast<T *>(static_cast<const T *>(saved)), i);  // backward only reads it
        const T *const query_weight = static_cast<const T *>(s.query_weight), *const output_weight = static_cast<const T *>(s.output_weight);
        case_fast_parallel(threads, chunks, [&](int64_t chunk) {
            const int64_t begin = chunk * most_rows, rows = chunk_rows(chunk);
            kernel.drop(output_dropout(c, s), begin * width, rows * width, grad + begin * width, grad_projected + begin * width, false);
            kernel.multiply(rows, row, width, grad_projected + begin * width, width, 1, output_weight, row, grad_attended + begin * row, row);
        });
        Attention<T> &a = attentions[size_t(i)];
        a.query = kept.query;
        a.out = kept.attended;
        a.lse = kept.lse;
        a.grad_out = grad_attended;
        a.grad_query = grad_query;
        a.grad_key = static_cast<T *>(g.key);
        a.grad_value = static_cast<T *>(g.value);
        a.grad_query_stride = a.grad_key_stride = a.grad_value_stride = row;
        const AttentionBackward<T> &work = works[size_t(i)];
        case_fast_parallel(threads, work.tasks(), [&](int64_t task) { slots.with([&](T *memory) { work.run(task, memory); }); });
        case_fast_parallel(threads, chunks, [&](int64_t chunk) {
            slots.with([&](T *grad_normed) {
                const int64_t begin = chunk * most_rows, rows = chunk_rows(chunk);
                const T *const weight = static_cast<const T *>(s.norm_weight);
                T *const partial = norm_grads + chunk * 2 * width;
                std::fill_n(partial, 2 * width, T(0));
                kernel.scale_and_shift(rows, width, kept.normalised + begin * width, weight, static_cast<const T *>(s.norm_bias),
                                       normed + begin * width);
                kernel.multiply(rows, width, row, grad_query + begin * row, row, 1, query_weight, width, grad_normed, width);
                kernel.normalise_backward(rows, width, kept.normalised + begin * width, kept.inverse_deviation + begin, weight, grad_normed,
                                          grad + begin * width, partial);
            });
        });
        const int64_t output_tasks = (width + most_rows - 1) / most_rows, query_tasks = (row + most_rows - 1) / most_rows;
        case_fast_parallel(threads, output_tasks + query_tasks + 1, [&](int64_t task) {
            if (task < output_tasks) {
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
        if (s.keys > 0 && (missing({s.key, s.value}) || s.key_stride < row || s.value_stride < row)) status = CASE_FAST_BAD_ARGUMENT;
        if (!status) status = check(keys_of(c, s), c.batch);
        if (status) return status + 16 * i;
    }
    return CASE_FAST_OK;
}

template <class Run>
int guarded(Run run) {
    try {
        return run();
    } catch (const std::bad_alloc &) {
        return CASE_FAST_NO_MEMORY;  // all is allocated before the first write
    }
}

template <class T>
Attention<T> describe_backward(const case_fast_attention &c, const Keys &keys, const void *query, const void *key, const void *value,
                               const void *out, const void *lse, const void *grad_out) {
    Attention<T> a = describe<T>(c, keys, query, key, value);
    a.out = const_cast<T *>(static_cast<const T *>(out));  // backward only reads them
    a.lse = const_cast<T *>(static_cast<const T *>(lse));
    a.grad_out = static_cast<const T *>(grad_out);
    return a;
}

}  // namespace

extern "C" int case_fast_packed_attention_forward_cpu(const case_fast_attention *call, const void *query, const void *key,
                                                      const void *value, void *out, void *lse, int threads) {
    Keys keys;
    if (const int status = check(call, {query, out}, {key, value}, &keys)) return status;
    const bool wide = call->dtype == CASE_FAST_F64;
    return guarded([&] { return (wide ? attend<double> : attend<float>)(*call, keys, query, key, value, out, lse, threads); });
}

extern "C" int case_fast_packed_attention_backward_cpu(const case_fast_attention *call, const void *query, const void *key,
                                                       const void *value, const void *out, const void *lse, const void *grad_out,
                                                       void *grad_query, int64_t grad_query_stride, void *grad_key,
                                                       int64_t grad_key_stride, void *grad_value, int64_t grad_value_stride,
                                                       int threads) {
    Keys keys;
    if (const int status = check(call, {query, out, lse, grad_out, grad_query}, {key, value, grad_key, grad_value}, &keys)) return status;
    const int64_t row = int64_t(call->heads) * call->dim;
    if (grad_query_stride < row || grad_key_stride < row || grad_value_stride < row) return CASE_FAST_BAD_ARGUMENT;
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        Attention<T> a = describe_backward<T>(*call, keys, query, key, value, out, lse, grad_out);
        a.grad_query = static_cast<T *>(grad_query);
        a.grad_key = static_cast<T *>(grad_key);
        a.grad_value = static_cast<T *>(grad_value);
        a.grad_query_stride = grad_query_stride;
        a.grad_key_stride = grad_key_stride;
        a.grad_value_stride = grad_value_stride;
        return backward(*call, keys, a, threads);
    };
    return guarded([&] { return call->dtype == CASE_FAST_F64 ? run(0.0) : run(0.0f); });
}

extern "C" int64_t case_fast_cross_attention_saved(const case_fast_cross_attention *call) { return call->sources * saved_elements(*call); }

extern "C" int case_fast_cross_attention_forward_cpu(const case_fast_cross_attention *call, const case_fast_source *sources,
                                                     const void *hidden, void *out, void *saved, int threads) {
    if (const int status = check(call, sources, {hidden, out})) return status;
    const auto run = call->dtype == CASE_FAST_F64 ? block_forward<double> : block_forward<float>;
    return guarded([&] { return run(*call, sources, hidden, out, saved, threads); });
}

extern "C" int case_fast_cross_attention_backward_cpu(const case_fast_cross_attention *call, const case_fast_source *sources,
                                                      const void *saved, const void *grad_out, void *grad_hidden,
                                                      const case_fast_source_gradients *gradients, int threads) {
    if (const int status = check(call, sources, {grad_out, grad_hidden})) return status;
    if (call->sources > 0 && (!gradients || (call->rows > 0 && !saved))) return CASE_FAST_BAD_ARGUMENT;
    for (int i = 0; i < call->sources; ++i) {
        const case_fast_source_gradients &g = gradients[i];
        if (missing({g.norm_weight, g.norm_bias, g.query_weight, g.output_weight}) || (sources[i].keys > 0 && missing({g.key, g.value})))
            return CASE_FAST_BAD_ARGUMENT + 16 * i;
    }
    const auto run = call->dtype == CASE_FAST_F64 ? block_backward<double> : block_backward<float>;
    return guarded([&] { return run(*call, sources, saved, grad_out, grad_hidden, gradients, threads); });
}
