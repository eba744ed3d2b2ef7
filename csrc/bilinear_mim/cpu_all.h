// Bilinear MIM with all negatives. Of cpu.cpp.
//
// Scores exist as one tile at a time, in cache: forward adds its e^S to row and column sums, backward makes the tile again, turns
// it into d loss / d z and multiplies it with b and, transposed, with a. Forward gives a task some chunks of rows of a and its own
// column sums. Backward goes through the tiles in steps; the tiles of a step share neither rows nor columns, so that each adds to
// both gradients in place, and each gradient's order of additions is that of the steps. Where there are too few columns for that,
// every chunk of rows has its own gradient of b.
#pragma once

#include <limits>
#include <vector>

#include "bilinear_mim/cpu_plan.h"

namespace {

constexpr int64_t most_columns = 512;             // of a tile: its scores take half of a 1 MiB second cache
constexpr int64_t most_parts = 32;                // of the column sums
constexpr int64_t kept_bytes = int64_t(8) << 20;  // below, operands of backward are packed once and not for each tile
constexpr int64_t copies_bytes = int64_t(4) << 20;  // for gradients of b by chunk of rows

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
    T *const a_rows = workspace.take<T>(lanes * tiling.row_elements());
    T *const scores = workspace.take<T>(lanes * tiling.score_elements());
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
        kernel.join_columns(column_max + (s.dot ? column : 0), column_sum + column, parts, s.rows, tiling.columns.length(j),
                            s.dot, saved.x_top + column, saved.x_sum + column);
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
    const int64_t at_once = copies ? rows.number : std::min(rows.number, columns.number);
    const int64_t lanes = std::min<int64_t>(threads, at_once);
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
            const int64_t tasks = std::min<int64_t>(s.rows, 16);
            const int64_t begin = s.rows * i / tasks * d, end = s.rows * (i + 1) / tasks * d;
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

}  // namespace
