// Matrix products on one thread, for the instruction set of the including file. C (rows, columns) = or += A (rows, depth) times
// B (depth, columns).
//
// A tile of C stays in registers while depth goes by: one vector load of B serves all its rows, one broadcast of A all its
// columns. Operands are packed into panels as wide as the tile, so that both are read in one ascending stream; depth is cut into
// pieces whose column panel stays in the first cache. Each element of C is the sum over pieces, ascending, of its sums over a
// piece, ascending: its bits depend on the depth alone, not on its place, the other rows, or who computes it.
//
// What panels hold is E: a number, or where the processor multiplies such, two numbers next to each other in depth that packing has
// rounded to bfloat16. C is of Sum<E>. Depths are in elements E throughout, but where numbers are packed.
//
// Like vector.h, nothing here may be shared by the linker between instruction sets.
#pragma once

#include "common/vector.h"

namespace {

// Two numbers rounded to bfloat16, to the nearest, ties to even; numbers below 2^-126 are 0. The first has the lower bits.
struct Bf16Pair {
    uint32_t bits;
};

template <class E>
struct Element {
    using Sum = E;
    static constexpr int numbers = 1;
};
template <>
struct Element<Bf16Pair> {
    using Sum = float;
    static constexpr int numbers = 2;
};
template <class E>
using Sum = typename Element<E>::Sum;

// Elements that so many numbers of depth take; beyond the last number is 0.
template <class E>
CASE_FAST_INLINE int64_t elements(int64_t numbers) {
    return (numbers + Element<E>::numbers - 1) / Element<E>::numbers;
}

// sum + a x, where x holds the bits of as many elements as a vector has.
template <class T>
CASE_FAST_INLINE Vector<T> multiply_add(Vector<T> sum, T a, Vector<T> x) {
    return sum + a * x;
}
#if defined(__AVX512BF16__)
CASE_FAST_INLINE Vector<float> multiply_add(Vector<float> sum, Bf16Pair a, Vector<float> x) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)_mm512_set1_epi32(int(a.bits)));
}
#endif

template <class E>
struct Tile {
    static constexpr int vectors = 2, columns = vectors * Lanes<Sum<E>>::width;
#if CASE_FAST_VECTOR_BYTES == 64
    static constexpr int rows = 12;  // 24 of 32 registers hold sums
#elif CASE_FAST_VECTOR_BYTES == 32
    static constexpr int rows = 6;  // 12 of 16
#else
    static constexpr int rows = 4;  // 8 of 16
#endif
};

constexpr int64_t most_depth = 128;  // of a piece: a column panel is 16 KiB. Short pieces round less, too

CASE_FAST_INLINE int64_t panels_of(int64_t count, int64_t width) { return (count + width - 1) / width; }

// Elements that pack_rows and pack_columns write.
template <class E>
CASE_FAST_INLINE int64_t packed_rows(int64_t rows, int64_t depth) {
    return panels_of(rows, Tile<E>::rows) * Tile<E>::rows * depth;
}
template <class E>
CASE_FAST_INLINE int64_t packed_columns(int64_t columns, int64_t depth) {
    return panels_of(columns, Tile<E>::columns) * Tile<E>::columns * depth;
}

// The length of the pieces that depth is cut into: about equal, and whole column panels (scores serve as A, see RowLayout).
template <class E>
CASE_FAST_INLINE int64_t depth_piece(int64_t depth) {
    const int64_t pieces = depth > most_depth ? panels_of(depth, most_depth) : 1;
    return panels_of(depth > 0 ? depth : 1, pieces * Tile<E>::columns) * Tile<E>::columns;
}

#if CASE_FAST_VECTOR_BYTES == 64
// Four elements next to each other in depth; of `count` numbers, 0 beyond.
CASE_FAST_INLINE __m128 load_four(const float *from, int64_t count, float) {
    return count >= 4 ? _mm_loadu_ps(from) : _mm_maskz_loadu_ps(__mmask8((1u << count) - 1), from);
}
#if defined(__AVX512BF16__)
CASE_FAST_INLINE __m128 load_four(const float *from, int64_t count, Bf16Pair) {
    const __m256 x = count >= 8 ? _mm256_loadu_ps(from) : _mm256_maskz_loadu_ps(__mmask8((1u << count) - 1), from);
    return (__m128)_mm256_cvtneps_pbh(x);
}
#endif

