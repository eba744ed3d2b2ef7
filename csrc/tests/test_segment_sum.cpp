// Segment sums on the CPU against a naive loop, bit for bit: every vector width this machine has, 1 to 5 threads, segments in order
// and not, empty ones, rows apart, damaged numbers, outputs full of NaN. What ASan, UBSan and TSan run on.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "levels.h"
#include "segment_sum/segment_sum.h"

namespace {

std::mt19937_64 random_bits(7);
int64_t below(int64_t n) { return int64_t(random_bits() % uint64_t(n)); }

struct Shape {
    int64_t rows, size, width, gap = 0;  // gap: elements between rows
    bool sorted = false;
};

template <class T>
std::vector<T> noise(int64_t count) {
    std::vector<T> x(static_cast<size_t>(count));
    for (T &value : x) value = T(double(random_bits() >> 11) / double(1ull << 52) - 1);
    return x;
}

// `count` rows of s.width with a gap between them, which is NaN; the last is not followed by one.
template <class T>
std::vector<T> apart(const Shape &s, int64_t count, const std::vector<T> &rows) {
    std::vector<T> x(size_t(count ? count * s.width + (count - 1) * s.gap : 0), std::numeric_limits<T>::quiet_NaN());
    for (int64_t i = 0; i < count; ++i)
        std::copy_n(rows.data() + i * s.width, s.width, x.data() + i * (s.width + s.gap));
    return x;
}

template <class T>
bool same_bits(const std::vector<T> &a, const std::vector<T> &b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

std::vector<int64_t> numbers(const Shape &s) {
    std::vector<int64_t> segment(static_cast<size_t>(s.rows));
    for (int64_t &number : segment) number = below(s.size);
    if (s.sorted) std::sort(segment.begin(), segment.end());
    return segment;
}

template <class T>
void test_against_a_naive_loop(const Shape &s) {
    const std::vector<int64_t> wide = numbers(s);
    const std::vector<int32_t> narrow(wide.begin(), wide.end());
    const std::vector<T> rows = noise<T>(s.rows * s.width), x = apart(s, s.rows, rows);
    std::vector<T> sums(size_t(s.size * s.width), T(0));
    for (int64_t i = 0; i < s.rows; ++i)
        for (int64_t j = 0; j < s.width; ++j) sums[size_t(wide[size_t(i)] * s.width + j)] += rows[size_t(i * s.width + j)];
    for (int bits : {32, 64})
        for (int threads : {1, 2, 3, 5}) {
            case_fast_segment_sum call = {s.rows, s.size, s.width, s.width + s.gap,
                                          std::is_same_v<T, float> ? CASE_FAST_F32 : CASE_FAST_F64, bits, nullptr};
            call.segment = bits == 64 ? static_cast<const void *>(wide.data()) : narrow.data();
            std::vector<T> out(sums.size(), std::numeric_limits<T>::quiet_NaN());
            CHECK(case_fast_segment_sum_forward_cpu(&call, x.data(), out.data(), threads) == CASE_FAST_OK);
            CHECK(same_bits(out, sums));
        }
}

// A row read once serves as all of them.
void test_a_row_may_stand_for_many() {
    const std::vector<float> row = noise<float>(70);
    const std::vector<int64_t> segment(500, 1);
    std::vector<float> out(140, 9.0f), expected(140, 0.0f);
    for (int i = 0; i < 500; ++i)
        for (int j = 0; j < 70; ++j) expected[size_t(70 + j)] += row[size_t(j)];
    const case_fast_segment_sum call = {500, 2, 70, 0, CASE_FAST_F32, 64, segment.data()};
    CHECK(case_fast_segment_sum_forward_cpu(&call, row.data(), out.data(), 2) == CASE_FAST_OK);
    CHECK(same_bits(out, expected));
}

template <class I>
void test_a_number_that_names_nothing(int bits) {
    const int64_t rows = 40, size = 7, width = 3;
    std::vector<float> x = noise<float>(rows * width), out(size_t(size * width), -9.0f);
    std::vector<I> segment(static_cast<size_t>(rows));
    std::vector<I> bad = {-1, std::numeric_limits<I>::min(), std::numeric_limits<I>::max(), I(size)};
    if (bits == 64) bad.insert(bad.end(), {I(int64_t(1) << 32), I((int64_t(1) << 32) + 3), I(3 - (int64_t(1) << 32))});
    for (I number : bad)
        for (int64_t place : {int64_t(0), int64_t(17), rows - 1}) {
            for (I &s : segment) s = I(below(size));
            segment[size_t(place)] = number;
            const case_fast_segment_sum call = {rows, size, width, width, CASE_FAST_F32, bits, segment.data()};
            CHECK(case_fast_segment_sum_forward_cpu(&call, x.data(), out.data(), 2) == CASE_FAST_BAD_SEGMENT);
            CHECK(std::all_of(out.begin(), out.end(), [](float y) { return y == -9.0f; }));
        }
    std::fill(segment.begin(), segment.end(), I(0));
    const case_fast_segment_sum none = {rows, 0, width, width, CASE_FAST_F32, bits, segment.data()};
    CHECK(case_fast_segment_sum_forward_cpu(&none, x.data(), nullptr, 2) == CASE_FAST_BAD_SEGMENT);
}

void test_wrong_arguments() {
    std::vector<float> x(12), out(12);
    const std::vector<int32_t> segment(4, 0);
    const case_fast_segment_sum good = {4, 4, 3, 3, CASE_FAST_F32, 32, segment.data()};
    CHECK(case_fast_segment_sum_forward_cpu(&good, x.data(), out.data(), 1) == CASE_FAST_OK);
    CHECK(case_fast_segment_sum_forward_cpu(nullptr, x.data(), out.data(), 1) == CASE_FAST_BAD_ARGUMENT);
    CHECK(case_fast_segment_sum_forward_cpu(&good, nullptr, out.data(), 1) == CASE_FAST_BAD_ARGUMENT);
    CHECK(case_fast_segment_sum_forward_cpu(&good, x.data(), nullptr, 1) == CASE_FAST_BAD_ARGUMENT);
    for (int member = 0; member < 8; ++member) {
        case_fast_segment_sum call = good;
        if (member < 4) (&call.rows)[member] = -1;
        if (member == 4) call.dtype = 7;
        if (member == 5) call.index_bits = 16;
        if (member == 6) call.segment = nullptr;
        if (member == 7) call.dtype = CASE_FAST_BF16;
        CHECK(case_fast_segment_sum_forward_cpu(&call, x.data(), out.data(), 1) == CASE_FAST_BAD_ARGUMENT);
    }
}

void test_all() {
    const Shape shapes[] = {
        {0, 0, 3}, {0, 5, 3}, {5, 2, 0}, {1, 1, 1}, {9, 4, 1}, {9, 4, 1, 2}, {700, 16, 1}, {31, 7, 5}, {31, 7, 5, 3, true}, {60, 3, 16},
        {60, 90, 17}, {60, 20, 33, 1, true}, {200, 11, 127}, {300, 40, 128, 0, true}, {260, 17, 129}, {320, 130, 300, 0, true},
        {320, 130, 300}, {230, 9, 301, 5}, {100, 4, 700},
    };
    for (const Shape &s : shapes) {
        test_against_a_naive_loop<float>(s);
        test_against_a_naive_loop<double>(s);
    }
    test_a_row_may_stand_for_many();
    test_a_number_that_names_nothing<int32_t>(32);
    test_a_number_that_names_nothing<int64_t>(64);
    test_wrong_arguments();
}

}  // namespace

int main() {
    at_each_level([](const char *level) {
        std::printf("segment_sum: %s\n", level);
        test_all();
    });
}
