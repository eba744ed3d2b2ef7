// What the benchmarks of packed and cross-attention share.
#pragma once

#include <ctime>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

constexpr int heads = 2, dim = 150, row = heads * dim;
std::mt19937_64 random_bits(1);

std::vector<float> noise(int64_t count, float scale = 1) {
    std::vector<float> x(static_cast<size_t>(count));
    for (float &value : x) value = scale * (float(int64_t(random_bits() >> 40)) / float(1 << 23) - 1);
    return x;
}

// Offsets of sequences with `length` rows, or 1 .. 2 * length - 1 where ragged.
[[maybe_unused]] std::vector<int64_t> offsets(int64_t sequences, int64_t length, bool ragged) {
    std::vector<int64_t> cu = {0};
    for (int64_t s = 0; s < sequences; ++s)
        cu.push_back(cu.back() + (ragged && length > 1 ? 1 + int64_t(random_bits() % uint64_t(2 * length - 1)) : length));
    return cu;
}

double now(int threads) {
    timespec t;
    clock_gettime(threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) * 1e6 + double(t.tv_nsec) * 1e-3;
}

template <class Body>
double least(int threads, int repetitions, Body body) {
    double best = INFINITY;
    for (int i = 0; i < repetitions; ++i) {
        const double begin = now(threads);
        body();
        best = std::min(best, now(threads) - begin);
    }
    return best;
}

}  // namespace
