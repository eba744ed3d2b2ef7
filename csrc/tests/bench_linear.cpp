// Times of products of rows with weights at the C level: bench_linear [threads] [repetitions] [rows, 0: all] [1: factors of
// bfloat16]. Least and median microseconds, and Gflop per second of the median.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "linear/linear.h"

namespace {

std::vector<float> noise(int64_t count) {
    static std::mt19937_64 random(1);
    std::vector<float> x(static_cast<size_t>(count));
    for (float &value : x) value = 0.1f * (float(int64_t(random() >> 40)) / float(1 << 23) - 1);
    return x;
}

struct Timing {
    std::vector<double> taken;
    template <class Call>
    void take(Call call) {
        const auto started = std::chrono::steady_clock::now();
        call();
        taken.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - started).count());
    }
    void show(const char *name, double flops) {
        std::sort(taken.begin(), taken.end());
        const double median = taken[taken.size() / 2];
        std::printf("  %s %8.1f %8.1f us %6.1f", name, taken[0], median, 1e-3 * flops / median);
    }
};

void bench(int64_t rows, int64_t depth, int64_t outputs, int threads, int repetitions, int bf16) {
    const auto x = noise(rows * depth), weight = noise(outputs * depth), bias = noise(outputs);
    auto grad_y = noise(rows * outputs), y = grad_y, grad_x = x, grad_weight = weight;
    const case_fast_linear call = {rows, 1, depth, depth, depth, 1, CASE_FAST_F32, CASE_FAST_IDENTITY, bf16};
    case_fast_linear_weight of = {outputs, 0, depth, 1, weight.data(), grad_weight.data(), 0, depth, 1, y.data(), outputs, 0};
    Timing forward, backward;
    int status = 0;
    for (int i = 0; i < repetitions; ++i)
        forward.take([&] { status |= case_fast_linear_forward_cpu(&call, &of, x.data(), bias.data(), nullptr, threads); });
    of.y = grad_y.data();
    for (int i = 0; i < repetitions; ++i)
        backward.take([&] { status |= case_fast_linear_backward_cpu(&call, &of, x.data(), nullptr, grad_x.data(), nullptr, threads); });
    const double flops = 2.0 * double(rows) * double(depth) * double(outputs);
    std::printf("%5lld %5lld -> %5lld", static_cast<long long>(rows), static_cast<long long>(depth), static_cast<long long>(outputs));
    forward.show("forward", flops);
    backward.show("backward", 2 * flops);
    std::printf(status ? "  status %d\n" : "\n", status);
}

}  // namespace

int main(int count, char **arguments) {
    const int threads = count > 1 ? std::atoi(arguments[1]) : 2, repetitions = count > 2 ? std::atoi(arguments[2]) : 50;
    const int chosen = count > 3 ? std::atoi(arguments[3]) : 0, bf16 = count > 4 ? std::atoi(arguments[4]) : 0;
    constexpr int64_t widths[][2] = {{300, 300}, {300, 600}, {300, 900}, {600, 300}, {900, 300}};
    for (const int64_t rows : {16, 32, 220, 250, 430, 570, 670, 750, 1000, 1400, 2400})
        for (const auto &width : widths)
            if (chosen == 0 || chosen == rows) bench(rows, width[0], width[1], threads, repetitions, bf16);
    if (chosen == 0 || chosen == 250) bench(250, 300, 8531, threads, repetitions, bf16);
}
