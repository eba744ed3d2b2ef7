// Bilinear MIM on the CPU against a plain double loop: every vector width this machine has, 1 to 3 threads, all negatives and
// drawn ones, one-to-one and many-to-one pairs, saturated scores, NaN, outputs full of NaN. What ASan, UBSan and TSan run on.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "bilinear_mim/bilinear_mim.h"
#include "check.h"
#include "common/philox.h"
#include "common/simd.h"
#include "levels.h"

namespace {

std::mt19937_64 random_bits(11);
int64_t below(int64_t n) { return int64_t(random_bits() % uint64_t(n)); }

template <class T>
constexpr T nan_of = std::numeric_limits<T>::quiet_NaN();

template <class T>
std::vector<T> noise(int64_t count, double scale) {
    std::vector<T> x(static_cast<size_t>(count));
    for (T &value : x) value = T(scale * (double(random_bits() >> 11) / double(1ull << 52) - 1));
    return x;
}

struct Setting {
    int64_t pairs, rows, dim, negatives;
    bool dot;
    double scale;  // of the weights: 1 gives scores of order 1
    std::vector<int64_t> positive;
    uint64_t seed;
    int32_t plan = CASE_FAST_MIM_AUTO;
};
std::vector<int64_t> one_to_one(int64_t count) {
    std::vector<int64_t> order(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) order[size_t(i)] = i;
    std::shuffle(order.begin(), order.end(), random_bits);
    return order;
}
std::vector<int64_t> many_to_one(int64_t pairs, int64_t rows) {
    std::vector<int64_t> list(static_cast<size_t>(pairs));
    for (int64_t &c : list) c = below(rows);
    return list;
}

template <class T>
struct Inputs {
    std::vector<T> x, y, weight, grad_side_y, grad_side_x;
    explicit Inputs(const Setting &s)
        : x(noise<T>(s.pairs * s.dim, 1)), y(noise<T>(s.rows * s.dim, 1)),
          weight(noise<T>(s.dot ? 0 : s.dim * s.dim, s.scale * 3 / double(s.dim))), grad_side_y(noise<T>(s.pairs, 1)),
          grad_side_x(noise<T>(s.pairs, 1)) {
        if (s.dot)
            for (T &value : x) value *= T(s.scale / std::sqrt(double(s.dim)) * 3);
    }
};

template <class T>
struct Outputs {
    std::vector<T> side_y, side_x, logit, grad_x, grad_y, grad_weight, saved;
    std::vector<std::vector<T> *> all() { return {&side_y, &side_x, &logit, &grad_x, &grad_y, &grad_weight}; }
    Outputs(const Setting &s, T fill) {
        const int64_t counts[] = {s.pairs, s.pairs, s.pairs, s.pairs * s.dim, s.rows * s.dim, s.dot ? 0 : s.dim * s.dim};
        for (size_t i = 0; i < 6; ++i) all()[i]->assign(size_t(counts[i]), fill);
    }
    bool same_bits(Outputs other) {
        for (size_t i = 0; i < 6; ++i) {
            const auto &a = *all()[i], &b = *other.all()[i];
            if (a.size() != b.size() || (!a.empty() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)))) return false;
        }
        return true;
    }
};

// The negatives of pair p: rows of y (side 0) or of x (side 1), by the definition.
std::vector<int64_t> negatives_of(const Setting &s, int64_t p, int side) {
    std::vector<int64_t> eligible, drawn;
    for (int64_t r = 0; r < (side ? s.pairs : s.rows); ++r)
        if ((side ? s.positive[size_t(r)] : r) != s.positive[size_t(p)]) eligible.push_back(r);
    if (s.negatives < 0 || eligible.empty()) return eligible;
    for (int64_t slot = 0; slot < s.negatives; ++slot) {
        const uint32_t u = case_fast_philox(uint32_t(slot), uint32_t(p), uint32_t(side), 0, s.seed);
        drawn.push_back(eligible[size_t(uint64_t(u) * eligible.size() >> 32)]);
    }
    return drawn;
}

