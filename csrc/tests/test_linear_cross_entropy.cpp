// The vocabulary loss on the CPU against a naive loop: every vector width this machine has, with and without factors rounded to
// bfloat16, 1 to 7 threads, rows with none, one and many targets, damaged inputs, outputs full of NaN. What ASan, UBSan and TSan run on.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "levels.h"
#include "linear_cross_entropy/linear_cross_entropy.h"
#include "rounded.h"

namespace {

std::mt19937_64 random_bits(7);
int64_t below(int64_t n) { return int64_t(random_bits() % uint64_t(n)); }

template <class T>
constexpr T nan_of = std::numeric_limits<T>::quiet_NaN();

template <class T>
std::vector<T> noise(int64_t count, double magnitude = 1) {
    std::vector<T> x(static_cast<size_t>(count));
    for (T &value : x) value = T(magnitude * (double(random_bits() >> 11) / double(1ull << 52) - 1));
    return x;
}

bool bf16 = false;  // whether the calls allow factors of bfloat16, which float then has

constexpr int64_t few_rows = 24;  // whose scores are not rounded

struct Shape {
    int64_t rows, vocabulary;
    int dim;
    int64_t most = 1;  // targets of a row; 1: exactly one, without offsets
};

template <class T>
struct Inputs {
    std::vector<T> hidden, weight, bias, grad_nll;
    std::vector<int64_t> target, cu_target = {0};
    Inputs(const Shape &s, double magnitude = 1) {
        hidden = noise<T>(s.rows * s.dim, magnitude), weight = noise<T>(s.vocabulary * s.dim);
        bias = noise<T>(s.vocabulary, magnitude);
        for (int64_t row = 0; row < s.rows; ++row) {
            for (int64_t j = s.most == 1 ? 1 : below(s.most + 1); j > 0; --j) target.push_back(below(s.vocabulary));
            cu_target.push_back(int64_t(target.size()));
        }
        grad_nll = noise<T>(int64_t(target.size()));
    }
};

template <class T>
struct Outputs {
    std::vector<T> nll, state, kept, grad_hidden, grad_weight, grad_bias;
    std::vector<int64_t> prediction;
    Outputs(const Shape &s, const Inputs<T> &in, T fill) {
        nll.assign(in.target.size(), fill);
        state.assign(size_t(2 * s.rows), fill);
        kept.assign(size_t(s.rows * s.vocabulary), fill);
        grad_hidden.assign(size_t(s.rows * s.dim), fill);
        grad_weight.assign(size_t(s.vocabulary * s.dim), fill);
        grad_bias.assign(size_t(s.vocabulary), fill);
        prediction.assign(size_t(s.rows), -9);
    }
    std::vector<std::vector<T> *> all() { return {&nll, &state, &kept, &grad_hidden, &grad_weight, &grad_bias}; }
    bool same_bits(Outputs other) {
        for (size_t i = 0; i < all().size(); ++i) {
            const auto &a = *all()[i], &b = *other.all()[i];
            if (a.size() != b.size() || (!a.empty() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)))) return false;
        }
        return prediction == other.prediction;
    }
};

