// The kernels of bilinear MIM for the instruction set that this is compiled for. See cpu.h for the data.
//
// A tile's scores lie in column panels of common/gemm.h's width: [panel][row][width]. So the product that makes them writes whole
// cache lines, each panel's columns add up in registers, and both products of backward read them where they lie: as A with rows
// `width` apart and depth going from panel to panel, and transposed with one panel's columns as rows.
#include <float.h>

#include "bilinear_mim/cpu.h"
#include "common/gemm.h"
#include "common/philox_vector.h"

namespace {

template <class T>
struct Limits {
    static constexpr T lowest = sizeof(T) == 4 ? T(-FLT_MAX) : T(-DBL_MAX);  // of nothing; minus itself it is 0
};

// A score and its derivative. From e^-|z|, which never overflows; NaN goes through.
template <class T>
struct Logistic {
    Vector<T> value, slope;
};
template <class T>
CASE_FAST_INLINE Logistic<T> logistic(Vector<T> z) {
    const Vector<T> e = exp_nonpositive(z < T(0) ? z : -z), r = T(1) / (T(1) + e), er = e * r;
    return {z < T(0) ? er : r, er * r};
}

template <class T>
CASE_FAST_INLINE Vector<T> larger(Vector<T> a, Vector<T> b) {  // a where b is NaN
    return b > a ? b : a;
}

template <class T>
CASE_FAST_INLINE Vector<T> lane_numbers() {
    Vector<T> x = {};
    for (int i = 0; i < Lanes<T>::width; ++i) x[i] = T(i);
    return x;
}

template <class T>
CASE_FAST_INLINE T lane_sum(Vector<T> x) {
    T sum = x[0];
    for (int i = 1; i < Lanes<T>::width; ++i) sum += x[i];
    return sum;
}
template <class T>
CASE_FAST_INLINE T lane_max(Vector<T> x) {
    T top = x[0];
    for (int i = 1; i < Lanes<T>::width; ++i) top = x[i] > top ? x[i] : top;
    return top;
}

constexpr int vectors = Tile<float>::vectors;  // of a column panel

#define CASE_FAST_APART __attribute__((noinline))

template <class T>
CASE_FAST_INLINE int64_t panel_height(const MimTile<T> &t) {
    return panels_of(t.rows, Tile<T>::rows) * Tile<T>::rows;
}

// Not inlined from here on, so that a profile names the parts.
template <class T>
CASE_FAST_APART void score_tile(const MimTile<T> &t) {
    constexpr int64_t height = Tile<T>::rows, width = Tile<T>::columns;
    multiply_tiles<T, height, true>({t.a_rows, t.dim, height}, {1, height, INT64_MAX, 0}, {t.b_rows, width * t.dim, width},
                                    {t.scores, width, panel_height(t) * width}, t.rows, t.columns, t.dim, false);
}

// Calls body(row, z, masked) for each row of a panel that begins with column `first` of the tile. `masked(v, x, otherwise)` is
// x of the row's vector v at negatives, and `otherwise` at the pair and beyond the last column. `paired(row, place)` comes first
// where the row's pair lies in the panel.
template <class T, class Body, class Paired>
CASE_FAST_INLINE void each_row(const MimTile<T> &t, int64_t first, T *panel, Paired paired, Body body) {
    constexpr int64_t lanes = Lanes<T>::width, width = Tile<T>::columns;
    const Vector<T> numbers = lane_numbers<T>();
    const int64_t columns = t.columns - first, begin = t.first_column + first, rows = t.rows;
    const int64_t *const positive = t.positive;
    for (int64_t row = 0; row < rows; ++row) {
        T *const z = panel + row * width;
        const int64_t own = positive[row] - begin;
        if (uint64_t(own) >= uint64_t(width) && columns >= width) {
            body(row, z, [](int, Vector<T> x, Vector<T>) __attribute__((always_inline)) { return x; });
        } else {
            if (uint64_t(own) < uint64_t(width)) paired(row, own);
            body(row, z, [=](int v, Vector<T> x, Vector<T> otherwise) __attribute__((always_inline)) {
                x = numbers == T(own - v * lanes) ? otherwise : x;
                return numbers < T(columns - v * lanes) ? x : otherwise;
            });
        }
    }
}

// Sums of e^f of a panel into the rows' lanes and the columns.
template <class T>
CASE_FAST_APART void forward_panel(const MimTile<T> &t, int64_t first, T *panel) {
    constexpr int64_t lanes = Lanes<T>::width;
    const Vector<T> zero = {};
    Vector<T> sum[vectors] = {};
    T *const logit = t.logit, *const row_sum = t.row_sum;
    each_row(t, first, panel, [=](int64_t row, int64_t own) { logit[row] = panel[row * Tile<T>::columns + own]; },
             [&](int64_t row, const T *z, auto masked) __attribute__((always_inline)) {
                 Vector<T> e[vectors];
                 for (int v = 0; v < vectors; ++v) {
                     e[v] = masked(v, exp_of_fraction(logistic<T>(load(z + v * lanes)).value), zero);
                     sum[v] += e[v];
                 }
                 store(row_sum + row * lanes, load(row_sum + row * lanes) + (e[0] + e[1]));
             });
    for (int v = 0; v < vectors && first + v * lanes < t.columns; ++v) {
        T *const to = t.column_sum + first + v * lanes;
        const int64_t left = t.columns - first - v * lanes;
        if (left >= lanes)
            store(to, load(to) + sum[v]);
        else
            store(to, load(to, make_tail<T>(int(left))) + sum[v], make_tail<T>(int(left)));
    }
}

// The same for unbounded scores: each lane of a row and each column has a maximum so far, and its sum is relative to that.
template <class T>
CASE_FAST_APART void forward_panel_dot(const MimTile<T> &t, int64_t first, T *panel) {
    constexpr int64_t lanes = Lanes<T>::width;
    const Vector<T> zero = {}, lowest = zero + Limits<T>::lowest;
    Vector<T> before[vectors], top[vectors], sum[vectors] = {};
    Tail<T> tail[vectors];
    bool whole[vectors], any[vectors];
    for (int v = 0; v < vectors; ++v) {
        const int64_t left = t.columns - first - v * lanes;
        whole[v] = left >= lanes;
        any[v] = left > 0;
        tail[v] = make_tail<T>(whole[v] || !any[v] ? 0 : int(left));
        const T *const from = t.column_max + first + v * lanes;
        before[v] = whole[v] ? load(from) : any[v] ? load(from, tail[v]) : lowest;
        top[v] = before[v];
    }
    T *const logit = t.logit, *const row_max = t.row_max, *const row_sum = t.row_sum;
    each_row(t, first, panel, [=](int64_t row, int64_t own) { logit[row] = panel[row * Tile<T>::columns + own]; },
             [&](int64_t row, const T *z, auto masked) __attribute__((always_inline)) {
                 Vector<T> x[vectors], e = zero;
                 const Vector<T> old = load(row_max + row * lanes);
                 Vector<T> highest = old;
                 for (int v = 0; v < vectors; ++v) {
                     x[v] = load(z + v * lanes);
                     const Vector<T> shown = masked(v, x[v], lowest);
                     top[v] = larger<T>(top[v], shown);
                     highest = larger<T>(highest, shown);
                 }
                 for (int v = 0; v < vectors; ++v) e += masked(v, exp_nonpositive(x[v] - highest), zero);
                 store(row_max + row * lanes, highest);
                 store(row_sum + row * lanes, load(row_sum + row * lanes) * exp_nonpositive(old - highest) + e);
             });
    each_row(t, first, panel, [](int64_t, int64_t) {}, [&](int64_t, const T *z, auto masked) __attribute__((always_inline)) {
        for (int v = 0; v < vectors; ++v) sum[v] += masked(v, exp_nonpositive(load(z + v * lanes) - top[v]), zero);
    });
    for (int v = 0; v < vectors && any[v]; ++v) {
        T *const to = t.column_sum + first + v * lanes, *const max = t.column_max + first + v * lanes;
        const Vector<T> shrunk = exp_nonpositive(before[v] - top[v]);
        if (whole[v]) {
            store(to, load(to) * shrunk + sum[v]);
            store(max, top[v]);
        } else {
            store(to, load(to, tail[v]) * shrunk + sum[v], tail[v]);
            store(max, top[v], tail[v]);
        }
    }
}

template <class T>
void forward_tile(const MimTile<T> &t) {
    constexpr int64_t width = Tile<T>::columns;
    score_tile(t);
    for (int64_t first = 0; first < t.columns; first += width) {
        T *const panel = t.scores + first * panel_height(t);
        if (t.dot)
            forward_panel_dot(t, first, panel);
        else
            forward_panel(t, first, panel);
    }
}

// A panel's scores become d loss / d z; zero beyond the last column.
template <class T, bool dot>
CASE_FAST_APART void backward_panel(const MimTile<T> &t, int64_t first, T *panel) {
    constexpr int64_t lanes = Lanes<T>::width, width = Tile<T>::columns;
    const Vector<T> zero = {};
    Vector<T> scale[vectors], top[vectors];
    for (int v = 0; v < vectors; ++v) {
        const int64_t at = first + v * lanes, left = t.columns - at;
        const Tail<T> tail = make_tail<T>(left > 0 && left < lanes ? int(left) : 0);
        scale[v] = left >= lanes ? load(t.column_scale + at) : left > 0 ? load(t.column_scale + at, tail) : zero;
        if (dot) top[v] = left >= lanes ? load(t.column_top + at) : left > 0 ? load(t.column_top + at, tail) : zero;
    }
    const T *const row_scale = t.row_scale, *const row_top = t.row_top, *const pair_scale = t.pair_scale;
    each_row(t, first, panel, [](int64_t, int64_t) {}, [&](int64_t row, T *z, auto masked) __attribute__((always_inline)) {
        const int64_t own = t.positive[row] - t.first_column - first;
        Vector<T> g[vectors];
        T pair = 0;
        const bool paired = uint64_t(own) < uint64_t(width);
        if (paired) pair = z[own];
        for (int v = 0; v < vectors; ++v) {
            const Vector<T> x = load(z + v * lanes);
            if (dot) {
                g[v] = exp_nonpositive(x - row_top[row]) * row_scale[row] + exp_nonpositive(x - top[v]) * scale[v];
            } else {
                const Logistic<T> f = logistic<T>(x);
                g[v] = exp_of_fraction(f.value) * f.slope * (row_scale[row] + scale[v]);
            }
            store(z + v * lanes, masked(v, g[v], zero));
        }
        if (paired) z[own] = pair_scale[row] * (dot ? T(1) : logistic<T>(zero + pair).slope[0]);
    });
}

// grad_a += scores b
template <class T>
CASE_FAST_APART void multiply_scores(const MimTile<T> &t) {
    constexpr int64_t width = Tile<T>::columns;
    const int64_t tall = panel_height(t);
    multiply_tiles<T, Tile<T>::rows, true>({t.scores, width, tall}, {width, 1, width, (tall - 1) * width},
                                           {t.b_columns, width * t.columns, width}, {t.grad_a, t.dim, width}, t.rows, t.dim,
                                           t.columns, t.add_a);
}

// grad_b += scores^T a
template <class T>
CASE_FAST_APART void multiply_scores_across(const MimTile<T> &t) {
    constexpr int64_t width = Tile<T>::columns;
    constexpr int height = CASE_FAST_VECTOR_BYTES == 64 ? 8 : 4;  // divides the panel's width
    for (int64_t first = 0; first < t.columns; first += width) {
        const int64_t count = t.columns - first < width ? t.columns - first : width;
        multiply_tiles<T, height, true>({t.scores + first * panel_height(t), 1, width}, {1, width, INT64_MAX, 0},
                                        {t.a_columns, width * t.rows, width}, {t.grad_b + first * t.dim, t.dim, width}, count,
                                        t.dim, t.rows, t.add_b);
    }
}

template <class T>
void backward_tile(const MimTile<T> &t) {
    score_tile(t);
    for (int64_t first = 0; first < t.columns; first += Tile<T>::columns) {
        T *const panel = t.scores + first * panel_height(t);
        if (t.dot)
            backward_panel<T, true>(t, first, panel);
        else
            backward_panel<T, false>(t, first, panel);
    }
    multiply_scores(t);
    multiply_scores_across(t);
}

// out (count, d) = in times M^T for no more rows than a column panel has columns: as (M in^T)^T, where M is read in place. Work:
// (d, width) for in^T, (d, width) for the product, a row panel for what is left of M.
template <class T>
void multiply_few(const T *in, int64_t count, const T *matrix, int64_t d, T *out, T *work) {
    constexpr int64_t height = Tile<T>::rows, width = Tile<T>::columns;
    const int64_t whole = d / height * height;
    T *const product = work + width * d, *const rest = product + width * d;
    pack_columns(in, 1, d, d, count, work);
    if (whole)
        multiply_tiles<T, height, true>({matrix, d, 1}, {d, 1, INT64_MAX, 0}, {work, width * d, width}, {product, width, width},
                                        whole, count, d, false);
    if (whole < d) {
        pack_rows(matrix + whole * d, d, 1, d - whole, d, rest);
        multiply(rest, work, d - whole, count, d, product + whole * width, width, false);
    }
    for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < d; ++j) out[i * d + j] = product[j * width + i];
}