// The definition, in long double where it sums.
template <class T>
Outputs<double> naive(const Setting &s, const Inputs<T> &in) {
    Outputs<double> o(s, 0.0);
    const int64_t P = s.pairs, Q = s.rows, d = s.dim;
    std::vector<double> a(size_t(P * d), 0.0), z(size_t(P * Q), 0.0), gz(size_t(P * Q), 0.0), ga(size_t(P * d), 0.0);
    for (int64_t p = 0; p < P; ++p)
        for (int64_t j = 0; j < d; ++j) {
            if (s.dot) a[size_t(p * d + j)] = in.x[size_t(p * d + j)];
            for (int64_t i = 0; i < d && !s.dot; ++i)
                a[size_t(p * d + j)] += double(in.x[size_t(p * d + i)]) * double(in.weight[size_t(i * d + j)]);
        }
    for (int64_t p = 0; p < P; ++p)
        for (int64_t q = 0; q < Q; ++q)
            for (int64_t j = 0; j < d; ++j) z[size_t(p * Q + q)] += a[size_t(p * d + j)] * double(in.y[size_t(q * d + j)]);
    const auto f = [&](double x) { return s.dot ? x : x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); };
    const auto slope = [&](double x) { return s.dot ? 1.0 : std::exp(-std::fabs(x)) / std::pow(1 + std::exp(-std::fabs(x)), 2); };
    for (int64_t p = 0; p < P; ++p) {
        const int64_t c = s.positive[size_t(p)];
        const size_t own = size_t(p * Q + c);
        o.logit[size_t(p)] = z[own];
        for (int side = 0; side < 2; ++side) {
            const auto negatives = negatives_of(s, p, side);
            const auto at = [&](int64_t r) { return side ? size_t(r * Q + c) : size_t(p * Q + r); };
            double top = f(z[own]);
            for (int64_t r : negatives) top = std::max(top, f(z[at(r)]));
            double others = 0, sum = std::exp(f(z[own]) - top);
            for (int64_t r : negatives) others += std::exp(f(z[at(r)]) - top);
            sum += others;
            (side ? o.side_x : o.side_y)[size_t(p)] = std::log(sum) + top - f(z[own]);
            const double by = double((side ? in.grad_side_x : in.grad_side_y)[size_t(p)]);
            for (int64_t r : negatives) gz[at(r)] += by * std::exp(f(z[at(r)]) - top) / sum * slope(z[at(r)]);
            gz[own] -= by * others / sum * slope(z[own]);
        }
    }
    for (int64_t p = 0; p < P; ++p)
        for (int64_t q = 0; q < Q; ++q)
            for (int64_t j = 0; j < d; ++j) {
                ga[size_t(p * d + j)] += gz[size_t(p * Q + q)] * double(in.y[size_t(q * d + j)]);
                o.grad_y[size_t(q * d + j)] += gz[size_t(p * Q + q)] * a[size_t(p * d + j)];
            }
    if (s.dot) {
        o.grad_x = ga;
        return o;
    }
    for (int64_t p = 0; p < P; ++p)
        for (int64_t i = 0; i < d; ++i)
            for (int64_t j = 0; j < d; ++j) {
                o.grad_x[size_t(p * d + i)] += ga[size_t(p * d + j)] * double(in.weight[size_t(i * d + j)]);
                o.grad_weight[size_t(i * d + j)] += double(in.x[size_t(p * d + i)]) * ga[size_t(p * d + j)];
            }
    return o;
}

template <class T>
struct Call {
    const Inputs<T> &in;
    case_fast_mim mim;
    Call(const Setting &s, const Inputs<T> &inputs) : in(inputs) {
        const SeedParts seed = parts_of(s.seed);
        mim = {s.pairs, s.rows, int32_t(s.dim), std::is_same_v<T, float> ? CASE_FAST_F32 : CASE_FAST_F64,
               s.dot ? CASE_FAST_DOT : CASE_FAST_BILINEAR_SIGMOID, s.negatives, s.positive.data(), seed.number, seed.at, s.plan};
    }
    int forward(Outputs<T> &o, int threads) const {
        return case_fast_bilinear_mim_forward_cpu(&mim, in.x.data(), in.y.data(), in.weight.data(), o.side_y.data(), o.side_x.data(),
                                                  o.logit.data(), o.saved.data(), threads);
    }
    int backward(Outputs<T> &o, int threads) const {
        return case_fast_bilinear_mim_backward_cpu(&mim, in.x.data(), in.y.data(), in.weight.data(), o.saved.data(),
                                                   in.grad_side_y.data(), in.grad_side_x.data(), o.grad_x.data(), o.grad_y.data(),
                                                   o.grad_weight.data(), threads);
    }
    void run(Outputs<T> &o, int threads) const {
        o.saved.assign(size_t(case_fast_bilinear_mim_saved(&mim)), nan_of<T>);
        CHECK(forward(o, threads) == CASE_FAST_OK);
        CHECK(backward(o, threads) == CASE_FAST_OK);
    }
};

