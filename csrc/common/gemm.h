// Matrix products on one thread, for the instruction set of the including file. C (rows, columns) = or += A (rows, depth) times
// B (depth, columns).
//
// A tile of C stays in registers while depth goes by: one vector load of B serves all its rows, one broadcast of A all its
// columns. Operands are packed into panels as wide as the tile, so that both are read in one ascending stream; depth is cut into
// pieces whose column panel stays in the first cache. Each element of C is the sum over pieces, ascending, of its sums over a
// piece, ascending: its bits depend on the depth alone, not on its place, the other rows, or who computes it.
//
// Like vector.h, nothing here may be shared by the linker between instruction sets.
#pragma once

#include "common/vector.h"

namespace {

template <class T>
struct Tile {
    static constexpr int vectors = 2, columns = vectors * Lanes<T>::width;
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
template <class T>
CASE_FAST_INLINE int64_t packed_rows(int64_t rows, int64_t depth) {
    return panels_of(rows, Tile<T>::rows) * Tile<T>::rows * depth;
}
template <class T>
CASE_FAST_INLINE int64_t packed_columns(int64_t columns, int64_t depth) {
    return panels_of(columns, Tile<T>::columns) * Tile<T>::columns * depth;
}

// The length of the pieces that depth is cut into: about equal, and whole column panels (scores serve as A, see RowLayout).
template <class T>
CASE_FAST_INLINE int64_t depth_piece(int64_t depth) {
    const int64_t pieces = depth > most_depth ? panels_of(depth, most_depth) : 1;
    return panels_of(depth > 0 ? depth : 1, pieces * Tile<T>::columns) * Tile<T>::columns;
}

#if CASE_FAST_VECTOR_BYTES == 64
// The same as pack_panel for rows whose elements lie together, 16 rows by 4 elements at once. Returns up to which k: whole fours.
template <int width>
CASE_FAST_INLINE int64_t transpose(const float *from, int64_t lane_stride, int64_t count, int64_t depth, float *to) {
    const int64_t whole = depth / 4 * 4;
    for (int64_t l = 0; l < count; l += 16) {
        const float *row[16];
        for (int64_t i = 0; i < 16; ++i) row[i] = from + least(l + i, count - 1) * lane_stride;
        const __mmask16 real = __mmask16(count - l < 16 ? (1u << (count - l)) - 1 : 0xFFFF);
        const __mmask16 own = __mmask16(width - l < 16 ? (1u << (width - l)) - 1 : 0xFFFF);
        for (int64_t k = 0; k < whole; k += 4) {
            __m512 x[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                x[i] = _mm512_castps128_ps512(_mm_loadu_ps(row[i] + k));
                x[i] = _mm512_insertf32x4(x[i], _mm_loadu_ps(row[i + 4] + k), 1);
                x[i] = _mm512_insertf32x4(x[i], _mm_loadu_ps(row[i + 8] + k), 2);
                x[i] = _mm512_insertf32x4(x[i], _mm_loadu_ps(row[i + 12] + k), 3);
            }
            const __m512d a = (__m512d)_mm512_unpacklo_ps(x[0], x[1]), b = (__m512d)_mm512_unpackhi_ps(x[0], x[1]);
            const __m512d c = (__m512d)_mm512_unpacklo_ps(x[2], x[3]), d = (__m512d)_mm512_unpackhi_ps(x[2], x[3]);
            const __m512d y[4] = {_mm512_unpacklo_pd(a, c), _mm512_unpackhi_pd(a, c), _mm512_unpacklo_pd(b, d), _mm512_unpackhi_pd(b, d)};
            float *const target = to + k * width + l;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                if (real == 0xFFFF)
                    _mm512_storeu_ps(target + i * width, (__m512)y[i]);
                else
                    _mm512_mask_storeu_ps(target + i * width, own, _mm512_maskz_mov_ps(real, (__m512)y[i]));
            }
        }
    }
    return whole;
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

// to[l] = from[l * stride] for `count` of `width` lanes and 0 beyond, for each k: lane l lies at from + l * lane_stride.
template <class T, int width>
CASE_FAST_INLINE void pack_panel(const T *from, int64_t lane_stride, int64_t depth_stride, int64_t count, int64_t depth, T *to) {
    int64_t k = 0;
    if (count == width && lane_stride == 1) {
        for (; k < depth; ++k)
            for (int l = 0; l < width; ++l) to[k * width + l] = from[k * depth_stride + l];
        return;
    }
    if (count < width)
        for (int64_t i = 0; i < depth; ++i)
            for (int64_t l = count; l < width; ++l) to[i * width + l] = T(0);
#if CASE_FAST_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
        if (depth_stride == 1) k = transpose<width>(from, lane_stride, count, depth, to);
#endif
#if defined(__x86_64__)
    if (depth_stride == 1 && k == 0) {  // blocks of 16 bytes squared are transposed in registers
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

// A[i, k] = a[i * row_stride + k * depth_stride] as [ceil(rows / Tile::rows)][depth][Tile::rows], zeros beyond the last row.
template <class T>
void pack_rows(const T *a, int64_t row_stride, int64_t depth_stride, int64_t rows, int64_t depth, T *panels) {
    constexpr int64_t width = Tile<T>::rows;
    for (int64_t i = 0; i < rows; i += width)
        pack_panel<T, width>(a + i * row_stride, row_stride, depth_stride, rows - i < width ? rows - i : width, depth,
                             panels + i * depth);
}

// B[k, j] = b[k * depth_stride + j * column_stride] as [ceil(columns / Tile::columns)][depth][Tile::columns], likewise.
template <class T>
void pack_columns(const T *b, int64_t depth_stride, int64_t column_stride, int64_t depth, int64_t columns, T *panels) {
    constexpr int64_t width = Tile<T>::columns;
    for (int64_t j = 0; j < columns; j += width)
        pack_panel<T, width>(b + j * column_stride, column_stride, depth_stride, columns - j < width ? columns - j : width, depth,
                             panels + j * depth);
}

// Where the A of a tile lies: element (i, k) at i * row + k * depth, and `hop` further after each `group` of k. Members that the
// caller writes as constants cost no register.
struct RowLayout {
    int64_t row, depth, group, hop;
};

// `count` <= `rows` rows and `columns` columns (more than those of vectors - 1 vectors) of C. Reads A's rows up to `rows` and, if
// `padded`, B's columns up to whole vectors; B's row k lies at k * b_depth.
template <class T, int rows, int vectors, bool padded>
CASE_FAST_INLINE void multiply_tile(const T *a, const RowLayout layout, const T *b, int64_t b_depth, int64_t depth, T *c,
                                    int64_t c_stride, int64_t count, int64_t columns, bool add) {
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
                x[v] = !padded && cut && v == vectors - 1 ? load(b + v * width, tail) : load(b + v * width);
#pragma GCC unroll 16
            for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
                for (int v = 0; v < vectors; ++v) sum[r][v] += a[r * layout.row] * x[v];
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
template <class T>
struct Left {
    const T *data;
    int64_t row, depth;
};
template <class T>
struct Right {
    const T *data;
    int64_t panel, depth;
};
template <class T>
struct Product {
    T *data;
    int64_t row, panel;
};

// C = or += A B by tiles of `height` rows.
template <class T, int height, bool padded>
CASE_FAST_INLINE void multiply_tiles(Left<T> a, const RowLayout layout, Right<T> b, Product<T> c, int64_t rows, int64_t columns,
                                     int64_t depth, bool add) {
    constexpr int64_t width = Tile<T>::columns;
    constexpr int tall = height, medium = height > 4 ? height * 2 / 3 : height, low = height > 4 ? (height + 2) / 3 : height;
    const int64_t piece = depth_piece<T>(depth);
    // as many rows as a third of a 1 MiB second cache holds, so that each is fetched from afar once
    const int64_t block = (int64_t(384) << 10) / (piece * int64_t(sizeof(T)) * height) * height;
    int64_t k = 0;
    do {
        const int64_t steps = depth - k < piece ? depth - k : piece;
        const bool more = add || k > 0;
        for (int64_t first = 0; first < rows; first += block) {
            const int64_t last = rows - first < block ? rows : first + block;
            for (int64_t j = 0; j < columns; j += width) {
                const T *const right = b.data + j / width * b.panel + k * b.depth;
                const int64_t wide = columns - j;
                for (int64_t i = first; i < last; i += height) {
                    const T *const left = a.data + i * a.row + k * a.depth;
                    T *const to = c.data + i * c.row + j / width * c.panel;
                    const int64_t count = last - i;
                    const auto tile = [&](auto tile_rows) __attribute__((always_inline)) {
                        constexpr int n = decltype(tile_rows)::value;
                        if (wide > Lanes<T>::width)
                            multiply_tile<T, n, 2, padded>(left, layout, right, b.depth, steps, to, c.row, count, wide, more);
                        else
                            multiply_tile<T, n, 1, padded>(left, layout, right, b.depth, steps, to, c.row, count, wide, more);
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
template <class T>
void multiply(const T *row_panels, const T *column_panels, int64_t rows, int64_t columns, int64_t depth, T *c, int64_t c_stride,
              bool add) {
    constexpr int64_t height = Tile<T>::rows, width = Tile<T>::columns;
    multiply_tiles<T, height, true>({row_panels, depth, height}, {1, height, INT64_MAX, 0}, {column_panels, width * depth, width},
                                    {c, c_stride, width}, rows, columns, depth, add);
}

// The same with B where it lies, row by row: for few rows of A, which do not repay packing B.
template <class T>
void multiply_unpacked(const T *row_panels, const T *b, int64_t b_stride, int64_t rows, int64_t columns, int64_t depth, T *c,
                       int64_t c_stride, bool add) {
    constexpr int64_t height = Tile<T>::rows, width = Tile<T>::columns;
    multiply_tiles<T, height, false>({row_panels, depth, height}, {1, height, INT64_MAX, 0}, {b, width, b_stride},
                                     {c, c_stride, width}, rows, columns, depth, add);
}

}  // namespace
