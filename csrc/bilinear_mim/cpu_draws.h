// The negatives that are drawn, and their order by the row they hit. Of cpu_sampled.h.
#pragma once

#include "bilinear_mim/cpu_plan.h"

namespace {

// Pairs by the row of b they share. keys: a group's rows less their rank in it, ascending, so that the r-th row outside the group
// is r plus the number of keys up to r.
struct Groups {
    const int64_t *start;  // (rows + 1)
    const int32_t *order, *keys;
    Groups(const int64_t *positive, int64_t pairs, int64_t rows, Workspace &workspace) {
        int64_t *const end = workspace.take<int64_t>(rows + 1);
        int32_t *const sorted = workspace.take<int32_t>(pairs), *const keyed = workspace.take<int32_t>(pairs);
        std::fill_n(end, rows + 1, 0);
        for (int64_t p = 0; p < pairs; ++p) ++end[positive[p]];
        int64_t sum = 0;
        for (int64_t c = 0; c <= rows; ++c) {
            const int64_t count = c < rows ? end[c] : 0;
            end[c] = sum;
            sum += count;
        }
        for (int64_t p = 0; p < pairs; ++p) sorted[end[positive[p]]++] = int32_t(p);
        for (int64_t c = rows; c > 0; --c) end[c] = end[c - 1];
        end[0] = 0;
        for (int64_t c = 0; c < rows; ++c)
            for (int64_t i = end[c]; i < end[c + 1]; ++i) keyed[i] = sorted[i] - int32_t(i - end[c]);
        start = end;
        order = sorted;
        keys = keyed;
    }
    int64_t size(int64_t c) const { return start[c + 1] - start[c]; }
};

template <class T>
struct Sampler {
    const MimKernels<T> &kernel = kernels<T>();
    const Sizes<T> &s;
    const int64_t *positive;
    uint64_t seed;
    const Groups &groups;
    bool any_y() const { return s.rows > 1; }
    bool any_x(int64_t p) const { return groups.size(positive[p]) < s.pairs; }
    void draw_y(int64_t p, int32_t *list) const {
        kernel.draw(seed, uint32_t(p), 0, uint32_t(s.rows - 1), s.draws, list);
        const int32_t c = int32_t(positive[p]);
        for (int64_t i = 0; i < s.draws; ++i) list[i] += list[i] >= c;
    }
    void draw_x(int64_t p, int32_t *list) const {
        const int64_t c = positive[p], size = groups.size(c);
        const int32_t *const keys = groups.keys + groups.start[c];
        kernel.draw(seed, uint32_t(p), 1, uint32_t(s.pairs - size), s.draws, list);
        if (size == 1)
            for (int64_t i = 0; i < s.draws; ++i) list[i] += list[i] >= keys[0];
        else
            for (int64_t i = 0; i < s.draws; ++i) list[i] += int32_t(std::upper_bound(keys, keys + size, list[i]) - keys);
    }
};

// What pairs [first, last) have drawn: `each` rows of b for side y, of a for side x, where there are any to draw.
template <class T>
struct Draws {
    int64_t first, last, each;
    int32_t *list_y, *list_x;  // (last - first, each)
    T *z_y, *z_x;              // their scores; then, in backward, d loss / d z
    char *any_y, *any_x;       // (last - first)

    Draws(const Sizes<T> &s, Workspace &workspace)
        : first(0), last(0), each(s.draws), list_y(workspace.take<int32_t>(s.at_once * s.draws)),
          list_x(workspace.take<int32_t>(s.at_once * s.draws)), z_y(workspace.take<T>(s.at_once * s.draws)),
          z_x(workspace.take<T>(s.at_once * s.draws)), any_y(workspace.take<char>(s.at_once)), any_x(workspace.take<char>(s.at_once)) {}

    void draw(const Sampler<T> &sampler, int64_t p) const {
        const int64_t i = p - first;
        any_y[i] = each > 0 && sampler.any_y();
        any_x[i] = each > 0 && sampler.any_x(p);
        if (any_y[i]) sampler.draw_y(p, list_y + i * each);
        if (any_x[i]) sampler.draw_x(p, list_x + i * each);
    }
};

// Calls body(i, first + i) for each pair, on several threads.
template <class T, class Body>
void each_pair_of(const Draws<T> &draws, int threads, Body body) {
    const Chunks blocks(draws.last - draws.first, 32);
    each_task(threads, blocks.number, [&](int64_t, int64_t block) {
        for (int64_t i = blocks.begin(block); i < blocks.begin(block + 1); ++i) body(i, draws.first + i);
    });
}

// Calls body(p, e) for each draw of one side, in order; e is its place in the lists.
template <class T, class Body>
void each_draw(const Draws<T> &draws, const char *any, Body body) {
    for (int64_t p = draws.first; p < draws.last; ++p)
        if (any[p - draws.first])
            for (int64_t e = (p - draws.first) * draws.each; e < (p - draws.first + 1) * draws.each; ++e) body(p, e);
}

// Sorts the draws of one side by the row they hit: those of row r come to the places from end[r - 1], 0 for r = 0, to end[r], in
// order of pairs. end: (rows + 1). put(place, p, e) notes one there.
template <class T, class Put>
void sort_draws(const Draws<T> &draws, const int32_t *list, const char *any, int64_t rows, int64_t *end, Put put) {
    std::fill_n(end, rows + 1, 0);
    each_draw(draws, any, [&](int64_t, int64_t e) { ++end[list[e]]; });
    int64_t sum = 0;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t count = end[r];
        end[r] = sum;
        sum += count;
    }
    each_draw(draws, any, [&](int64_t p, int64_t e) { put(end[list[e]]++, p, e); });
}

// d loss / d z of the draws of one side, by the row they hit.
template <class T>
struct Sorted {
    int64_t *end;    // as of sort_draws
    int32_t *other;  // the row on the other side
    T *scale;
    Sorted(const Sizes<T> &s, int64_t rows, Workspace &workspace)
        : end(workspace.take<int64_t>(rows + 1)), other(workspace.take<int32_t>(s.at_once * s.draws)),
          scale(workspace.take<T>(s.at_once * s.draws)) {}
    int64_t begin_of(int64_t r) const { return r ? end[r - 1] : 0; }
    int64_t count_of(int64_t r) const { return end[r] - begin_of(r); }
};

}  // namespace