template <class T>
void compare(const Setting &s, const char *level) {
    const Inputs<T> in(s);
    Outputs<double> expected = naive(s, in);
    const Call<T> call(s, in);
    Outputs<T> first(s, nan_of<T>);
    call.run(first, 1);
    const char *const names[] = {"side_y", "side_x", "logit", "grad_x", "grad_y", "grad_weight"};
    for (size_t i = 0; i < 6; ++i) {
        const auto &got = *first.all()[i];
        const auto &want = *expected.all()[i];
        double largest = i < 3 ? 1 : 1e-3;
        for (double x : want) largest = std::max(largest, std::fabs(x));
        for (size_t j = 0; j < want.size(); ++j) {
            const double error = std::fabs(double(got[j]) - want[j]) / largest;
            const bool close = error < (sizeof(T) == 4 ? 3e-5 : 1e-12) * std::max(1.0, s.scale);
            if (!close)
                std::fprintf(stderr, "%s, %lld x %lld x %lld, %lld negatives, dot %d: %s[%zu]: %g, not %g\n", level,
                             static_cast<long long>(s.pairs), static_cast<long long>(s.rows), static_cast<long long>(s.dim),
                             static_cast<long long>(s.negatives), int(s.dot), names[i], j, double(got[j]), want[j]);
            CHECK(close);
        }
    }
    for (int threads : {2, 3}) {
        Outputs<T> again(s, T(threads));
        call.run(again, threads);
        CHECK(again.same_bits(first));
    }
}

std::vector<int32_t> plans_of(int64_t negatives) {
    if (negatives < 0) return {CASE_FAST_MIM_AUTO};
    return {CASE_FAST_MIM_GATHERED, CASE_FAST_MIM_DENSE};
}

void test_against_naive(const char *level) {
    int cases = 0;
    const auto all = [&](int64_t pairs, int64_t rows, int64_t dim, const std::vector<int64_t> &positive, double scale = 1) {
        for (const int64_t negatives : {int64_t(-1), int64_t(0), 1 + below(7), dim, 2 * dim + 5})
            for (const bool dot : {false, true})
                for (const int32_t plan : plans_of(negatives)) {
                    const Setting s = {pairs, rows, dim, negatives, dot, scale, positive, random_bits(), plan};
                    compare<float>(s, level);
                    compare<double>(s, level);
                    cases += 2;
                }
    };
    for (int64_t count : {1, 2, 3, 16, 17, 33, 65}) all(count, count, 1 + below(40), one_to_one(count));
    for (int64_t dim : {1, 2, 15, 16, 31, 32, 33, 48, 100}) all(20, 20, dim, one_to_one(20));
    all(70, 9, 12, many_to_one(70, 9));
    all(9, 70, 12, many_to_one(9, 70));       // rows without a pair, and W on the side of x
    all(40, 1, 8, many_to_one(40, 1));        // no negatives on either side
    all(50, 30, 7, std::vector<int64_t>(50, 3));  // all pairs share one row: none on the side of x
    all(130, 120, 20, many_to_one(130, 120));
    all(0, 5, 4, {});
    all(0, 0, 4, {});
    // several chunks, and drawn ones
    for (const bool dot : {false, true})
        for (const int64_t negatives : {-1, 5})
            for (const int32_t plan : plans_of(negatives)) {
                compare<float>({700, 700, 10, negatives, dot, 1, one_to_one(700), 5, plan}, level);
                compare<float>({900, 60, 10, negatives, dot, 1, many_to_one(900, 60), 6, plan}, level);
                compare<float>({60, 900, 10, negatives, dot, 1, many_to_one(60, 900), 7, plan}, level);
                compare<float>({300, 300, 300, negatives, dot, 1, one_to_one(300), 8, plan}, level);
                cases += 4;
            }
    // steep scores
    for (const bool dot : {false, true}) compare<double>({40, 40, 16, -1, dot, 30, one_to_one(40), 1}, level);
    std::printf("%s: %d cases\n", level, cases + 2);
}

