// What the divisions of bilinear MIM share: kernels, chunks, tasks, the parts of `saved`, and one pair's arithmetic. Of cpu.cpp.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>

#include "bilinear_mim/bilinear_mim.h"
#include "bilinear_mim/cpu.h"
#include "common/parallel.h"
#include "common/workspace.h"

namespace {

constexpr int64_t most_rows = 252;  // of a chunk
constexpr int64_t most_draws = int64_t(1) << 20;  // of a side, held at a time
// Products of whole matrices win where there is a draw, of one side, for no more than so many scores: measured by
// bench_bilinear_mim from 256 to 8192 pairs.
constexpr int64_t dense_scores_a_draw = 7;

template <class T>
const MimKernels<T> &kernels() {
    return CASE_FAST_WIDEST(bilinear_mim).of<T>();
}

int64_t ratio_up(int64_t count, int64_t size) { return (count + size - 1) / size; }

// [0, count) in chunks of equal size.
struct Chunks {
    int64_t count, size, number;
    Chunks(int64_t count, int64_t size) : count(count), size(size), number(ratio_up(count, size)) {}
    int64_t begin(int64_t i) const { return std::min(count, i * size); }
    int64_t length(int64_t i) const { return begin(i + 1) - begin(i); }
};
// About eight, of whole panels, neither small nor above `most`.
Chunks in_chunks(int64_t count, int64_t panel, int64_t most) {
    const int64_t size = std::clamp<int64_t>(ratio_up(count, 8), 48, most);
    return {count, std::max(panel, std::min(ratio_up(size, panel) * panel, most / panel * panel))};
}

// Calls run(lane, task) for each task; no two calls with the same lane, of at most `threads`, at a time.
template <class Run>
void each_task(int threads, int64_t tasks, Run run) {
    std::atomic<int64_t> next{0};
    const int64_t lanes = std::min<int64_t>(threads, tasks);
    case_fast_parallel(int(lanes), lanes, [&](int64_t lane) {
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run(lane, task);
    });
}

template <class T>
struct Sizes {
    int64_t pairs, rows, dim;
    bool dot, sampled;
    int64_t draws;         // of a pair and side
    bool by_x;             // W is applied to x, not to y
    int64_t at_once;       // pairs whose draws are held at a time
    bool dense;            // a case_fast_mim_plan
    bool keeps_draws;      // backward finds their z in `saved`
    int64_t other;         // what the sums of side_x belong to: rows of b, or, if sampled, pairs

    explicit Sizes(const case_fast_mim &m)
        : pairs(m.pairs), rows(m.rows), dim(m.dim), dot(m.score == CASE_FAST_DOT), sampled(m.negatives >= 0),
          draws(std::max<int64_t>(m.negatives, 0)), by_x(m.pairs <= m.rows),
          at_once(std::clamp<int64_t>(most_draws / std::max<int64_t>(draws, 1), 1, std::max<int64_t>(m.pairs, 1))),
          dense(sampled && draws > 0 &&
                (m.plan == CASE_FAST_MIM_AUTO ? double(m.pairs) * double(m.rows) <= double(dense_scores_a_draw * at_once * draws)
                                              : m.plan == CASE_FAST_MIM_DENSE)),
          keeps_draws(sampled && draws <= m.dim), other(sampled ? m.pairs : m.rows) {}
    int64_t projected() const { return dot ? 0 : (by_x ? pairs : rows) * dim; }
};

// The parts of `saved`. Sums are of e^(f - top) over the negatives; tops are 0 for the sigmoid.
template <class T>
struct Saved {
    T *projected, *logit, *y_sum, *y_top, *x_sum, *x_top, *draws_y, *draws_x;
    int64_t size;
    Saved(const Sizes<T> &s, T *base) {
        size = 0;
        const auto part = [&](int64_t count) {
            T *const at = base ? base + size : nullptr;
            size += count;
            return at;
        };
        projected = part(s.projected());
        logit = part(s.pairs);
        y_sum = part(s.pairs);
        y_top = part(s.pairs);
        x_sum = part(s.other);
        x_top = part(s.other);
        draws_y = part(s.keeps_draws ? s.pairs * s.draws : 0);
        draws_x = part(s.keeps_draws ? s.pairs * s.draws : 0);
    }
};

// ---- one pair: s its score, and a side's sum r of e^(f - top) over its negatives
double score(double z, bool dot) {
    if (dot) return z;
    const double e = std::exp(-std::fabs(z));
    return z < 0 ? e / (1 + e) : 1 / (1 + e);
}
double slope(double z, bool dot) {
    if (dot) return 1;
    const double e = std::exp(-std::fabs(z));
    return e / ((1 + e) * (1 + e));
}
// log(e^s + r e^top) - s
double side(double s, double top, double r) {
    if (r == 0) return s - s;  // NaN where the pair is NaN
    const double t = top - s;
    return t <= 0 ? std::log1p(r * std::exp(t)) : t + std::log(r + std::exp(-t));
}
// e^top / (e^s + r e^top): its derivative by a negative's f, apart from e^(f - top)
double share(double s, double top, double r) {
    if (r == 0) return s - s;
    const double t = top - s;
    return t <= 0 ? std::exp(t) / (1 + r * std::exp(t)) : 1 / (r + std::exp(-t));
}

}  // namespace
