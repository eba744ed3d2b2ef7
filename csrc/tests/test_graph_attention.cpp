// Graph attention on the CPU against a naive double loop: every vector width this machine has, 1 to 3 threads, ragged graphs,
// damaged inputs, outputs full of NaN. What ASan, UBSan and TSan run on.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "check.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "graph_attention/graph_attention.h"
#include "levels.h"

namespace {

std::mt19937_64 random_bits(7);
int64_t below(int64_t n) { return int64_t(random_bits() % uint64_t(n)); }

struct Graph {
    int64_t vertices = 0, relations = 0;
    std::vector<int64_t> indptr = {0}, indices, relation;
    int64_t edges() const { return int64_t(indices.size()); }
};

// `graphs` graphs side by side; 0 to 2 * degree neighbours a vertex, parallel edges and loops included, and now and then a
// vertex with very many.
Graph random_graph(int graphs, int64_t size, int64_t degree, int64_t relations) {
    Graph g;
    g.vertices = graphs * size;
    g.relations = relations;
    for (int64_t i = 0; i < g.vertices; ++i) {
        const int64_t first = i / size * size, many = below(50) == 0 ? 40 : 1;
        for (int64_t j = below(2 * degree + 1) * many; j > 0; --j) {
            g.indices.push_back(first + below(size));
            g.relation.push_back(relations ? below(relations) : 0);
        }
        g.indptr.push_back(g.edges());
    }
    return g;
}

template <class T>
std::vector<T> noise(int64_t count) {
    std::vector<T> x(static_cast<size_t>(count));
    for (T &value : x) value = T(double(random_bits() >> 11) / double(1ull << 52) - 1);
    return x;
}

struct Setting {
    int heads, dim;
    double scale, dropout_p;
    uint64_t seed;
};

template <class T>
struct Inputs {
    std::vector<T> query, key, value, relation_query, relation_key, grad_out;
    Inputs(const Graph &g, const Setting &s) {
        const int64_t row = int64_t(s.heads) * s.dim;
        query = noise<T>(g.vertices * row), key = noise<T>(g.vertices * row), value = noise<T>(g.vertices * row);
        relation_query = noise<T>(g.relations * row), relation_key = noise<T>(g.relations * row);
        grad_out = noise<T>(g.vertices * row);
    }
};

template <class T>
struct Outputs {
    std::vector<T> out, weights, grad_query, grad_key, grad_value, grad_relation_query, grad_relation_key;
    std::vector<std::vector<T> *> all() {
        return {&out, &weights, &grad_query, &grad_key, &grad_value, &grad_relation_query, &grad_relation_key};
    }
    Outputs(const Graph &g, const Setting &s, T fill) {
        const int64_t row = int64_t(s.heads) * s.dim;
        const int64_t counts[] = {g.vertices * row, g.edges() * s.heads, g.vertices * row,  g.vertices * row,
                                  g.vertices * row, g.relations * row,   g.relations * row};
        for (int i = 0; i < 7; ++i) all()[size_t(i)]->assign(size_t(counts[i]), fill);
    }
    bool same_bits(Outputs other) {
        for (size_t i = 0; i < 7; ++i) {
            const auto &a = *all()[i], &b = *other.all()[i];
            if (a.size() != b.size() || (!a.empty() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)))) return false;
        }
        return true;
    }
};

