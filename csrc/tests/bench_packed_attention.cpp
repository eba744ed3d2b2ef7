// Times of packed attention at the C level: bench_packed_attention [threads] [repetitions] [cases].
// cases: those whose name holds this.
// Least over the repetitions, in microseconds: of the thread's CPU time with one thread, else wall time; and Gflop/s.
#include <cstring>

#include "attention_bench.h"
#include "packed_attention/packed_attention.h"

namespace {

const char *chosen = "";

void bench_packed(const char *name, int64_t batch, int64_t queries, int64_t keys, bool ragged, bool causal, double dropout_p,
                  int threads, int repetitions) {
    if (!std::strstr(name, chosen)) return;
    const auto cu_query = offsets(batch, queries, ragged), cu_key = causal || queries == keys ? cu_query : offsets(batch, keys, ragged);
    const int64_t rows = cu_query.back(), key_rows = cu_key.back();
    double products = 0;
    for (size_t s = 0; s < size_t(batch); ++s)
        products += double(cu_query[s + 1] - cu_query[s]) * double(cu_key[s + 1] - cu_key[s]) * row / (causal ? 2 : 1);
    const auto query = noise(rows * row), key = noise(key_rows * row), value = noise(key_rows * row), grad_out = noise(rows * row);
    auto out = query, grad_query = query, grad_key = key, grad_value = key;
    std::vector<float> lse(static_cast<size_t>(rows * heads));
    const case_fast_packed_attention call = {batch, rows, batch, key_rows, heads, dim, CASE_FAST_F32, 64, causal, cu_query.data(), cu_key.data(),
                                      nullptr, nullptr, row, row, row, 1 / std::sqrt(double(dim)), dropout_p, 1, nullptr};
    int status = 0;
    const double forward = least(threads, repetitions, [&] {
        status |= case_fast_packed_attention_forward_cpu(&call, query.data(), key.data(), value.data(), out.data(), lse.data(), threads);
    });
    const double backward = least(threads, repetitions, [&] {
        status |= case_fast_packed_attention_backward_cpu(&call, query.data(), key.data(), value.data(), out.data(), lse.data(),
                                                          grad_out.data(), grad_query.data(), row, grad_key.data(), row, grad_value.data(),
                                                          row, threads);
    });
    std::printf("%-44s %d threads  forward %9.1f us %6.1f Gflop/s  backward %9.1f us %6.1f Gflop/s  status %d\n", name, threads, forward,
                4e-3 * products / forward, backward, 10e-3 * products / backward, status);
}

}  // namespace

int main(int count, char **arguments) {
    const int threads = count > 1 ? std::atoi(arguments[1]) : 2, repetitions = count > 2 ? std::atoi(arguments[2]) : 100;
    if (count > 3) chosen = arguments[3];
    bench_packed("decode: 16 x 1, 100 keys", 16, 1, 100, false, false, 0, threads, 10 * repetitions);
    bench_packed("a step's contexts: 16 x 1 .. 71", 16, 36, 36, true, false, 0, threads, repetitions);
    bench_packed("a step's texts: 430 x 1 .. 11", 430, 6, 6, true, false, 0, threads, repetitions);
    bench_packed("a step's reactions: 32 x 1 .. 13", 32, 7, 7, true, false, 0, threads, repetitions);
    bench_packed("a step's replies: causal, 16 x 1 .. 29", 16, 15, 15, true, true, 0, threads, repetitions);
    bench_packed("the same, dropout 0.1", 16, 15, 15, true, true, 0.1, threads, repetitions);
    bench_packed("train: 16 x 30, 100 keys", 16, 30, 100, false, false, 0, threads, repetitions);
    bench_packed("train: 16 x 1 .. 59, 1 .. 199 keys", 16, 30, 100, true, false, 0, threads, repetitions);
    bench_packed("self: 16 x 50", 16, 50, 50, false, false, 0, threads, repetitions);
    bench_packed("self: 16 x 250", 16, 250, 250, false, false, 0, threads, std::max(1, repetitions / 4));
    bench_packed("self, dropout 0.1: 16 x 250", 16, 250, 250, false, false, 0.1, threads, std::max(1, repetitions / 4));
    bench_packed("causal: 16 x 30", 16, 30, 30, false, true, 0, threads, repetitions);
    bench_packed("causal: 8 x 512", 8, 512, 512, false, true, 0, threads, std::max(1, repetitions / 10));
    bench_packed("one sequence: 4096 rows, 512 keys", 1, 4096, 512, false, false, 0, threads, std::max(1, repetitions / 20));
}