template <class T>
struct Call {
    const Shape &s;
    const Inputs<T> &in;
    std::vector<int32_t> target, cu_target;
    case_fast_linear_cross_entropy call;
    Call(const Shape &shape, const Inputs<T> &inputs, int index_bits)
        : s(shape), in(inputs), target(in.target.begin(), in.target.end()), cu_target(in.cu_target.begin(), in.cu_target.end()) {
        const bool wide = index_bits == 64;
        const void *const words = wide ? static_cast<const void *>(in.target.data()) : target.data();
        const void *const offsets = wide ? static_cast<const void *>(in.cu_target.data()) : cu_target.data();
        call = {s.rows, s.vocabulary, int64_t(in.target.size()), s.dim, std::is_same_v<T, float> ? CASE_FAST_F32 : CASE_FAST_F64,
                index_bits, bf16, words, s.most == 1 ? nullptr : offsets};
    }
    int forward(Outputs<T> &o, int threads, bool keep) const {
        return case_fast_linear_cross_entropy_forward_cpu(&call, in.hidden.data(), in.weight.data(), in.bias.data(), o.nll.data(),
                                                     o.prediction.data(), o.state.data(), keep ? o.kept.data() : nullptr, threads);
    }
    int backward(Outputs<T> &o, int threads, bool keep, int wanted = 7) const {
        return case_fast_linear_cross_entropy_backward_cpu(
            &call, in.hidden.data(), in.weight.data(), in.bias.data(), o.state.data(), keep ? o.kept.data() : nullptr,
            in.grad_nll.data(), wanted & 1 ? o.grad_hidden.data() : nullptr, wanted & 2 ? o.grad_weight.data() : nullptr,
            wanted & 4 ? o.grad_bias.data() : nullptr, threads);
    }
    void run(Outputs<T> &o, int threads, bool keep) const {
        CHECK(forward(o, threads, keep) == CASE_FAST_OK);
        CHECK(backward(o, threads, keep) == CASE_FAST_OK);
    }
};

// The definition, in double; `kept` holds the scores row by row.
template <class T>
Outputs<double> naive(const Shape &s, const Inputs<T> &in) {
    const Inputs<double> like = [&] {
        Inputs<double> x(Shape{0, s.vocabulary, s.dim});
        x.target = in.target;
        return x;
    }();
    Outputs<double> o(s, like, 0.0);
    const bool rounds = bf16 && sizeof(T) == 4, rounds_scores = rounds && s.rows > few_rows;
    const auto factor = [](double x, bool to_round) { return to_round ? rounded(float(x)) : x; };
    const auto hidden = [&](int64_t t, int64_t k, bool to_round) { return factor(in.hidden[size_t(t * s.dim + k)], to_round); };
    const auto weight = [&](int64_t v, int64_t k, bool to_round) { return factor(in.weight[size_t(v * s.dim + k)], to_round); };
    for (int64_t t = 0; t < s.rows; ++t) {
        double *const z = o.kept.data() + t * s.vocabulary;
        double top = -INFINITY, sum = 0, scale = 0;
        for (int64_t v = 0; v < s.vocabulary; ++v) {
            z[v] = in.bias[size_t(v)];
            for (int64_t k = 0; k < s.dim; ++k) z[v] += hidden(t, k, rounds_scores) * weight(v, k, rounds_scores);
            if (z[v] > top) o.prediction[size_t(t)] = v;
            top = std::max(top, z[v]);
        }
        for (int64_t v = 0; v < s.vocabulary; ++v) sum += std::exp(z[v] - top);
        o.state[size_t(2 * t)] = top;
        o.state[size_t(2 * t + 1)] = std::log(sum);
        std::vector<double> gradient(size_t(s.vocabulary), 0.0);
        for (int64_t m = in.cu_target[size_t(t)]; m < in.cu_target[size_t(t) + 1]; ++m) {
            o.nll[size_t(m)] = top - z[in.target[size_t(m)]] + std::log(sum);
            gradient[size_t(in.target[size_t(m)])] -= in.grad_nll[size_t(m)];
            scale += in.grad_nll[size_t(m)];
        }
        for (int64_t v = 0; v < s.vocabulary; ++v) {
            gradient[size_t(v)] += scale * std::exp(z[v] - top) / sum;
            o.grad_bias[size_t(v)] += gradient[size_t(v)];
            const double gradient_factor = factor(gradient[size_t(v)], rounds);
            for (int64_t k = 0; k < s.dim; ++k) {
                o.grad_hidden[size_t(t * s.dim + k)] += gradient_factor * weight(v, k, rounds);
                o.grad_weight[size_t(v * s.dim + k)] += gradient_factor * hidden(t, k, rounds);
            }
        }
    }
    return o;
}

