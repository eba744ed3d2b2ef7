// The kernels of products of rows with weights, for the instruction set that this is compiled for. See cpu.h for the data.
//
// B is packed by groups of columns that stay in the second cache; rows of A are read as they lie where one of their strides is 1.
// Each element of C is the sum over pieces of depth, ascending, of its sums over a piece, ascending, whichever operand is A.
#include "common/gemm.h"
#include "common/vector.h"
#include "linear/cpu.h"

namespace {

constexpr int64_t group_bytes = int64_t(400) << 10;  // of a group of B: of a second cache of 1 MiB

template <class T>
struct Division {
    int64_t piece, span, group;  // depth summed in registers, depth packed at once, columns packed at once
};
template <class T>
CASE_FAST_INLINE Division<T> divide(int64_t columns, int64_t depth) {
    constexpr int64_t width = Tile<T>::columns;
    const int64_t pieces = depth > linear_piece ? panels_of(depth, linear_piece) : 1;
    const int64_t piece = panels_of(depth > 0 ? depth : 1, pieces);
    const int64_t span = depth <= linear_transposed ? (depth > 0 ? depth : 1) : piece;
    const int64_t most = group_bytes / (span * width * int64_t(sizeof(T)));
    const int64_t panels = panels_of(columns > 0 ? columns : 1, width), groups = panels_of(panels, most > 0 ? most : 1);
    return {piece, span, panels_of(panels, groups) * width};
}

template <class T>
int64_t scratch(int64_t columns, int64_t depth) {
    const Division<T> d = divide<T>(columns, depth);
    return d.group * d.span + Tile<T>::rows * (d.span + d.group);
}

// ---- what follows a product

template <class T>
CASE_FAST_INLINE Vector<T> activated(Vector<T> z, int32_t activation) {
    constexpr int width = Lanes<T>::width;
    if (activation == CASE_FAST_RELU) return z < T(0) ? Vector<T>{} : z;  // NaN goes through
    if (activation == CASE_FAST_GELU)
        for (int i = 0; i < width; ++i) z[i] *= T(0.5) * (T(1) + T(::erf(double(z[i]) * M_SQRT1_2)));
    if (activation == CASE_FAST_TANH)
        for (int i = 0; i < width; ++i) z[i] = T(::tanh(double(z[i])));
    return z;
}

// c (rows, columns) = f(c + bias), and z.
template <class T>
void finish(T *c, int64_t stride, int64_t rows, int64_t columns, const T *bias, T *z, int32_t activation) {
    for (int64_t i = 0; i < rows; ++i, c += stride, z = z ? z + stride : z)
        each_vector<T>(columns, [=](int64_t j, auto get, auto put) __attribute__((always_inline)) {
            Vector<T> sum = get(c + j);
            if (bias) sum += get(bias + j);
            if (z) put(z + j, sum);
            put(c + j, activated<T>(sum, activation));
        });
}

// The same for a strip (rows, columns) that goes to c (columns, rows), with a bias a row.
template <class T>
void finish_transposed(const T *strip, int64_t width, int64_t rows, int64_t columns, T *c, int64_t stride, const T *bias, T *z,
                       int32_t activation) {
    for (int64_t j = 0; j < columns; ++j)
        for (int64_t i = 0; i < rows; ++i) {
            T sum = strip[i * width + j];
            if (bias) sum += bias[i];
            if (z) z[j * stride + i] = sum;
            const Vector<T> all = activated<T>(Vector<T>{} + sum, activation);
            c[j * stride + i] = all[0];
        }
}

// ---- products

// `count` rows and `columns` columns of C; pairs of rows beyond `count` are read where packed.
template <class T>
CASE_FAST_INLINE void tile(const T *a, const LinearOperand<T> &of, bool packed, const T *b, int64_t depth, T *c, int64_t stride,
                           int64_t count, int64_t columns, bool add) {
    constexpr int64_t height = Tile<T>::rows;
    constexpr int width = Lanes<T>::width, whole = int(height);
    const auto run = [&](auto rows, const RowLayout layout) __attribute__((always_inline)) {
        constexpr int n = decltype(rows)::value;
        if (columns > width)
            multiply_tile<T, n, 2, true>(a, layout, b, Tile<T>::columns, depth, c, stride, count, columns, add);
        else
            multiply_tile<T, n, 1, true>(a, layout, b, Tile<T>::columns, depth, c, stride, count, columns, add);
    };
    if (packed)
        with_constant<whole / 2>((count + 1) / 2, [&](auto pairs) __attribute__((always_inline)) {
            run(Constant<2 * decltype(pairs)::value>{}, RowLayout{1, height, INT64_MAX, 0});
        });
    else if (of.depth == 1)
        run(Constant<whole>{}, RowLayout{of.lane, 1, INT64_MAX, 0});
    else
        run(Constant<whole>{}, RowLayout{1, of.depth, INT64_MAX, 0});
}

template <class T>
void product(const LinearProduct<T> &p, const LinearRows<T> *parts, int64_t part_count, T *memory) {
    constexpr int64_t height = Tile<T>::rows, width = Tile<T>::columns;
    const Division<T> d = divide<T>(p.columns, p.depth);
    T *const panels = memory, *const packed = panels + d.group * d.span, *const strip = packed + height * d.span;
    for (int64_t j = 0; j < p.columns; j += d.group) {
        const int64_t columns = least(d.group, p.columns - j);
        int64_t k = 0;
        do {
            const int64_t span = least(d.span, p.depth - k);
            const bool last = k + d.span >= p.depth, more = p.add || k > 0;
            pack_columns(p.b.data + j * p.b.lane + k * p.b.depth, p.b.depth, p.b.lane, span, columns, panels);
            for (int64_t s = 0; s < part_count; ++s) {
                const LinearRows<T> &part = parts[s];
                const bool direct = part.a.depth == 1 || part.a.lane == 1;
                for (int64_t i = 0; i < part.rows; i += height) {
                    const int64_t count = least(height, part.rows - i);
                    const T *const a = part.a.data + i * part.a.lane + k * part.a.depth;
                    const bool packs = !direct || count < height;
                    if (packs) pack_rows(a, part.a.lane, part.a.depth, count, span, packed);
                    const int64_t at = p.transposed ? j * p.c_stride + i : i * p.c_stride + j;
                    T *const to = p.transposed ? strip : part.c + at;
                    const int64_t stride = p.transposed ? d.group : p.c_stride;
                    int64_t l = 0;
                    do {
                        const int64_t steps = least(d.piece, span - l);
                        const T *const left = packs ? packed + l * height : a + l * part.a.depth;
                        for (int64_t n = 0; n < columns; n += width)
                            tile<T>(left, part.a, packs, panels + n * span + l * width, steps, to + n, stride, count, columns - n,
                                    more || l > 0);
                        l += d.piece;
                    } while (l < span);
                    if (!last) continue;
                    T *const z = part.z ? part.z + at : nullptr;
                    if (p.transposed)
                        finish_transposed(strip, d.group, count, columns, part.c + at, p.c_stride, part.bias ? part.bias + i : nullptr,
                                          z, p.activation);
                    else if (part.bias || z || p.activation != CASE_FAST_IDENTITY)
                        finish(to, p.c_stride, count, columns, part.bias ? part.bias + j : nullptr, z, p.activation);
                }
            }
            k += d.span;
        } while (k < p.depth);
    }
}

}  // namespace

const KernelsOf<LinearKernels> CASE_FAST_KERNELS_HERE(linear) = {{scratch<float>, product<float>}, {scratch<double>, product<double>}};
