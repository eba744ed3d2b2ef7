// Bilinear MIM on the CPU: checks, W, and the call's order. cpu_all.h and cpu_sampled.h divide the work into tasks, cpu_kernels.cpp
// has the arithmetic.
//
// W is applied to the shorter of x and y: x W y^T = (x W) y^T = x (y W^T)^T. What is multiplied from then on is a (P, d), from x,
// and b (Q, d), from y. All divisions depend on the sizes alone: hence the same bits for any number of threads.
#include <cstring>
#include <limits>

#include "bilinear_mim/cpu_all.h"
#include "bilinear_mim/cpu_sampled.h"
#include "common/calls.h"
#include "common/philox.h"

namespace {

int check(const case_fast_mim *mim, std::initializer_list<const void *> x_arrays, std::initializer_list<const void *> y_arrays,
          std::initializer_list<const void *> weight_arrays) {
    if (!mim) return CASE_FAST_BAD_ARGUMENT;
    const case_fast_mim &m = *mim;
    constexpr int64_t most = std::numeric_limits<int32_t>::max() - 4096;
    if (m.pairs < 0 || m.pairs > most || m.rows < 0 || m.rows > most || m.dim < 1 || m.dim > most) return CASE_FAST_BAD_ARGUMENT;
    if (m.negatives < -1 || m.negatives > most) return CASE_FAST_BAD_ARGUMENT;
    if (m.dtype != CASE_FAST_F32 && m.dtype != CASE_FAST_F64) return CASE_FAST_BAD_ARGUMENT;
    if (m.plan < CASE_FAST_MIM_AUTO || m.plan > CASE_FAST_MIM_DENSE) return CASE_FAST_BAD_ARGUMENT;
    if (m.score != CASE_FAST_BILINEAR_SIGMOID && m.score != CASE_FAST_DOT) return CASE_FAST_BAD_ARGUMENT;
    const bool weighs = m.score == CASE_FAST_BILINEAR_SIGMOID;
    if (m.pairs > 0 && (!m.positive || missing(x_arrays))) return CASE_FAST_BAD_ARGUMENT;
    if (m.rows > 0 && missing(y_arrays)) return CASE_FAST_BAD_ARGUMENT;
    if (weighs && missing(weight_arrays)) return CASE_FAST_BAD_ARGUMENT;
    for (int64_t p = 0; p < m.pairs; ++p)
        if (uint64_t(m.positive[p]) >= uint64_t(m.rows)) return CASE_FAST_BAD_INDICES;
    return CASE_FAST_OK;
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
    T *const panels = workspace.take<T>(std::min<int64_t>(threads, chunks.number) * chunks.size * d);
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

// The gradient of the projected rows, in `grad`, becomes that of `in`, x or y; and that of W is written. `by_x`: they are `in`
// times W, else times W^T.
template <class T>
void project_backward(const T *in, int64_t count, const T *weight, bool by_x, int64_t d, T *grad, T *grad_weight,
                      Workspace &workspace, int threads) {
    const MimKernels<T> &kernel = kernels<T>();
    const Chunks chunks = in_chunks(count, kernel.row_width, most_rows);
    const int64_t tall = ratio_up(d, kernel.row_width) * kernel.row_width;
    const int64_t wide = ratio_up(d, kernel.column_width) * kernel.column_width;
    const int64_t most = std::clamp<int64_t>(chunks.number, 1, 8);  // each with a gradient of W
    const int64_t parts = std::clamp<int64_t>((int64_t(1) << 20) / (d * d), 1, most);
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
            kernel.multiply(across + lane * tall * chunks.size, along + lane * wide * chunks.size, d, d, n,
                            partials + part * d * d, d, i > first);
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
        project(s.by_x ? a : b, s.by_x ? s.pairs : s.rows, static_cast<const T *>(weight), !s.by_x, s.dim, saved.projected,
                workspace, threads);
        (s.by_x ? a : b) = saved.projected;
    }
    if (s.sampled)
        sampled_forward(s, m.positive, case_fast_seed(m.seed, m.seed_at), a, b, saved, workspace, threads);
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
        Workspace workspace;
        sampled_backward(s, m.positive, case_fast_seed(m.seed, m.seed_at), a, b, saved, by_y, by_x, grad_a, grad_b, workspace,
                         threads);
    } else {
        Workspace workspace;
        all_backward(s, m.positive, a, b, saved, by_y, by_x, grad_a, grad_b, workspace, threads);
    }
    if (!s.dot) {
        Workspace workspace;
        project_backward(static_cast<const T *>(s.by_x ? x : y), s.by_x ? s.pairs : s.rows, static_cast<const T *>(weight),
                         s.by_x, s.dim, s.by_x ? grad_a : grad_b, static_cast<T *>(grad_weight), workspace, threads);
    }
    return CASE_FAST_OK;
}

}  // namespace

extern "C" int64_t case_fast_bilinear_mim_saved(const case_fast_mim *mim) {
    return Saved<float>(Sizes<float>(*mim), nullptr).size;
}

extern "C" int case_fast_bilinear_mim_plan(const case_fast_mim *mim) {
    const Sizes<float> s(*mim);
    return s.dense ? CASE_FAST_MIM_DENSE : s.draws > 0 ? CASE_FAST_MIM_GATHERED : CASE_FAST_MIM_AUTO;
}

extern "C" int case_fast_bilinear_mim_forward_cpu(const case_fast_mim *mim, const void *x, const void *y, const void *weight,
                                                  void *side_y, void *side_x, void *logit, void *saved, int threads) {
    const int status = check(mim, {x, side_y, side_x, logit, saved}, {y}, {weight});
    if (status != CASE_FAST_OK) return status;
    return guarded(mim->dtype, [&](auto like) {
        return forward<decltype(like)>(*mim, x, y, weight, side_y, side_x, logit, saved, threads);
    });
}

extern "C" int case_fast_bilinear_mim_backward_cpu(const case_fast_mim *mim, const void *x, const void *y, const void *weight,
                                                   const void *saved, const void *grad_side_y, const void *grad_side_x, void *grad_x,
                                                   void *grad_y, void *grad_weight, int threads) {
    const int status = check(mim, {x, saved, grad_side_y, grad_side_x, grad_x}, {y, grad_y}, {weight, grad_weight});
    if (status != CASE_FAST_OK) return status;
    return guarded(mim->dtype, [&](auto like) {
        return backward<decltype(like)>(*mim, x, y, weight, saved, grad_side_y, grad_side_x, grad_x, grad_y, grad_weight, threads);
    });
}
