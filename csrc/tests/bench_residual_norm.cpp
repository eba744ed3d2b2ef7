// Times of a residual and its norm at the C level: bench_residual_norm [threads] [repetitions].
// Least over the repetitions, in microseconds: of the thread's CPU time with one thread, else wall time; and GB/s of what must move.
#include "attention_bench.h"
#include "residual_norm/residual_norm.h"

int main(int argument_count, char **arguments) {
    const int threads = argument_count > 1 ? std::atoi(arguments[1]) : 1, repetitions = argument_count > 2 ? std::atoi(arguments[2]) : 300;
    constexpr int64_t width = 300;
    for (const int64_t rows : {16, 233, 750, 2400})
        for (const double dropout_p : {0.0, 0.2}) {
            const case_fast_residual_norm call = {rows, width, CASE_FAST_F32, 1e-5, dropout_p, 3, nullptr};
            const int64_t count = rows * width;
            const auto x = noise(count), update = noise(count), weight = noise(width), bias = noise(width);
            auto total = x, normed = x, stats = noise(2 * rows), grad_x = x, grad_update = x, grad_weight = weight, grad_bias = bias;
            int status = 0;
            const double forward = least(threads, repetitions, [&] {
                status |= case_fast_residual_norm_forward_cpu(&call, x.data(), update.data(), weight.data(), bias.data(), total.data(),
                                                              normed.data(), stats.data(), threads);
            });
            const double backward = least(threads, repetitions, [&] {
                status |= case_fast_residual_norm_backward_cpu(&call, total.data(), stats.data(), weight.data(), x.data(), update.data(),
                                                               grad_x.data(), dropout_p > 0 ? grad_update.data() : nullptr,
                                                               grad_weight.data(), grad_bias.data(), threads);
            });
            std::printf("%5lld rows of %lld, dropout %.1f, %d threads  forward %7.1f us %5.1f GB/s  backward %7.1f us %5.1f GB/s  status %d\n",
                        static_cast<long long>(rows), static_cast<long long>(width), dropout_p, threads, forward,
                        16e-3 * double(count) / forward, backward, (dropout_p > 0 ? 20e-3 : 16e-3) * double(count) / backward, status);
        }
}