template <class T>
bool close(const std::vector<T> &got, const std::vector<double> &want, const char *what, double slack = 0) {
    double largest = 1;
    for (double x : want) largest = std::max(largest, std::fabs(x));
    for (size_t j = 0; j < want.size(); ++j)
        if (!(std::fabs(got[j] - want[j]) / largest < (sizeof(T) == 4 ? 2e-5 : 1e-13) + slack)) {
            std::fprintf(stderr, "%s[%zu]: %g, not %g\n", what, j, double(got[j]), want[j]);
            return false;
        }
    return true;
}

template <class T>
void compare(const Shape &s) {
    const Inputs<T> in(s);
    const Outputs<double> expected = naive(s, in);
    const Call<T> call(s, in, below(2) ? 64 : 32);
    // a gradient of a score that is off in its last place may round to the next number of 8 bits: a few of them in a sum
    const double slack = bf16 && sizeof(T) == 4 ? 4.0 / 256 : 0;
    for (const bool keep : {false, true}) {
        Outputs<T> first(s, in, nan_of<T>);
        call.run(first, 1, keep);
        CHECK(close(first.nll, expected.nll, "nll") && close(first.state, expected.state, "state"));
        CHECK(close(first.grad_hidden, expected.grad_hidden, "grad_hidden", slack));
        CHECK(close(first.grad_weight, expected.grad_weight, "grad_weight", slack));
        CHECK(close(first.grad_bias, expected.grad_bias, "grad_bias"));
        for (int64_t t = 0; t < s.rows; ++t) {  // a word as good as the best
            const double *const z = expected.kept.data() + t * s.vocabulary;
            CHECK(z[first.prediction[size_t(t)]] > z[expected.prediction[size_t(t)]] - (sizeof(T) == 4 ? 1e-4 : 1e-12));
        }
        for (const int threads : {1, 2, 3, 7}) {
            Outputs<T> again(s, in, keep ? T(threads) : nan_of<T>);
            call.run(again, threads, keep);
            CHECK(again.same_bits(first));
        }
        for (int wanted = 0; wanted < 7; ++wanted) {
            Outputs<T> some(s, in, nan_of<T>);
            CHECK(call.forward(some, 2, keep) == CASE_FAST_OK && call.backward(some, 2, keep, wanted) == CASE_FAST_OK);
            CHECK(!(wanted & 1) || some.grad_hidden == first.grad_hidden);
            CHECK(!(wanted & 2) || some.grad_weight == first.grad_weight);
            CHECK(!(wanted & 4) || some.grad_bias == first.grad_bias);
            CHECK((wanted & 4) || !(some.grad_bias[0] == some.grad_bias[0]));
        }
    }
}

void test_against_naive(const char *level) {
    int cases = 0;
    const auto both = [&](const Shape &s) {
        compare<float>(s);
        compare<double>(s);
        cases += 2;
    };
    for (const int dim : {1, 7, 16, 33, 150, 300})
        for (const int64_t rows : {1, 2, 5, 23, 24, 25, 40}) both({rows, 1 + below(600), dim, 1 + below(3)});
    for (const int64_t vocabulary : {1, 2, 3, 5, 15, 16, 17, 191, 192, 193, 400}) both({1 + below(40), vocabulary, 6, 1 + below(2)});
    both({0, 50, 4});
    both({3, 50, 4, 40});    // many targets a row
    both({265, 250, 9});     // two blocks of rows
    both({700, 30, 5, 2});   // more than backward takes at once
    both({60, 13000, 3});    // more blocks than chunks
    std::printf("%s: %d cases\n", level, cases);
}

void test_many_rows() {  // more than forward takes at once
    const Shape s = {4300, 9, 2};
    compare<float>(s);
}