// The definition, in double.
template <class T>
Outputs<double> naive(const Graph &g, const Setting &s, const Inputs<T> &in) {
    Outputs<double> o(g, s, 0.0);
    const int64_t d = s.dim;
    const bool biased = g.relations > 0;
    for (int64_t i = 0; i < g.vertices; ++i)
        for (int h = 0; h < s.heads; ++h) {
            const int64_t first = g.indptr[size_t(i)], last = g.indptr[size_t(i) + 1], own = (i * s.heads + h) * d;
            const auto other = [&](int64_t e) { return (g.indices[size_t(e)] * s.heads + h) * d; };
            const auto bias = [&](int64_t e) { return (g.relation[size_t(e)] * s.heads + h) * d; };
            const auto weight = [&](int64_t e) -> double & { return o.weights[size_t(e * s.heads + h)]; };
            const auto x = [&](int64_t e, int64_t c) {
                return in.query[size_t(own + c)] + (biased ? double(in.relation_query[size_t(bias(e) + c)]) : 0.0);
            };
            const auto y = [&](int64_t e, int64_t c) {
                return in.key[size_t(other(e) + c)] + (biased ? double(in.relation_key[size_t(bias(e) + c)]) : 0.0);
            };
            const auto mask = [&](int64_t e) {
                return case_fast_keep(s.seed, e, h, case_fast_drop_below(s.dropout_p)) ? 1 / (1 - s.dropout_p) : 0.0;
            };
            double top = -INFINITY, sum = 0, mean = 0;
            for (int64_t e = first; e < last; ++e) {
                double score = 0;
                for (int64_t c = 0; c < d; ++c) score += x(e, c) * y(e, c);
                weight(e) = s.scale * score;
                top = std::max(top, weight(e));
            }
            for (int64_t e = first; e < last; ++e) sum += weight(e) = std::exp(weight(e) - top);
            std::vector<double> grad(size_t(last - first));
            for (int64_t e = first; e < last; ++e) {
                weight(e) /= sum;
                for (int64_t c = 0; c < d; ++c) {
                    o.out[size_t(own + c)] += mask(e) * weight(e) * in.value[size_t(other(e) + c)];
                    o.grad_value[size_t(other(e) + c)] += mask(e) * weight(e) * in.grad_out[size_t(own + c)];
                    grad[size_t(e - first)] += mask(e) * double(in.grad_out[size_t(own + c)]) * in.value[size_t(other(e) + c)];
                }
                mean += weight(e) * grad[size_t(e - first)];
            }
            for (int64_t e = first; e < last; ++e) {
                const double by_score = s.scale * weight(e) * (grad[size_t(e - first)] - mean);
                for (int64_t c = 0; c < d; ++c) {
                    const double by_x = by_score * y(e, c), by_y = by_score * x(e, c);
                    o.grad_query[size_t(own + c)] += by_x;
                    o.grad_key[size_t(other(e) + c)] += by_y;
                    if (biased) o.grad_relation_query[size_t(bias(e) + c)] += by_x;
                    if (biased) o.grad_relation_key[size_t(bias(e) + c)] += by_y;
                }
            }
        }
    return o;
}

template <class T>
struct Call {
    const Inputs<T> &in;
    std::vector<int32_t> narrow[3];
    case_fast_graph graph;
    Call(const Graph &g, const Setting &s, const Inputs<T> &inputs, int index_bits) : in(inputs) {
        const std::vector<int64_t> *wide[] = {&g.indptr, &g.indices, &g.relation};
        const void *lists[3];
        for (int i = 0; i < 3; ++i) {
            narrow[i].assign(wide[i]->begin(), wide[i]->end());
            lists[i] = index_bits == 64 ? static_cast<const void *>(wide[i]->data()) : narrow[i].data();
        }
        const SeedParts seed = parts_of(s.seed);
        graph = {g.vertices, g.edges(), g.relations, s.heads, s.dim, std::is_same_v<T, float> ? CASE_FAST_F32 : CASE_FAST_F64,
                 index_bits, lists[0], lists[1], g.relations ? lists[2] : nullptr, s.scale, s.dropout_p, seed.number,
                 seed.at};
    }
    int forward(Outputs<T> &o, int threads) const {
        return case_fast_graph_attention_forward_cpu(&graph, in.query.data(), in.key.data(), in.value.data(),
                                                     in.relation_query.data(), in.relation_key.data(), o.out.data(),
                                                     o.weights.data(), threads);
    }
    int backward(Outputs<T> &o, int threads) const {
        return case_fast_graph_attention_backward_cpu(
            &graph, in.query.data(), in.key.data(), in.value.data(), in.relation_query.data(), in.relation_key.data(),
            o.weights.data(), in.grad_out.data(), o.grad_query.data(), o.grad_key.data(), o.grad_value.data(),
            o.grad_relation_query.data(), o.grad_relation_key.data(), threads);
    }
    void run(Outputs<T> &o, int threads) const {
        CHECK(forward(o, threads) == CASE_FAST_OK);
        CHECK(backward(o, threads) == CASE_FAST_OK);
    }
};

template <class T>
constexpr T nan_of = std::numeric_limits<T>::quiet_NaN();

template <class T>
void compare(const Graph &g, const Setting &s, const char *what) {
    const Inputs<T> in(g, s);
    Outputs<double> expected = naive(g, s, in);
    const Call<T> call(g, s, in, below(2) ? 64 : 32);
    Outputs<T> first(g, s, nan_of<T>);
    call.run(first, 1);
    for (size_t i = 0; i < 7; ++i) {
        const auto &got = *first.all()[i];
        const auto &want = *expected.all()[i];
        double largest = 1;
        for (double x : want) largest = std::max(largest, std::fabs(x));
        for (size_t j = 0; j < want.size(); ++j) {
            const double error = std::fabs(got[j] - want[j]) / largest;
            const bool close = error < (sizeof(T) == 4 ? 2e-5 : 1e-13);
            if (!close) std::fprintf(stderr, "%s: output %zu[%zu]: %g, not %g\n", what, i, j, double(got[j]), want[j]);
            CHECK(close);
        }
    }
    for (int threads : {1, 2, 3}) {
        Outputs<T> again(g, s, T(threads));
        call.run(again, threads);
        CHECK(again.same_bits(first));
    }
}

