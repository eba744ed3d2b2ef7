// Times of the cross-attention block at the C level: bench_cross_attention [threads] [repetitions].
// Least over the repetitions, in microseconds: of the thread's CPU time with one thread, else wall time; and Gflop/s.
#include "attention_bench.h"
#include "cross_attention/cross_attention.h"

namespace {

// Three sources with about `keys` keys a sequence.
void bench_block(const char *name, int64_t batch, int64_t queries, int64_t keys, int64_t beams, bool ragged, double dropout_p,
                 bool training, int threads, int repetitions) {
    constexpr int width = 300, count = 3;
    const auto cu = offsets(batch * beams, queries, ragged && queries > 1);
    const int64_t rows = cu.back();
    std::vector<int64_t> key_of;
    for (int64_t s = 0; s < batch * beams; ++s) key_of.push_back(s / beams);
    std::vector<int64_t> cu_key[count];
    std::vector<float> arrays[count][6], gradients[count][6];
    std::vector<case_fast_source> sources;
    std::vector<case_fast_source_gradients> into;
    double products = 0;
    for (int i = 0; i < count; ++i) {
        cu_key[i] = offsets(batch, keys, ragged);
        const int64_t key_rows = cu_key[i].back();
        products += double(rows) * row * width * 2;
        for (int64_t s = 0; s < batch * beams; ++s)
            products += 2.0 * row * double(cu[size_t(s) + 1] - cu[size_t(s)]) * double(cu_key[i][size_t(s / beams) + 1] - cu_key[i][size_t(s / beams)]);
        const int64_t sizes[] = {key_rows * row, key_rows * row, width, width, row * width, width * row};
        for (int j = 0; j < 6; ++j) {
            arrays[i][j] = noise(sizes[j], j < 4 ? 1.0f : 0.1f);
            gradients[i][j].resize(size_t(sizes[j]));
        }
        const auto &a = arrays[i];
        sources.push_back({batch, key_rows, row, row, cu_key[i].data(), key_of.data(), nullptr, a[0].data(), a[1].data(), a[2].data(),
                           a[3].data(), a[4].data(), a[5].data(), uint64_t(i), uint64_t(i) + 10});
        auto &g = gradients[i];
        into.push_back({g[0].data(), g[1].data(), g[2].data(), g[3].data(), g[4].data(), g[5].data()});
    }
    const case_fast_cross_attention call = {batch * beams, rows, count, width, heads, dim, CASE_FAST_F32, 64, cu.data(), 1e-5, dropout_p, dropout_p,
                                            nullptr};
    const auto hidden = noise(rows * width), grad_out = noise(rows * width);
    auto out = hidden, grad_hidden = hidden;
    std::vector<float> saved(training ? size_t(case_fast_cross_attention_saved(&call, sources.data())) : 0);
    int status = 0;
    const double forward = least(threads, repetitions, [&] {
        status |= case_fast_cross_attention_forward_cpu(&call, sources.data(), hidden.data(), out.data(), training ? saved.data() : nullptr, threads);
    });
    std::printf("%-44s %d threads  forward %9.1f us %6.1f Gflop/s", name, threads, forward, 2e-3 * products / forward);
    if (training) {
        const double backward = least(threads, repetitions, [&] {
            status |= case_fast_cross_attention_backward_cpu(&call, sources.data(), saved.data(), grad_out.data(), grad_hidden.data(),
                                                             into.data(), threads);
        });
        std::printf("  backward %9.1f us %6.1f Gflop/s", backward, 4e-3 * products / backward);  // but for the recomputed scores
    }
    std::printf("  status %d\n", status);
}

}  // namespace

int main(int count, char **arguments) {
    const int threads = count > 1 ? std::atoi(arguments[1]) : 2, repetitions = count > 2 ? std::atoi(arguments[2]) : 100;
    bench_block("decode: 16 rows, 3 x 100 keys", 16, 1, 100, 1, false, 0, false, threads, 10 * repetitions);
    bench_block("decode: 16 rows, 3 x 1 .. 199 keys", 16, 1, 100, 1, true, 0, false, threads, 10 * repetitions);
    bench_block("decode: 1 row, 3 x 100 keys", 1, 1, 100, 1, false, 0, false, threads, 10 * repetitions);
    bench_block("decode: 128 rows, 3 x 100 keys", 128, 1, 100, 1, false, 0, false, threads, repetitions);
    bench_block("decode: 16 x 5 beams, 3 x 100 keys", 16, 1, 100, 5, false, 0, false, threads, repetitions);
    bench_block("train: 16 x 15 rows, 3 x 45 keys", 16, 15, 45, 1, false, 0, true, threads, repetitions);
    bench_block("train, dropout 0.1: 16 x 15 rows, 3 x 45 keys", 16, 15, 45, 1, false, 0.1, true, threads, repetitions);
    bench_block("train: 16 x 30 rows, 3 x 100 keys", 16, 30, 100, 1, false, 0, true, threads, repetitions);
    bench_block("train: 16 x 1 .. 59 rows, 3 x 1 .. 199 keys", 16, 30, 100, 1, true, 0, true, threads, repetitions);
    bench_block("train, dropout 0.1", 16, 30, 100, 1, true, 0.1, true, threads, repetitions);
}
