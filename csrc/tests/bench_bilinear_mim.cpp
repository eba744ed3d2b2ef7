// Times of bilinear MIM, forward and backward, at the C level: bench_bilinear_mim [threads] [repetitions] [case]. Least wall time,
// and on one thread least CPU time, in milliseconds; and the rate if the products with scores alone were computed.
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "bilinear_mim/bilinear_mim.h"

namespace {

double seconds(clockid_t clock) {
    timespec now;
    clock_gettime(clock, &now);
    return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

void bench(const char *name, int64_t pairs, int64_t rows, int64_t dim, int64_t negatives, int score, int threads, int repetitions,
           int plan = CASE_FAST_MIM_AUTO) {
    std::mt19937_64 random(1);
    const auto noise = [&](int64_t count, double scale) {
        std::vector<float> x(static_cast<size_t>(count));
        for (float &value : x) value = float(scale * (double(int64_t(random() >> 11)) / double(1ull << 52) - 1));
        return x;
    };
    std::vector<int64_t> positive(static_cast<size_t>(pairs));
    for (int64_t p = 0; p < pairs; ++p) positive[size_t(p)] = p * rows / pairs;
    const auto x = noise(pairs * dim, 1), y = noise(rows * dim, 1), weight = noise(dim * dim, 3.0 / double(dim)), grad = noise(pairs, 1);
    auto grad_x = x, grad_y = y, grad_weight = weight, side_y = grad, side_x = grad, logit = grad;
    const case_fast_mim mim = {pairs, rows, int32_t(dim), CASE_FAST_F32, score, negatives, positive.data(), 1, nullptr, plan};
    std::vector<float> saved(size_t(case_fast_bilinear_mim_saved(&mim)));
    double least[4] = {1e9, 1e9, 1e9, 1e9};
    int status = 0;
    for (int i = 0; i < repetitions; ++i) {
        double at[3][2];
        const auto mark = [&](int k) { at[k][0] = seconds(CLOCK_MONOTONIC), at[k][1] = seconds(CLOCK_THREAD_CPUTIME_ID); };
        mark(0);
        status |= case_fast_bilinear_mim_forward_cpu(&mim, x.data(), y.data(), weight.data(), side_y.data(), side_x.data(), logit.data(),
                                                     saved.data(), threads);
        mark(1);
        status |= case_fast_bilinear_mim_backward_cpu(&mim, x.data(), y.data(), weight.data(), saved.data(), grad.data(), grad.data(),
                                                      grad_x.data(), grad_y.data(), grad_weight.data(), threads);
        mark(2);
        for (int k = 0; k < 2; ++k)
            for (int clock = 0; clock < 2; ++clock)
                least[2 * k + clock] = std::min(least[2 * k + clock], 1e3 * (at[k + 1][clock] - at[k][clock]));
    }
    std::printf("%-28s %d threads: wall %9.4f + %9.4f = %9.4f ms, caller's CPU %9.4f + %9.4f = %9.4f ms (%.0f Gflop/s), status %d\n", name,
                threads, least[0], least[2], least[0] + least[2], least[1], least[3], least[1] + least[3],
                8e-6 * double(pairs) * double(rows) * double(dim) / (least[1] + least[3]), status);
}

}  // namespace

int main(int count, char **arguments) {
    const int threads = count > 1 ? std::atoi(arguments[1]) : 1, repetitions = count > 2 ? std::atoi(arguments[2]) : 100;
    const int chosen = count > 3 ? std::atoi(arguments[3]) : -1, few = std::max(1, repetitions / 30);
    const auto runs = [&](int number) { return chosen < 0 || chosen == number; };
    if (runs(0)) bench("16 x 16", 16, 16, 300, -1, 0, threads, 20 * repetitions);
    if (runs(1)) bench("1280 x 64, many-to-one", 1280, 64, 300, -1, 0, threads, repetitions);
    if (runs(2)) bench("1280 x 1280, 64 drawn", 1280, 1280, 300, 64, 0, threads, repetitions);
    if (runs(3)) bench("1280 x 1280", 1280, 1280, 300, -1, 0, threads, repetitions);
    if (runs(4)) bench("8192 x 8192", 8192, 8192, 300, -1, 0, threads, few);
    if (runs(5)) bench("1280 x 1280, dot", 1280, 1280, 300, -1, 1, threads, repetitions);
    if (runs(6)) bench("1280 x 64, 64 drawn", 1280, 64, 300, 64, 0, threads, repetitions);
    if (chosen == 7)  // where products of whole matrices begin to win: dense_scores_a_draw of cpu_plan.h
        for (const int64_t pairs : {256, 1280, 2048})
            for (const int64_t share : {12, 8, 6, 4, 2}) {
                char name[64];
                std::snprintf(name, sizeof name, "%lld pairs, %lld drawn, ", static_cast<long long>(pairs), static_cast<long long>(pairs / share));
                for (const int plan : {CASE_FAST_MIM_GATHERED, CASE_FAST_MIM_DENSE})
                    bench((std::string(name) + (plan == CASE_FAST_MIM_DENSE ? "dense" : "gathered")).c_str(), pairs, pairs, 300,
                          pairs / share, 0, threads, pairs > 2000 ? few : repetitions, plan);
            }
}
