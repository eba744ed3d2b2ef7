// Bilinear MIM with sampled negatives. Of cpu.cpp.
//
// Few draws: dot products of gathered rows, and two products with the sparse matrix of d loss / d z, whose entries are sorted by the
// row they hit, so that each row of a gradient is added up by one task, in ascending order of pairs. Many draws: cpu_dense.h.
#pragma once

#include <optional>

#include "bilinear_mim/cpu_dense.h"
#include "bilinear_mim/cpu_draws.h"

namespace {

// Scores of the pairs, and sums over their draws, as they stand in `saved`.
template <class T>
void sampled_forward(const Sizes<T> &s, const int64_t *positive, uint64_t seed, const T *a, const T *b, const Saved<T> &saved,
                     Workspace &workspace, int threads) {
    const Groups groups(positive, s.pairs, s.rows, workspace);
    const Sampler<T> sampler = {kernels<T>(), s, positive, seed, groups};
    const MimKernels<T> &kernel = sampler.kernel;
    const int64_t k = s.draws, d = s.dim;
    // Of one side: z (k) of pair p's draws are kept, and summed up.
    const auto finish = [&](bool any, const T *z, T *kept, T *top, T *sum) {
        *top = *sum = T(0);
        if (any) kernel.sum_of(z, k, s.dot, top, sum);
        if (!kept || kept == z) return;
        any ? void(std::copy_n(z, k, kept)) : void(std::fill_n(kept, k, T(0)));
    };
    const auto own_score = [&](int64_t p) {
        const int32_t c = int32_t(positive[p]);
        kernel.dots(a + p * d, b, &c, 1, d, saved.logit + p);
    };
    if (s.dense) {
        Draws<T> draws(s, workspace);
        const DenseScores<T> scores(s, a, b, workspace, threads);
        for (draws.first = 0; draws.first < s.pairs; draws.first = draws.last) {
            draws.last = std::min(s.pairs, draws.first + s.at_once);
            const auto each_pair = [&](auto body) { each_pair_of(draws, threads, body); };
            each_pair([&](int64_t, int64_t p) { draws.draw(sampler, p); });
            scores.find(draws, positive, threads);
            each_pair([&](int64_t i, int64_t p) {
                own_score(p);
                finish(draws.any_y[i], draws.z_y + i * k, s.keeps_draws ? saved.draws_y + p * k : nullptr, saved.y_top + p, saved.y_sum + p);
                finish(draws.any_x[i], draws.z_x + i * k, s.keeps_draws ? saved.draws_x + p * k : nullptr, saved.x_top + p, saved.x_sum + p);
            });
        }
        return;
    }
    const Chunks blocks(s.pairs, 32);
    const int64_t lanes = std::min<int64_t>(threads, blocks.number);
    int32_t *const lists = workspace.take<int32_t>(lanes * k);
    T *const scores = workspace.take<T>(s.keeps_draws ? 0 : lanes * k);
    for (const bool x : {false, true})  // one side after the other: the second cache holds the rows of one
        each_task(threads, blocks.number, [&](int64_t lane, int64_t i) {
            int32_t *const list = lists + lane * k;
            for (int64_t p = blocks.begin(i); p < blocks.begin(i + 1); ++p) {
                T *const z = s.keeps_draws ? (x ? saved.draws_x : saved.draws_y) + p * k : scores + lane * k;
                const bool any = k && (x ? sampler.any_x(p) : sampler.any_y());
                if (any) {
                    x ? sampler.draw_x(p, list) : sampler.draw_y(p, list);
                    kernel.dots(x ? b + positive[p] * d : a + p * d, x ? a : b, list, k, d, z);
                } else {
                    std::fill_n(z, k, T(0));
                }
                if (!x) own_score(p);
                finish(any, z, z, (x ? saved.x_top : saved.y_top) + p, (x ? saved.x_sum : saved.y_sum) + p);
            }
        });
}

template <class T>
void sampled_backward(const Sizes<T> &s, const int64_t *positive, uint64_t seed, const T *a, const T *b, const Saved<T> &saved,
                      const T *grad_side_y, const T *grad_side_x, T *grad_a, T *grad_b, Workspace &workspace, int threads) {
    const Groups groups(positive, s.pairs, s.rows, workspace);
    const Sampler<T> sampler = {kernels<T>(), s, positive, seed, groups};
    const MimKernels<T> &kernel = sampler.kernel;
    const int64_t k = s.draws, d = s.dim;
    Draws<T> draws(s, workspace);
    T *const pair_scale = workspace.take<T>(s.at_once);
    Sorted<T> by_b(s, s.rows, workspace), by_a(s, s.pairs, workspace);
    const bool dense = s.dense && all_finite(a, s.pairs * d) && all_finite(b, s.rows * d);
    std::optional<DenseScores<T>> scores;
    std::optional<DenseGradients<T>> dense_a, dense_b;
    if (s.dense && !s.keeps_draws) scores.emplace(s, a, b, workspace, threads);
    if (dense) {
        dense_a.emplace(s, s.pairs, b, s.rows, workspace, threads);
        dense_b.emplace(s, s.rows, a, s.pairs, workspace, threads);
    }

    for (draws.first = 0; draws.first < std::max<int64_t>(s.pairs, 1); draws.first = draws.last) {
        const int64_t first = draws.first, last = draws.last = std::min(s.pairs, first + s.at_once);
        const auto each_pair = [&](auto body) { each_pair_of(draws, threads, body); };
        const auto score_draws = [&](int64_t i, int64_t p) {  // unless `scores` will
            draws.draw(sampler, p);
            T *const z_y = draws.z_y + i * k, *const z_x = draws.z_x + i * k;
            if (s.keeps_draws) {
                std::copy_n(saved.draws_y + p * k, k, z_y);
                std::copy_n(saved.draws_x + p * k, k, z_x);
            } else if (!scores) {
                if (draws.any_y[i]) kernel.dots(a + p * d, b, draws.list_y + i * k, k, d, z_y);
                if (draws.any_x[i]) kernel.dots(b + positive[p] * d, a, draws.list_x + i * k, k, d, z_x);
            }
        };
        const auto differentiate = [&](int64_t i, int64_t p) {
            const double own = score(saved.logit[p], s.dot), steep = slope(saved.logit[p], s.dot);
            const double by_y = double(grad_side_y[p]) * share(own, saved.y_top[p], saved.y_sum[p]);
            const double by_x = double(grad_side_x[p]) * share(own, saved.x_top[p], saved.x_sum[p]);
            pair_scale[i] = T(-(by_y * double(saved.y_sum[p]) + by_x * double(saved.x_sum[p])) * steep);
            if (draws.any_y[i]) kernel.gradients(draws.z_y + i * k, k, s.dot, saved.y_top[p], T(by_y));
            if (draws.any_x[i]) kernel.gradients(draws.z_x + i * k, k, s.dot, saved.x_top[p], T(by_x));
        };
        if (scores) {
            each_pair(score_draws);
            scores->find(draws, positive, threads);
            each_pair(differentiate);
        } else {
            each_pair([&](int64_t i, int64_t p) { score_draws(i, p), differentiate(i, p); });
        }
        each_task(threads, 2, [&](int64_t, int64_t side) {
            if (side == 0)
                sort_draws(draws, draws.list_y, draws.any_y, s.rows, by_b.end, [&](int64_t place, int64_t p, int64_t e) {
                    by_b.other[place] = int32_t(p);
                    by_b.scale[place] = draws.z_y[e];
                });
            else
                sort_draws(draws, draws.list_x, draws.any_x, s.pairs, by_a.end, [&](int64_t place, int64_t p, int64_t e) {
                    by_a.other[place] = int32_t(positive[p]);
                    by_a.scale[place] = draws.z_x[e];
                });
        });
        // What row r of a, or of b, is multiplied with: add(others, list of their rows, scale, count).
        const auto row_of_a = [&](int64_t r, auto add) {
            if (r >= first && r < last) {
                const int64_t i = r - first;
                const int32_t c = int32_t(positive[r]);
                add(&c, pair_scale + i, 1);
                if (draws.any_y[i]) add(draws.list_y + i * k, draws.z_y + i * k, k);
            }
            add(by_a.other + by_a.begin_of(r), by_a.scale + by_a.begin_of(r), by_a.count_of(r));
        };
        const auto row_of_b = [&](int64_t r, auto add) {
            for (int64_t e = groups.start[r]; e < groups.start[r + 1]; ++e) {
                const int32_t p = groups.order[e];
                if (p < first || p >= last) continue;
                add(&p, pair_scale + (p - first), 1);
                if (draws.any_x[p - first]) add(draws.list_x + (p - first) * k, draws.z_x + (p - first) * k, k);
            }
            add(by_b.other + by_b.begin_of(r), by_b.scale + by_b.begin_of(r), by_b.count_of(r));
        };
        if (dense) {
            each_task(threads, dense_a->tasks() + dense_b->tasks(), [&](int64_t lane, int64_t task) {
                const auto filled = [](auto row) {
                    return [row](int64_t r, auto put) {
                        row(r, [&](const int32_t *list, const T *scale, int64_t count) {
                            for (int64_t e = 0; e < count; ++e) put(list[e], scale[e]);
                        });
                    };
                };
                if (task < dense_a->tasks())
                    dense_a->run(lane, task, grad_a, first > 0, filled(row_of_a));
                else
                    dense_b->run(lane, task - dense_a->tasks(), grad_b, first > 0, filled(row_of_b));
            });
            continue;
        }
        const Chunks rows(s.pairs, 32), columns(s.rows, 32);
        each_task(threads, rows.number + columns.number, [&](int64_t, int64_t task) {
            const auto gather = [&](const Chunks &chunks, int64_t chunk, T *out, const T *others, auto row) {
                for (int64_t r = chunks.begin(chunk); r < chunks.begin(chunk + 1); ++r) {
                    if (first == 0) std::fill_n(out + r * d, d, T(0));
                    row(r, [&](const int32_t *list, const T *scale, int64_t count) {
                        kernel.combine(out + r * d, others, list, scale, count, d);
                    });
                }
            };
            if (task < rows.number)
                gather(rows, task, grad_a, b, row_of_a);
            else
                gather(columns, task - rows.number, grad_b, a, row_of_b);
        });
    }
}

}  // namespace