// Operands too large to be kept packed: one tile's at a time. And more draws than are held at a time.
void test_large(const char *level) {
    const Setting tiles = {2600, 1100, 400, -1, false, 1, many_to_one(2600, 1100), 1};
    const Setting draws = {2100, 1500, 3, 700, false, 1, many_to_one(2100, 1500), 1, CASE_FAST_MIM_GATHERED};
    const Setting kept = {2100, 1500, 1300, 600, true, 1, many_to_one(2100, 1500), 1, CASE_FAST_MIM_DENSE};
    const Setting dense = {2100, 1500, 3, 700, false, 1, draws.positive, 1, CASE_FAST_MIM_DENSE};
    for (const Setting *s : {&tiles, &draws, &dense, &kept}) {
        const Inputs<float> in(*s);
        Inputs<double> wide(*s);
        const auto widen = [](const std::vector<float> &x) { return std::vector<double>(x.begin(), x.end()); };
        wide.x = widen(in.x), wide.y = widen(in.y), wide.weight = widen(in.weight);
        wide.grad_side_y = widen(in.grad_side_y), wide.grad_side_x = widen(in.grad_side_x);
        Outputs<float> one(*s, nan_of<float>), two(*s, 0);
        Outputs<double> truth(*s, nan_of<double>);
        Call<float>(*s, in).run(one, 1);
        Call<float>(*s, in).run(two, 2);
        Call<double>(*s, wide).run(truth, 2);  // other panels, other chunks
        CHECK(one.same_bits(two));
        for (size_t i = 0; i < 6; ++i) {
            double largest = 1e-3, error = 0;
            for (double x : *truth.all()[i]) largest = std::max(largest, std::fabs(x));
            for (size_t j = 0; j < truth.all()[i]->size(); ++j)
                error = std::max(error, std::fabs(double((*one.all()[i])[j]) - (*truth.all()[i])[j]));
            if (!(error < 3e-5 * largest)) std::fprintf(stderr, "%s: output %zu: %g of %g\n", level, i, error, largest);
            CHECK(error < 3e-5 * largest);
        }
    }
}

// |x W y| up to 1e4.
void test_saturated() {
    for (const bool dot : {false, true})
        for (const int32_t plan : {CASE_FAST_MIM_AUTO, CASE_FAST_MIM_GATHERED, CASE_FAST_MIM_DENSE}) {
            const int64_t negatives = plan == CASE_FAST_MIM_AUTO ? -1 : 8;
            const Setting s = {50, 50, 24, negatives, dot, dot ? 1500.0 : 3000.0, one_to_one(50), 2, plan};
            const Inputs<float> in(s);
            Outputs<float> o(s, nan_of<float>);
            Call<float>(s, in).run(o, 2);
            float largest = 0;
            for (float z : o.logit) largest = std::max(largest, std::fabs(z));
            CHECK(largest > 1e3 && largest < 1e5);
            for (auto *list : o.all())
                for (float x : *list) CHECK(std::isfinite(x));
        }
}

void test_without_negatives() {
    for (const bool dot : {false, true})
        for (const int64_t negatives : {-1, 0, 5})
            for (const int64_t pairs : {1, 7}) {
                const Setting s = {pairs, 1, 20, negatives, dot, 1, std::vector<int64_t>(size_t(pairs), 0), 2};
                const Inputs<float> in(s);
                Outputs<float> o(s, nan_of<float>);
                Call<float>(s, in).run(o, 2);
                for (auto *list : {&o.side_y, &o.side_x, &o.grad_x, &o.grad_y, &o.grad_weight})
                    for (float x : *list) CHECK(x == 0);
            }
}

void test_nan_shows() {
    for (int round = 0; round < 40; ++round) {
        const int64_t rows = 1 + below(30), pairs = 1 + below(40);
        const int64_t negatives = round % 3 ? 3 : -1;
        const Setting s = {pairs, rows, 1 + below(40), negatives, below(2) == 1, 1, many_to_one(pairs, rows), 4, round % 3};
        Inputs<float> in(s);
        Outputs<float> clean(s, 0), damaged(s, 0);
        const Call<float> call(s, in);
        call.run(clean, 2);
        const bool of_x = below(2);
        const int64_t hit = below(of_x ? pairs : rows);
        (of_x ? in.x : in.y)[size_t(hit * s.dim + below(s.dim))] = nan_of<float>;
        call.run(damaged, 2);
        for (int64_t p = 0; p < pairs; ++p) {
            const bool own = of_x ? p == hit : s.positive[size_t(p)] == hit;
            for (int side = 0; side < 2; ++side) {
                const auto negatives = negatives_of(s, p, side);
                const bool held = own || (of_x == (side == 1) && std::count(negatives.begin(), negatives.end(), hit));
                const float before = (side ? clean.side_x : clean.side_y)[size_t(p)];
                const float after = (side ? damaged.side_x : damaged.side_y)[size_t(p)];
                CHECK(held ? std::isnan(after) : std::memcmp(&before, &after, 4) == 0);
            }
        }
    }
}

