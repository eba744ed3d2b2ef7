// Times of graph attention, forward and backward, at the C level: bench_graph_attention [threads] [repetitions].
// Minimum and median over the repetitions, in milliseconds, and the memory traffic if each array passed once.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "graph_attention/graph_attention.h"

namespace {

using Clock = std::chrono::steady_clock;
constexpr int heads = 2, dim = 150, relations = 7;

struct Timing {
    std::vector<double> all;
    void add(Clock::time_point begin, Clock::time_point end) {
        all.push_back(std::chrono::duration<double, std::milli>(end - begin).count());
    }
    double least() { return *std::min_element(all.begin(), all.end()); }
    double median() {
        std::nth_element(all.begin(), all.begin() + long(all.size() / 2), all.end());
        return all[all.size() / 2];
    }
};

// `graphs` graphs of `size` vertices with `degree` edges a vertex; neighbours within `reach` vertices.
void bench(const char *name, int graphs, int64_t size, int degree, int64_t reach, int threads, int repetitions) {
    std::mt19937_64 random(1);
    const int64_t vertices = graphs * size, edges = vertices * degree;
    std::vector<int64_t> indptr = {0}, indices, relation;
    for (int64_t i = 0; i < vertices; ++i) {
        for (int j = 0; j < degree; ++j) {
            const int64_t from = i / size * size, low = std::max(from, i - reach), high = std::min(from + size, i + reach + 1);
            indices.push_back(low + int64_t(random() % uint64_t(high - low)));
            relation.push_back(int64_t(random() % relations));
        }
        indptr.push_back(int64_t(indices.size()));
    }
    const auto noise = [&](int64_t rows) {
        std::vector<float> x(size_t(rows * heads * dim));
        for (float &value : x) value = float(int64_t(random() >> 40)) / float(1 << 23) - 1;
        return x;
    };
    const auto query = noise(vertices), key = noise(vertices), value = noise(vertices), grad_out = noise(vertices);
    const auto relation_query = noise(relations), relation_key = noise(relations);
    auto out = query, grad_query = query, grad_key = query, grad_value = query;
    auto grad_relation_query = relation_query, grad_relation_key = relation_query;
    std::vector<float> weights(size_t(edges * heads));
    const case_fast_graph graph = {vertices, edges, relations, heads, dim, CASE_FAST_F32, 64,
                                   indptr.data(), indices.data(), relation.data(), 0.08, 0.0, 0, nullptr};
    Timing forward, backward, both;
    int status = 0;
    for (int i = 0; i < repetitions; ++i) {
        const auto begin = Clock::now();
        status |= case_fast_graph_attention_forward_cpu(&graph, query.data(), key.data(), value.data(), relation_query.data(),
                                                        relation_key.data(), out.data(), weights.data(), threads);
        const auto middle = Clock::now();
        status |= case_fast_graph_attention_backward_cpu(
            &graph, query.data(), key.data(), value.data(), relation_query.data(), relation_key.data(), weights.data(),
            grad_out.data(), grad_query.data(), grad_key.data(), grad_value.data(), grad_relation_query.data(),
            grad_relation_key.data(), threads);
        const auto end = Clock::now();
        forward.add(begin, middle);
        backward.add(middle, end);
        both.add(begin, end);
    }
    std::printf("%-34s %d threads  forward %8.3f  backward %8.3f  both %8.3f (median %8.3f)  %8.1f MB  status %d\n", name, threads,
                forward.least(), backward.least(), both.least(), both.median(),
                1e-6 * 4 * double(vertices * heads * dim) * 11, status);
}

}  // namespace

int main(int count, char **arguments) {
    const int threads = count > 1 ? std::atoi(arguments[1]) : 2, repetitions = count > 2 ? std::atoi(arguments[2]) : 300;
    bench("paper: 16 x 84, 4 a vertex", 16, 84, 4, 84, threads, repetitions);
    const int few = std::max(1, repetitions / 30);
    bench("1190 x 84, 4 a vertex", 1190, 84, 4, 84, threads, few);
    bench("1 x 100000, 4 within 50", 1, 100000, 4, 50, threads, few);
    bench("1 x 100000, 4 anywhere", 1, 100000, 4, 100000, threads, few);
}
