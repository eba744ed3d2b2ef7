// Bilinear MIM with sampled negatives. Of cpu.cpp.
//
// Dot products of gathered rows, and two products with the sparse matrix of d loss / d z. Draws are sorted by the row they hit, so
// that each row of a gradient is added up by one task, in ascending order of pairs.
#pragma once

#include <cstring>

#include "bilinear_mim/cpu_plan.h"

namespace {

constexpr int64_t most_draws = int64_t(1) << 20;  // a side that backward holds at a time

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

template <class T>
void sampled_forward(const Sizes<T> &s, const int64_t *positive, uint64_t seed, const T *a, const T *b, const Saved<T> &saved,
                     Workspace &workspace, int threads) {
    const Groups groups(positive, s.pairs, s.rows, workspace);
    const Sampler<T> sampler = {kernels<T>(), s, positive, seed, groups};
    const Chunks blocks(s.pairs, 32);
    const int64_t lanes = std::min<int64_t>(threads, blocks.number);
    int32_t *const lists = workspace.take<int32_t>(lanes * s.draws);
    T *const scores = workspace.take<T>(s.keeps_draws ? 0 : lanes * s.draws);
    each_task(threads, blocks.number, [&](int64_t lane, int64_t i) {
        int32_t *const list = lists + lane * s.draws;
        for (int64_t p = blocks.begin(i); p < blocks.begin(i + 1); ++p) {
            const int32_t c = int32_t(positive[p]);
            const T *const own_a = a + p * s.dim, *const own_b = b + c * s.dim;
            sampler.kernel.dots(own_a, b, &c, 1, s.dim, saved.logit + p);
            saved.y_sum[p] = saved.y_top[p] = saved.x_sum[p] = saved.x_top[p] = T(0);
            T *const z_y = s.keeps_draws ? saved.draws_y + p * s.draws : scores + lane * s.draws;
            T *const z_x = s.keeps_draws ? saved.draws_x + p * s.draws : scores + lane * s.draws;
            if (s.draws && sampler.any_y()) {
                sampler.draw_y(p, list);
                sampler.kernel.dots(own_a, b, list, s.draws, s.dim, z_y);
                sampler.kernel.sum_of(z_y, s.draws, s.dot, saved.y_top + p, saved.y_sum + p);
            } else {
                std::fill_n(z_y, s.draws, T(0));
            }
            if (s.draws && sampler.any_x(p)) {
                sampler.draw_x(p, list);
                sampler.kernel.dots(own_b, a, list, s.draws, s.dim, z_x);
                sampler.kernel.sum_of(z_x, s.draws, s.dot, saved.x_top + p, saved.x_sum + p);
            } else {
                std::fill_n(z_x, s.draws, T(0));
            }
        }
    });
}

// Draws of pairs [first, last), sorted by drawn row.
template <class T>
struct Drawn {
    int64_t *end;    // (rows + 1): those of row r are from end[r - 1], 0 for r = 0, to end[r]
    int32_t *other;  // the row on the other side
    T *scale;        // d loss / d z
    void combine(const MimKernels<T> &kernel, T *out, const T *others, int64_t r, int64_t d) const {
        const int64_t first = r ? end[r - 1] : 0;
        kernel.combine(out, others, other + first, scale + first, end[r] - first, d);
    }
    template <class Other>
    void sort(const int32_t *lists, const T *scales, const char *any, int64_t first, int64_t last, int64_t draws, int64_t rows,
              Other other_of) {
        std::fill_n(end, rows + 1, 0);
        const auto each = [&](auto body) {
            for (int64_t p = first; p < last; ++p)
                if (any[p - first])
                    for (int64_t e = (p - first) * draws; e < (p - first + 1) * draws; ++e) body(p, e);
        };
        each([&](int64_t, int64_t e) { ++end[lists[e]]; });
        int64_t sum = 0;
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t count = end[r];
            end[r] = sum;
            sum += count;
        }
        each([&](int64_t p, int64_t e) {
            const int64_t place = end[lists[e]]++;
            other[place] = other_of(p);
            scale[place] = scales[e];
        });
    }
};

