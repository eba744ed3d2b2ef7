// Products of rows with weights on the CPU against naive loops in double: every vector width this machine has, with and without factors
// rounded to bfloat16, 1 to 7 threads (the same bits), rows alone and among others (the same bits), groups, several weights, any
// strides, outputs full of NaN. What ASan, UBSan and TSan run on.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "levels.h"
#include "linear/linear.h"
#include "rounded.h"

namespace {

std::mt19937_64 random_bits(7);

template <class T>
std::vector<T> noise(int64_t count) {
    std::vector<T> x(static_cast<size_t>(count));
    for (T &value : x) value = T(double(random_bits() >> 11) / double(1ull << 52) - 1);
    return x;
}
template <class T>
std::vector<T> nan_filled(int64_t count) {
    return std::vector<T>(static_cast<size_t>(count), std::numeric_limits<T>::quiet_NaN());
}
template <class T>
bool same_bits(const std::vector<T> &a, const std::vector<T> &b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

enum Layout { ROWS, COLUMNS, APART };  // of a weight: its rows dense, its columns, or neither

struct Shape {
    int64_t rows, groups, depth;
    std::vector<int64_t> outputs;  // of each weight
    Layout layout = ROWS;
    int64_t gap = 0;  // between rows of x
    int activation = CASE_FAST_IDENTITY;
    bool bias = true, bf16 = false;
};

template <class T>
struct Call {
    const Shape s;
    int64_t total = 0;  // outputs
    std::vector<T> x, bias, x_factors;
    std::vector<std::vector<T>> memory, weight_factors;  // x and weights, and as products have them
    std::vector<case_fast_linear_weight> weights;
    case_fast_linear call;

    explicit Call(const Shape &shape) : s(shape) {
        for (const int64_t outputs : s.outputs) total += outputs;
        x = noise<T>(s.rows * (s.groups * s.depth + s.gap));
        bias = noise<T>(s.groups * total);
        for (const int64_t outputs : s.outputs) {
            const int64_t apart = s.layout == APART ? 2 : 1;
            memory.push_back(noise<T>(s.groups * outputs * s.depth * apart));
            case_fast_linear_weight w = {};
            w.outputs = outputs;
            w.group = outputs * s.depth * apart;
            w.row = s.layout == COLUMNS ? 1 : s.depth * apart;
            w.column = s.layout == COLUMNS ? outputs : apart;
            w.weight = memory.back().data();
            weights.push_back(w);
        }
        call = {s.rows, s.groups, s.depth, s.groups * s.depth + s.gap, s.depth, int32_t(s.outputs.size()),
                std::is_same_v<T, float> ? CASE_FAST_F32 : CASE_FAST_F64, s.activation, s.bf16};
        x_factors = factors(x);
        for (const std::vector<T> &weight : memory) weight_factors.push_back(factors(weight));
    }
    bool rounds() const { return s.bf16 && std::is_same_v<T, float> && case_fast_simd_bf16(); }
    template <class Number>
    std::vector<Number> factors(std::vector<Number> of) const {
        for (size_t i = 0; rounds() && i < of.size(); ++i) of[i] = Number(rounded(float(of[i])));
        return of;
    }
    double at_x(int64_t i, int64_t g, int64_t k) const { return x_factors[size_t(i * call.x_row + g * call.x_group + k)]; }
    double at_weight(int64_t g, int64_t o, int64_t k) const {
        size_t place = 0;
        while (o >= weights[place].outputs) o -= weights[place++].outputs;
        const case_fast_linear_weight &w = weights[place];
        return weight_factors[place][size_t(g * w.group + o * w.row + k * w.column)];
    }
    double z(int64_t i, int64_t g, int64_t o) const {
        double sum = s.bias ? double(bias[size_t(g * total + o)]) : 0;
        for (int64_t k = 0; k < s.depth; ++k) sum += at_x(i, g, k) * at_weight(g, o, k);
        return sum;
    }
    int64_t size() const { return s.rows * s.groups * total; }
    std::vector<std::vector<T>> gradients() {  // of the weights, full of NaN
        std::vector<std::vector<T>> found;
        for (size_t i = 0; i < weights.size(); ++i) {
            case_fast_linear_weight &w = weights[i];
            found.push_back(nan_filled<T>(s.groups * w.outputs * s.depth));
            w.grad_group = w.outputs * s.depth;
            w.grad_row = s.layout == COLUMNS ? 1 : s.depth;
            w.grad_column = s.layout == COLUMNS ? w.outputs : 1;
            w.grad = found.back().data();
        }
        return found;
    }
    // The weights with `y` (n, G, N) as their results.
    const case_fast_linear_weight *with(std::vector<T> &y) {
        int64_t first = 0;
        for (case_fast_linear_weight &w : weights) {
            w.y = y.data() + first, w.y_row = s.groups * total, w.y_group = total;
            first += w.outputs;
        }
        return weights.data();
    }
    int forward(std::vector<T> &y, std::vector<T> *z, int threads) {
        return case_fast_linear_forward_cpu(&call, with(y), x.data(), s.bias ? bias.data() : nullptr, z ? z->data() : nullptr, threads);
    }
};

double activated(double z, int activation) {
    switch (activation) {
        case CASE_FAST_RELU: return z > 0 ? z : 0;
        case CASE_FAST_GELU: return 0.5 * z * (1 + std::erf(z * std::sqrt(0.5)));
        case CASE_FAST_TANH: return std::tanh(z);
        default: return z;
    }
}

template <class T>
void check_close(double found, double expected, double scale, double slack = 0) {
    const double error = std::is_same_v<T, float> ? 4e-7 : 1e-15;
    CHECK(std::fabs(found - expected) <= error * (4 + scale) + slack);
}

template <class T>
void test_against_a_naive_loop(const Shape &s) {
    Call<T> c(s);
    std::vector<T> first;
    for (const int threads : {1, 2, 3, 7}) {
        std::vector<T> y = nan_filled<T>(c.size()), z = nan_filled<T>(c.size());
        CHECK(c.forward(y, threads == 2 ? &z : nullptr, threads) == CASE_FAST_OK);
        if (threads == 1) {
            first = y;
            for (int64_t i = 0, at = 0; i < s.rows; ++i)
                for (int64_t g = 0; g < s.groups; ++g)
                    for (int64_t o = 0; o < c.total; ++o, ++at)
                        check_close<T>(y[size_t(at)], activated(c.z(i, g, o), s.activation), double(s.depth));
        }
        CHECK(same_bits(y, first));
        for (size_t i = 0; threads == 2 && i < z.size(); ++i) {
            CHECK(z[i] == z[i]);
            if (s.activation == CASE_FAST_IDENTITY) CHECK(z[i] == y[i]);
        }
    }
    if (s.rows < 2) return;
    // a row alone
    Shape alone = s;
    alone.rows = 1;
    Call<T> one(alone);
    one.memory = c.memory;
    one.bias = c.bias;
    for (size_t i = 0; i < one.weights.size(); ++i) one.weights[i].weight = one.memory[i].data();
    for (const int64_t row : {int64_t(0), s.rows / 2, s.rows - 1}) {
        std::copy_n(c.x.data() + row * c.call.x_row, c.call.x_row, one.x.data());
        std::vector<T> y = nan_filled<T>(one.size());
        CHECK(one.forward(y, nullptr, 1) == CASE_FAST_OK);
        CHECK(same_bits(y, std::vector<T>(first.begin() + row * one.size(), first.begin() + (row + 1) * one.size())));
    }
}

double slope(double kept, int activation) {
    switch (activation) {
        case CASE_FAST_RELU: return kept > 0 ? 1 : 0;
        case CASE_FAST_GELU: return 0.5 * (1 + std::erf(kept * std::sqrt(0.5))) + kept * std::exp(-0.5 * kept * kept) / std::sqrt(2 * M_PI);
        case CASE_FAST_TANH: return 1 - kept * kept;
        default: return 1;
    }
}

template <class T>
void test_gradients(const Shape &s) {
    Call<T> c(s);
    const std::vector<T> kept = noise<T>(c.size());
    std::vector<T> grad_y = noise<T>(c.size());
    const int64_t depth = s.depth, total = c.total, groups = s.groups;
    std::vector<double> grad_z(grad_y.size());
    for (size_t i = 0; i < grad_y.size(); ++i) grad_z[i] = double(grad_y[i]) * slope(kept[i], s.activation);
    const std::vector<double> factor = c.factors(grad_z);
    // a derivative that is off in its last place may round to the next number of 8 bits: a few of them in a sum
    const double slack = c.rounds() && s.activation ? 4.0 / 256 : 0;
    std::vector<T> first_x, first_bias;
    std::vector<std::vector<T>> first;
    for (const int threads : {1, 2, 3, 7}) {
        auto found = c.gradients();
        std::vector<T> grad_x = nan_filled<T>(s.rows * groups * depth), grad_bias = nan_filled<T>(groups * total);
        const auto run = [&](bool x, bool bias) {
            return case_fast_linear_backward_cpu(&c.call, c.with(grad_y), c.x.data(), s.activation ? kept.data() : nullptr,
                                                 x ? grad_x.data() : nullptr, bias ? grad_bias.data() : nullptr, threads);
        };
        CHECK(run(true, true) == CASE_FAST_OK);
        if (threads > 1) {
            CHECK(same_bits(grad_x, first_x) && same_bits(grad_bias, first_bias));
            for (size_t i = 0; i < found.size(); ++i) CHECK(same_bits(found[i], first[i]));
            continue;
        }
        first_x = grad_x, first_bias = grad_bias, first = found;
        for (int64_t g = 0; g < groups; ++g) {
            for (int64_t i = 0; i < s.rows; ++i)
                for (int64_t k = 0; k < depth; ++k) {
                    double sum = 0;
                    for (int64_t o = 0; o < total; ++o) sum += factor[size_t((i * groups + g) * total + o)] * c.at_weight(g, o, k);
                    check_close<T>(grad_x[size_t((i * groups + g) * depth + k)], sum, double(total), slack);
                }
            size_t place = 0;
            for (int64_t o = 0, at = 0; o < total; ++o, ++at) {
                while (at >= c.weights[place].outputs) at -= c.weights[place++].outputs;
                double sum = 0;
                for (int64_t i = 0; i < s.rows; ++i) sum += grad_z[size_t((i * groups + g) * total + o)];
                check_close<T>(grad_bias[size_t(g * total + o)], sum, double(s.rows));
                const case_fast_linear_weight &w = c.weights[place];
                for (int64_t k = 0; k < depth; ++k) {
                    double product = 0;
                    for (int64_t i = 0; i < s.rows; ++i) product += factor[size_t((i * groups + g) * total + o)] * c.at_x(i, g, k);
                    check_close<T>(found[place][size_t(g * w.grad_group + at * w.grad_row + k * w.grad_column)], product, double(s.rows),
                                   slack);
                }
            }
        }
        // each alone is what it is with the others
        for (const int wanted : {0, 1, 2}) {
            auto again = c.gradients();
            grad_x = nan_filled<T>(s.rows * groups * depth), grad_bias = nan_filled<T>(groups * total);
            for (size_t i = 0; i < again.size(); ++i)
                if (wanted != 2 || i + 1 < again.size()) c.weights[i].grad = nullptr;
            CHECK(run(wanted == 0, wanted == 1) == CASE_FAST_OK);
            CHECK(wanted != 0 || same_bits(grad_x, first_x));
            CHECK(wanted != 1 || same_bits(grad_bias, first_bias));
            CHECK(wanted != 2 || same_bits(again.back(), first.back()));
        }
    }
}

// Each weight's results, and their gradients, in an array of its own with room between the rows.
template <class T>
void test_results_apart(const Shape &s) {
    Call<T> c(s);
    std::vector<T> joined = nan_filled<T>(c.size()), grad_y = noise<T>(c.size()), kept = noise<T>(c.size());
    std::vector<std::vector<T>> apart, found[2];
    std::vector<T> grad_x[2], grad_bias[2];
    CHECK(c.forward(joined, nullptr, 2) == CASE_FAST_OK);
    for (const bool own : {false, true}) {
        c.with(grad_y);
        found[own] = c.gradients();
        grad_x[own] = nan_filled<T>(s.rows * s.groups * s.depth), grad_bias[own] = nan_filled<T>(s.groups * c.total);
        std::vector<std::vector<T>> grads;
        int64_t first = 0;
        for (case_fast_linear_weight &w : c.weights) {
            const int64_t row = s.groups * w.outputs + 3;
            std::vector<T> grad(size_t(s.rows * row));
            for (int64_t i = 0; i < s.rows; ++i)
                for (int64_t g = 0; g < s.groups; ++g)
                    for (int64_t o = 0; o < w.outputs; ++o)
                        grad[size_t(i * row + g * w.outputs + o)] = grad_y[size_t((i * s.groups + g) * c.total + first + o)];
            first += w.outputs;
            grads.push_back(grad);
            if (own) w.y = grads.back().data(), w.y_row = row, w.y_group = w.outputs;
        }
        CHECK(case_fast_linear_backward_cpu(&c.call, c.weights.data(), c.x.data(), s.activation ? kept.data() : nullptr, grad_x[own].data(),
                                            grad_bias[own].data(), 2) == CASE_FAST_OK);
        if (!own) continue;
        for (size_t i = 0; i < c.weights.size(); ++i) {
            apart.push_back(nan_filled<T>(s.rows * c.weights[i].y_row));
            c.weights[i].y = apart.back().data();
        }
        CHECK(case_fast_linear_forward_cpu(&c.call, c.weights.data(), c.x.data(), s.bias ? c.bias.data() : nullptr, nullptr, 3) == CASE_FAST_OK);
        first = 0;
        for (size_t p = 0; p < c.weights.size(); first += c.weights[p++].outputs)
            for (int64_t i = 0; i < s.rows; ++i)
                for (int64_t g = 0; g < s.groups; ++g)
                    for (int64_t o = 0; o < c.weights[p].outputs; ++o)
                        CHECK(apart[p][size_t(i * c.weights[p].y_row + g * c.weights[p].outputs + o)] ==
                              joined[size_t((i * s.groups + g) * c.total + first + o)]);
    }
    CHECK(same_bits(grad_x[0], grad_x[1]) && same_bits(grad_bias[0], grad_bias[1]));
    for (size_t i = 0; i < found[0].size(); ++i) CHECK(same_bits(found[0][i], found[1][i]));
}

// Where nothing is rounded, the call that allows it gives the same bits.
template <class T>
void test_that_only_float_rounds(const Shape &s) {
    Call<T> c(s);
    std::vector<T> found[2], grad_x[2], grad_y = noise<T>(c.size());
    const std::vector<T> kept = noise<T>(c.size());
    for (const int bf16 : {0, 1}) {
        c.call.bf16 = bf16;
        found[bf16] = nan_filled<T>(c.size());
        CHECK(c.forward(found[bf16], nullptr, 2) == CASE_FAST_OK);
        grad_x[bf16] = nan_filled<T>(s.rows * s.groups * s.depth);
        CHECK(case_fast_linear_backward_cpu(&c.call, c.with(grad_y), c.x.data(), kept.data(), grad_x[bf16].data(), nullptr, 2) == CASE_FAST_OK);
    }
    CHECK(same_bits(found[0], found[1]) && same_bits(grad_x[0], grad_x[1]));
}

// The Gaussian unit, near 0 and far from it, where it is 0 or its argument. Its argument is a product of 1 and x.
template <class T>
void test_gaussian_unit() {
    constexpr T infinity = std::numeric_limits<T>::infinity();
    std::vector<T> x = {T(-1e30), T(-1000), T(-40), T(-1e-30), T(0), T(1e-30), T(40), T(1000), T(1e30), infinity, -infinity, T(NAN)};
    const size_t far = x.size();
    for (int i = -6000; i <= 6000; ++i) x.push_back(T(i) / T(1000));
    std::vector<T> y = nan_filled<T>(int64_t(x.size())), z = y, slope_of = y, grad_y(x.size(), T(1)), weight = {T(1)};
    const case_fast_linear call = {int64_t(x.size()), 1, 1, 1, 1, 1, std::is_same_v<T, float> ? CASE_FAST_F32 : CASE_FAST_F64, CASE_FAST_GELU, 0};
    case_fast_linear_weight w = {1, 0, 1, 1, weight.data(), nullptr, 0, 1, 1, y.data(), 1, 0};
    CHECK(case_fast_linear_forward_cpu(&call, &w, x.data(), nullptr, z.data(), 1) == CASE_FAST_OK);
    w.y = grad_y.data();
    CHECK(case_fast_linear_backward_cpu(&call, &w, x.data(), z.data(), slope_of.data(), nullptr, 1) == CASE_FAST_OK);
    for (size_t i = 0; i + 3 < far; ++i) {
        if (std::fabs(x[i]) < T(1))
            CHECK(std::fabs(y[i] - x[i] / 2) <= T(1e-6) * std::fabs(x[i]) && std::fabs(slope_of[i] - T(0.5)) < T(1e-7));
        else
            CHECK(y[i] == std::max(x[i], T(0)) && std::fabs(slope_of[i] - T(x[i] > T(0))) < T(1e-20));
    }
    CHECK(y[far - 3] == infinity);
    for (const T value : {y[far - 2], y[far - 1], slope_of[far - 3], slope_of[far - 2], slope_of[far - 1]}) CHECK(value != value);
    constexpr double error = std::is_same_v<T, float> ? 1.5e-7 : 1e-15;
    for (size_t i = far; i < x.size(); ++i) {
        const double exact = 0.5 * double(x[i]) * std::erfc(-double(x[i]) * std::sqrt(0.5));
        CHECK(std::fabs(double(y[i]) - exact) <= error * std::max(1.0, std::fabs(exact)));
        if (x[i] <= T(0)) CHECK(std::fabs(double(y[i]) - exact) <= 0.01 * std::fabs(exact));  // none is lost against 1
        CHECK(std::fabs(double(slope_of[i]) - slope(double(x[i]), CASE_FAST_GELU)) <= 2 * error);
    }
}

void test_wrong_arguments() {
    Call<float> c({4, 2, 3, {5, 2}, ROWS, 0, CASE_FAST_TANH});
    std::vector<float> y(size_t(c.size()), -9.0f);
    CHECK(c.forward(y, nullptr, 1) == CASE_FAST_OK);
    auto gradients = c.gradients();
    const auto refused = [&](const case_fast_linear *call, const case_fast_linear_weight *weights, const void *x) {
        return case_fast_linear_forward_cpu(call, weights, x, nullptr, nullptr, 1) == CASE_FAST_BAD_ARGUMENT &&
               case_fast_linear_backward_cpu(call, weights, x, y.data(), nullptr, nullptr, 1) == CASE_FAST_BAD_ARGUMENT;
    };
    CHECK(refused(nullptr, c.weights.data(), c.x.data()) && refused(&c.call, nullptr, c.x.data()));
    CHECK(refused(&c.call, c.weights.data(), nullptr));
    for (int member = 0; member < 9; ++member) {
        case_fast_linear call = c.call;
        if (member < 5) (&call.rows)[member] = -1;
        if (member == 5) call.sources = 0;
        if (member == 6) call.dtype = CASE_FAST_BF16;
        if (member == 7) call.activation = 4;
        if (member == 8) call.activation = -1;
        CHECK(refused(&call, c.weights.data(), c.x.data()));
    }
    for (int member = 0; member < 8; ++member) {
        std::vector<case_fast_linear_weight> weights = c.weights;
        case_fast_linear_weight &w = weights[1];
        if (member < 4) (&w.outputs)[member] = -1;
        if (member == 4) w.weight = nullptr;
        if (member == 5) w.y = nullptr;
        if (member == 6) w.y_row = -1;
        if (member == 7) w.y_group = -1;
        CHECK(refused(&c.call, weights.data(), c.x.data()));
    }
    const auto backward = [&](const void *kept) {
        return case_fast_linear_backward_cpu(&c.call, c.weights.data(), c.x.data(), kept, nullptr, nullptr, 1);
    };
    CHECK(backward(y.data()) == CASE_FAST_OK && backward(nullptr) == CASE_FAST_BAD_ARGUMENT);
    c.weights[0].grad_column = c.weights[0].grad_row = 2;
    CHECK(backward(y.data()) == CASE_FAST_BAD_ARGUMENT);
}

void test_all() {
    std::vector<Shape> shapes = {
        {0, 1, 3, {4}}, {1, 1, 1, {1}}, {5, 1, 0, {3}}, {3, 0, 4, {2}}, {4, 1, 3, {0}}, {7, 1, 5, {0, 3, 0}}, {13, 1, 7, {1}},
        {1, 1, 300, {300}}, {16, 1, 300, {300}}, {33, 1, 17, {31, 2, 33}, ROWS, 3}, {131, 1, 67, {97}, COLUMNS}, {131, 1, 67, {97}, APART, 1},
        {97, 2, 67, {31, 12}, COLUMNS}, {12, 3, 33, {40}}, {250, 2, 150, {300}}, {40, 2, 300, {150}, COLUMNS},
        {16, 1, 300, {300, 31}}, {350, 1, 300, {300, 31}}, {30, 1, 20, {900, 300}},
        {50, 1, 385, {30}}, {20, 1, 770, {40}}, {50, 1, 900, {30}, ROWS, 0}, {20, 1, 1200, {40}}, {500, 1, 40, {700}}, {700, 1, 30, {41}},
    };
    const size_t count = shapes.size();
    for (size_t i = 0; i < count; ++i) {
        Shape s = shapes[i];
        s.activation = int(1 + i % 3);
        s.bias = i % 4 < 2;
        shapes.push_back(s);
    }
    for (Shape s : shapes) {
        test_against_a_naive_loop<float>(s);
        test_against_a_naive_loop<double>(s);
        test_gradients<float>(s);
        test_gradients<double>(s);
        test_results_apart<float>(s);
        s.bf16 = true;
        test_that_only_float_rounds<double>(s);
        if (!case_fast_simd_bf16()) {
            test_that_only_float_rounds<float>(s);
            continue;
        }
        test_against_a_naive_loop<float>(s);
        test_gradients<float>(s);
        test_results_apart<float>(s);
    }
    test_gaussian_unit<float>();
    test_gaussian_unit<double>();
    test_wrong_arguments();
}

}  // namespace

int main() {
    at_each_level([](const char *level) {
        std::printf("linear: %s\n", level);
        test_all();
    });
}