// A row whose gradients are 0 takes no part: the others' gradients are as without it.
void test_rows_without_gradient() {
    for (const int64_t rows : {7, 90}) {
        const Shape s = {rows, 300, 20};
        Inputs<float> in(s);
        for (int64_t t = 0; t < rows; t += 3) {
            in.grad_nll[size_t(t)] = 0;
            in.hidden[size_t(t * s.dim)] = nan_of<float>;
        }
        Outputs<float> o(s, in, nan_of<float>);
        for (const bool keep : {false, true}) {
            Call<float>(s, in, 64).run(o, 2, keep);
            for (int64_t t = 0; t < rows; ++t)
                for (int k = 0; k < s.dim; ++k) {
                    const float g = o.grad_hidden[size_t(t * s.dim + k)];
                    CHECK(t % 3 ? g == g && g != 0 : g == 0);
                }
            for (const float g : o.grad_weight) CHECK(g == g);
        }
        std::fill(in.grad_nll.begin(), in.grad_nll.end(), 0.0f);
        Call<float>(s, in, 64).run(o, 2, false);
        for (const auto *list : {&o.grad_hidden, &o.grad_weight, &o.grad_bias})
            for (const float g : *list) CHECK(g == 0);
    }
}

void test_large_scores() {
    const Shape s = {30, 500, 8};
    for (const double magnitude : {1e2, 1e4, 1e30}) {
        const Inputs<float> in(s, magnitude);
        Outputs<float> o(s, in, 0);
        Call<float>(s, in, 64).run(o, 1, false);
        for (const auto *list : {&o.nll, &o.grad_hidden, &o.grad_weight, &o.grad_bias})
            for (const float x : *list) CHECK(std::isfinite(x));
    }
}

void test_ties_and_nan() {
    for (const int64_t rows : {2, 50}) {
        const Shape s = {rows, 700, 3};
        Inputs<float> in(s);
        std::fill(in.weight.begin(), in.weight.end(), 0.0f);
        std::fill(in.bias.begin(), in.bias.end(), -1.0f);
        for (const size_t best : {650u, 203u, 17u}) {
            in.bias[best] = 2;
            Outputs<float> o(s, in, 0);
            CHECK(Call<float>(s, in, 64).forward(o, 2, false) == CASE_FAST_OK);
            for (const int64_t word : o.prediction) CHECK(word == int64_t(best));
        }
        std::fill(in.bias.begin(), in.bias.end(), -INFINITY);
        in.target.assign(in.target.size(), 300);
        in.bias[300] = 1;
        Outputs<float> o(s, in, 0);
        Call<float>(s, in, 64).run(o, 2, true);
        for (const int64_t word : o.prediction) CHECK(word == 300);
        for (const float x : o.nll) CHECK(x == 0);
        for (const float x : o.grad_hidden) CHECK(x == 0);
        in.bias[300] = -INFINITY;
        CHECK(Call<float>(s, in, 64).forward(o, 2, false) == CASE_FAST_OK);
        for (const int64_t word : o.prediction) CHECK(word == 0);
        in.bias[500] = in.bias[400] = nan_of<float>;
        CHECK(Call<float>(s, in, 64).forward(o, 2, false) == CASE_FAST_OK);
        for (const int64_t word : o.prediction) CHECK(word == 400);
        for (const float x : o.nll) CHECK(!(x == x));
    }
}

void test_nan_stays_in_its_row() {
    for (const int64_t rows : {9, 270}) {
        const Shape s = {rows, 400, 19};
        Inputs<float> in(s);
        Outputs<float> clean(s, in, 0), damaged(s, in, 0);
        Call<float>(s, in, 64).run(clean, 2, false);
        for (const float bad : {nan_of<float>, INFINITY, -INFINITY}) {
            const int64_t hit = below(rows);
            Inputs<float> spoiled = in;
            spoiled.hidden[size_t(hit * s.dim + below(s.dim))] = bad;
            Call<float>(s, spoiled, 64).run(damaged, 2, false);
            for (int64_t t = 0; t < rows; ++t) {
                const bool same = std::memcmp(&clean.nll[size_t(t)], &damaged.nll[size_t(t)], 4) == 0 &&
                                  std::memcmp(&clean.grad_hidden[size_t(t * s.dim)], &damaged.grad_hidden[size_t(t * s.dim)],
                                              size_t(s.dim) * 4) == 0;
                CHECK(same == (t != hit));
            }
            CHECK(!(damaged.nll[size_t(hit)] == damaged.nll[size_t(hit)]));
        }
    }
}

