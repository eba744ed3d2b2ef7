// Softmax of a row of scores, dropout on its weights, and its gradient, for the instruction set of the including file. A `Call` has
// the members scale, kept_scale, seed and drop_below of `Attention`.
//
// Like vector.h, nothing here may be shared by the linker between instruction sets.
#pragma once

#include "common/philox_vector.h"
#include "common/sums.h"

namespace {

// Scores of the first `visible` keys to softmax weights, the others to 0. A row holds whole vectors. Returns log-sum-exp.
template <class T>
CASE_FAST_INLINE T softmax(T *row, int64_t visible, int64_t padded, T scale) {
    constexpr int width = Lanes<T>::width;
    const Vector<T> zero = {};
    const T nothing = -T(INFINITY);
    if (visible <= 0) {
        for (int64_t j = 0; j < padded; j += width) store(row + j, zero);
        return nothing;
    }
    const int64_t whole = visible / width * width, end = (visible + width - 1) / width * width;
    Vector<T> tops = zero + nothing;
    const auto raise = [&](int64_t j) __attribute__((always_inline)) {
        const Vector<T> x = load(row + j);
        tops = x > tops ? x : tops;  // NaN: comes back through the sum
    };
    for (int64_t j = 0; j < whole; j += width) {
        store(row + j, load(row + j) * scale);
        raise(j);
    }
    if (whole < end) {
        for (int64_t j = whole; j < visible; ++j) row[j] *= scale;
        for (int64_t j = visible; j < end; ++j) row[j] = nothing;
        raise(whole);
    }
    T top = tops[0];
    for (int i = 1; i < width; ++i) top = tops[i] > top ? tops[i] : top;
    Vector<T> total = zero;
    for (int64_t j = 0; j < end; j += width) {
        const Vector<T> x = exp_nonpositive(load(row + j) - top);
        store(row + j, x);
        total += x;
    }
    const T sum = sum_of<T>(total), inverse = 1 / sum;
    for (int64_t j = 0; j < end; j += width) store(row + j, load(row + j) * inverse);
    for (int64_t j = end; j < padded; j += width) store(row + j, zero);
    return top + T(::log(double(sum)));
}

// number: of the first weight, for dropout.
template <class T, class Call>
void drop_weights(const Call &a, uint64_t number, int head, int64_t count, T *weights) {
    const T kept_scale = a.kept_scale;
    const uint64_t seed = a.seed, drop_below = a.drop_below;
    for (int64_t j = 0; j < count; j += Lanes<T>::width)
        store(weights + j, load(weights + j) * kept(number + uint64_t(j), uint32_t(head), seed, drop_below, kept_scale));
}

template <class T, bool dropping, class Call>
void weight_gradients_of(const Call &a, uint64_t number, int head, int64_t visible, int64_t seen, T mean, T lse, T *p, T *g) {
    constexpr int width = Lanes<T>::width;
    const T scale = a.scale, kept_scale = a.kept_scale;
    const uint64_t seed = a.seed, drop_below = a.drop_below;
    for (int64_t j = 0; j < seen; j += width) {
        const Vector<T> least = {}, log_weight = load(p + j) * scale - lse, slope = load(g + j);
        // of scores beyond 1e6 the rounding of lse would make weights of any size; NaN goes through
        const Vector<T> weight = exp_nonpositive(log_weight > least ? least : log_weight);
        if constexpr (dropping) {
            const Vector<T> factor = kept(number + uint64_t(j), uint32_t(head), seed, drop_below, kept_scale);
            store(p + j, weight * factor);
            store(g + j, weight * (slope * factor - mean) * scale);
        } else {
            store(p + j, weight);
            store(g + j, weight * (slope - mean) * scale);
        }
    }
    for (int64_t j = visible; j < seen; ++j) p[j] = g[j] = 0;
}

// Of one row: the scores p to W = P M, and the slopes g = grad_out value^T to S. (Whether there is dropout is known when the loop is
// compiled: GCC 12 gets a vector that is multiplied on a condition wrong.)
template <class T, class Call>
CASE_FAST_INLINE void weight_gradients(const Call &a, uint64_t number, int head, int64_t visible, int64_t seen, T mean, T lse, T *p, T *g) {
    if (a.drop_below)
        weight_gradients_of<T, true>(a, number, head, visible, seen, mean, lse, p, g);
    else
        weight_gradients_of<T, false>(a, number, head, visible, seen, mean, lse, p, g);
}

}  // namespace
