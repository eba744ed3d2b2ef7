// Bilinear MIM with so many draws that products of whole matrices cost less than gathered rows. Of cpu_sampled.h.
//
// Some rows of a at a time have all their scores, from which those drawn are picked; and some rows of a, or of b, have d loss / d z
// as a whole matrix, which is multiplied with the other side. Never more than some rows: no (P, Q) array.
#pragma once

#include "bilinear_mim/cpu_draws.h"

namespace {

// Rows whose scores with `others` rows lie in the second cache.
template <class T>
Chunks dense_chunks(int64_t rows, int64_t others) {
    const int64_t fit = (int64_t(1) << 20) / (std::max<int64_t>(others, 1) * int64_t(sizeof(T)));
    return in_chunks(rows, kernels<T>().row_width, std::clamp<int64_t>(fit, 48, most_rows));
}

// All rows of a matrix as column panels: transposed, for products of other rows with its rows; or not, for sums of its rows.
template <class T>
const T *dense_panels(const T *matrix, int64_t rows, int64_t d, bool transposed, Workspace &workspace, int threads) {
    const MimKernels<T> &kernel = kernels<T>();
    const int64_t width = kernel.column_width, columns = transposed ? rows : d, depth = transposed ? d : rows;
    T *const panels = workspace.take<T>(ratio_up(columns, width) * width * depth);
    const Chunks chunks(columns, width * ratio_up(columns, 8 * width));
    each_task(threads, chunks.number, [&](int64_t, int64_t i) {
        const int64_t first = chunks.begin(i);
        kernel.pack_columns(matrix + first * (transposed ? d : 1), transposed ? 1 : d, transposed ? d : 1, depth, chunks.length(i),
                            panels + first * depth);
    });
    return panels;
}

// The scores of draws, by products of some rows of a at a time with all of b.
template <class T>
class DenseScores {
public:
    DenseScores(const Sizes<T> &s, const T *a, const T *b, Workspace &workspace, int threads)
        : s_(s), a_(a), chunks_(dense_chunks<T>(s.pairs, s.rows)), lanes_(std::min<int64_t>(threads, chunks_.number)),
          b_columns_(dense_panels(b, s.rows, s.dim, true, workspace, threads)),
          rows_(workspace.take<T>(lanes_ * chunks_.size * s.dim)), scores_(workspace.take<T>(lanes_ * chunks_.size * s.rows)),
          end_(workspace.take<int64_t>(s.pairs + 1)), place_(workspace.take<int32_t>(s.at_once * s.draws)) {}

    // z_y and z_x of the draws.
    void find(const Draws<T> &draws, const int64_t *positive, int threads) const {
        sort_draws(draws, draws.list_x, draws.any_x, s_.pairs, end_, [&](int64_t place, int64_t, int64_t e) { place_[place] = int32_t(e); });
        each_task(threads, chunks_.number, [&](int64_t lane, int64_t i) {
            const MimKernels<T> &kernel = kernels<T>();
            const int64_t begin = chunks_.begin(i), end = chunks_.begin(i + 1), k = draws.each;
            const int64_t first = std::max(begin, draws.first), last = std::min(end, draws.last);
            const int64_t hit = begin ? end_[begin - 1] : 0;
            if (first >= last && hit == end_[end - 1]) return;
            T *const rows = rows_ + lane * chunks_.size * s_.dim, *const scores = scores_ + lane * chunks_.size * s_.rows;
            kernel.pack_rows(a_ + begin * s_.dim, s_.dim, 1, end - begin, s_.dim, rows);
            kernel.multiply(rows, b_columns_, end - begin, s_.rows, s_.dim, scores, s_.rows, false);
            for (int64_t p = first; p < last; ++p) {
                const int64_t from = (p - draws.first) * k;
                if (!draws.any_y[p - draws.first]) continue;
                for (int64_t e = from; e < from + k; ++e) draws.z_y[e] = scores[(p - begin) * s_.rows + draws.list_y[e]];
            }
            for (int64_t r = begin, at = hit; r < end; ++r)
                for (; at < end_[r]; ++at) {
                    const int64_t e = place_[at];
                    draws.z_x[e] = scores[(r - begin) * s_.rows + positive[draws.first + e / k]];
                }
        });
    }

private:
    const Sizes<T> &s_;
    const T *a_;
    Chunks chunks_;
    int64_t lanes_;
    const T *b_columns_;
    T *rows_, *scores_;
    int64_t *end_;
    int32_t *place_;  // in the lists, of the draws of side x by the row they hit
};

// One side's gradients: out (rows, d) = or += G times the other side's rows, where fill(r, add) adds to row r of G by
// add(other row, value).
template <class T>
class DenseGradients {
public:
    DenseGradients(const Sizes<T> &s, int64_t rows, const T *others, int64_t other_rows, Workspace &workspace, int threads)
        : d_(s.dim), depth_(other_rows), chunks_(dense_chunks<T>(rows, other_rows)), lanes_(std::min<int64_t>(threads, chunks_.number)),
          panels_(dense_panels(others, other_rows, s.dim, false, workspace, threads)),
          matrix_(workspace.take<T>(lanes_ * chunks_.size * depth_)) {}

    int64_t tasks() const { return chunks_.number; }

    template <class Fill>
    void run(int64_t lane, int64_t task, T *out, bool more, Fill fill) const {
        const MimKernels<T> &kernel = kernels<T>();
        const int64_t begin = chunks_.begin(task), count = chunks_.length(task), height = kernel.row_width;
        const int64_t place = chunks_.number <= lanes_ ? task : lane;  // other objects' tasks share the lanes
        T *const matrix = matrix_ + place * chunks_.size * depth_;     // row panels
        std::fill_n(matrix, ratio_up(count, height) * height * depth_, T(0));
        for (int64_t i = 0; i < count; ++i) {
            T *const row = matrix + i / height * height * depth_ + i % height;
            fill(begin + i, [row, height](int64_t other, T value) { row[other * height] += value; });
        }
        kernel.multiply(matrix, panels_, count, d_, depth_, out + begin * d_, d_, more);
    }

private:
    int64_t d_, depth_;
    Chunks chunks_;
    int64_t lanes_;
    const T *panels_;
    T *matrix_;
};

// A product would spread what is not finite to rows that have no part in it.
template <class T>
bool all_finite(const T *x, int64_t count) {
    T rest = 0;
    for (int64_t i = 0; i < count; ++i) rest += x[i] * T(0);
    return rest == T(0);
}

}  // namespace
