// The kernels of a residual and the norm that follows, for the instruction set that this is compiled for. See cpu.h.
//
// A row stays in the first cache while it is gone through two or three times. Drawing what is dropped is most of the work.
#include "common/dots.h"
#include "common/philox_vector.h"
#include "common/sums.h"
#include "residual_norm/cpu.h"

namespace {

// body(i, k, load, store) for each vector of a row, k what dropout multiplies its columns by.
template <class T, class Body>
CASE_FAST_INLINE void each_kept(const RowDropout &d, int64_t row, int64_t columns, Body body) {
    constexpr int width = Lanes<T>::width;
    const uint64_t seed = d.seed;  // local, as the others, so that no store is thought to change them
    const uint32_t drop_below = d.drop_below;
    const T kept_scale = T(d.kept_scale);
    Vector<T> k[drawn_at_once / width];
    int64_t i = 0;
    for (; i + drawn_at_once <= columns; i += drawn_at_once) {
        kept_columns<T>(uint64_t(row), uint64_t(i), seed, drop_below, kept_scale, k);
        for (int v = 0; v < drawn_at_once / width; ++v)
            body(
                i + v * width, k[v], [](const T *from) __attribute__((always_inline)) { return load(from); },
                [](T *to, Vector<T> x) __attribute__((always_inline)) { store(to, x); });
    }
    if (i == columns) return;
    kept_columns<T>(uint64_t(row), uint64_t(i), seed, drop_below, kept_scale, k);
    int v = 0;
    for (; i + width <= columns; i += width, ++v)
        body(
            i, k[v], [](const T *from) __attribute__((always_inline)) { return load(from); },
            [](T *to, Vector<T> x) __attribute__((always_inline)) { store(to, x); });
    if (i < columns) {
        const Tail<T> tail = make_tail<T>(int(columns - i));
        body(
            i, k[v], [tail](const T *from) __attribute__((always_inline)) { return load(from, tail); },
            [tail](T *to, Vector<T> x) __attribute__((always_inline)) { store(to, x, tail); });
    }
}

// As each_kept; without dropout k is not to be used.
template <class T, bool dropping, class Body>
CASE_FAST_INLINE void each_column(const RowDropout &d, int64_t row, int64_t columns, Body body) {
    if constexpr (dropping)
        each_kept<T>(d, row, columns, body);
    else
        each_vector<T>(columns, [&](int64_t i, auto load, auto store)
                                    __attribute__((always_inline)) { body(i, Vector<T>{}, load, store); });
}

template <class T, bool updating, bool dropping>
void forward_of(const ResidualRows<T> &a, int64_t begin, int64_t end) {
    const int64_t width = a.width, whole = width / Lanes<T>::width * Lanes<T>::width;
    const T *const weight = a.weight, *const bias = a.bias;
    for (int64_t r = begin; r < end; ++r) {
        const T *const x = a.x + r * width, *const update = a.update + (updating ? r * width : 0);
        T *const total = updating ? a.total + r * width : nullptr, *const normed = a.normed + r * width;
        Vector<T> sum = {}, squares = {};
        each_column<T, dropping>(a.dropout, r, width, [&](int64_t i, Vector<T> k, auto load, auto store) __attribute__((always_inline)) {
            Vector<T> t = load(x + i);
            if constexpr (updating) {
                Vector<T> u = load(update + i);
                if constexpr (dropping) u *= k;
                t += u;
                store(total + i, t);
            }
            sum += t;
        });
        const T *const row = updating ? total : x;
        const T mean = sum_of<T>(sum) / T(width);
        for (int64_t i = 0; i < whole; i += Lanes<T>::width) {
            const Vector<T> t = load(row + i) - mean;
            squares += t * t;
        }
        T square = sum_of<T>(squares);
        for (int64_t i = whole; i < width; ++i) square += (row[i] - mean) * (row[i] - mean);
        const T inverse = T(1 / ::sqrt(double(square) / double(width) + a.eps));
        each_vector<T>(width, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
            store(normed + i, (load(row + i) - mean) * inverse * load(weight + i) + load(bias + i));
        });
        a.mean[r] = mean;
        a.inverse[r] = inverse;
    }
}
template <class T>
void forward(const ResidualRows<T> &a, int64_t begin, int64_t end) {
    const auto run = !a.update ? forward_of<T, false, false> : a.dropout.drop_below ? forward_of<T, true, true> : forward_of<T, true, false>;
    run(a, begin, end);
}

