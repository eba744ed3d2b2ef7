// Bilinear MIM on the CPU: checks, the division into tasks, threads. The arithmetic is in cpu_kernels.h.
//
// W is applied to the shorter of x and y: x W y^T = (x W) y^T = x (y W^T)^T. What is multiplied from then on is a (P, d), from x,
// and b (Q, d), from y.
//
// All negatives: scores exist as one tile at a time, in cache: forward adds its e^S to row and column sums, backward makes the
// tile again, turns it into d loss / d z and multiplies it with b and, transposed, with a. Forward gives a task some chunks of
// rows of a and its own column sums. Backward goes through the tiles in steps; the tiles of a step share neither rows nor
// columns, so that each adds to both gradients in place, and each gradient's order of additions is that of the steps. Where
// there are too few columns for that, every chunk of rows has its own gradient of b.
//
// Sampled negatives: dot products of gathered rows, and two products with the sparse matrix of d loss / d z.
//
// All divisions depend on the sizes alone: hence the same bits for any number of threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
#include <type_traits>
#include <vector>

#include "bilinear_mim/bilinear_mim.h"
#include "bilinear_mim/cpu.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/workspace.h"

namespace {

constexpr int64_t most_rows = 252, most_columns = 512;  // of a tile: its scores take half of a 1 MiB second cache
constexpr int64_t most_parts = 32;                      // of the column sums
constexpr int64_t kept_bytes = int64_t(8) << 20;        // below, operands of backward are packed once and not for each tile
constexpr int64_t copies_bytes = int64_t(4) << 20;      // for gradients of b by chunk of rows
constexpr int64_t most_draws = int64_t(1) << 20;        // a side that backward holds at a time

template <class T>
const MimKernels<T> &kernels() {
    const auto set = []() -> const MimKernelSet & {
#if defined(__x86_64__)
        const case_fast_simd level = case_fast_simd_level();
        if (level == CASE_FAST_AVX512) return bilinear_mim_avx512;
        if (level == CASE_FAST_AVX2) return bilinear_mim_avx2;
#endif
        return bilinear_mim_baseline;
    };
    if constexpr (std::is_same_v<T, float>)
        return set().f32;
    else
        return set().f64;
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
    bool keeps_draws;      // backward finds their z in `saved`
    int64_t other;         // what the sums of side_x belong to: rows of b, or, if sampled, pairs

    explicit Sizes(const case_fast_mim &m)
        : pairs(m.pairs), rows(m.rows), dim(m.dim), dot(m.score == CASE_FAST_DOT), sampled(m.negatives >= 0),
          draws(std::max<int64_t>(m.negatives, 0)), by_x(m.pairs <= m.rows), keeps_draws(sampled && 2 * draws <= m.dim),
          other(sampled ? m.pairs : m.rows) {}
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

int check(const case_fast_mim *mim, std::initializer_list<const void *> x_arrays, std::initializer_list<const void *> y_arrays,
          std::initializer_list<const void *> weight_arrays) {
    if (!mim) return CASE_FAST_BAD_ARGUMENT;
    const case_fast_mim &m = *mim;
    const auto missing = [](const void *pointer) { return pointer == nullptr; };
    constexpr int64_t most = std::numeric_limits<int32_t>::max() - 4096;
    if (m.pairs < 0 || m.pairs > most || m.rows < 0 || m.rows > most || m.dim < 1 || m.dim > most) return CASE_FAST_BAD_ARGUMENT;
    if (m.negatives < -1 || m.negatives > most || (m.dtype != CASE_FAST_F32 && m.dtype != CASE_FAST_F64)) return CASE_FAST_BAD_ARGUMENT;
    if (m.score != CASE_FAST_BILINEAR_SIGMOID && m.score != CASE_FAST_DOT) return CASE_FAST_BAD_ARGUMENT;
    if (m.pairs > 0 && (!m.positive || std::any_of(x_arrays.begin(), x_arrays.end(), missing))) return CASE_FAST_BAD_ARGUMENT;
    if (m.rows > 0 && std::any_of(y_arrays.begin(), y_arrays.end(), missing)) return CASE_FAST_BAD_ARGUMENT;
    if (m.score != CASE_FAST_DOT && std::any_of(weight_arrays.begin(), weight_arrays.end(), missing)) return CASE_FAST_BAD_ARGUMENT;
    for (int64_t p = 0; p < m.pairs; ++p)
        if (uint64_t(m.positive[p]) >= uint64_t(m.rows)) return CASE_FAST_BAD_INDICES;
    return CASE_FAST_OK;
}

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

// ---- W
template <class T>
int64_t work_for_few(const MimKernels<T> &kernel, int64_t d) {
    return (2 * kernel.column_width + kernel.row_width) * d;
}

// out (count, d) = in times W, or W^T
template <class T>
void project(const T *in, int64_t count, const T *weight, bool transposed, int64_t d, T *out, Workspace &workspace, int threads) {
    const MimKernels<T> &kernel = kernels<T>();
    if (transposed && count <= kernel.column_width)
        return kernel.multiply_few(in, count, weight, d, out, workspace.take<T>(work_for_few(kernel, d)));
    const Chunks chunks = in_chunks(count, kernel.row_width, most_rows);
    const bool packs = transposed || count > 2 * kernel.row_width;
    T *const matrix = workspace.take<T>(packs ? ratio_up(d, kernel.column_width) * kernel.column_width * d : 0);
    T *const panels = workspace.take<T>(std::min<int64_t>(threads, chunks.number) * ratio_up(chunks.size, kernel.row_width) * kernel.row_width * d);
    if (packs) kernel.pack_columns(weight, transposed ? 1 : d, transposed ? d : 1, d, d, matrix);
    each_task(threads, chunks.number, [&](int64_t lane, int64_t i) {
        T *const rows = panels + lane * chunks.size * d;
        kernel.pack_rows(in + chunks.begin(i) * d, d, 1, chunks.length(i), d, rows);
        if (packs)
            kernel.multiply(rows, matrix, chunks.length(i), d, d, out + chunks.begin(i) * d, d, false);
        else
            kernel.multiply_unpacked(rows, weight, d, chunks.length(i), d, d, out + chunks.begin(i) * d, d, false);
    });
}

// The gradient of the projected rows, in `grad`, becomes that of `in`, x or y, and that of W is written. `by_x`: the projected are
// in W; else in W^T.
template <class T>
void project_backward(const T *in, int64_t count, const T *weight, bool by_x, int64_t d, T *grad, T *grad_weight,
                      Workspace &workspace, int threads) {
    const MimKernels<T> &kernel = kernels<T>();
    const Chunks chunks = in_chunks(count, kernel.row_width, most_rows);
    const int64_t tall = ratio_up(d, kernel.row_width) * kernel.row_width, wide = ratio_up(d, kernel.column_width) * kernel.column_width;
    const int64_t parts = std::clamp<int64_t>((int64_t(1) << 20) / (d * d), 1, std::min<int64_t>(8, std::max<int64_t>(chunks.number, 1)));
    const int64_t lanes = std::min<int64_t>(threads, parts);
    T *const matrix = workspace.take<T>(wide * d);
    T *const partials = parts > 1 ? workspace.take<T>(parts * d * d) : grad_weight;
    T *const across = workspace.take<T>(lanes * tall * chunks.size), *const along = workspace.take<T>(lanes * wide * chunks.size);
    T *const rows = workspace.take<T>(lanes * chunks.size * d);
    const bool few = by_x && count <= kernel.column_width;
    T *const work = workspace.take<T>(few ? work_for_few(kernel, d) : 0);
    if (!few) kernel.pack_columns(weight, by_x ? 1 : d, by_x ? d : 1, d, d, matrix);
    each_task(threads, parts, [&](int64_t lane, int64_t part) {
        const int64_t first = chunks.number * part / parts, last = chunks.number * (part + 1) / parts;
        for (int64_t i = first; i < last; ++i) {
            const int64_t n = chunks.length(i);
            T *const own = grad + chunks.begin(i) * d;
            const T *const rest = in + chunks.begin(i) * d, *const left = by_x ? rest : own, *const right = by_x ? own : rest;
            kernel.pack_rows(left, 1, d, d, n, across + lane * tall * chunks.size);
            kernel.pack_columns(right, d, 1, n, d, along + lane * wide * chunks.size);
            kernel.multiply(across + lane * tall * chunks.size, along + lane * wide * chunks.size, d, d, n, partials + part * d * d,
                            d, i > first);
            if (few) {
                kernel.multiply_few(own, n, weight, d, own, work);
                continue;
            }
            kernel.pack_rows(own, d, 1, n, d, rows + lane * chunks.size * d);
            kernel.multiply(rows + lane * chunks.size * d, matrix, n, d, d, own, d, false);
        }
    });
    if (chunks.number == 0) std::memset(grad_weight, 0, size_t(d * d) * sizeof(T));
    if (parts == 1) return;
    each_task(threads, std::min<int64_t>(d, 16), [&](int64_t, int64_t i) {
        const int64_t tasks = std::min<int64_t>(d, 16), begin = d * i / tasks * d, end = d * (i + 1) / tasks * d;
        for (int64_t e = begin; e < end; ++e) {
            T sum = partials[e];
            for (int64_t part = 1; part < parts; ++part) sum += partials[part * d * d + e];
            grad_weight[e] = sum;
        }
    });
}

// ---- all negatives
template <class T>
struct Tiling {
    const MimKernels<T> &kernel = kernels<T>();
    Chunks rows, columns;
    int64_t dim, height;  // of a tile, whole row panels
    int64_t row_elements() const { return height * dim; }
    int64_t score_elements() const { return height * columns.size; }
    explicit Tiling(const Sizes<T> &s)
        : rows(in_chunks(s.pairs, kernel.row_width, most_rows)), columns(in_chunks(s.rows, kernel.column_width, most_columns)),
          dim(s.dim), height(ratio_up(rows.size, kernel.row_width) * kernel.row_width) {}

    // b transposed, whole: column panels, those of chunk j beginning at columns.begin(j) * dim
    T *pack_b(const T *b, Workspace &workspace, int threads) const {
        T *const panels = workspace.take<T>(columns.number * columns.size * dim);
        each_task(threads, columns.number, [&](int64_t, int64_t j) {
            kernel.pack_columns(b + columns.begin(j) * dim, 1, dim, dim, columns.length(j), panels + columns.begin(j) * dim);
        });
        return panels;
    }
};

template <class T>
void all_forward(const Sizes<T> &s, const int64_t *positive, const T *a, const T *b, const Saved<T> &saved, Workspace &workspace,
                 int threads) {
    const Tiling<T> tiling(s);
    const MimKernels<T> &kernel = tiling.kernel;
    const int64_t parts = std::min(tiling.rows.number, most_parts), per_lane = tiling.height * kernel.lanes;
    const T *const b_rows = tiling.pack_b(b, workspace, threads);
    const int64_t lanes = std::min<int64_t>(threads, parts);
    T *const column_sum = workspace.take<T>(parts * s.rows), *const column_max = workspace.take<T>(s.dot ? parts * s.rows : 0);
    T *const a_rows = workspace.take<T>(lanes * tiling.row_elements()), *const scores = workspace.take<T>(lanes * tiling.score_elements());
    T *const row_sum = workspace.take<T>(lanes * per_lane), *const row_max = workspace.take<T>(s.dot ? lanes * per_lane : 0);
    each_task(threads, parts, [&](int64_t lane, int64_t part) {
        MimTile<T> tile = {};
        tile.dim = s.dim;
        tile.dot = s.dot;
        tile.a_rows = a_rows + lane * tiling.row_elements();
        tile.scores = scores + lane * tiling.score_elements();
        tile.row_sum = row_sum + lane * per_lane;
        tile.row_max = row_max + (s.dot ? lane * per_lane : 0);
        std::fill_n(column_sum + part * s.rows, s.rows, T(0));
        if (s.dot) std::fill_n(column_max + part * s.rows, s.rows, std::numeric_limits<T>::lowest());
        for (int64_t i = tiling.rows.number * part / parts; i < tiling.rows.number * (part + 1) / parts; ++i) {
            const int64_t row = tiling.rows.begin(i);
            tile.rows = tiling.rows.length(i);
            tile.positive = positive + row;
            tile.logit = saved.logit + row;
            kernel.pack_rows(a + row * s.dim, s.dim, 1, tile.rows, s.dim, const_cast<T *>(tile.a_rows));
            std::fill_n(tile.row_sum, per_lane, T(0));
            if (s.dot) std::fill_n(tile.row_max, per_lane, std::numeric_limits<T>::lowest());
            for (int64_t j = 0; j < tiling.columns.number; ++j) {
                const int64_t column = tiling.columns.begin(j);
                tile.columns = tiling.columns.length(j);
                tile.first_column = column;
                tile.b_rows = b_rows + column * s.dim;
                tile.column_sum = column_sum + part * s.rows + column;
                tile.column_max = column_max + (s.dot ? part * s.rows + column : 0);
                kernel.forward_tile(tile);
            }
            kernel.join_lanes(tile.row_max, tile.row_sum, tile.rows, s.dot, saved.y_top + row, saved.y_sum + row);
        }
    });
    each_task(threads, tiling.columns.number, [&](int64_t, int64_t j) {
        const int64_t column = tiling.columns.begin(j);
        kernel.join_columns(column_max + (s.dot ? column : 0), column_sum + column, parts, s.rows, tiling.columns.length(j), s.dot,
                            saved.x_top + column, saved.x_sum + column);
    });
}

template <class T>
void all_backward(const Sizes<T> &s, const int64_t *positive, const T *a, const T *b, const Saved<T> &saved, const T *grad_side_y,
                  const T *grad_side_x, T *grad_a, T *grad_b, Workspace &workspace, int threads) {
    const Tiling<T> tiling(s);
    const Chunks &rows = tiling.rows, &columns = tiling.columns;
    const MimKernels<T> &kernel = tiling.kernel;
    const int64_t d = s.dim, wide = ratio_up(d, kernel.column_width) * kernel.column_width;

    T *const row_scale = workspace.take<T>(s.pairs), *const pair_scale = workspace.take<T>(s.pairs);
    T *const by_pair = workspace.take<T>(s.pairs), *const column_scale = workspace.take<T>(s.rows);
    const bool few_columns = columns.number < std::min<int64_t>(rows.number, 8);
    const bool copies = few_columns && rows.number * s.rows * d * int64_t(sizeof(T)) <= copies_bytes;
    const int64_t at_once = copies ? rows.number : std::min(rows.number, columns.number), lanes = std::min<int64_t>(threads, at_once);
    T *const partials = copies ? workspace.take<T>(rows.number * s.rows * d) : nullptr;
    // Operands of tiles: kept whole if small, else packed anew for each tile, in the lane's own places.
    const bool keeps = (2 * s.pairs + s.rows) * d * int64_t(sizeof(T)) <= kept_bytes;
    const int64_t row_places = keeps ? rows.number : lanes, column_places = keeps ? columns.number : lanes;
    const T *const b_rows = tiling.pack_b(b, workspace, threads);
    T *const a_rows = workspace.take<T>(row_places * tiling.row_elements());
    T *const a_columns = workspace.take<T>(row_places * rows.size * wide);
    T *const b_columns = workspace.take<T>(column_places * columns.size * wide);
    T *const scores = workspace.take<T>(lanes * tiling.score_elements());
    std::vector<char> begun_a(size_t(rows.number), 0), begun_b(size_t(columns.number), 0);

    const Chunks pairs(s.pairs, 1024);
    each_task(threads, pairs.number, [&](int64_t, int64_t i) {
        for (int64_t p = pairs.begin(i); p < pairs.begin(i + 1); ++p) {
            const int64_t c = positive[p];
            const double own = score(saved.logit[p], s.dot);
            const double by_y = double(grad_side_y[p]) * share(own, saved.y_top[p], saved.y_sum[p]);
            const double by_x = double(grad_side_x[p]) * share(own, saved.x_top[c], saved.x_sum[c]);
            row_scale[p] = T(by_y);
            by_pair[p] = T(by_x);
            pair_scale[p] = T(-(by_y * double(saved.y_sum[p]) + by_x * double(saved.x_sum[c])));
        }
    });
    std::fill_n(column_scale, s.rows, T(0));
    for (int64_t p = 0; p < s.pairs; ++p) column_scale[positive[p]] += by_pair[p];

    const auto pack_a = [&](int64_t place, int64_t i) {
        kernel.pack_rows(a + rows.begin(i) * d, d, 1, rows.length(i), d, a_rows + place * tiling.row_elements());
        kernel.pack_columns(a + rows.begin(i) * d, d, 1, rows.length(i), d, a_columns + place * rows.size * wide);
    };
    const auto pack_b = [&](int64_t place, int64_t j) {
        kernel.pack_columns(b + columns.begin(j) * d, d, 1, columns.length(j), d, b_columns + place * columns.size * wide);
    };
    if (keeps)
        each_task(threads, rows.number + columns.number, [&](int64_t, int64_t i) {
            i < rows.number ? pack_a(i, i) : pack_b(i - rows.number, i - rows.number);
        });
    const auto run = [&](int64_t lane, int64_t i, int64_t j, T *b_target, bool add_a, bool add_b) {
        const int64_t row_place = keeps ? i : lane, column_place = keeps ? j : lane;
        if (!keeps) pack_a(row_place, i), pack_b(column_place, j);
        MimTile<T> tile = {};
        tile.rows = rows.length(i);
        tile.columns = columns.length(j);
        tile.dim = d;
        tile.dot = s.dot;
        tile.first_column = columns.begin(j);
        tile.positive = positive + rows.begin(i);
        tile.a_rows = a_rows + row_place * tiling.row_elements();
        tile.b_rows = b_rows + columns.begin(j) * d;
        tile.scores = scores + lane * tiling.score_elements();
        tile.row_scale = row_scale + rows.begin(i);
        tile.row_top = saved.y_top + rows.begin(i);
        tile.pair_scale = pair_scale + rows.begin(i);
        tile.column_scale = column_scale + columns.begin(j);
        tile.column_top = saved.x_top + columns.begin(j);
        tile.a_columns = a_columns + row_place * rows.size * wide;
        tile.b_columns = b_columns + column_place * columns.size * wide;
        tile.grad_a = grad_a + rows.begin(i) * d;
        tile.grad_b = b_target + columns.begin(j) * d;
        tile.add_a = add_a;
        tile.add_b = add_b;
        kernel.backward_tile(tile);
    };
    if (copies) {
        each_task(threads, rows.number, [&](int64_t lane, int64_t i) {
            for (int64_t j = 0; j < columns.number; ++j) run(lane, i, j, partials + i * s.rows * d, j > 0, false);
        });
        each_task(threads, std::min<int64_t>(s.rows, 16), [&](int64_t, int64_t i) {
            const int64_t tasks = std::min<int64_t>(s.rows, 16), begin = s.rows * i / tasks * d, end = s.rows * (i + 1) / tasks * d;
            for (int64_t e = begin; e < end; ++e) {
                T sum = partials[e];
                for (int64_t part = 1; part < rows.number; ++part) sum += partials[part * s.rows * d + e];
                grad_b[e] = sum;
            }
        });
        return;
    }
    for (int64_t step = 0; step < std::max(rows.number, columns.number); ++step)
        each_task(threads, at_once, [&](int64_t lane, int64_t task) {
            const bool more_rows = rows.number >= columns.number;
            const int64_t i = more_rows ? (task + step) % rows.number : task;
            const int64_t j = more_rows ? task : (task + step) % columns.number;
            run(lane, i, j, grad_b, begun_a[size_t(i)], begun_b[size_t(j)]);
            begun_a[size_t(i)] = begun_b[size_t(j)] = 1;
        });
}

// ---- sampled negatives
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
    int64_t begin(int64_t r) const { return r ? end[r - 1] : 0; }
    template <class Other>
    void sort(const int32_t *lists, const T *scales, const char *any, int64_t first, int64_t last, int64_t draws, int64_t rows, Other other_of) {
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
    const int64_t at_once = std::clamp<int64_t>(most_draws / std::max<int64_t>(k, 1), 1, std::max<int64_t>(s.pairs, 1)), held = at_once * k;
    int32_t *const list_y = workspace.take<int32_t>(held), *const list_x = workspace.take<int32_t>(held);
    T *const scale_y = workspace.take<T>(held), *const scale_x = workspace.take<T>(held), *const pair_scale = workspace.take<T>(at_once);
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
                    kernel.combine(out, b, by_a.other + by_a.begin(r), by_a.scale + by_a.begin(r), by_a.end[r] - by_a.begin(r), d);
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
                    kernel.combine(out, a, by_b.other + by_b.begin(r), by_b.scale + by_b.begin(r), by_b.end[r] - by_b.begin(r), d);
                }
            }
        });
    }
}

