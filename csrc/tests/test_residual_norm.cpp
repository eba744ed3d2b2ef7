// A residual and the norm that follows on the CPU against plain loops in double: every vector width this machine has, 1 to 7 threads,
// with and without dropout, what is added and each gradient, outputs full of NaN. What ASan, UBSan and TSan run on.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "common/philox.h"
#include "levels.h"
#include "residual_norm/residual_norm.h"

namespace {

std::mt19937_64 random_bits(7);

template <class T>
using List = std::vector<T>;

template <class T>
List<T> noise(int64_t count) {
    List<T> x(static_cast<size_t>(count));
    for (T &value : x) value = T(double(random_bits() >> 11) / double(1ull << 52) - 1);
    return x;
}
template <class T>
List<T> unwritten(int64_t count) {
    return List<T>(static_cast<size_t>(count), std::numeric_limits<T>::quiet_NaN());
}

template <class T>
bool same_bits(const List<T> &a, const List<T> &b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}
template <class T>
bool close(const List<T> &found, const List<double> &expected, double scale = 1) {
    const double allowed = scale * (std::is_same_v<T, float> ? 2e-5 : 1e-12);
    for (size_t i = 0; i < found.size(); ++i)
        if (!(std::fabs(double(found[i]) - expected[i]) <= allowed * (1 + std::fabs(expected[i])))) return false;
    return found.size() == expected.size();
}

struct Shape {
    int64_t rows, width;
    double dropout_p = 0;
    uint64_t seed = 0;
};

double kept(const Shape &s, int64_t row, int64_t column) {
    const double below = std::floor(s.dropout_p * 65536);
    return double(case_fast_half_word(s.seed, row, column)) >= below ? 65536 / (65536 - below) : 0;
}

// Outputs of the three functions, in double and by loops.
struct Plain {
    List<double> total, normed, stats, dropped, grad_x, grad_update, grad_weight, grad_bias;
};
template <class T>
struct Arrays {
    List<T> x, update, weight, bias, grad_total, grad_normed;
};

template <class T>
Plain plain(const Shape &s, double eps, const Arrays<T> &a, bool updating, bool adding) {
    const size_t n = size_t(s.rows), d = size_t(s.width);
    Plain out;
    for (auto *rows : {&out.total, &out.normed, &out.dropped, &out.grad_x, &out.grad_update}) rows->resize(n * d);
    out.stats.resize(2 * n);
    out.grad_weight.resize(d), out.grad_bias.resize(d);
    for (size_t i = 0; i < n; ++i) {
        double mean = 0, variance = 0, centre = 0, slope = 0;
        const auto g = [&](size_t j) { return double(a.grad_normed[i * d + j]) * double(a.weight[j]); };
        for (size_t j = 0; j < d; ++j) {
            const size_t at = i * d + j;
            out.dropped[at] = kept(s, int64_t(i), int64_t(j)) * double(a.update[at]);
            out.total[at] = double(a.x[at]) + (updating ? out.dropped[at] : 0);
            mean += out.total[at] / double(d);
        }
        for (size_t j = 0; j < d; ++j) variance += std::pow(out.total[i * d + j] - mean, 2) / double(d);
        const double inverse = 1 / std::sqrt(variance + eps);
        const auto z = [&](size_t j) { return (out.total[i * d + j] - mean) * inverse; };
        for (size_t j = 0; j < d; ++j) {
            centre += g(j) / double(d), slope += g(j) * z(j) / double(d);
            out.grad_weight[j] += double(a.grad_normed[i * d + j]) * z(j), out.grad_bias[j] += double(a.grad_normed[i * d + j]);
        }
        for (size_t j = 0; j < d; ++j) {
            const size_t at = i * d + j;
            out.normed[at] = z(j) * double(a.weight[j]) + double(a.bias[j]);
            out.grad_x[at] = (adding ? double(a.grad_total[at]) : 0) + (g(j) - centre - z(j) * slope) * inverse;
            out.grad_update[at] = kept(s, int64_t(i), int64_t(j)) * out.grad_x[at];
        }
        out.stats[i] = mean, out.stats[n + i] = inverse;
    }
    return out;
}

// What the functions give, by so many threads; grad_update only with dropout.
template <class T>
struct Found {
    List<T> total, normed, stats, dropped, grad_x, grad_update, grad_weight, grad_bias;
    List<const List<T> *> all() const { return {&total, &normed, &stats, &dropped, &grad_x, &grad_update, &grad_weight, &grad_bias}; }
};
template <class T>
Found<T> run(const Shape &s, double eps, const Arrays<T> &a, bool updating, bool adding, int threads) {
    const SeedParts seed = parts_of(s.seed);
    const case_fast_residual_norm call = {s.rows,      s.width,     std::is_same_v<T, float> ? CASE_FAST_F32 : CASE_FAST_F64, eps,
                                          s.dropout_p, seed.number, seed.at};
    const int64_t count = s.rows * s.width;
    const bool drops = s.dropout_p > 0;
    Found<T> out = {unwritten<T>(updating ? count : 0), unwritten<T>(count),   unwritten<T>(2 * s.rows), unwritten<T>(count), unwritten<T>(count),
                    unwritten<T>(drops ? count : 0),    unwritten<T>(s.width), unwritten<T>(s.width)};
    CHECK(case_fast_residual_norm_forward_cpu(&call, a.x.data(), updating ? a.update.data() : nullptr, a.weight.data(), a.bias.data(),
                                              updating ? out.total.data() : nullptr, out.normed.data(), out.stats.data(),
                                              threads) == CASE_FAST_OK);
    CHECK(case_fast_residual_norm_drop_cpu(&call, a.update.data(), adding ? a.x.data() : nullptr, out.dropped.data(), threads) ==
          CASE_FAST_OK);
    CHECK(case_fast_residual_norm_backward_cpu(&call, (updating ? out.total : a.x).data(), out.stats.data(), a.weight.data(),
                                               adding ? a.grad_total.data() : nullptr, a.grad_normed.data(), out.grad_x.data(),
                                               drops ? out.grad_update.data() : nullptr, out.grad_weight.data(), out.grad_bias.data(),
                                               threads) == CASE_FAST_OK);
    return out;
}

template <class T>
void test_against_plain_loops(const Shape &s) {
    const int64_t count = s.rows * s.width;
    const double eps = s.width < 3 ? 0.1 : 1e-5;  // rows of few columns would all be normalised to the same, sharply
    const Arrays<T> a = {noise<T>(count), noise<T>(count), noise<T>(s.width), noise<T>(s.width), noise<T>(count), noise<T>(count)};
    for (bool updating : {true, false})
        for (bool adding : {true, false}) {
            const Plain expected = plain(s, eps, a, updating, adding);
            List<double> dropped = expected.dropped;
            for (size_t i = 0; adding && i < dropped.size(); ++i) dropped[i] += double(a.x[i]);
            const Found<T> found = run(s, eps, a, updating, adding, 1);
            CHECK(!updating || close(found.total, expected.total));
            CHECK(close(found.normed, expected.normed, 4) && close(found.stats, expected.stats, 4) && close(found.dropped, dropped));
            CHECK(close(found.grad_x, expected.grad_x, 20));
            CHECK(s.dropout_p == 0 || close(found.grad_update, expected.grad_update, 20));
            const double rows = 4 + double(s.rows) / 20;
            CHECK(close(found.grad_weight, expected.grad_weight, rows) && close(found.grad_bias, expected.grad_bias, rows));
            for (int threads : {2, 3, 7}) {
                const Found<T> again = run(s, eps, a, updating, adding, threads);
                for (size_t i = 0; i < found.all().size(); ++i) CHECK(same_bits(*again.all()[i], *found.all()[i]));
            }
        }
}

// The bits of a row are those that it has among the first rows alone.
void test_a_row_does_not_depend_on_later_ones() {
    const Shape all = {700, 37, 0.3, 11}, few = {13, 37, 0.3, 11};
    const int64_t count = all.rows * all.width, first = few.rows * few.width;
    const Arrays<float> a = {noise<float>(count), noise<float>(count), noise<float>(37), noise<float>(37), noise<float>(count),
                             noise<float>(count)};
    const Found<float> whole = run(all, 1e-5, a, true, true, 3), part = run(few, 1e-5, a, true, true, 1);
    const auto same = [&](const List<float> &x, const List<float> &y) {
        return std::memcmp(x.data(), y.data(), size_t(first) * sizeof(float)) == 0;
    };
    CHECK(same(whole.total, part.total) && same(whole.normed, part.normed) && same(whole.dropped, part.dropped));
    CHECK(same(whole.grad_x, part.grad_x) && same(whole.grad_update, part.grad_update));
}

void test_wrong_arguments() {
    List<float> x(12), out(12), small(8);
    const case_fast_residual_norm good = {4, 3, CASE_FAST_F32, 1e-5, 0.1, 1, nullptr};
    float *const r = x.data(), *const w = out.data(), *const p = small.data();
    const auto forward = [&](const case_fast_residual_norm *c, float *in, float *update, float *total, float *stats) {
        return case_fast_residual_norm_forward_cpu(c, in, update, p, p, total, w, stats, 1);
    };
    const auto backward = [&](const case_fast_residual_norm *c, float *in, float *grad, float *to, float *of_bias) {
        return case_fast_residual_norm_backward_cpu(c, in, p, p, nullptr, grad, to, nullptr, p + 3, of_bias, 1);
    };
    CHECK(forward(&good, r, r, w, p) == CASE_FAST_OK && backward(&good, r, r, w, p) == CASE_FAST_OK);
    CHECK(case_fast_residual_norm_drop_cpu(&good, r, nullptr, w, 1) == CASE_FAST_OK);
    for (int missing = 0; missing < 4; ++missing) {
        const auto one = [&](int place, float *array) { return missing == place ? nullptr : array; };
        CHECK(forward(&good, one(0, r), one(1, r), one(2, w), one(3, p)) == CASE_FAST_BAD_ARGUMENT);
        CHECK(backward(&good, one(0, r), one(1, r), one(2, w), one(3, p)) == CASE_FAST_BAD_ARGUMENT);
    }
    CHECK(case_fast_residual_norm_drop_cpu(&good, nullptr, nullptr, w, 1) == CASE_FAST_BAD_ARGUMENT);
    CHECK(case_fast_residual_norm_drop_cpu(&good, r, nullptr, nullptr, 1) == CASE_FAST_BAD_ARGUMENT);
    for (int member = 0; member < 9; ++member) {
        case_fast_residual_norm bad = good;
        if (member == 0) bad.rows = -1;
        if (member == 1) bad.width = 0;
        if (member == 2) bad.dtype = CASE_FAST_BF16;
        if (member == 3) bad.eps = -1;
        if (member == 4) bad.eps = std::numeric_limits<double>::infinity();
        if (member == 5) bad.eps = std::numeric_limits<double>::quiet_NaN();
        if (member == 6) bad.dropout_p = 1;
        if (member == 7) bad.dropout_p = -0.1;
        const case_fast_residual_norm *const call = member == 8 ? nullptr : &bad;
        CHECK(forward(call, r, r, w, p) == CASE_FAST_BAD_ARGUMENT && backward(call, r, r, w, p) == CASE_FAST_BAD_ARGUMENT);
        CHECK(case_fast_residual_norm_drop_cpu(call, r, nullptr, w, 1) == CASE_FAST_BAD_ARGUMENT);
    }
}

void test_all() {
    const Shape shapes[] = {
        {0, 5}, {1, 1, 0.5, 3}, {3, 1}, {2, 2, 0.4, 1}, {7, 3, 0.3, 2}, {31, 7, 0.2, uint64_t(1) << 63 | 5}, {17, 16, 0.5, 4}, {16, 33},
        {40, 31, 0.1, 5}, {13, 32, 0.6, 6}, {9, 65, 0.25, 7}, {100, 129, 0.2, 8}, {233, 300, 0.1, uint64_t(77) << 40}, {97, 300}, {3, 1000, 0.9, 9},
    };
    for (const Shape &s : shapes) {
        test_against_plain_loops<float>(s);
        test_against_plain_loops<double>(s);
    }
    test_a_row_does_not_depend_on_later_ones();
    test_wrong_arguments();
}

}  // namespace

int main() {
    at_each_level([](const char *level) {
        std::printf("residual_norm: %s\n", level);
        test_all();
    });
}