// The same as pack_panel for rows whose numbers lie together, 16 rows by 4 elements at once.
template <class E, int width>
CASE_FAST_INLINE void transpose(const float *from, int64_t lane_stride, int64_t count, int64_t depth, E *to) {
    constexpr int64_t numbers = Element<E>::numbers;
    for (int64_t l = 0; l < width; l += 16) {
        const float *row[16];
        for (int64_t i = 0; i < 16; ++i) row[i] = from + least(l + i, count - 1) * lane_stride;
        const __mmask16 real = __mmask16(count - l >= 16 ? 0xFFFF : count > l ? (1u << (count - l)) - 1 : 0);
        const __mmask16 own = __mmask16(width - l < 16 ? (1u << (width - l)) - 1 : 0xFFFF);
        const auto fours = [=](int64_t k, int64_t left) __attribute__((always_inline)) {
            __m512 x[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                x[i] = _mm512_castps128_ps512(load_four(row[i] + k, left, E{}));
                x[i] = _mm512_insertf32x4(x[i], load_four(row[i + 4] + k, left, E{}), 1);
                x[i] = _mm512_insertf32x4(x[i], load_four(row[i + 8] + k, left, E{}), 2);
                x[i] = _mm512_insertf32x4(x[i], load_four(row[i + 12] + k, left, E{}), 3);
            }
            const __m512d a = (__m512d)_mm512_unpacklo_ps(x[0], x[1]), b = (__m512d)_mm512_unpackhi_ps(x[0], x[1]);
            const __m512d c = (__m512d)_mm512_unpacklo_ps(x[2], x[3]), d = (__m512d)_mm512_unpackhi_ps(x[2], x[3]);
            const __m512d y[4] = {_mm512_unpacklo_pd(a, c), _mm512_unpackhi_pd(a, c), _mm512_unpacklo_pd(b, d),
                                  _mm512_unpackhi_pd(b, d)};
            E *const target = to + k / numbers * width + l;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                if (i * numbers >= left) break;
                if (real == 0xFFFF)
                    _mm512_storeu_ps(target + i * width, (__m512)y[i]);
                else
                    _mm512_mask_storeu_ps(target + i * width, own, _mm512_maskz_mov_ps(real, (__m512)y[i]));
            }
        };
        int64_t k = 0;
        for (; k + 4 * numbers <= depth; k += 4 * numbers) fours(k, 4 * numbers);
        if (k < depth) fours(k, depth - k);
    }
}
#endif

#if defined(__x86_64__)
// to[j * to_stride + i] = from[i * from_stride + j] for i and j below 4
CASE_FAST_INLINE void transpose_four(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
    __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + from_stride);
    __m128 c = _mm_loadu_ps(from + 2 * from_stride), d = _mm_loadu_ps(from + 3 * from_stride);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(to, a);
    _mm_storeu_ps(to + to_stride, b);
    _mm_storeu_ps(to + 2 * to_stride, c);
    _mm_storeu_ps(to + 3 * to_stride, d);
}
#endif

