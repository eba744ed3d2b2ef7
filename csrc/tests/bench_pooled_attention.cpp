// Times of pooled attention at the C level: bench_pooled_attention [threads] [repetitions].
// Least over the repetitions, in microseconds: of the thread's CPU time with one thread, else wall time; and Gflop/s.
#include "attention_bench.h"
#include "pooled_attention/pooled_attention.h"

namespace {

constexpr int width = row;  // rows are of all heads' width

void bench_pooled(const char *name, int64_t sequences, int64_t length, double dropout_p, int threads, int repetitions) {
    const auto cu = offsets(sequences, length, true);
    const int64_t rows = cu.back(), queries = sequences * heads;
    const auto query = noise(queries * width), shared = noise(rows * width), grad_out = noise(queries * width);
    auto out = query, grad_query = query, grad_rows = shared;
    std::vector<float> lse(static_cast<size_t>(queries));
    const case_fast_pooled_attention call = {sequences, rows, heads, width, CASE_FAST_F32, 64, cu.data(), row * heads, width, width,
                                             1 / std::sqrt(double(dim)), dropout_p, 1, nullptr};
    int status = 0;
    const double forward = least(threads, repetitions, [&] {
        status |= case_fast_pooled_attention_forward_cpu(&call, query.data(), shared.data(), out.data(), lse.data(), threads);
    });
    const double backward = least(threads, repetitions, [&] {
        status |= case_fast_pooled_attention_backward_cpu(&call, query.data(), shared.data(), out.data(), lse.data(), grad_out.data(),
                                                          width * heads, width, grad_query.data(), grad_rows.data(), threads);
    });
    const double products = double(rows) * heads * width;
    std::printf("%-44s %6ld rows %d threads  forward %9.1f us %6.1f Gflop/s  backward %9.1f us %6.1f Gflop/s  status %d\n", name, long(rows),
                threads, forward, 4e-3 * products / forward, backward, 10e-3 * products / backward, status);
}

}  // namespace

int main(int count, char **arguments) {
    const int threads = count > 1 ? std::atoi(arguments[1]) : 2, repetitions = count > 2 ? std::atoi(arguments[2]) : 1000;
    for (double dropout_p : {0.0, 0.1}) {
        std::printf("dropout %.1f\n", dropout_p);
        bench_pooled("knowledge texts", 430, 6, dropout_p, threads, repetitions);
        bench_pooled("reactions in context", 32, 43, dropout_p, threads, repetitions);
        bench_pooled("replies", 16, 16, dropout_p, threads, repetitions);
        bench_pooled("one sequence", 1, 2000, dropout_p, threads, repetitions);
    }
}