template <class T>
void join_lanes(const T *max, const T *sum, int64_t rows, bool dot, T *top, T *total) {
    constexpr int64_t lanes = Lanes<T>::width;
    for (int64_t row = 0; row < rows; ++row) {
        const Vector<T> s = load(sum + row * lanes);
        if (dot) {
            const Vector<T> m = load(max + row * lanes);
            top[row] = lane_max<T>(m);
            total[row] = lane_sum<T>(s * exp_nonpositive(m - top[row]));
        } else {
            top[row] = 0;
            total[row] = lane_sum<T>(s);
        }
    }
}

template <class T>
void join_columns(const T *max, const T *sum, int64_t count, int64_t part_stride, int64_t columns, bool dot, T *top, T *total) {
    constexpr int64_t lanes = Lanes<T>::width;
    const auto join = [&](int64_t j, auto load, auto store) __attribute__((always_inline)) {
        const Vector<T> zero = {};
        Vector<T> m = zero, s = zero;
        if (dot) {
            m = load(max + j);
            for (int64_t i = 1; i < count; ++i) m = larger<T>(m, load(max + i * part_stride + j));
            for (int64_t i = 0; i < count; ++i)
                s += load(sum + i * part_stride + j) * exp_nonpositive(load(max + i * part_stride + j) - m);
        } else {
            for (int64_t i = 0; i < count; ++i) s += load(sum + i * part_stride + j);
        }
        store(top + j, m);
        store(total + j, s);
    };
    int64_t j = 0;
    for (; j + lanes <= columns; j += lanes)
        join(
            j, [](const T *from) __attribute__((always_inline)) { return load(from); },
            [](T *to, Vector<T> x) __attribute__((always_inline)) { store(to, x); });
    if (j < columns) {
        const Tail<T> tail = make_tail<T>(int(columns - j));
        join(
            j, [tail](const T *from) __attribute__((always_inline)) { return load(from, tail); },
            [tail](T *to, Vector<T> x) __attribute__((always_inline)) { store(to, x, tail); });
    }
}