// to[l] = from[l * lane_stride] for `count` of `width` lanes and 0 beyond, for each of `depth` numbers.
template <int width, class T>
CASE_FAST_INLINE void pack_panel(const T *from, int64_t lane_stride, int64_t depth_stride, int64_t count, int64_t depth, T *to) {
    int64_t k = 0;
    if (count == width && lane_stride == 1) {
        for (; k < depth; ++k)
            for (int l = 0; l < width; ++l) to[k * width + l] = from[k * depth_stride + l];
        return;
    }
#if CASE_FAST_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
        if (depth_stride == 1) return transpose<T, width>(from, lane_stride, count, depth, to);
#endif
    if (count < width)
        for (int64_t i = 0; i < depth; ++i)
            for (int64_t l = count; l < width; ++l) to[i * width + l] = T(0);
#if defined(__x86_64__)
    if (depth_stride == 1) {  // blocks of 16 bytes squared are transposed in registers
        constexpr int block = 16 / int(sizeof(T));
        for (; k + block <= depth; k += block) {
            int l = 0;
            for (; l + block <= count; l += block) {
                const T *const source = from + l * lane_stride + k;
                T *const target = to + k * width + l;
                if constexpr (sizeof(T) == 4) {
                    transpose_four(source, lane_stride, target, width);
                } else {
                    const __m128d a = _mm_loadu_pd(source), b = _mm_loadu_pd(source + lane_stride);
                    _mm_storeu_pd(target, _mm_unpacklo_pd(a, b));
                    _mm_storeu_pd(target + width, _mm_unpackhi_pd(a, b));
                }
            }
            for (; l < count; ++l)
                for (int i = 0; i < block; ++i) to[(k + i) * width + l] = from[l * lane_stride + k + i];
        }
    }
#endif
    for (; k < depth; ++k)
        for (int64_t l = 0; l < count; ++l) to[k * width + l] = from[k * depth_stride + l * lane_stride];
}
#if defined(__AVX512BF16__)
// The same of pairs.
template <int width>
CASE_FAST_INLINE void pack_panel(const float *from, int64_t lane_stride, int64_t depth_stride, int64_t count, int64_t depth,
                                 Bf16Pair *to) {
    if (depth_stride == 1) return transpose<Bf16Pair, width>(from, lane_stride, count, depth, to);
    alignas(64) uint16_t place[32];  // the first numbers are rounded to the lower half of a vector, the second to the upper
    for (int i = 0; i < 32; ++i) place[i] = uint16_t(i % 2 * 16 + i / 2);
    const __m512i zipped = _mm512_load_si512(place);
    for (int64_t l = 0; l < width; l += 16) {
        const int64_t real = count - l >= 16 ? 16 : count > l ? count - l : 0;
        const __mmask16 mask = __mmask16((1u << real) - 1), own = __mmask16(width - l < 16 ? (1u << (width - l)) - 1 : 0xFFFF);
        const auto lanes = [=](const float *at) __attribute__((always_inline)) {
            if (lane_stride == 1) return _mm512_maskz_loadu_ps(mask, at);
            float found[16] = {};
            for (int64_t i = 0; i < real; ++i) found[i] = at[i * lane_stride];
            return _mm512_loadu_ps(found);
        };
        for (int64_t k = 0; k < depth; k += 2) {
            const float *const at = from + l * lane_stride + k * depth_stride;
            const __m512 second = k + 1 < depth ? lanes(at + depth_stride) : _mm512_setzero_ps();
            const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(second, lanes(at));
            _mm512_mask_storeu_epi32(to + k / 2 * width + l, own, _mm512_permutexvar_epi16(zipped, rounded));
        }
    }
}
#endif

// A[i, k] = a[i * row_stride + k * depth_stride], k of `depth` numbers, as [ceil(rows / Tile::rows)][elements][Tile::rows], zeros
// beyond the last row.
template <class E>
void pack_rows(const Sum<E> *a, int64_t row_stride, int64_t depth_stride, int64_t rows, int64_t depth, E *panels) {
    constexpr int64_t width = Tile<E>::rows;
    for (int64_t i = 0; i < rows; i += width)
        pack_panel<width>(a + i * row_stride, row_stride, depth_stride, rows - i < width ? rows - i : width, depth,
                          panels + i * elements<E>(depth));
}

// B[k, j] = b[k * depth_stride + j * column_stride] as [ceil(columns / Tile::columns)][elements][Tile::columns], likewise.
template <class E>
void pack_columns(const Sum<E> *b, int64_t depth_stride, int64_t column_stride, int64_t depth, int64_t columns, E *panels) {
    constexpr int64_t width = Tile<E>::columns;
    for (int64_t j = 0; j < columns; j += width)
        pack_panel<width>(b + j * column_stride, column_stride, depth_stride, columns - j < width ? columns - j : width, depth,
                          panels + j * elements<E>(depth));
}

// Where the A of a tile lies: element (i, k) at i * row + k * depth, and `hop` further after each `group` of k. Members that the
// caller writes as constants cost no register.
struct RowLayout {
    int64_t row, depth, group, hop;
};

// `count` <= `rows` rows and `columns` columns (more than those of vectors - 1 vectors) of C. Reads A's rows up to `rows` and, if
// `padded`, B's columns up to whole vectors; B's row k lies at k * b_depth.
template <class E, int rows, int vectors, bool padded>
CASE_FAST_INLINE void multiply_tile(const E *a, const RowLayout layout, const E *b, int64_t b_depth, int64_t depth, Sum<E> *c,
                                    int64_t c_stride, int64_t count, int64_t columns, bool add) {
    using T = Sum<E>;
    constexpr int width = Lanes<T>::width;
    const bool cut = columns < vectors * width;
    const Tail<T> tail = make_tail<T>(cut ? int(columns - (vectors - 1) * width) : 0);
    Vector<T> sum[rows][vectors] = {};
    while (depth > 0) {
        const int64_t steps = depth < layout.group ? depth : layout.group;
        for (int64_t k = 0; k < steps; ++k) {
            Vector<T> x[vectors];
#pragma GCC unroll 16
            for (int v = 0; v < vectors; ++v)
                x[v] = !padded && cut && v == vectors - 1 ? load((const T *)b + v * width, tail) : load((const T *)b + v * width);
#pragma GCC unroll 16
            for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
                for (int v = 0; v < vectors; ++v) sum[r][v] = multiply_add(sum[r][v], a[r * layout.row], x[v]);
            a += layout.depth;
            b += b_depth;
        }
        a += layout.hop;
        depth -= steps;
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
        if (r >= count) break;
        T *const to = c + r * c_stride;
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) {
            if (cut && v == vectors - 1)
                store(to + v * width, add ? load(to + v * width, tail) + sum[r][v] : sum[r][v], tail);
            else
                store(to + v * width, add ? load(to + v * width) + sum[r][v] : sum[r][v]);
        }
    }
}