template <class T>
void test_top_words() {
    for (int round = 0; round < 60; ++round) {
        const Shape s = {1 + below(round % 5 ? 20 : 220), 1 + below(900), 1 + int(below(40))};
        Inputs<T> in(s);
        if (round % 3 == 0)
            for (T &x : in.bias) x = T(below(3));  // ties
        if (round % 3 == 0) std::fill(in.weight.begin(), in.weight.end(), T(0));
        if (round % 4 == 0)
            for (int64_t i = 0; i < s.vocabulary; ++i)
                if (below(3) == 0 && i != s.vocabulary / 2) in.bias[size_t(i)] = -INFINITY;  // forbidden words
        const int64_t k = round % 2 ? 1 + below(std::min<int64_t>(s.vocabulary, 12)) : 1 + below(s.vocabulary);
        const Outputs<double> expected = naive(s, in);
        std::vector<T> first;
        std::vector<int64_t> first_word;
        for (const int threads : {1, 2, 3}) {
            std::vector<T> value(size_t(s.rows * k), nan_of<T>);
            std::vector<int64_t> word(size_t(s.rows * k), -1);
            CHECK(case_fast_top_words_cpu(s.rows, s.vocabulary, k, s.dim, sizeof(T) == 4 ? CASE_FAST_F32 : CASE_FAST_F64,
                                               in.hidden.data(), in.weight.data(), in.bias.data(), value.data(), word.data(),
                                               threads) == CASE_FAST_OK);
            if (threads == 1) first = value, first_word = word;
            CHECK(word == first_word && std::memcmp(value.data(), first.data(), value.size() * sizeof(T)) == 0);
        }
        for (int64_t t = 0; t < s.rows; ++t) {
            const double *const z = expected.kept.data() + t * s.vocabulary;
            std::vector<int64_t> order(static_cast<size_t>(s.vocabulary));
            std::iota(order.begin(), order.end(), 0);
            std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return z[a] > z[b]; });
            std::vector<char> seen(size_t(s.vocabulary), 0);
            for (int64_t j = 0; j < k; ++j) {
                const int64_t word = first_word[size_t(t * k + j)], want = order[size_t(j)];
                CHECK(word >= 0 && word < s.vocabulary && !seen[size_t(word)]);
                seen[size_t(word)] = 1;
                const double slack = sizeof(T) == 4 ? 1e-4 : 1e-12, value = double(first[size_t(t * k + j)]);
                const double lse = expected.state[size_t(2 * t)] + expected.state[size_t(2 * t + 1)];
                CHECK(word == want || (round % 3 && std::fabs(z[word] - z[want]) < slack));
                CHECK(value == z[word] - lse || std::fabs(value - (z[word] - lse)) < slack);
            }
        }
    }
}