// One thread for work that is done before another wakes up.
template <class T>
int useful_threads(const Sizes<T> &s, int threads) {
    const double scores = s.sampled ? 2.0 * double(s.pairs) * double(s.draws) : double(s.pairs) * double(s.rows);
    const double products = double(s.dim) * scores + double(s.projected()) * double(s.dim);
    return products < 4e6 ? 1 : std::max(threads, 1);
}

template <class T>
int forward(const case_fast_mim &m, const void *x, const void *y, const void *weight, void *side_y, void *side_x, void *logit,
            void *saved_array, int threads) {
    const Sizes<T> s(m);
    const Saved<T> saved(s, static_cast<T *>(saved_array));
    Workspace workspace;
    std::fill_n(saved.logit, s.pairs == 0 ? saved.size : 0, T(0));  // what no kernel will write
    if (s.pairs == 0) return CASE_FAST_OK;
    threads = useful_threads(s, threads);
    prepare_output(saved_array, size_t(saved.size) * sizeof(T));
    const T *a = static_cast<const T *>(x), *b = static_cast<const T *>(y);
    if (!s.dot) {
        project(s.by_x ? a : b, s.by_x ? s.pairs : s.rows, static_cast<const T *>(weight), !s.by_x, s.dim, saved.projected, workspace, threads);
        (s.by_x ? a : b) = saved.projected;
    }
    if (s.sampled)
        sampled_forward(s, m.positive, m.seed, a, b, saved, workspace, threads);
    else
        all_forward(s, m.positive, a, b, saved, workspace, threads);
    const Chunks pairs(s.pairs, 1024);
    each_task(threads, pairs.number, [&](int64_t, int64_t i) {
        for (int64_t p = pairs.begin(i); p < pairs.begin(i + 1); ++p) {
            const int64_t c = s.sampled ? p : m.positive[p];
            const double own = score(saved.logit[p], s.dot);
            static_cast<T *>(side_y)[p] = T(side(own, saved.y_top[p], saved.y_sum[p]));
            static_cast<T *>(side_x)[p] = T(side(own, saved.x_top[c], saved.x_sum[c]));
            static_cast<T *>(logit)[p] = saved.logit[p];
        }
    });
    return CASE_FAST_OK;
}