void draw(uint64_t seed, uint32_t pair, uint32_t side, uint32_t n, int64_t count, int32_t *out) {
    const Words zero = {}, pairs = zero + uint64_t(pair), sides = zero + uint64_t(side);
    const auto words = [=](int64_t slot) __attribute__((always_inline)) {  // as case_fast_draw
        return times(random_words(consecutive(uint64_t(slot)), pairs, sides, zero, seed), n) >> 32;
    };
    const auto put = [=](int64_t slot, Words drawn) __attribute__((always_inline)) {
        for (int64_t i = 0; i < word_lanes && slot + i < count; ++i) out[slot + i] = int32_t(drawn[i]);
    };
    int64_t slot = 0;
    for (; slot + 2 * word_lanes <= count; slot += 2 * word_lanes) {  // two at a time hide each other's latency
        const Words one = words(slot), other = words(slot + word_lanes);
#if CASE_FAST_VECTOR_BYTES == 64
        _mm256_storeu_si256((__m256i *)(out + slot), _mm512_cvtepi64_epi32((__m512i)one));
        _mm256_storeu_si256((__m256i *)(out + slot + word_lanes), _mm512_cvtepi64_epi32((__m512i)other));
#else
        put(slot, one);
        put(slot + word_lanes, other);
#endif
    }
    for (; slot < count; slot += word_lanes) put(slot, words(slot));
}

