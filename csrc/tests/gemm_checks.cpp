// See gemm_checks.h. Compiled once per instruction set.
#include <stdlib.h>
#include <time.h>

#include "gemm_checks.h"

#include "check.h"
#include "common/gemm.h"

namespace {

// Arrays of exactly `count` elements, for AddressSanitizer to see a step beyond.
template <class T>
struct Array {
    T *const data;
    explicit Array(int64_t count) : data(static_cast<T *>(malloc(size_t(count) * sizeof(T) + (count == 0)))) {}
    ~Array() { free(data); }
    Array(const Array &) = delete;
};

uint32_t state = 1;
int small() {  // -8 .. 8: sums of products stay exact
    state = state * 1664525u + 1013904223u;
    return int((state >> 16) % 17) - 8;
}

int compared = 0;
template <class E>
void check_product(int64_t rows, int64_t columns, int64_t depth, bool rows_along, bool columns_along, bool add) {
    using T = Sum<E>;
    const int64_t deep = elements<E>(depth);
    // A and B lie row by row or column by column, with room between; C with two elements between its rows that must stay
    const int64_t a_row = rows_along ? depth + 3 : 1, a_depth = rows_along ? 1 : rows + 3;
    const int64_t b_depth = columns_along ? columns + 1 : 1, b_column = columns_along ? 1 : depth + 1, stride = columns + 2;
    Array<T> a((rows + 3) * (depth + 3)), b((depth + 1) * (columns + 1)), c(rows * stride), before(rows * stride);
    Array<T> in_place(rows * stride);
    for (int64_t i = 0; i < (rows + 3) * (depth + 3); ++i) a.data[i] = T(small());
    for (int64_t i = 0; i < (depth + 1) * (columns + 1); ++i) b.data[i] = T(small());
    for (int64_t i = 0; i < rows * stride; ++i) before.data[i] = c.data[i] = in_place.data[i] = T(small());
    Array<E> row_panels(packed_rows<E>(rows, deep)), column_panels(packed_columns<E>(columns, deep));
    pack_rows(a.data, a_row, a_depth, rows, depth, row_panels.data);
    pack_columns(b.data, b_depth, b_column, depth, columns, column_panels.data);
    multiply(row_panels.data, column_panels.data, rows, columns, deep, c.data, stride, add);
    bool unpacked = false;
    if constexpr (Element<E>::numbers == 1)
        if ((unpacked = columns_along))
            multiply_unpacked(row_panels.data, b.data, b_depth, rows, columns, depth, in_place.data, stride, add);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < stride; ++j) {
            double want = add || j >= columns ? double(before.data[i * stride + j]) : 0;
            for (int64_t k = 0; k < depth && j < columns; ++k)
                want += double(a.data[i * a_row + k * a_depth]) * double(b.data[k * b_depth + j * b_column]);
            CHECK(double(c.data[i * stride + j]) == want);
            if (unpacked) CHECK(double(in_place.data[i * stride + j]) == want);
        }
    ++compared;
}

int check() {
    const int64_t sizes[] = {0, 1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 16, 17, 25, 31, 32, 33, 40, 65}, depths[] = {0, 1, 2, 5, 16, 19};
    int done = 0;
    for (const int64_t rows : sizes)
        for (const int64_t columns : sizes)
            for (const int64_t depth : depths) {
                check_product<float>(rows, columns, depth, done & 1, done & 2, done & 4);
                check_product<double>(rows, columns, depth, done & 1, done & 2, done & 4);
#if defined(__AVX512BF16__)
                check_product<Bf16Pair>(rows, columns, depth, done & 1, done & 2, done & 4);
#endif
                done += 1;
            }
    const int64_t deep[] = {255, 256, 257, 300, 513, 700};
    for (const int64_t depth : deep) {  // one piece, pieces, pieces of unequal length
        check_product<float>(29, 71, depth, true, false, depth & 1);
        check_product<double>(700, 35, depth, true, true, depth & 1);  // more rows than a block
#if defined(__AVX512BF16__)
        check_product<Bf16Pair>(1300, 71, depth, true, false, depth & 1);
#endif
    }
    return compared;
}

template <class T>
double rate(int64_t rows, int64_t columns, int64_t depth) {
    Array<T> a(rows * depth), b(depth * columns), c(rows * columns);
    for (int64_t i = 0; i < rows * depth; ++i) a.data[i] = T(small());
    for (int64_t i = 0; i < depth * columns; ++i) b.data[i] = T(small());
    Array<T> row_panels(packed_rows<T>(rows, depth)), column_panels(packed_columns<T>(columns, depth));
    pack_rows(a.data, depth, 1, rows, depth, row_panels.data);
    pack_columns(b.data, columns, 1, depth, columns, column_panels.data);
    double least = 1e9;
    for (int i = 0; i < 50; ++i) {
        timespec begin, end;
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &begin);
        multiply(row_panels.data, column_panels.data, rows, columns, depth, c.data, columns, false);
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
        const double seconds = double(end.tv_sec - begin.tv_sec) + 1e-9 * double(end.tv_nsec - begin.tv_nsec);
        least = seconds < least ? seconds : least;
    }
    return 2e-9 * double(rows) * double(columns) * double(depth) / least;
}

}  // namespace

const GemmChecks CASE_FAST_KERNELS_HERE(gemm_checks) = {check, rate<float>, rate<double>};