// With z the normalised row and g = grad_normed * weight: grad_x = grad_total + (g - mean(g) - z mean(g z)) / deviation
template <class T, bool adding, bool dropping>
void backward_of(const ResidualGradients<T> &a, int64_t begin, int64_t end, T *part) {
    const int64_t width = a.width;
    const T *const weight = a.weight;
    T *const of_weight = part, *const of_bias = part + width;
    for (int64_t i = 0; i < 2 * width; ++i) part[i] = T(0);
    for (int64_t r = begin; r < end; ++r) {
        const T *const total = a.total + r * width, *const given = a.grad_normed + r * width;
        const T *const grad_total = a.grad_total + (adding ? r * width : 0);
        T *const grad_x = a.grad_x + r * width, *const grad_update = a.grad_update + (dropping ? r * width : 0);
        const T mean = a.mean[r], inverse = a.inverse[r];
        Vector<T> sum = {}, along = {};
        each_vector<T>(width, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
            // beyond the row's end given is 0
            const Vector<T> z = (load(total + i) - mean) * inverse, y = load(given + i), g = y * load(weight + i);
            sum += g;
            along += g * z;
            store(of_weight + i, load(of_weight + i) + y * z);
            store(of_bias + i, load(of_bias + i) + y);
        });
        const T centre = sum_of<T>(sum) / T(width), slope = sum_of<T>(along) / T(width);
        each_column<T, dropping>(a.dropout, r, width, [&](int64_t i, Vector<T> k, auto load, auto store) __attribute__((always_inline)) {
            const Vector<T> z = (load(total + i) - mean) * inverse, g = load(given + i) * load(weight + i);
            Vector<T> grad = (g - centre - z * slope) * inverse;
            if constexpr (adding) grad += load(grad_total + i);
            store(grad_x + i, grad);
            if constexpr (dropping) store(grad_update + i, grad * k);
        });
    }
}
template <class T>
void backward(const ResidualGradients<T> &a, int64_t begin, int64_t end, T *part) {
    const auto run = a.grad_update ? (a.grad_total ? backward_of<T, true, true> : backward_of<T, false, true>)
                                   : (a.grad_total ? backward_of<T, true, false> : backward_of<T, false, false>);
    run(a, begin, end, part);
}

template <class T, bool adding>
void drop_of(const RowDropout &d, int64_t width, const T *from, const T *base, T *to, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
        each_kept<T>(d, r, width, [&](int64_t i, Vector<T> k, auto load, auto store) __attribute__((always_inline)) {
            Vector<T> x = load(from + r * width + i) * k;
            if constexpr (adding) x += load(base + r * width + i);
            store(to + r * width + i, x);
        });
}
template <class T>
void drop(const RowDropout &d, int64_t width, const T *from, const T *base, T *to, int64_t begin, int64_t end) {
    (base ? drop_of<T, true> : drop_of<T, false>)(d, width, from, base, to, begin, end);
}

template <class T>
void join(int64_t parts, int64_t count, const T *part, T *out) {
    each_vector<T>(count, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
        Vector<T> sum = load(part + i);
        for (int64_t p = 1; p < parts; ++p) sum += load(part + p * count + i);
        store(out + i, sum);
    });
}

template <class T>
constexpr ResidualKernels<T> residual_kernels() {
    return {forward<T>, backward<T>, drop<T>, join<T>};
}

}  // namespace

const KernelsOf<ResidualKernels> CASE_FAST_KERNELS_HERE(residual_norm) = {residual_kernels<float>(), residual_kernels<double>()};