// Calls body(i, n) for i from 0 to count in steps of `step`, then of 4, 2 and 1; n is known to the compiler.
template <int step, class Body>
CASE_FAST_INLINE void by_steps(int64_t count, Body body) {
    int64_t i = 0;
    for (; i + step <= count; i += step) body(i, Constant<step>{});
    if constexpr (step > 4)
        if (count - i >= 4) body(i, Constant<4>{}), i += 4;
    if (count - i >= 2) body(i, Constant<2>{}), i += 2;
    if (count - i >= 1) body(i, Constant<1>{});
}

// z[i] = own . others[list[i]], four rows at a time: their loads hide each other's latency.
template <class T>
void dots(const T *own, const T *others, const int32_t *list, int64_t count, int64_t dim, T *z) {
    constexpr int64_t lanes = Lanes<T>::width;
    const int64_t full = dim / lanes * lanes;
    const Tail<T> tail = make_tail<T>(int(dim - full));
    by_steps<4>(count, [&](int64_t i, auto constant) __attribute__((always_inline)) {
        constexpr int n = decltype(constant)::value;
        const T *row[n];
        for (int j = 0; j < n; ++j) row[j] = others + list[i + j] * dim;
        Vector<T> sum[4] = {};
        for (int64_t d = 0; d < full; d += lanes) {
            const Vector<T> x = load(own + d);
            for (int j = 0; j < n; ++j) sum[j] += x * load(row[j] + d);
        }
        if (full < dim) {
            const Vector<T> x = load(own + full, tail);
            for (int j = 0; j < n; ++j) sum[j] += x * load(row[j] + full, tail);
        }
        T out[4];
        sums(sum, out);
        for (int j = 0; j < n; ++j) z[i + j] = out[j];
    });
}