template <class T>
void sampled_backward(const Sizes<T> &s, const int64_t *positive, uint64_t seed, const T *a, const T *b, const Saved<T> &saved,
                      const T *grad_side_y, const T *grad_side_x, T *grad_a, T *grad_b, Workspace &workspace, int threads) {
    const Groups groups(positive, s.pairs, s.rows, workspace);
    const Sampler<T> sampler = {kernels<T>(), s, positive, seed, groups};
    const MimKernels<T> &kernel = sampler.kernel;
    const int64_t k = s.draws, d = s.dim;
    const int64_t at_once = std::clamp<int64_t>(most_draws / std::max<int64_t>(k, 1), 1, std::max<int64_t>(s.pairs, 1));
    const int64_t held = at_once * k;
    int32_t *const list_y = workspace.take<int32_t>(held), *const list_x = workspace.take<int32_t>(held);
    T *const scale_y = workspace.take<T>(held), *const scale_x = workspace.take<T>(held);
    T *const pair_scale = workspace.take<T>(at_once);
    char *const any_y = workspace.take<char>(at_once), *const any_x = workspace.take<char>(at_once);
    Drawn<T> by_b = {workspace.take<int64_t>(s.rows + 1), workspace.take<int32_t>(held), workspace.take<T>(held)};
    Drawn<T> by_a = {workspace.take<int64_t>(s.pairs + 1), workspace.take<int32_t>(held), workspace.take<T>(held)};

    for (int64_t first = 0; first < std::max<int64_t>(s.pairs, 1); first += at_once) {
        const int64_t last = std::min(s.pairs, first + at_once);
        const Chunks blocks(last - first, 32);
        each_task(threads, blocks.number, [&](int64_t, int64_t block) {
            for (int64_t i = blocks.begin(block); i < blocks.begin(block + 1); ++i) {
                const int64_t p = first + i, c = positive[p];
                const double own = score(saved.logit[p], s.dot), steep = slope(saved.logit[p], s.dot);
                const double by_y = double(grad_side_y[p]) * share(own, saved.y_top[p], saved.y_sum[p]);
                const double by_x = double(grad_side_x[p]) * share(own, saved.x_top[p], saved.x_sum[p]);
                pair_scale[i] = T(-(by_y * double(saved.y_sum[p]) + by_x * double(saved.x_sum[p])) * steep);
                any_y[i] = k > 0 && sampler.any_y();
                any_x[i] = k > 0 && sampler.any_x(p);
                if (any_y[i]) {
                    sampler.draw_y(p, list_y + i * k);
                    if (s.keeps_draws)
                        std::copy_n(saved.draws_y + p * k, k, scale_y + i * k);
                    else
                        kernel.dots(a + p * d, b, list_y + i * k, k, d, scale_y + i * k);
                    kernel.gradients(scale_y + i * k, k, s.dot, saved.y_top[p], T(by_y));
                }
                if (any_x[i]) {
                    sampler.draw_x(p, list_x + i * k);
                    if (s.keeps_draws)
                        std::copy_n(saved.draws_x + p * k, k, scale_x + i * k);
                    else
                        kernel.dots(b + c * d, a, list_x + i * k, k, d, scale_x + i * k);
                    kernel.gradients(scale_x + i * k, k, s.dot, saved.x_top[p], T(by_x));
                }
            }
        });
        each_task(threads, 2, [&](int64_t, int64_t side) {
            if (side == 0)
                by_b.sort(list_y, scale_y, any_y, first, last, k, s.rows, [](int64_t p) { return int32_t(p); });
            else
                by_a.sort(list_x, scale_x, any_x, first, last, k, s.pairs, [&](int64_t p) { return int32_t(positive[p]); });
        });
        const Chunks rows(s.pairs, 32), columns(s.rows, 32);
        each_task(threads, rows.number + columns.number, [&](int64_t, int64_t task) {
            if (task < rows.number) {
                for (int64_t r = rows.begin(task); r < rows.begin(task + 1); ++r) {
                    T *const out = grad_a + r * d;
                    if (first == 0) std::fill_n(out, d, T(0));
                    if (r >= first && r < last) {
                        const int64_t i = r - first;
                        const int32_t c = int32_t(positive[r]);
                        kernel.combine(out, b, &c, pair_scale + i, 1, d);
                        if (any_y[i]) kernel.combine(out, b, list_y + i * k, scale_y + i * k, k, d);
                    }
                    by_a.combine(kernel, out, b, r, d);
                }
            } else {
                for (int64_t r = columns.begin(task - rows.number); r < columns.begin(task - rows.number + 1); ++r) {
                    T *const out = grad_b + r * d;
                    if (first == 0) std::fill_n(out, d, T(0));
                    for (int64_t e = groups.start[r]; e < groups.start[r + 1]; ++e) {
                        const int32_t p = groups.order[e];
                        if (p < first || p >= last) continue;
                        kernel.combine(out, a, &p, pair_scale + (p - first), 1, d);
                        if (any_x[p - first]) kernel.combine(out, a, list_x + (p - first) * k, scale_x + (p - first) * k, k, d);
                    }
                    by_b.combine(kernel, out, a, r, d);
                }
            }
        });
    }
}

}  // namespace