void test_against_naive(const char *level) {
    int cases = 0;
    const auto both = [&](const Graph &g, const Setting &s) {
        compare<float>(g, s, level);
        compare<double>(g, s, level);
        cases += 2;
    };
    const auto any_dropout = [] { return below(2) ? 0.0 : 0.3; };
    for (int dim : {1, 7, 16, 150, 256, 300})
        for (int64_t relations : {0, 1, 2, 7, 10}) {
            const Setting s = {1 + int(below(3)), dim, 1 / std::sqrt(double(dim)), any_dropout(), random_bits()};
            both(random_graph(1 + int(below(4)), 1 + below(30), 1 + below(5), relations), s);
        }
    for (int dim = 1; dim <= 40; ++dim)
        both(random_graph(2, 1 + below(9), 3, 3), {1, dim, 0.5, any_dropout(), random_bits()});
    for (int64_t size : {0, 1, 2}) both(random_graph(1, size, 2, 2), {2, 5, 0.3, 0.0, 1});
    both(random_graph(1, 5, 0, 3), {2, 9, 0.3, 0.0, 1});                    // no edges
    both(random_graph(90, 20, 3, 7), {2, 10, 0.3, 0.1, random_bits()});     // many small graphs
    both(random_graph(1, 1500, 4, 7), {2, 10, 0.3, 0.1, random_bits()});    // one large
    both(random_graph(1, 1500, 4, 0), {1, 10, 0.3, 0.0, 1});                // one large, plain
    both(random_graph(2, 12, 3, 400), {1, 6, 0.3, 0.0, 1});                 // more relations than edges
    std::printf("%s: %d cases\n", level, cases);
}

void test_dropout_limits() {
    const Graph g = random_graph(3, 10, 3, 2);
    const Setting all = {2, 17, 0.3, 1.0, 5};
    const Inputs<float> in(g, all);
    Outputs<float> o(g, all, nan_of<float>);
    Call<float>(g, all, in, 32).run(o, 2);
    for (auto *list : {&o.out, &o.grad_query, &o.grad_key, &o.grad_value, &o.grad_relation_query, &o.grad_relation_key})
        for (float x : *list) CHECK(x == 0);
    for (float w : o.weights) CHECK(w >= 0 && w <= 1);  // from before the dropout
}

// Two edges with scores 0 and x: their weights are as 1 to e^x.
void test_exponential() {
    double worst = 0;
    for (double x = 0; x > -110; x -= 0.00390625 + 1e-4 * double(below(10))) {
        Graph g;
        g.vertices = 2;
        g.indptr = {0, 2, 2};
        g.indices = {0, 1};
        const Setting s = {1, 1, 1.0, 0.0, 0};
        Inputs<float> in(g, s);
        in.query = {1, 1};
        in.key = {0, float(x)};
        Outputs<float> o(g, s, 0);
        CHECK(Call<float>(g, s, in, 64).forward(o, 1) == CASE_FAST_OK);
        const double got = double(o.weights[1]) / double(o.weights[0]), want = std::exp(double(float(x)));
        const double unit = std::max(want * 1.1920929e-7, 1.4012985e-45);
        worst = std::max(worst, std::fabs(got - want) / unit);
    }
    std::printf("e^x: at most %.2f units\n", worst);
    CHECK(worst < 4);  // three roundings of softmax included
}

void test_nan_stays_in_its_graph() {
    const int64_t size = 9;
    const Graph g = random_graph(40, size, 3, 4);
    const Setting s = {2, 19, 0.3, 0.1, 3};
    for (int round = 0; round < 30; ++round) {
        Inputs<float> in(g, s);
        Outputs<float> clean(g, s, 0), damaged(g, s, 0);
        Call<float>(g, s, in, 64).run(clean, 2);
        const int64_t row = s.heads * s.dim, hit = below(g.vertices), from = hit / size * size * row, to = from + size * row;
        std::vector<float> *lists[] = {&in.query, &in.key, &in.value, &in.grad_out};
        for (float bad : {nan_of<float>, INFINITY, -INFINITY})
            if (below(2)) (*lists[below(4)])[size_t(hit * row + below(row))] = bad;
        Call<float>(g, s, in, 64).run(damaged, 2);
        for (size_t i : {0u, 2u, 3u, 4u})
            for (int64_t j = 0; j < g.vertices * row; ++j)
                if (j < from || j >= to) CHECK((*clean.all()[i])[size_t(j)] == (*damaged.all()[i])[size_t(j)]);
    }
}