// Eight rows are added up before they meet `out`: fewer roundings, and fewer passes over it.
template <class T>
void combine(T *out, const T *others, const int32_t *list, const T *scale, int64_t count, int64_t dim) {
    constexpr int64_t lanes = Lanes<T>::width;
    const int64_t full = dim / lanes * lanes;
    const Tail<T> tail = make_tail<T>(int(dim - full));
    by_steps<8>(count, [&](int64_t i, auto constant) __attribute__((always_inline)) {
        constexpr int n = decltype(constant)::value;
        const T *row[n];
        T by[n];
        for (int j = 0; j < n; ++j) row[j] = others + list[i + j] * dim, by[j] = scale[i + j];
        for (int64_t d = 0; d < full; d += lanes) {
            Vector<T> x = by[0] * load(row[0] + d);
            for (int j = 1; j < n; ++j) x += by[j] * load(row[j] + d);
            store(out + d, load(out + d) + x);
        }
        if (full < dim) {
            Vector<T> x = by[0] * load(row[0] + full, tail);
            for (int j = 1; j < n; ++j) x += by[j] * load(row[j] + full, tail);
            store(out + full, load(out + full, tail) + x, tail);
        }
    });
}

// Calls body(load, store, last) over a list, its last vector filled with `otherwise`.
template <class T, class Body>
CASE_FAST_INLINE void each_vector_of(int64_t count, Body body) {
    constexpr int64_t lanes = Lanes<T>::width;
    const Vector<T> numbers = lane_numbers<T>();
    for (int64_t i = 0; i < count; i += lanes) {
        const bool whole = count - i >= lanes;
        const Tail<T> tail = make_tail<T>(whole ? 0 : int(count - i));
        const T left = T(count - i);
        body(
            i, [=](const T *from) __attribute__((always_inline)) { return whole ? load(from) : load(from, tail); },
            [=](T *to, Vector<T> x) __attribute__((always_inline)) { whole ? store(to, x) : store(to, x, tail); },
            [=](Vector<T> x, T otherwise) __attribute__((always_inline)) {
                return whole || count - i >= lanes ? x : (numbers < left ? x : Vector<T>{} + otherwise);
            });
    }
}

template <class T>
void sum_of(const T *z, int64_t count, bool dot, T *top, T *total) {
    const Vector<T> zero = {};
    Vector<T> m = zero + Limits<T>::lowest, s = zero;
    if (dot)
        each_vector_of<T>(count, [&](int64_t i, auto load, auto, auto filled) __attribute__((always_inline)) {
            m = larger<T>(m, filled(load(z + i), Limits<T>::lowest));
        });
    const T highest = dot ? lane_max<T>(m) : T(0);
    each_vector_of<T>(count, [&](int64_t i, auto load, auto, auto filled) __attribute__((always_inline)) {
        const Vector<T> x = load(z + i);
        s += filled(dot ? exp_nonpositive(x - highest) : exp_of_fraction(logistic<T>(x).value), T(0));
    });
    *top = highest;
    *total = lane_sum<T>(s);
}

template <class T>
void gradients(T *z, int64_t count, bool dot, T top, T scale) {
    each_vector_of<T>(count, [&](int64_t i, auto load, auto store, auto) __attribute__((always_inline)) {
        const Vector<T> x = load(z + i);
        const Logistic<T> f = logistic<T>(x);
        store(z + i, dot ? exp_nonpositive(x - top) * scale : exp_of_fraction(f.value) * f.slope * scale);
    });
}

template <class T>
constexpr MimKernels<T> mim_kernels() {
    return {Tile<T>::rows, Tile<T>::columns, Lanes<T>::width, pack_rows<T>, pack_columns<T>, multiply<T>, multiply_unpacked<T>,
            multiply_few<T>, forward_tile<T>, backward_tile<T>, join_lanes<T>, join_columns<T>, draw, dots<T>, sum_of<T>,
            gradients<T>, combine<T>};
}

}  // namespace

const KernelsOf<MimKernels> CASE_FAST_KERNELS_HERE(bilinear_mim) = {mim_kernels<float>(), mim_kernels<double>()};