void test_bad_inputs() {
    Setting s = {30, 20, 6, -1, false, 1, many_to_one(30, 20), 4};
    const Inputs<float> in(s);
    Outputs<float> o(s, 3.0f);
    o.saved.assign(10000, 3.0f);
    const Outputs<float> before = o;
    const int64_t wrong[] = {-1, 20, std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min()};
    for (int round = 0; round < 100; ++round) {
        Setting bad = s;
        bad.positive[size_t(below(30))] = wrong[below(4)];
        bad.negatives = below(2) ? 3 : -1;
        const Call<float> call(bad, in);
        CHECK(call.forward(o, 2) == CASE_FAST_BAD_INDICES && call.backward(o, 2) == CASE_FAST_BAD_INDICES);
    }
    const auto refused = [&](auto change) {
        Call<float> call(s, in);
        change(call.mim);
        CHECK(call.forward(o, 1) == CASE_FAST_BAD_ARGUMENT && call.backward(o, 1) == CASE_FAST_BAD_ARGUMENT);
    };
    refused([](case_fast_mim &x) { x.pairs = -1; });
    refused([](case_fast_mim &x) { x.rows = -1; });
    refused([](case_fast_mim &x) { x.pairs = int64_t(1) << 31; });
    refused([](case_fast_mim &x) { x.dim = 0; });
    refused([](case_fast_mim &x) { x.dtype = CASE_FAST_F16; });
    refused([](case_fast_mim &x) { x.score = 2; });
    refused([](case_fast_mim &x) { x.negatives = -2; });
    refused([](case_fast_mim &x) { x.plan = 3; });
    refused([](case_fast_mim &x) { x.positive = nullptr; });
    const int status = case_fast_bilinear_mim_forward_cpu(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 1);
    CHECK(status == CASE_FAST_BAD_ARGUMENT);
    CHECK(o.same_bits(before) && o.saved == before.saved);
}

// AUTO gathers few draws and multiplies for many; a NaN in one row leaves the gradients of rows that have no part in it alone.
void test_plan() {
    const auto plan_of = [](int64_t pairs, int64_t negatives) {
        const case_fast_mim mim = {pairs, pairs, 300, CASE_FAST_F32, 0, negatives, nullptr, 0, nullptr, CASE_FAST_MIM_AUTO};
        return case_fast_bilinear_mim_plan(&mim);
    };
    CHECK(plan_of(1280, -1) == CASE_FAST_MIM_AUTO && plan_of(1280, 0) == CASE_FAST_MIM_AUTO);
    CHECK(plan_of(1280, 8) == CASE_FAST_MIM_GATHERED && plan_of(1280, 640) == CASE_FAST_MIM_DENSE);
    CHECK(plan_of(100000, 64) == CASE_FAST_MIM_GATHERED);
    for (const int32_t plan : {CASE_FAST_MIM_GATHERED, CASE_FAST_MIM_DENSE}) {
        const Setting s = {60, 60, 20, 2, false, 1, one_to_one(60), 3, plan};
        Inputs<float> in(s);
        in.y[0] = nan_of<float>;
        Outputs<float> o(s, 0);
        Call<float>(s, in).run(o, 2);
        int clean = 0;
        for (int64_t p = 0; p < s.pairs; ++p)
            clean += !std::isnan(o.side_y[size_t(p)]) && std::isfinite(o.grad_y[size_t(s.positive[size_t(p)] * s.dim)]);
        CHECK(clean > 20 && clean < 60);
    }
}

}  // namespace

int main() {
    test_bad_inputs();
    at_each_level([](const char *level) {
        test_against_naive(level);
        test_saturated();
        test_without_negatives();
        test_nan_shows();
    });
    test_plan();
    test_large(case_fast_simd_name(case_fast_simd_level()));
}