void test_bad_inputs() {
    const Setting s = {2, 11, 0.3, 0.0, 0};
    for (int round = 0; round < 1000; ++round) {
        Graph g = random_graph(2, 5 + below(5), 3, 3);
        if (g.edges() == 0) continue;
        const Inputs<float> in(g, s);
        const int64_t wrong[] = {-1, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()};
        const int64_t bad = wrong[below(3)];
        int expected = 0;
        switch (below(5)) {
            case 0: g.indices[size_t(below(g.edges()))] = below(2) ? bad : g.vertices; expected = CASE_FAST_BAD_INDICES; break;
            case 1: g.relation[size_t(below(g.edges()))] = below(2) ? bad : g.relations; expected = CASE_FAST_BAD_RELATION; break;
            case 2: g.indptr[size_t(below(g.vertices + 1))] = bad; expected = CASE_FAST_BAD_INDPTR; break;
            case 3: g.indptr[0] = 1; expected = CASE_FAST_BAD_INDPTR; break;
            case 4: g.indptr.back() += below(2) ? 1 : -1; expected = CASE_FAST_BAD_INDPTR; break;
        }
        Outputs<float> o(g, s, 3.0f);
        const Outputs<float> before = o;
        const Call<float> call(g, s, in, below(2) ? 32 : 64);
        CHECK(call.forward(o, 2) == expected);
        CHECK(call.backward(o, 2) == expected);
        CHECK(o.same_bits(before));
    }
    const Graph g = random_graph(2, 5, 3, 3);
    const Inputs<float> in(g, s);
    Outputs<float> o(g, s, 3.0f);
    const Outputs<float> before = o;
    const auto refused = [&](auto change) {
        Call<float> call(g, s, in, 64);
        change(call.graph);
        CHECK(call.forward(o, 1) == CASE_FAST_BAD_ARGUMENT && call.backward(o, 1) == CASE_FAST_BAD_ARGUMENT);
    };
    refused([](case_fast_graph &x) { x.vertices = -1; });
    refused([](case_fast_graph &x) { x.edges = -1; });
    refused([](case_fast_graph &x) { x.heads = 0; });
    refused([](case_fast_graph &x) { x.dim = 0; });
    refused([](case_fast_graph &x) { x.dtype = CASE_FAST_F16; });
    refused([](case_fast_graph &x) { x.index_bits = 16; });
    refused([](case_fast_graph &x) { x.indptr = nullptr; });
    refused([](case_fast_graph &x) { x.relation = nullptr; });
    refused([](case_fast_graph &x) { x.dropout_p = -0.1; });
    refused([](case_fast_graph &x) { x.dropout_p = 1.1; });
    refused([](case_fast_graph &x) { x.dropout_p = NAN; });
    CHECK(o.same_bits(before));
}

void test_philox() {  // the known answers of Random123
    CHECK(case_fast_philox(0, 0, 0, 0, 0) == 0x6627e8d5u);
    CHECK(case_fast_philox(~0u, ~0u, ~0u, ~0u, ~0ull) == 0x408f276du);
    CHECK(case_fast_philox(0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u, 0x299f31d0a4093822ull) == 0xd16cfe09u);
    CHECK(case_fast_drop_below(0.5) == 1ull << 31 && case_fast_drop_below(1.0) == 1ull << 32);
    CHECK(case_fast_keep(1, 2, 3, 0) && !case_fast_keep(1, 2, 3, 1ull << 32));
}

void test_parallel() {
    for (int threads : {-1, 0, 1, 2, 3, 8})
        for (int64_t tasks : {0, 1, 2, 7, 1000}) {
            std::vector<int> done(size_t(tasks), 0);
            case_fast_parallel(threads, tasks, [&](int64_t i) {
                ++done[size_t(i)];
                case_fast_parallel(2, 3, [](int64_t) {});  // from within a task
            });
            for (int count : done) CHECK(count == 1);
        }
    std::vector<std::thread> callers;
    for (int c = 0; c < 4; ++c)
        callers.emplace_back([] {
            for (int round = 0; round < 200; ++round) {
                std::vector<int> done(20, 0);
                case_fast_parallel(3, 20, [&](int64_t i) { ++done[size_t(i)]; });
                for (int count : done) CHECK(count == 1);
            }
        });
    for (auto &caller : callers) caller.join();
#if !defined(__SANITIZE_THREAD__)  // it ends a forked child that starts threads
    const pid_t child = fork();
    if (child == 0) {
        std::vector<int> done(100, 0);
        case_fast_parallel(3, 100, [&](int64_t i) { ++done[size_t(i)]; });
        _exit(std::count(done.begin(), done.end(), 1) == 100 ? 0 : 1);
    }
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
#endif
}

}  // namespace

int main() {
    test_philox();
    test_parallel();
    test_bad_inputs();
    at_each_level([](const char *level) {
        test_against_naive(level);
        test_dropout_limits();
        test_exponential();
        test_nan_stays_in_its_graph();
    });
}
