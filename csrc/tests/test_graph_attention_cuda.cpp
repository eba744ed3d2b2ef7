// The CUDA kernels of graph_attention, emulated on the CPU, against the equations in double: every plan, dtype and index type,
// long rows and columns, damaged indices; outputs and workspace NaN beforehand.
#define CASE_FAST_EMULATE
#include "graph_attention/cuda_kernels.cu"

#include "graph_attention/cuda.cu"

#include <algorithm>
#include <random>
#include <string>

using namespace case_fast;
using namespace case_fast::graph_attention;

namespace {

struct Case {
    std::string name;
    int vertices, edges, heads, dim, relations;
    double dropout;
    int graphs;   // blocks on the diagonal
    int hub = 0;  // edges of row 0, and as many into column 1, beside the others
};

template <class T> double wide(T x) { return widened(x); }

template <class T> struct Problem {
    using A = Sum<T>;
    Case c;
    int edges;
    std::vector<int> indptr, indices, relation;
    std::vector<T> query, key, value, relation_query, relation_key, grad_out;

    Problem(const Case &c, unsigned seed) : c(c) {
        std::mt19937 random(seed);
        auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
        std::vector<std::vector<int>> rows(c.vertices);
        const int size = c.vertices ? (c.vertices + c.graphs - 1) / c.graphs : 1;
        for (int e = 0; e < c.edges; ++e) {
            const int i = below(c.vertices), first = i / size * size, last = std::min(first + size, c.vertices);
            if (i % 7 != 3) rows[i].push_back(first + below(last - first));  // some rows stay empty
        }
        for (int e = 0; e < c.hub; ++e) rows[0].push_back(below(c.vertices)), rows[below(c.vertices)].push_back(1);
        indptr.push_back(0);
        for (auto &row : rows) {
            indices.insert(indices.end(), row.begin(), row.end());
            indptr.push_back(static_cast<int>(indices.size()));
        }
        edges = static_cast<int>(indices.size());
        for (int e = 0; e < edges && c.relations; ++e) relation.push_back(below(c.relations));
        std::normal_distribution<float> normal;
        auto fill = [&](std::vector<T> &x, int rows) {
            for (int i = 0; i < rows * c.heads * c.dim; ++i) x.push_back(narrowed<T>(normal(random)));
        };
        for (auto *x : {&query, &key, &value, &grad_out}) fill(*x, c.vertices);
        fill(relation_query, c.relations), fill(relation_key, c.relations);
    }
};

struct Results {
    std::vector<double> of[6];
};  // out, then gradients of query, key, value, relation_query, relation_key
const char *const NAMES[6] = {"out", "grad_query", "grad_key", "grad_value", "grad_relation_query", "grad_relation_key"};
constexpr uint64_t SEED = 0x123456789ABCDEF0u;
const uint64_t ELSEWHERE = 0xF0E1D2C3B4A59687u;  // what a kernel finds at seed_at, and the number that makes SEED of it
constexpr uint64_t OTHER = 0x62D584BB2E194877u;

template <class T> Results truth(const Problem<T> &p) {
    const Case &c = p.c;
    Results r;
    const size_t rows = static_cast<size_t>(c.vertices) * c.heads * c.dim,
                 bias = static_cast<size_t>(c.relations) * c.heads * c.dim;
    for (int i = 0; i < 6; ++i) r.of[i].assign(i < 4 ? rows : bias, 0.0);
    const double scale = 1 / std::sqrt(static_cast<double>(c.dim));
    const uint64_t below = case_fast_drop_below(c.dropout);
    auto at = [&](int i, int h, int d) { return (static_cast<size_t>(i) * c.heads + h) * c.dim + d; };
    for (int i = 0; i < c.vertices; ++i)
        for (int h = 0; h < c.heads; ++h) {
            const int begin = p.indptr[i], end = p.indptr[i + 1];
            auto left = [&](int e, int d) {
                return wide(p.query[at(i, h, d)]) + (c.relations ? wide(p.relation_query[at(p.relation[e], h, d)]) : 0);
            };
            auto right = [&](int e, int d) {
                return wide(p.key[at(p.indices[e], h, d)]) + (c.relations ? wide(p.relation_key[at(p.relation[e], h, d)]) : 0);
            };
            std::vector<double> w, kept, dp;
            double peak = -INFINITY, total = 0, mean = 0;
            for (int e = begin; e < end; ++e) {
                double s = 0;
                for (int d = 0; d < c.dim; ++d) s += left(e, d) * right(e, d);
                w.push_back(s * scale);
                peak = std::max(peak, w.back());
            }
            for (double &x : w) total += x = std::exp(x - peak);
            for (int e = begin; e < end; ++e) {
                w[e - begin] /= total;
                kept.push_back(c.dropout == 0 ? 1 : case_fast_keep(SEED, e, h, below) ? 1 / (1 - c.dropout) : 0);
                double g = 0;
                for (int d = 0; d < c.dim; ++d) g += wide(p.grad_out[at(i, h, d)]) * wide(p.value[at(p.indices[e], h, d)]);
                dp.push_back(g * kept.back());
                mean += w[e - begin] * dp.back();
            }
            for (int e = begin; e < end; ++e) {
                const double pw = w[e - begin] * kept[e - begin], ds = scale * w[e - begin] * (dp[e - begin] - mean);
                for (int d = 0; d < c.dim; ++d) {
                    r.of[0][at(i, h, d)] += pw * wide(p.value[at(p.indices[e], h, d)]);
                    r.of[1][at(i, h, d)] += ds * right(e, d);
                    r.of[2][at(p.indices[e], h, d)] += ds * left(e, d);
                    r.of[3][at(p.indices[e], h, d)] += pw * wide(p.grad_out[at(i, h, d)]);
                    if (c.relations)
                        r.of[4][at(p.relation[e], h, d)] += ds * right(e, d), r.of[5][at(p.relation[e], h, d)] += ds * left(e, d);
                }
            }
        }
    return r;
}

template <class T> constexpr int dtype() {
    return std::is_same_v<T, float>    ? CASE_FAST_F32
           : std::is_same_v<T, double> ? CASE_FAST_F64
           : std::is_same_v<T, __half> ? CASE_FAST_F16
                                       : CASE_FAST_BF16;
}

// Both passes; outputs and workspace hold 0xFF bytes (NaN) beforehand, and the bytes after each must stay as they were.
template <class T, class I>
Results run(const Problem<T> &p, int plan, int32_t *flag, bool &sound, uint64_t seed = SEED, const uint64_t *seed_at = nullptr) {
    using A = Sum<T>;
    const Case &c = p.c;
    const std::vector<I> indptr(p.indptr.begin(), p.indptr.end()), indices(p.indices.begin(), p.indices.end()),
        relation(p.relation.begin(), p.relation.end());
    const case_fast_graph g = {c.vertices,
                               p.edges,
                               c.relations,
                               c.heads,
                               c.dim,
                               dtype<T>(),
                               8 * sizeof(I),
                               indptr.data(),
                               indices.data(),
                               relation.data(),
                               1 / std::sqrt(static_cast<double>(c.dim)),
                               c.dropout,
                               seed,
                               seed_at};
    auto poisoned = [](size_t bytes) { return std::vector<char>(bytes, static_cast<char>(0xFF)); };
    const size_t rows = static_cast<size_t>(c.vertices) * c.heads * c.dim * sizeof(T),
                 bias = static_cast<size_t>(c.relations) * c.heads * c.dim * sizeof(T);
    std::vector<char> outputs[6], weights = poisoned(static_cast<size_t>(p.edges) * c.heads * sizeof(A));
    for (int i = 0; i < 6; ++i) outputs[i] = poisoned(i < 4 ? rows : bias);
    auto space = poisoned(case_fast_graph_attention_workspace_cuda(&g, 0, plan));
    sound = case_fast_graph_attention_forward_cuda(&g, p.query.data(), p.key.data(), p.value.data(), p.relation_query.data(),
                                                   p.relation_key.data(), outputs[0].data(), weights.data(), plan, space.data(),
                                                   space.size(), flag, nullptr) == CASE_FAST_OK;
    space = poisoned(case_fast_graph_attention_workspace_cuda(&g, 1, plan));
    sound &= case_fast_graph_attention_backward_cuda(&g, p.query.data(), p.key.data(), p.value.data(), p.relation_query.data(),
                                                     p.relation_key.data(), weights.data(), p.grad_out.data(), outputs[1].data(),
                                                     outputs[2].data(), outputs[3].data(), outputs[4].data(), outputs[5].data(),
                                                     plan, space.data(), space.size(), flag, nullptr) == CASE_FAST_OK;
    Results r;
    for (int i = 0; i < 6; ++i) {
        const T *x = reinterpret_cast<const T *>(outputs[i].data());
        for (size_t n = 0; n < outputs[i].size() / sizeof(T); ++n) r.of[i].push_back(wide(x[n]));
    }
    return r;
}

int failures = 0;
void expect(bool good, const std::string &what) {
    if (!good) std::printf("FAILED: %s\n", what.c_str()), ++failures;
}

template <class T, class I> void check(const Case &c, int plan, double tolerance) {
    const Problem<T> p(c, 7);
    const Results expected = truth(p);
    int32_t flag = 0;
    bool sound, again_sound;
    const Results found = run<T, I>(p, plan, &flag, sound);
    const Results again = run<T, I>(p, plan, &flag, again_sound, OTHER, &ELSEWHERE);
    const std::string what = c.name + ", plan " + std::to_string(plan) + ", dtype " + std::to_string(dtype<T>());
    expect(sound && again_sound && flag == 0, what + ": status or flag");
    for (int i = 0; i < 6; ++i) {
        double worst = 0, size = 1;
        for (size_t n = 0; n < found.of[i].size(); ++n) {
            const double error = std::abs(found.of[i][n] - expected.of[i][n]);
            worst = error <= worst || worst != worst ? worst : error;  // NaN stays
            size = std::max(size, std::abs(expected.of[i][n]));
        }
        if (!(worst <= tolerance * size)) std::printf("%s: error %g\n", NAMES[i], worst);
        expect(worst <= tolerance * size, what + ": " + NAMES[i]);
        expect(found.of[i] == again.of[i], what + ": " + NAMES[i] + " changes between runs");
    }
}

void damaged(int plan) {
    const Case c{"damaged", 12, 60, 2, 6, 3, 0.0, 2};
    for (int which = 0; which < 6; ++which) {
        Problem<float> p(c, 3);
        const int row = 4, e = p.indptr[row];
        int *const place[] = {&p.indices[e], &p.indices[e], &p.relation[e], &p.relation[e], &p.indptr[3], &p.indptr[12]};
        const int wrong[] = {12, -1, 3, -5, -2, 1 << 30}, status[] = {2, 2, 3, 3, 1, 1};
        *place[which] = wrong[which];
        int32_t flag = 0;
        bool sound;
        const Results r = run<float, int32_t>(p, plan, &flag, sound);
        const std::string what = "damaged " + std::to_string(which) + ", plan " + std::to_string(plan);
        expect(sound && flag == status[which], what + ": flag " + std::to_string(flag));
        if (which > 3) continue;
        const size_t width = 12;
        for (size_t n = 0; n < r.of[0].size(); ++n)
            expect(std::isnan(r.of[0][n]) == (n / width == row), what + ": NaN elsewhere than in its row");
    }
}

// NaN in one graph of a batch reaches no other, not even through rows that a warp loads and does not use.
void contained(int plan) {
    const Case c{"contained", 40, 160, 2, 10, 4, 0.2, 5};
    Problem<float> p(c, 5);
    int32_t flag = 0;
    bool sound;
    const Results clean = run<float, int32_t>(p, plan, &flag, sound);
    const size_t width = 20, first = 8 * width, last = 16 * width;  // the second graph
    for (auto *x : {&p.query, &p.key, &p.value, &p.grad_out}) std::fill(x->begin() + first, x->begin() + last, NAN);
    const Results hurt = run<float, int32_t>(p, plan, &flag, sound);
    for (int i = 0; i < 4; ++i)
        for (size_t n = 0; n < hurt.of[i].size(); ++n)
            expect((n >= first && n < last) || hurt.of[i][n] == clean.of[i][n], std::string("NaN spread in ") + NAMES[i]);
    for (int v = 0; v < c.vertices; ++v) {  // a vertex that does not lead to itself never reads its own value or gradient
        Problem<float> q(c, 5);
        const auto begin = q.indices.begin() + q.indptr[v], end = q.indices.begin() + q.indptr[v + 1];
        if (std::find(begin, end, v) != end) continue;
        for (auto *x : {&q.value, &q.grad_out}) std::fill(x->begin() + v * width, x->begin() + (v + 1) * width, NAN);
        const Results r = run<float, int32_t>(q, plan, &flag, sound);
        for (size_t n = v * width; n < (v + 1) * width; ++n) {
            expect(r.of[0][n] == clean.of[0][n], "a row read its own value");
            expect(r.of[3][n] == clean.of[3][n], "a column read its own gradient");
        }
    }
}

void sorts() {
    std::mt19937 random(1);
    std::vector<int> start = {0};
    std::vector<int64_t> list;
    for (const int size : {0, 1, 2, 31, 32, 33, 64, 127, 128, 129, 0, 255, 256, 257, 1000, 3}) {
        for (int i = 0; i < size; ++i) list.push_back(edge_and_row(static_cast<int>(random() >> 1), static_cast<int>(random() >> 1)));
        start.push_back(static_cast<int>(list.size()));
    }
    std::vector<int64_t> expected = list;
    for (size_t c = 0; c + 1 < start.size(); ++c) std::sort(expected.begin() + start[c], expected.begin() + start[c + 1]);
    const int columns = static_cast<int>(start.size()) - 1;
    CASE_FAST_LAUNCH(sort_columns, blocks(columns, ORDER_THREADS / WARP), ORDER_THREADS, 0, nullptr, columns, start.data(), list.data());
    expect(list == expected, "columns are not sorted");
}

}  // namespace

