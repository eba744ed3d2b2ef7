// Times of the vocabulary loss at the C level: bench_linear_cross_entropy [threads] [repetitions] [rows] [words] [1:
// factors of bfloat16]. Least milliseconds, by the clock and of the caller's CPU time.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <random>
#include <vector>

#include "linear_cross_entropy/linear_cross_entropy.h"

namespace {

struct Timing {
    double wall = 1e9, cpu = 1e9;
    template <class Call>
    void take(Call call) {
        timespec begin, end;
        const auto started = std::chrono::steady_clock::now();
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &begin);
        call();
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
        wall = std::min(wall, std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - started).count());
        cpu = std::min(cpu, 1e3 * double(end.tv_sec - begin.tv_sec) + 1e-6 * double(end.tv_nsec - begin.tv_nsec));
    }
};

constexpr int dim = 300;

void bench(int64_t rows, int64_t vocabulary, int threads, int repetitions, int bf16 = 0) {
    std::mt19937_64 random(1);
    const auto noise = [&](int64_t count) {
        std::vector<float> x(static_cast<size_t>(count));
        for (float &value : x) value = 0.1f * (float(int64_t(random() >> 40)) / float(1 << 23) - 1);
        return x;
    };
    const auto hidden = noise(rows * dim), weight = noise(vocabulary * dim), bias = noise(vocabulary), grad_nll = noise(rows);
    std::vector<int64_t> target(static_cast<size_t>(rows)), word(static_cast<size_t>(rows * 5));
    for (int64_t &y : target) y = int64_t(random() % uint64_t(vocabulary));
    auto nll = grad_nll, grad_hidden = hidden, grad_weight = weight, grad_bias = bias;
    std::vector<float> state(size_t(2 * rows)), kept(size_t(rows * vocabulary)), value(size_t(rows * 5));
    const case_fast_linear_cross_entropy call = {rows, vocabulary, rows, dim, CASE_FAST_F32, 64, bf16, target.data(), nullptr};
    int status = 0;
    for (const bool keep : {true, false}) {
        Timing forward, backward;
        float *const scores = keep ? kept.data() : nullptr;
        for (int i = 0; i < repetitions; ++i) {
            forward.take([&] {
                status |= case_fast_linear_cross_entropy_forward_cpu(&call, hidden.data(), weight.data(), bias.data(), nll.data(),
                                                                word.data(), state.data(), scores, threads);
            });
            backward.take([&] {
                status |= case_fast_linear_cross_entropy_backward_cpu(&call, hidden.data(), weight.data(), bias.data(), state.data(),
                                                                 scores, grad_nll.data(), grad_hidden.data(), grad_weight.data(),
                                                                 grad_bias.data(), threads);
            });
        }
        const double flops = 2e-6 * double(rows) * double(vocabulary) * dim;
        std::printf("%5lld x %6lld %-10s forward %8.2f (cpu %8.2f, %5.1f Gflop/s)  backward %8.2f (cpu %8.2f, %5.1f Gflop/s)\n",
                    static_cast<long long>(rows), static_cast<long long>(vocabulary), keep ? "kept" : "recomputed", forward.wall,
                    forward.cpu, flops / forward.cpu, backward.wall, backward.cpu, (keep ? 2 : 3) * flops / backward.cpu);
    }
    if (rows <= 128)
        for (const int64_t k : {1, 5}) {
            Timing top;
            for (int i = 0; i < repetitions; ++i)
                top.take([&] {
                    status |= case_fast_top_words_cpu(rows, vocabulary, k, dim, CASE_FAST_F32, hidden.data(), weight.data(),
                                                           bias.data(), value.data(), word.data(), threads);
                });
            std::printf("%5lld x %6lld top %lld      %8.3f (cpu %8.3f)\n", static_cast<long long>(rows),
                        static_cast<long long>(vocabulary), static_cast<long long>(k), top.wall, top.cpu);
        }
    if (status) std::printf("status %d\n", status);
}

}  // namespace

int main(int count, char **arguments) {
    const int threads = count > 1 ? std::atoi(arguments[1]) : 2, repetitions = count > 2 ? std::atoi(arguments[2]) : 20;
    if (count > 3) {
        bench(std::atoi(arguments[3]), count > 4 ? std::atoi(arguments[4]) : 24000, threads, repetitions,
              count > 5 ? std::atoi(arguments[5]) : 0);
        return 0;
    }
    for (const int64_t rows : {1, 16, 80, 480, 2048}) bench(rows, 24000, threads, rows > 1000 ? repetitions / 4 + 1 : repetitions);
}
