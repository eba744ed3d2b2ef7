// What the tests of the emulated CUDA kernels of packed and cross-attention share: the definition in double, and comparisons.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <vector>

using namespace case_fast;

namespace {

int failures = 0;
void expect(bool good, const std::string &what) {
    if (!good) std::printf("FAILED: %s\n", what.c_str()), ++failures;
}

constexpr uint64_t SEED = 0x123456789ABCDEF0u;
const uint64_t ELSEWHERE = 0xF0E1D2C3B4A59687u;  // what a kernel finds at seed_at, and the number that makes SEED of it
constexpr uint64_t OTHER = 0x62D584BB2E194877u;
using Lengths = std::vector<int>;

template <class T> constexpr int dtype() {
    return std::is_same_v<T, float>    ? CASE_FAST_F32
           : std::is_same_v<T, double> ? CASE_FAST_F64
           : std::is_same_v<T, __half> ? CASE_FAST_F16
                                       : CASE_FAST_BF16;
}

template <class I> std::vector<I> offsets(const Lengths &lengths) {
    std::vector<I> cu = {0};
    for (const int n : lengths) cu.push_back(static_cast<I>(cu.back() + n));
    return cu;
}
int sum_of(const Lengths &lengths) { return std::accumulate(lengths.begin(), lengths.end(), 0); }
std::vector<char> poisoned(size_t bytes) { return std::vector<char>(bytes, static_cast<char>(0xFF)); }  // NaN in every dtype

struct Random {
    std::mt19937 random;
    std::normal_distribution<float> normal;
    template <class T> std::vector<T> of(int64_t count, float scale = 1) {
        std::vector<T> x;
        for (int64_t i = 0; i < count; ++i) x.push_back(narrowed<T>(scale * normal(random)));
        return x;
    }
};
template <class T> std::vector<double> wide(const std::vector<T> &x) {
    std::vector<double> out;
    for (const T &value : x) out.push_back(widened(value));
    return out;
}
template <class T> std::vector<double> wide(const std::vector<char> &bytes) {
    const T *x = reinterpret_cast<const T *>(bytes.data());
    return wide(std::vector<T>(x, x + bytes.size() / sizeof(T)));
}

void compare(const std::vector<double> &found, const std::vector<double> &expected, double tolerance, const std::string &what) {
    double worst = 0, size = 1;
    expect(found.size() == expected.size(), what + ": size");
    for (size_t n = 0; n < found.size(); ++n) {
        if (found[n] == expected[n]) continue;  // infinities
        const double error = std::abs(found[n] - expected[n]);
        worst = error <= worst || worst != worst ? worst : error;  // NaN stays
        if (std::isfinite(expected[n])) size = std::max(size, std::abs(expected[n]));
    }
    if (!(worst <= tolerance * size)) std::printf("error %g of %g\n", worst, size);
    expect(worst <= tolerance * size, what);
}

// Calls body(row, key row, weight before dropout, factor of dropout, place of the key) for what each row sees; and lse.
struct Truth {
    int heads, dim, longest = 0;
    bool causal;
    double scale, dropout;
    uint64_t seed;
    template <class Visit> double row(const std::vector<double> &query, int64_t query_at, const std::vector<double> &key,
                                      int64_t key_stride, int begin, int seen, int number, int head, Visit visit) const {
        std::vector<double> w;
        double peak = -INFINITY, total = 0;
        for (int j = 0; j < seen; ++j) {
            double s = 0;
            for (int d = 0; d < dim; ++d) s += query[query_at + d] * key[(begin + j) * key_stride + head * dim + d];
            w.push_back(s * scale);
            peak = std::max(peak, w.back());
        }
        for (double &x : w) total += x = std::exp(x - peak);
        const uint64_t below = case_fast_drop_below(dropout);
        for (int j = 0; j < seen; ++j) {
            const bool keep = dropout == 0 || case_fast_keep(seed, int64_t(number) * longest + j, head, below);
            visit(begin + j, w[j] / total, keep ? (dropout ? 1 / (1 - dropout) : 1) : 0.0);
        }
        return seen > 0 ? peak + std::log(total) : -INFINITY;
    }
};

}  // namespace
