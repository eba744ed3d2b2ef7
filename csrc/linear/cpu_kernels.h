// The kernels of products of rows with weights, for the instruction set of the including file. See cpu.h for the data.
//
// B is packed by groups of columns that stay in the second cache; rows of A that need no rounding are read as they lie where one of
// their strides is 1.
// Each element of C is the sum over pieces of depth, ascending, of its sums over a piece, ascending, whichever operand is A.
#pragma once

#include "common/gemm.h"
#include "common/vector.h"
#include "linear/cpu.h"

namespace {

constexpr int64_t group_bytes = int64_t(400) << 10;  // of a group of B, at most: of a second cache of 1 MiB
static_assert(group_bytes >= int64_t(sizeof(double)) * Tile<double>::columns * linear_transposed, "a panel may be a group");

struct Division {  // depth in elements
    int64_t piece, span, group;  // depth summed in registers, depth packed at once, columns packed at once
};
template <class E>
CASE_FAST_INLINE Division divide(int64_t columns, int64_t depth) {
    constexpr int64_t width = Tile<E>::columns;
    const int64_t pieces = depth > linear_piece ? panels_of(depth, linear_piece) : 1;
    const int64_t piece = panels_of(depth > 0 ? depth : 1, pieces);
    const int64_t span = depth <= linear_transposed ? (depth > 0 ? depth : 1) : piece;
    const int64_t most = group_bytes / (span * width * int64_t(sizeof(E)));
    const int64_t panels = panels_of(columns > 0 ? columns : 1, width), groups = panels_of(panels, most > 0 ? most : 1);
    return {piece, span, panels_of(panels, groups) * width};
}

// Enough for that many columns and depth, and for fewer.
template <class E>
int64_t scratch(int64_t columns, int64_t depth) {
    static_assert(sizeof(E) == sizeof(Sum<E>), "panels and sums share it");
    constexpr int64_t most = group_bytes / int64_t(sizeof(E));
    const int64_t span = least(depth > 0 ? elements<E>(depth) : 1, linear_transposed), group = least(packed_columns<E>(columns, 1), most);
    return least(group * span, most) + Tile<E>::rows * (span + 2 * group);
}

// ---- what follows a product

CASE_FAST_INLINE Vector<float> absolute(Vector<float> x) {
    typedef int32_t Bits __attribute__((vector_size(CASE_FAST_VECTOR_BYTES)));
    return (Vector<float>)((Bits)x & INT32_MAX);
}
CASE_FAST_INLINE Vector<double> absolute(Vector<double> x) {
    typedef int64_t Bits __attribute__((vector_size(CASE_FAST_VECTOR_BYTES)));
    return (Vector<double>)((Bits)x & INT64_MAX);
}

// The normal distribution P(x <= b) for b in [least_argument, 0], within 1e-7, and the fewer the smaller it is: 2 to a polynomial,
// fitted down to -6. At least_argument it is 0, and so it is below.
template <class T>
constexpr T least_argument = sizeof(T) == 4 ? T(-11.5) : T(-40);
CASE_FAST_INLINE Vector<float> normal_distribution(Vector<float> b) {
    const Vector<float> zero = {};
    Vector<float> y = zero - 1.28733825e-6f;
    y = y * b - 2.15086475e-5f;
    y = y * b - 1.05959742e-4f;
    y = y * b + 3.16417718e-4f;
    y = y * b + 7.27626868e-3f;
    y = y * b + 5.26273325e-2f;
    y = y * b - 4.59170133e-1f;
    y = y * b + 1.15110934f;
    y = y * b - 0.99999994f;
    const Vector<float> shifted = y + 12582912.0f, f = y - (shifted - 12582912.0f);
    Vector<float> p = zero + 1.53458328e-4f;  // 2^f for f in [-1/2, 1/2]
    p = p * f + 1.33999309e-3f;
    p = p * f + 9.61848907e-3f;
    p = p * f + 5.55032864e-2f;
    p = p * f + 2.40226462e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
    return times_two_to(p, shifted);
}
CASE_FAST_INLINE Vector<float> hyperbolic_tangent(Vector<float> x) {
    const Vector<float> zero = {}, t = absolute(x), s = x * x;
    const Vector<float> e = exp_nonpositive(-2.0f * t), far = (1.0f - e) / (1.0f + e);
    Vector<float> near = zero + 1.57394409e-2f;
    near = near * s - 5.23025580e-2f;
    near = near * s + 1.33152470e-1f;
    near = near * s - 3.33327681e-1f;
    near = near * s;
    near = near * x + x;
    return t > 0.55f ? (x < 0.0f ? -far : far) : near;
}
// Lane by lane, as exp_nonpositive in double.
CASE_FAST_INLINE Vector<double> normal_distribution(Vector<double> b) {
    for (int i = 0; i < Lanes<double>::width; ++i) b[i] = 0.5 * ::erfc(-b[i] * M_SQRT1_2);
    return b;
}
CASE_FAST_INLINE Vector<double> hyperbolic_tangent(Vector<double> x) {
    for (int i = 0; i < Lanes<double>::width; ++i) x[i] = ::tanh(x[i]);
    return x;
}

// z P(x <= z), and its derivative, of what they are at -|z|. NaN goes through, and where torch gives NaN, at infinities, so do they.
template <class T>
CASE_FAST_INLINE Vector<T> gaussian_unit(Vector<T> z) {
    const Vector<T> zero = {}, negative = -absolute(z), b = negative < least_argument<T> ? zero + least_argument<T> : negative;
    return (z < zero ? zero : z) + (z < zero ? z : b) * normal_distribution(b);
}
template <class T>
CASE_FAST_INLINE Vector<T> gaussian_unit_slope(Vector<T> z) {
    constexpr T scale = T(0.5 * M_2_SQRTPI * M_SQRT1_2);  // 1 / sqrt(2 pi)
    const Vector<T> zero = {}, negative = -absolute(z), b = negative < least_argument<T> ? zero + least_argument<T> : negative;
    const Vector<T> below = normal_distribution(b) + negative * (scale * exp_nonpositive(T(-0.5) * negative * negative));
    return z > zero ? T(1) - below : below;
}

// Calls body(f, derivative), which take vectors: f of z, and f' of what is kept.
template <class T, class Body>
CASE_FAST_INLINE void with_activation(int32_t activation, Body body) {
    switch (activation) {
        case CASE_FAST_RELU:
            return body([](Vector<T> z) __attribute__((always_inline)) { return z < T(0) ? Vector<T>{} : z; },  // NaN goes through
                        [](Vector<T> y) __attribute__((always_inline)) { return y <= T(0) ? Vector<T>{} : Vector<T>{} + T(1); });
        case CASE_FAST_GELU:
            return body([](Vector<T> z) __attribute__((always_inline)) { return gaussian_unit<T>(z); },
                        [](Vector<T> z) __attribute__((always_inline)) { return gaussian_unit_slope<T>(z); });
        case CASE_FAST_TANH:
            return body([](Vector<T> z) __attribute__((always_inline)) { return hyperbolic_tangent(z); },
                        [](Vector<T> y) __attribute__((always_inline)) { return T(1) - y * y; });
        default:
            return body([](Vector<T> z) __attribute__((always_inline)) { return z; },
                        [](Vector<T>) __attribute__((always_inline)) { return Vector<T>{} + T(1); });
    }
}

// c (rows, columns) = f(c + bias), with a bias a column, or a row where transposed; and z (rows, columns).
template <class T>
void finish(T *c, int64_t stride, int64_t rows, int64_t columns, const T *bias, bool transposed, T *z, int64_t z_stride,
            int32_t activation) {
    with_activation<T>(activation, [=](auto f, auto) __attribute__((always_inline)) {
        for (int64_t i = 0; i < rows; ++i) {
            T *const to = c + i * stride, *const before = z ? z + i * z_stride : nullptr;
            each_vector<T>(columns, [=](int64_t j, auto get, auto put) __attribute__((always_inline)) {
                Vector<T> sum = get(to + j);
                if (bias) sum += transposed ? Vector<T>{} + bias[i] : get(bias + j);
                if (before) put(before + j, sum);
                put(to + j, f(sum));
            });
        }
    });
}

// to[j * stride + i] = from[i * width + j]
template <class T>
void store_transposed(const T *from, int64_t width, int64_t rows, int64_t columns, T *to, int64_t stride) {
    int64_t i = 0;
#if defined(__x86_64__)
    if constexpr (sizeof(T) == 4)
        for (; i + 4 <= rows; i += 4) {
            int64_t j = 0;
            for (; j + 4 <= columns; j += 4) transpose_four(from + i * width + j, width, to + j * stride + i, stride);
            for (; j < columns; ++j)
                for (int64_t l = i; l < i + 4; ++l) to[j * stride + l] = from[l * width + j];
        }
#endif
    for (int64_t j = 0; j < columns; ++j)
        for (int64_t l = i; l < rows; ++l) to[j * stride + l] = from[l * width + j];
}

template <class T>
void differentiate(int32_t activation, int64_t rows, int64_t columns, const T *grad_y, int64_t y_stride, const T *kept, T *grad_z,
                   int64_t stride, T *sums) {
    const bool differs = activation != CASE_FAST_IDENTITY;
    for (int64_t j = 0; sums && j < columns; ++j) sums[j] = T(0);
    with_activation<T>(activation, [=](auto, auto derivative) __attribute__((always_inline)) {
        for (int64_t i = 0; i < rows; ++i) {
            const T *const given = grad_y + i * y_stride, *const at = differs ? kept + i * stride : nullptr;
            T *const to = differs ? grad_z + i * stride : nullptr;
            each_vector<T>(columns, [=](int64_t j, auto get, auto put) __attribute__((always_inline)) {
                Vector<T> g = get(given + j);
                if (differs) {
                    g *= derivative(get(at + j));
                    put(to + j, g);
                }
                if (sums) put(sums + j, get(sums + j) + g);
            });
        }
    });
}

// ---- products

// `count` rows and `columns` columns of C; pairs of rows beyond `count` are read where packed.
template <class E>
CASE_FAST_INLINE void tile(const E *a, const RowLayout as_it_lies, bool packed, const E *b, int64_t depth, Sum<E> *c, int64_t stride,
                           int64_t count, int64_t columns, bool add) {
    constexpr int64_t height = Tile<E>::rows;
    constexpr int width = Lanes<Sum<E>>::width, whole = int(height);
    const auto run = [&](auto rows, const RowLayout layout) __attribute__((always_inline)) {
        constexpr int n = decltype(rows)::value;
        if (columns > width)
            multiply_tile<E, n, 2, true>(a, layout, b, Tile<E>::columns, depth, c, stride, count, columns, add);
        else
            multiply_tile<E, n, 1, true>(a, layout, b, Tile<E>::columns, depth, c, stride, count, columns, add);
    };
    if (packed)
        with_constant<whole / 2>((count + 1) / 2, [&](auto pairs) __attribute__((always_inline)) {
            run(Constant<2 * decltype(pairs)::value>{}, RowLayout{1, height, INT64_MAX, 0});
        });
    else if (as_it_lies.depth == 1)
        run(Constant<whole>{}, RowLayout{as_it_lies.row, 1, INT64_MAX, 0});
    else
        run(Constant<whole>{}, RowLayout{1, as_it_lies.depth, INT64_MAX, 0});
}

template <class E>
void product(const LinearProduct<Sum<E>> &p, const LinearRows<Sum<E>> *parts, int64_t part_count, Sum<E> *memory) {
    using T = Sum<E>;
    constexpr int64_t height = Tile<E>::rows, width = Tile<E>::columns, numbers = Element<E>::numbers;
    const int64_t depth = elements<E>(p.depth);
    const Division d = divide<E>(p.columns, depth);
    E *const panels = (E *)memory, *const packed = panels + d.group * d.span;
    T *const strip = (T *)(packed + height * d.span), *const strip_z = strip + height * d.group;
    for (int64_t j = 0; j < p.columns; j += d.group) {
        const int64_t columns = least(d.group, p.columns - j);
        int64_t k = 0;
        do {
            const int64_t span = least(d.span, depth - k), first = k * numbers, count_k = least(span * numbers, p.depth - first);
            const bool last = k + d.span >= depth, more = p.add || k > 0;
            pack_columns(p.b.data + j * p.b.lane + first * p.b.depth, p.b.depth, p.b.lane, count_k, columns, panels);
            for (int64_t s = 0; s < part_count; ++s) {
                const LinearRows<T> &part = parts[s];
                const bool direct = numbers == 1 && (part.a.depth == 1 || part.a.lane == 1);
                for (int64_t i = 0; i < part.rows; i += height) {
                    const int64_t count = least(height, part.rows - i);
                    const T *const a = part.a.data + i * part.a.lane + first * part.a.depth;
                    const bool packs = !direct || count < height;
                    if (packs) pack_rows(a, part.a.lane, part.a.depth, count, count_k, packed);
                    const int64_t at = p.transposed ? j * part.stride + i : i * part.stride + j;
                    T *const to = p.transposed ? strip : part.c + at;
                    const int64_t stride = p.transposed ? d.group : part.stride;
                    int64_t l = 0;
                    do {
                        const int64_t steps = least(d.piece, span - l);
                        const E *const left = packs ? packed + l * height : (const E *)a + l * part.a.depth;
                        for (int64_t n = 0; n < columns; n += width)
                            tile<E>(left, {part.a.lane, part.a.depth, INT64_MAX, 0}, packs, panels + n * span + l * width, steps, to + n,
                                    stride, count, columns - n, more || l > 0);
                        l += d.piece;
                    } while (l < span);
                    if (!last) continue;
                    const T *const bias = part.bias ? part.bias + (p.transposed ? i : j) : nullptr;
                    T *const z = !part.z ? nullptr : p.transposed ? part.z + j * part.z_stride + i : part.z + i * part.z_stride + j;
                    if (bias || z || p.activation != CASE_FAST_IDENTITY)
                        finish(to, stride, count, columns, bias, p.transposed, z && p.transposed ? strip_z : z,
                               p.transposed ? stride : part.z_stride, p.activation);
                    if (!p.transposed) continue;
                    store_transposed(strip, stride, count, columns, part.c + at, part.stride);
                    if (z) store_transposed(strip_z, stride, count, columns, z, part.z_stride);
                }
            }
            k += d.span;
        } while (k < depth);
    }
}

}  // namespace