int main() {
    const std::vector<Case> cases = {
        {"batch of graphs", 40, 160, 2, 10, 4, 0.2, 5},
        {"plain", 40, 160, 2, 10, 0, 0.0, 5},
        {"the paper's head", 12, 40, 2, 150, 10, 0.2, 2},
        {"odd head", 9, 50, 3, 13, 5, 0.5, 1},
        {"largest head", 5, 20, 1, 256, 2, 0.0, 1},
        {"largest head of fours", 6, 30, 1, 128, 3, 0.1, 1},
        {"largest head of pairs", 5, 20, 1, 192, 2, 0.0, 1},
        {"one vertex", 1, 3, 1, 1, 1, 0.0, 1},
        {"no edges", 5, 0, 2, 4, 3, 0.1, 1},
        {"no vertices", 0, 0, 2, 4, 3, 0.1, 1},
        {"one vertex a graph", 70, 150, 1, 2, 0, 0.0, 70},
        {"more relations than lanes", 10, 90, 1, 4, 70, 0.0, 1},
        {"dense", 9, 700, 1, 6, 3, 0.1, 1},
        {"long row and column", 30, 60, 1, 4, 35, 0.1, 1, 700},
    };
    sorts();
    for (const int shared : {64 << 10, 9 << 10}) {  // with the smaller, few graphs fit
        emulated_shared_bytes = shared;
        for (const Case &c : cases)
            for (const int plan : {CASE_FAST_PLAN_GRAPHS, CASE_FAST_PLAN_ROWS, CASE_FAST_PLAN_AUTO}) {
                check<float, int32_t>(c, plan, 3e-6);
                if (plan == CASE_FAST_PLAN_AUTO || (shared == 9 << 10 && plan == CASE_FAST_PLAN_ROWS)) continue;
                check<double, int64_t>(c, plan, 1e-13);
                if (c.hub) continue;
                check<__nv_bfloat16, int64_t>(c, plan, 5e-3);
                check<__half, int32_t>(c, plan, 7e-4);
            }
        for (const int plan : {CASE_FAST_PLAN_GRAPHS, CASE_FAST_PLAN_ROWS}) damaged(plan), contained(plan);
    }
    std::printf("%d launches, %d failures\n", emulated_launches, failures);
    return failures != 0;
}
