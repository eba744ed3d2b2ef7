// The kernels of the block around the attention, for the instruction set that this is compiled for. See cpu.h.
#include "common/dots.h"
#include "common/philox_vector.h"
#include "common/sums.h"
#include "cross_attention/cpu.h"

namespace {

template <class T>
void multiply_fresh(int64_t rows, int64_t columns, int64_t depth, const T *a, int64_t a_row, int64_t a_depth, const T *b, int64_t b_stride,
                    T *c, int64_t c_stride) {
    multiply(rows, columns, depth, a, a_row, a_depth, b, b_stride, c, c_stride, false);
}

template <class T>
void normalise(int64_t rows, int64_t width, const T *hidden, const T *weight, const T *bias, double eps, T *out, T *kept_rows,
               T *inverse_deviation) {
    for (int64_t r = 0; r < rows; ++r, hidden += width, out += width) {
        Vector<T> total = {};
        each_vector<T>(width, [&](int64_t i, auto load, auto) __attribute__((always_inline)) { total += load(hidden + i); });
        const T mean = sum_of<T>(total) / T(width);
        const int64_t whole = width / Lanes<T>::width * Lanes<T>::width;
        total = Vector<T>{};
        for (int64_t i = 0; i < whole; i += Lanes<T>::width) {
            const Vector<T> x = load(hidden + i) - mean;
            total += x * x;
        }
        T squares = sum_of<T>(total);
        for (int64_t i = whole; i < width; ++i) squares += (hidden[i] - mean) * (hidden[i] - mean);
        const T inverse = T(1 / ::sqrt(double(squares) / double(width) + eps));
        each_vector<T>(width, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
            const Vector<T> x = (load(hidden + i) - mean) * inverse;
            if (kept_rows) store(kept_rows + r * width + i, x);
            store(out + i, x * load(weight + i) + load(bias + i));
        });
        if (inverse_deviation) inverse_deviation[r] = inverse;
    }
}

template <class T>
void scale_and_shift(int64_t rows, int64_t width, const T *kept_rows, const T *weight, const T *bias, T *out) {
    for (int64_t r = 0; r < rows; ++r, kept_rows += width, out += width)
        each_vector<T>(width, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
            store(out + i, load(kept_rows + i) * load(weight + i) + load(bias + i));
        });
}

// With x the normalised row and g = grad_normed * weight: grad += (g - mean(g) - x mean(g x)) / deviation
template <class T>
void normalise_backward(int64_t rows, int64_t width, const T *kept_rows, const T *inverse_deviation, const T *weight, const T *grad_normed,
                        T *grad, T *norm_grads) {
    for (int64_t r = 0; r < rows; ++r, kept_rows += width, grad_normed += width, grad += width) {
        Vector<T> total = {}, along = {};
        each_vector<T>(width, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
            const Vector<T> x = load(kept_rows + i), given = load(grad_normed + i), g = given * load(weight + i);
            total += g;
            along += g * x;
            store(norm_grads + i, load(norm_grads + i) + given * x);
            store(norm_grads + width + i, load(norm_grads + width + i) + given);
        });
        const T mean = sum_of<T>(total) / T(width), slope = sum_of<T>(along) / T(width), inverse = inverse_deviation[r];
        each_vector<T>(width, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
            const Vector<T> g = load(grad_normed + i) * load(weight + i);
            store(grad + i, load(grad + i) + (g - mean - load(kept_rows + i) * slope) * inverse);
        });
    }
}

template <class T, bool dropping, bool add>
void drop_as(const ElementDropout &d, int64_t first, int64_t count, const T *from, T *to) {
    const T kept_scale = T(d.kept_scale);
    const uint64_t seed = d.seed, drop_below = d.drop_below;  // local, so that no store is thought to change them
    each_vector<T>(count, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
        Vector<T> x = load(from + i);
        if constexpr (dropping) x *= kept(uint64_t(first + i), 0, seed, drop_below, kept_scale);
        if constexpr (add) x += load(to + i);
        store(to + i, x);
    });
}
template <class T>
void drop(const ElementDropout &d, int64_t first, int64_t count, const T *from, T *to, bool add) {
    const auto run = d.drop_below ? (add ? drop_as<T, true, true> : drop_as<T, true, false>)
                                  : (add ? drop_as<T, false, true> : drop_as<T, false, false>);
    run(d, first, count, from, to);
}

template <class T>
constexpr BlockKernels<T> block_kernels() {
    return {multiply_transposed<T>, multiply_fresh<T>, normalise<T>, normalise_backward<T>, scale_and_shift<T>, drop<T>};
}

}  // namespace

const KernelsOf<BlockKernels> CASE_FAST_KERNELS_HERE(cross_attention) = {block_kernels<float>(), block_kernels<double>()};
