// Attention of packed sequences on the CPU: the sequences of a call, their checks, and how the work is divided. Of cpu.cpp files.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/attention.h"
#include "common/calls.h"
#include "common/indices.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "common/types.h"
#include "common/workspace.h"

namespace {

constexpr int64_t least_work = 1 << 18;  // products that are worth another thread

template <class T>
const AttentionKernels<T> &attention_kernels() {
    return CASE_FAST_WIDEST(attention).of<T>();
}

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

// ----------------------------------------------------------------------------------------------------------------- kernels

template <class T>
void set_dropout(Attention<T> &a, double dropout_p, uint64_t seed) {
    a.seed = seed;
    a.drop_below = case_fast_drop_below(dropout_p);
    a.kept_scale = a.drop_below && dropout_p < 1 ? T(1 / (1 - dropout_p)) : T(1);
}

// grad_query of all segments, grad_key and grad_value of all key sequences. The arrays of `a` are whole. A task is one head after
// the other of some key sequences: heads of a sequence share cache lines, which two threads would take from each other. Where heads
// share keys and values, whose gradients are then sums over heads, all heads of a sequence are one task's.
template <class T>
struct AttentionBackward {
    const Attention<T> &a;
    const Keys &keys;
    std::vector<Owned> segments;  // by key sequence
    std::vector<int64_t> first;   // of a key sequence: its first segment
    int64_t apart;                // heads of a key sequence that may be of different tasks
    std::vector<int64_t> bounds;  // of the tasks, in such heads of key sequences

    AttentionBackward(const Attention<T> &attention, const Keys &k, const void *cu_query, int64_t batch, int threads)
        : a(attention), keys(k), segments(segments_of(k, cu_query, batch, attention.causal)), first(size_t(k.sequences) + 1, 0),
          apart(attention.key_head ? attention.heads : 1) {
        if (keys.of)
            std::stable_sort(segments.begin(), segments.end(), [](const Owned &x, const Owned &y) { return x.sequence < y.sequence; });
        for (const Owned &s : segments) ++first[size_t(s.sequence) + 1];
        for (size_t s = 1; s < first.size(); ++s) first[s] += first[s - 1];
        std::vector<int64_t> costs;
        for (int64_t s = 0; s < keys.sequences; ++s) {
            int64_t cost = 8 * keys.rows_of(s) + 1;
            each_segment(s, [&](const Segment &x) { cost += x.rows * (8 + x.keys); });
            costs.insert(costs.end(), size_t(apart), cost);
        }
        bounds = even_ranges(costs, threads <= 1 ? 1 : std::min<int64_t>(32 * int64_t(threads), int64_t(costs.size()) + 1));
    }
    int64_t workspace() const {
        int64_t most = 0;
        for (const Segment &s : segments) most = std::max(most, attention_workspace(s.rows, s.keys, true));
        return most;
    }
    int64_t tasks() const { return int64_t(bounds.size()) - 1; }
    void run(int64_t task, T *memory) const {
        for (int64_t i = bounds[size_t(task)], end = bounds[size_t(task) + 1]; i < end; ++i) {
            const int64_t sequence = i / apart, begin = i % apart, end_head = begin + a.heads / apart, offset = begin * a.key_head;
            for (int64_t row = keys.begin(sequence); row < keys.begin(sequence + 1); ++row) {
                std::fill_n(a.grad_key + row * a.grad_key_stride + offset, a.dim, T(0));
                std::fill_n(a.grad_value + row * a.grad_value_stride + offset, a.dim, T(0));
            }
            for (int64_t head = begin; head < end_head; ++head)
                each_segment(sequence, [&](const Segment &s) { attention_kernels<T>().backward(a, s, int(head), memory); });
        }
    }

private:
    template <class Body>
    void each_segment(int64_t sequence, Body body) const {
        for (int64_t s = first[size_t(sequence)]; s < first[size_t(sequence) + 1]; ++s) body(segments[size_t(s)]);
    }
};

}  // namespace