template <class T>
int backward(const case_fast_mim &m, const void *x, const void *y, const void *weight, const void *saved_array,
             const void *grad_side_y, const void *grad_side_x, void *grad_x, void *grad_y, void *grad_weight, int threads) {
    const Sizes<T> s(m);
    const Saved<T> saved(s, const_cast<T *>(static_cast<const T *>(saved_array)));  // only read
    Workspace workspace;
    threads = useful_threads(s, threads);
    prepare_output(grad_x, size_t(s.pairs * s.dim) * sizeof(T));
    prepare_output(grad_y, size_t(s.rows * s.dim) * sizeof(T));
    const T *a = static_cast<const T *>(x), *b = static_cast<const T *>(y);
    if (!s.dot) (s.by_x ? a : b) = saved.projected;
    const T *const by_y = static_cast<const T *>(grad_side_y), *const by_x = static_cast<const T *>(grad_side_x);
    T *const grad_a = static_cast<T *>(grad_x), *const grad_b = static_cast<T *>(grad_y);
    if (s.pairs == 0 || s.rows == 0) {
        std::fill_n(grad_a, s.pairs * s.dim, T(0));
        std::fill_n(grad_b, s.rows * s.dim, T(0));
    } else if (s.sampled) {
        sampled_backward(s, m.positive, m.seed, a, b, saved, by_y, by_x, grad_a, grad_b, workspace, threads);
    } else {
        all_backward(s, m.positive, a, b, saved, by_y, by_x, grad_a, grad_b, workspace, threads);
    }
    if (!s.dot)
        project_backward(static_cast<const T *>(s.by_x ? x : y), s.by_x ? s.pairs : s.rows, static_cast<const T *>(weight), s.by_x, s.dim,
                         s.by_x ? grad_a : grad_b, static_cast<T *>(grad_weight), workspace, threads);
    return CASE_FAST_OK;
}

}  // namespace