void test_top_words_with_nan() {
    const Shape s = {5, 600, 4};
    Inputs<float> in(s);
    in.hidden[4] = nan_of<float>;  // row 1
    in.bias[599] = INFINITY;
    for (const int64_t k : {1, 3, 600}) {
        std::vector<float> value(size_t(s.rows * k));
        std::vector<int64_t> word(size_t(s.rows * k));
        CHECK(case_fast_top_words_cpu(s.rows, s.vocabulary, k, s.dim, CASE_FAST_F32, in.hidden.data(), in.weight.data(),
                                           in.bias.data(), value.data(), word.data(), 2) == CASE_FAST_OK);
        for (int64_t t = 0; t < s.rows; ++t) {
            CHECK(!(value[size_t(t * k)] == value[size_t(t * k)]));
            CHECK(word[size_t(t * k)] == (t == 1 ? 0 : 599));
        }
    }
    const auto refused = [&](int64_t vocabulary, int64_t k, int dtype, const void *hidden) {
        std::vector<float> value(9);
        std::vector<int64_t> word(9);
        CHECK(case_fast_top_words_cpu(1, vocabulary, k, s.dim, dtype, hidden, in.weight.data(), in.bias.data(), value.data(),
                                           word.data(), 1) == CASE_FAST_BAD_ARGUMENT);
    };
    refused(600, 0, CASE_FAST_F32, in.hidden.data());
    refused(3, 4, CASE_FAST_F32, in.hidden.data());
    refused(0, 1, CASE_FAST_F32, in.hidden.data());
    refused(600, 1, CASE_FAST_BF16, in.hidden.data());
    refused(600, 1, CASE_FAST_F32, nullptr);
}

void test_bad_inputs() {
    for (int round = 0; round < 500; ++round) {
        const Shape s = {1 + below(9), 1 + below(30), 4, 3};
        Inputs<float> in(s);
        if (in.target.empty()) continue;
        const int64_t wrong[] = {-1, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()};
        const int64_t bad = wrong[below(3)], place = below(int64_t(in.target.size()));
        int expected = CASE_FAST_BAD_CU_TARGET;
        switch (below(4)) {
            case 0: in.target[size_t(place)] = below(2) ? bad : s.vocabulary; expected = CASE_FAST_BAD_TARGET; break;
            case 1: in.cu_target[size_t(below(s.rows + 1))] = bad; break;
            case 2: in.cu_target[0] = 1; break;
            case 3: in.cu_target.back() += below(2) ? 1 : -1; break;
        }
        Outputs<float> o(s, in, 3.0f);
        const Outputs<float> before = o;
        const Call<float> call(s, in, below(2) ? 32 : 64);
        CHECK(call.forward(o, 2, true) == expected);
        CHECK(call.backward(o, 2, true) == expected);
        CHECK(o.same_bits(before));
    }
    const Shape s = {4, 10, 3};
    const Inputs<float> in(s);
    Outputs<float> o(s, in, 3.0f);
    const Outputs<float> before = o;
    const auto refused = [&](auto change) {
        Call<float> call(s, in, 64);
        change(call.call);
        CHECK(call.forward(o, 1, true) == CASE_FAST_BAD_ARGUMENT && call.backward(o, 1, true) == CASE_FAST_BAD_ARGUMENT);
    };
    refused([](case_fast_linear_cross_entropy &x) { x.rows = -1; });
    refused([](case_fast_linear_cross_entropy &x) { x.rows = 3; });
    refused([](case_fast_linear_cross_entropy &x) { x.vocabulary = 0; });
    refused([](case_fast_linear_cross_entropy &x) { x.dim = 0; });
    refused([](case_fast_linear_cross_entropy &x) { x.dtype = CASE_FAST_F16; });
    refused([](case_fast_linear_cross_entropy &x) { x.index_bits = 16; });
    refused([](case_fast_linear_cross_entropy &x) { x.targets = -1; });
    refused([](case_fast_linear_cross_entropy &x) { x.target = nullptr; });
    CHECK(o.same_bits(before));
}

}  // namespace

int main() {
    test_bad_inputs();
    const auto test_losses = [](const char *level) {
        test_against_naive(level);
        test_many_rows();
        test_rows_without_gradient();
        test_large_scores();
        test_ties_and_nan();
        test_nan_stays_in_its_row();
    };
    at_each_level([=](const char *level) {
        test_losses(level);
        test_top_words<float>();
        test_top_words<double>();
        test_top_words_with_nan();
    });
    if ((bf16 = case_fast_simd_bf16())) test_losses("bf16");
}