// Operands of a product in terms of the tiles that it is made of: A's tile of row i (a multiple of the tile's height) and depth k
// begins at data + i * row + k * depth, B's tile of column panel n at data + n * panel + k * depth, C's at
// data + i * row + n * panel.
template <class E>
struct Left {
    const E *data;
    int64_t row, depth;
};
template <class E>
struct Right {
    const E *data;
    int64_t panel, depth;
};
template <class T>
struct Product {
    T *data;
    int64_t row, panel;
};

// C = or += A B by tiles of `height` rows.
template <class E, int height, bool padded>
CASE_FAST_INLINE void multiply_tiles(Left<E> a, const RowLayout layout, Right<E> b, Product<Sum<E>> c, int64_t rows, int64_t columns,
                                     int64_t depth, bool add) {
    using T = Sum<E>;
    constexpr int64_t width = Tile<E>::columns;
    constexpr int tall = height, medium = height > 4 ? height * 2 / 3 : height, low = height > 4 ? (height + 2) / 3 : height;
    const int64_t piece = depth_piece<E>(depth);
    // as many rows as a third of a 1 MiB second cache holds, so that each is fetched from afar once
    const int64_t block = (int64_t(384) << 10) / (piece * int64_t(sizeof(E)) * height) * height;
    int64_t k = 0;
    do {
        const int64_t steps = depth - k < piece ? depth - k : piece;
        const bool more = add || k > 0;
        for (int64_t first = 0; first < rows; first += block) {
            const int64_t last = rows - first < block ? rows : first + block;
            for (int64_t j = 0; j < columns; j += width) {
                const E *const right = b.data + j / width * b.panel + k * b.depth;
                const int64_t wide = columns - j;
                for (int64_t i = first; i < last; i += height) {
                    const E *const left = a.data + i * a.row + k * a.depth;
                    T *const to = c.data + i * c.row + j / width * c.panel;
                    const int64_t count = last - i;
                    const auto tile = [&](auto tile_rows) __attribute__((always_inline)) {
                        constexpr int n = decltype(tile_rows)::value;
                        if (wide > Lanes<T>::width)
                            multiply_tile<E, n, 2, padded>(left, layout, right, b.depth, steps, to, c.row, count, wide, more);
                        else
                            multiply_tile<E, n, 1, padded>(left, layout, right, b.depth, steps, to, c.row, count, wide, more);
                    };
                    if (count > medium || medium == tall)
                        tile(Constant<tall>{});
                    else if (count > low)
                        tile(Constant<medium>{});
                    else
                        tile(Constant<low>{});
                }
            }
        }
        k += piece;
    } while (k < depth);
}

// C = or += A B from panels (pack_rows, pack_columns).
template <class E>
void multiply(const E *row_panels, const E *column_panels, int64_t rows, int64_t columns, int64_t depth, Sum<E> *c, int64_t c_stride,
              bool add) {
    constexpr int64_t height = Tile<E>::rows, width = Tile<E>::columns;
    multiply_tiles<E, height, true>({row_panels, depth, height}, {1, height, INT64_MAX, 0}, {column_panels, width * depth, width},
                                    {c, c_stride, width}, rows, columns, depth, add);
}

// The same with B where it lies, row by row: for few rows of A, which do not repay packing B.
template <class E>
void multiply_unpacked(const E *row_panels, const E *b, int64_t b_stride, int64_t rows, int64_t columns, int64_t depth, Sum<E> *c,
                       int64_t c_stride, bool add) {
    constexpr int64_t height = Tile<E>::rows, width = Tile<E>::columns;
    multiply_tiles<E, height, false>({row_panels, depth, height}, {1, height, INT64_MAX, 0}, {b, width, b_stride},
                                     {c, c_stride, width}, rows, columns, depth, add);
}

}  // namespace