extern "C" int64_t case_fast_bilinear_mim_saved(const case_fast_mim *mim) {
    return Saved<float>(Sizes<float>(*mim), nullptr).size;
}

extern "C" int case_fast_bilinear_mim_forward_cpu(const case_fast_mim *mim, const void *x, const void *y, const void *weight,
                                                  void *side_y, void *side_x, void *logit, void *saved, int threads) {
    const int status = check(mim, {x, side_y, side_x, logit, saved}, {y}, {weight});
    if (status != CASE_FAST_OK) return status;
    const auto run = mim->dtype == CASE_FAST_F64 ? forward<double> : forward<float>;
    try {
        return run(*mim, x, y, weight, side_y, side_x, logit, saved, threads);
    } catch (const std::bad_alloc &) {
        return CASE_FAST_NO_MEMORY;
    }
}

extern "C" int case_fast_bilinear_mim_backward_cpu(const case_fast_mim *mim, const void *x, const void *y, const void *weight,
                                                   const void *saved, const void *grad_side_y, const void *grad_side_x, void *grad_x,
                                                   void *grad_y, void *grad_weight, int threads) {
    const int status = check(mim, {x, saved, grad_side_y, grad_side_x, grad_x}, {y, grad_y}, {weight, grad_weight});
    if (status != CASE_FAST_OK) return status;
    const auto run = mim->dtype == CASE_FAST_F64 ? backward<double> : backward<float>;
    try {
        return run(*mim, x, y, weight, saved, grad_side_y, grad_side_x, grad_x, grad_y, grad_weight, threads);
    } catch (const std::bad_alloc &) {
        return CASE_FAST_NO_MEMORY;
    }
}
