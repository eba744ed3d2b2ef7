// The CUDA kernels of cross_attention, emulated on the CPU, against plain loops in double: both plans, every dtype and index
// type, ugly shapes, damaged lists; outputs and workspace NaN beforehand.
#define CASE_FAST_EMULATE
#include "cross_attention/cuda_bf16.cu"
#include "cross_attention/cuda_f16.cu"
#include "cross_attention/cuda_f32.cu"
#include "cross_attention/cuda_f64.cu"

#include "cross_attention/cuda.cu"

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

using namespace case_fast;
using namespace case_fast::cross_attention;

namespace {

int failures = 0;
void expect(bool good, const std::string &what) {
    if (!good) std::printf("FAILED: %s\n", what.c_str()), ++failures;
}

constexpr uint64_t SEED = 0x123456789ABCDEF0u;
using Lengths = std::vector<int>;

template <class T> constexpr int dtype() {
    return std::is_same_v<T, float>    ? CASE_FAST_F32
           : std::is_same_v<T, double> ? CASE_FAST_F64
           : std::is_same_v<T, __half> ? CASE_FAST_F16
                                       : CASE_FAST_BF16;
}

template <class I> std::vector<I> offsets(const Lengths &lengths) {
    std::vector<I> cu = {0};
    for (const int n : lengths) cu.push_back(static_cast<I>(cu.back() + n));
    return cu;
}
int sum_of(const Lengths &lengths) { return std::accumulate(lengths.begin(), lengths.end(), 0); }
std::vector<char> poisoned(size_t bytes) { return std::vector<char>(bytes, static_cast<char>(0xFF)); }  // NaN in every dtype

struct Random {
    std::mt19937 random;
    std::normal_distribution<float> normal;
    template <class T> std::vector<T> of(int64_t count, float scale = 1) {
        std::vector<T> x;
        for (int64_t i = 0; i < count; ++i) x.push_back(narrowed<T>(scale * normal(random)));
        return x;
    }
};
template <class T> std::vector<double> wide(const std::vector<T> &x) {
    std::vector<double> out;
    for (const T &value : x) out.push_back(widened(value));
    return out;
}
template <class T> std::vector<double> wide(const std::vector<char> &bytes) {
    const T *x = reinterpret_cast<const T *>(bytes.data());
    return wide(std::vector<T>(x, x + bytes.size() / sizeof(T)));
}

void compare(const std::vector<double> &found, const std::vector<double> &expected, double tolerance, const std::string &what) {
    double worst = 0, size = 1;
    expect(found.size() == expected.size(), what + ": size");
    for (size_t n = 0; n < found.size(); ++n) {
        if (found[n] == expected[n]) continue;  // infinities
        const double error = std::abs(found[n] - expected[n]);
        worst = error <= worst || worst != worst ? worst : error;  // NaN stays
        if (std::isfinite(expected[n])) size = std::max(size, std::abs(expected[n]));
    }
    if (!(worst <= tolerance * size)) std::printf("error %g of %g\n", worst, size);
    expect(worst <= tolerance * size, what);
}

// ---- attention of packed sequences

struct Case {
    std::string name;
    Lengths rows, keys;  // rows of key sequences, of which `real` are keys; key_of where it is not empty
    Lengths key_of, real;
    int heads, dim;
    bool causal;
    double dropout;
    int apart = 0;  // elements between rows beyond heads * dim
};

template <class T> struct Problem {
    Case c;
    int queries, keys, stride;
    std::vector<T> query, key, value, grad_out;

    explicit Problem(const Case &c) : c(c), queries(sum_of(c.rows)), keys(sum_of(c.keys)), stride(c.heads * c.dim + c.apart) {
        Random random{std::mt19937(7), {}};
        query = random.of<T>(int64_t(queries) * stride), key = random.of<T>(int64_t(keys) * stride);
        value = random.of<T>(int64_t(keys) * stride), grad_out = random.of<T>(int64_t(queries) * c.heads * c.dim);
    }
    int sequence(int s) const { return c.key_of.empty() ? s : c.key_of[s]; }
    int real(int t) const { return c.real.empty() ? c.keys[t] : c.real[t]; }
};

struct Results {
    std::vector<double> of[5];
};  // out, lse, then gradients of query, key, value
const char *const NAMES[5] = {"out", "lse", "grad_query", "grad_key", "grad_value"};

// Calls body(row, key row, weight before dropout, factor of dropout, place of the key) for what each row sees; and lse.
struct Truth {
    int heads, dim, longest = 0;
    bool causal;
    double scale, dropout;
    uint64_t seed;
    template <class Visit> double row(const std::vector<double> &query, int64_t query_at, const std::vector<double> &key,
                                      int64_t key_stride, int begin, int seen, int number, int head, Visit visit) const {
        std::vector<double> w;
        double peak = -INFINITY, total = 0;
        for (int j = 0; j < seen; ++j) {
            double s = 0;
            for (int d = 0; d < dim; ++d) s += query[query_at + d] * key[(begin + j) * key_stride + head * dim + d];
            w.push_back(s * scale);
            peak = std::max(peak, w.back());
        }
        for (double &x : w) total += x = std::exp(x - peak);
        const uint64_t below = case_fast_drop_below(dropout);
        for (int j = 0; j < seen; ++j) {
            const bool keep = dropout == 0 || case_fast_keep(seed, int64_t(number) * longest + j, head, below);
            visit(begin + j, w[j] / total, keep ? (dropout ? 1 / (1 - dropout) : 1) : 0.0);
        }
        return seen > 0 ? peak + std::log(total) : -INFINITY;
    }
};

template <class T> Results truth(const Problem<T> &p) {
    const Case &c = p.c;
    const int inner = c.heads * c.dim;
    Truth t{c.heads, c.dim, 0, c.causal, 1 / std::sqrt(double(c.dim)), c.dropout, SEED};
    for (const int n : c.keys) t.longest = std::max(t.longest, n);
    const auto q = wide(p.query), k = wide(p.key), v = wide(p.value), g = wide(p.grad_out);
    Results r;
    r.of[0].assign(int64_t(p.queries) * inner, 0), r.of[1].assign(int64_t(p.queries) * c.heads, -INFINITY);
    r.of[2] = r.of[0], r.of[3].assign(int64_t(p.keys) * inner, 0), r.of[4] = r.of[3];
    const auto cu_query = offsets<int>(c.rows), cu_key = offsets<int>(c.keys);
    for (size_t s = 0; s < c.rows.size(); ++s)
        for (int place = 0; place < c.rows[s]; ++place)
            for (int h = 0; h < c.heads; ++h) {
                const int row = cu_query[s] + place, sequence = p.sequence(int(s)), keys = p.real(sequence);
                const int seen = c.causal ? std::clamp(place + 1 + keys - c.rows[s], 0, keys) : keys;
                std::vector<std::array<double, 3>> parts;  // key row, weight, factor
                const int64_t at = int64_t(row) * inner + h * c.dim;
                r.of[1][int64_t(row) * c.heads + h] =
                    t.row(q, int64_t(row) * p.stride + h * c.dim, k, p.stride, cu_key[sequence], seen, row, h,
                          [&](int key, double w, double factor) { parts.push_back({double(key), w, factor}); });
                double mean = 0;
                std::vector<double> slopes;
                for (const auto &[key, w, factor] : parts) {
                    double slope = 0;
                    for (int d = 0; d < c.dim; ++d) {
                        const double value = v[int64_t(key) * p.stride + h * c.dim + d];
                        r.of[0][at + d] += w * factor * value;
                        slope += g[at + d] * value;
                    }
                    slopes.push_back(slope * factor);
                    mean += w * slopes.back();
                }
                for (size_t j = 0; j < parts.size(); ++j) {
                    const auto &[key, w, factor] = parts[j];
                    const double ds = t.scale * w * (slopes[j] - mean);
                    for (int d = 0; d < c.dim; ++d) {
                        const int64_t there = int64_t(key) * inner + h * c.dim + d,
                                      from = int64_t(key) * p.stride + h * c.dim + d;
                        r.of[2][at + d] += ds * k[from];
                        r.of[3][there] += ds * q[int64_t(row) * p.stride + h * c.dim + d];
                        r.of[4][there] += w * factor * g[at + d];
                    }
                }
            }
    return r;
}

struct Lists {  // as the kernels read them; a test may damage them
    std::vector<int64_t> cu_query, cu_key, key_of, key_length;
};
template <class T> Lists lists_of(const Problem<T> &p) {
    const Case &c = p.c;
    return {
        offsets<int64_t>(c.rows), offsets<int64_t>(c.keys), {c.key_of.begin(), c.key_of.end()}, {c.real.begin(), c.real.end()}};
}

template <class T, class I> Results run(const Problem<T> &p, const Lists &lists, int plan, int32_t *flag, bool &sound) {
    using A = Sum<T>;
    const Case &c = p.c;
    const auto narrow = [](const std::vector<int64_t> &x) { return std::vector<I>(x.begin(), x.end()); };
    const auto cu_query = narrow(lists.cu_query), cu_key = narrow(lists.cu_key), key_of = narrow(lists.key_of),
               key_length = narrow(lists.key_length);
    const int inner = c.heads * c.dim;
    const case_fast_attention call = {int64_t(c.rows.size()),
                                      p.queries,
                                      int64_t(c.keys.size()),
                                      p.keys,
                                      c.heads,
                                      c.dim,
                                      dtype<T>(),
                                      8 * sizeof(I),
                                      c.causal,
                                      cu_query.data(),
                                      cu_key.data(),
                                      c.key_of.empty() ? nullptr : key_of.data(),
                                      c.real.empty() ? nullptr : key_length.data(),
                                      p.stride,
                                      p.stride,
                                      p.stride,
                                      1 / std::sqrt(double(c.dim)),
                                      c.dropout,
                                      SEED};
    const size_t query_bytes = size_t(p.queries) * inner * sizeof(T), key_bytes = size_t(p.keys) * inner * sizeof(T);
    auto out = poisoned(query_bytes), lse = poisoned(size_t(p.queries) * c.heads * sizeof(A));
    auto grad_query = poisoned(query_bytes), grad_key = poisoned(key_bytes), grad_value = poisoned(key_bytes);
    auto space = poisoned(case_fast_packed_attention_workspace_cuda(&call, 0));
    sound = case_fast_packed_attention_forward_cuda(&call, p.query.data(), p.key.data(), p.value.data(), out.data(), lse.data(),
                                                    plan, space.data(), space.size(), flag, nullptr) == CASE_FAST_OK;
    auto without = poisoned(query_bytes);
    sound &= case_fast_packed_attention_forward_cuda(&call, p.query.data(), p.key.data(), p.value.data(), without.data(), nullptr,
                                                     plan, space.data(), space.size(), nullptr, nullptr) == CASE_FAST_OK;
    sound &= without == out;
    space = poisoned(case_fast_packed_attention_workspace_cuda(&call, 1));
    sound &= case_fast_packed_attention_backward_cuda(&call, p.query.data(), p.key.data(), p.value.data(), out.data(), lse.data(),
                                                      p.grad_out.data(), grad_query.data(), inner, grad_key.data(), inner,
                                                      grad_value.data(), inner, space.data(), space.size(), flag,
                                                      nullptr) == CASE_FAST_OK;
    Results r;
    r.of[0] = wide<T>(out), r.of[1] = wide<A>(lse), r.of[2] = wide<T>(grad_query);
    r.of[3] = wide<T>(grad_key), r.of[4] = wide<T>(grad_value);
    return r;
}

template <class T, class I> void check(const Case &c, int plan, double tolerance) {
    const Problem<T> p(c);
    const Results expected = truth(p);
    int32_t flag = 0;
    bool sound, again_sound = true;
    const Results found = run<T, I>(p, lists_of(p), plan, &flag, sound);
    const Results again = dtype<T>() == CASE_FAST_F32 ? run<T, I>(p, lists_of(p), plan, &flag, again_sound) : found;
    const std::string what = c.name + ", plan " + std::to_string(plan) + ", dtype " + std::to_string(dtype<T>());
    expect(sound && again_sound && flag == 0, what + ": status or flag");
    for (int i = 0; i < 5; ++i) {
        compare(found.of[i], expected.of[i], tolerance, what + ": " + NAMES[i]);
        expect(found.of[i] == again.of[i], what + ": " + NAMES[i] + " changes between runs");
    }
}

void damaged(int plan) {
    const Case c{"damaged", {3, 2, 4, 1}, {5, 3, 9}, {2, 0, 0, 1}, {4, 3, 9}, 2, 6, false, 0.2};
    const Problem<float> p(c);
    const auto known = [&](const std::vector<double> &x) {
        return std::count_if(x.begin(), x.end(), [](double v) { return v == v; });
    };
    struct Wrong {
        std::vector<int64_t> Lists::*list;
        int place;
        int64_t value;
        int status;
        int sequence;  // of queries: all others are as ever; -1: not known
    };
    const Wrong all[] = {
        {&Lists::key_of, 1, 3, CASE_FAST_BAD_KEY_OF, 1},
        {&Lists::key_of, 1, -1, CASE_FAST_BAD_KEY_OF, 1},
        {&Lists::key_length, 1, 4, CASE_FAST_BAD_KEY_LENGTH, 3},
        {&Lists::key_length, 2, -7, CASE_FAST_BAD_KEY_LENGTH, 0},
        {&Lists::cu_query, 4, 11, CASE_FAST_BAD_CU_QUERY, -1},
        {&Lists::cu_query, 0, 1, CASE_FAST_BAD_CU_QUERY, -1},
        {&Lists::cu_query, 2, 1 << 30, CASE_FAST_BAD_CU_QUERY, -1},
        {&Lists::cu_query, 3, -5, CASE_FAST_BAD_CU_QUERY, -1},
        {&Lists::cu_key, 3, 18, CASE_FAST_BAD_CU_KEY, -1},
        {&Lists::cu_key, 1, -(1 << 30), CASE_FAST_BAD_CU_KEY, -1},
        {&Lists::cu_key, 2, 1 << 30, CASE_FAST_BAD_CU_KEY, -1},
        {&Lists::cu_key, 0, 2, CASE_FAST_BAD_CU_KEY, -1},
    };
    int32_t flag = 0;
    bool sound;
    const Results clean = run<float, int32_t>(p, lists_of(p), plan, &flag, sound);
    for (const Wrong &wrong : all) {
        Lists lists = lists_of(p);
        (lists.*wrong.list)[wrong.place] = wrong.value;
        flag = 0;
        const Results r = run<float, int32_t>(p, lists, plan, &flag, sound);
        const std::string what = "damaged to " + std::to_string(wrong.value) + ", plan " + std::to_string(plan);
        const bool key_bad = wrong.list == &Lists::cu_key && flag == CASE_FAST_BAD_KEY_LENGTH;  // what follows from it
        expect(sound && (flag == wrong.status || key_bad), what + ": flag " + std::to_string(flag));
        if (wrong.sequence < 0) continue;
        const auto cu = offsets<int>(c.rows);
        for (int s = 0; s < 4; ++s)
            for (int n = cu[s] * 12; n < cu[s + 1] * 12; ++n)
                expect(s == wrong.sequence ? std::isnan(r.of[0][n]) : r.of[0][n] == clean.of[0][n],
                       what + ": NaN elsewhere than in its rows");
        expect(known(r.of[2]) == known(r.of[0]), what + ": grad_query");
    }
}

// NaN in one sequence reaches no other.
void contained(int plan) {
    const Case c{"contained", {3, 20, 2, 5}, {40, 7, 3, 33}, {}, {}, 2, 10, true, 0.2};
    Problem<float> p(c);
    int32_t flag = 0;
    bool sound;
    const Results clean = run<float, int32_t>(p, lists_of(p), plan, &flag, sound);
    const auto cu_query = offsets<int>(c.rows), cu_key = offsets<int>(c.keys);
    const int width = p.stride;
    for (auto *x : {&p.query, &p.grad_out}) std::fill(x->begin() + cu_query[1] * width, x->begin() + cu_query[2] * width, NAN);
    for (auto *x : {&p.key, &p.value}) std::fill(x->begin() + cu_key[1] * width, x->begin() + cu_key[2] * width, NAN);
    const Results hurt = run<float, int32_t>(p, lists_of(p), plan, &flag, sound);
    for (int i = 0; i < 5; ++i) {
        const auto &cu = i > 2 ? cu_key : cu_query;
        const int each = i == 1 ? c.heads : width;
        for (int n = 0; n < int(hurt.of[i].size()); ++n)
            expect((n >= cu[1] * each && n < cu[2] * each) || hurt.of[i][n] == clean.of[i][n],
                   std::string("NaN spread in ") + NAMES[i]);
    }
}

// ---- the decoder's block

struct Block {
    std::string name;
    Lengths rows;
    std::vector<Lengths> keys;  // of each source
    Lengths key_of;             // of all sources, where it is not empty
    int width, heads, dim;
    double dropout, output_dropout;
};

template <class T, class I> void check_block(const Block &b, double tolerance) {
    const int rows = sum_of(b.rows), inner = b.heads * b.dim, sources = int(b.keys.size());
    Random random{std::mt19937(5), {}};
    const auto hidden = random.of<T>(int64_t(rows) * b.width);
    const auto cu_hidden = offsets<I>(b.rows);
    const std::vector<I> key_of(b.key_of.begin(), b.key_of.end());
    struct Arrays {
        std::vector<I> cu;
        std::vector<T> key, value, norm_weight, norm_bias, query_weight, output_weight;
    };
    std::vector<Arrays> arrays;
    std::vector<case_fast_source> given;
    for (const Lengths &keys : b.keys) {
        const int64_t count = int64_t(sum_of(keys)) * inner;
        const float in = 1 / std::sqrt(float(b.width)), out = 1 / std::sqrt(float(inner));
        arrays.push_back({offsets<I>(keys), random.of<T>(count), random.of<T>(count), random.of<T>(b.width),
                          random.of<T>(b.width), random.of<T>(int64_t(inner) * b.width, in),
                          random.of<T>(int64_t(inner) * b.width, out)});
    }
    for (int i = 0; i < sources; ++i) {
        const Arrays &a = arrays[i];
        given.push_back({int64_t(b.keys[i].size()), sum_of(b.keys[i]), inner, inner, a.cu.data(),
                         key_of.empty() ? nullptr : key_of.data(), nullptr, a.key.data(), a.value.data(), a.norm_weight.data(),
                         a.norm_bias.data(), a.query_weight.data(), a.output_weight.data(), SEED + i, SEED + 100 + i});
    }
    const case_fast_cross_attention call = {
        int64_t(b.rows.size()), rows, sources,   b.width,         b.heads, b.dim, dtype<T>(), 8 * sizeof(I),
        cu_hidden.data(),       1e-5, b.dropout, b.output_dropout};
    auto state = wide(hidden);
    for (int i = 0; i < sources; ++i) {
        const Arrays &a = arrays[i];
        const auto k = wide(a.key), v = wide(a.value), nw = wide(a.norm_weight), nb = wide(a.norm_bias),
                   qw = wide(a.query_weight), ow = wide(a.output_weight);
        Truth t{b.heads, b.dim, 0, false, 1 / std::sqrt(double(b.dim)), b.dropout, SEED + i};
        for (const int n : b.keys[i]) t.longest = std::max(t.longest, n);
        for (size_t s = 0; s < b.rows.size(); ++s)
            for (int row = int(cu_hidden[s]); row < int(cu_hidden[s + 1]); ++row) {
                double *const x = state.data() + int64_t(row) * b.width, mean = 0, variance = 0;
                for (int c = 0; c < b.width; ++c) mean += x[c] / b.width;
                for (int c = 0; c < b.width; ++c) variance += (x[c] - mean) * (x[c] - mean) / b.width;
                std::vector<double> query(inner, 0), attended(inner, 0);
                for (int o = 0; o < inner; ++o)
                    for (int c = 0; c < b.width; ++c)
                        query[o] += qw[int64_t(o) * b.width + c] * ((x[c] - mean) / std::sqrt(variance + 1e-5) * nw[c] + nb[c]);
                const int sequence = b.key_of.empty() ? int(s) : b.key_of[s];
                for (int h = 0; h < b.heads; ++h)
                    t.row(query, h * b.dim, k, inner, int(a.cu[sequence]), b.keys[i][sequence], row, h,
                          [&](int key, double w, double factor) {
                              for (int d = 0; d < b.dim; ++d)
                                  attended[h * b.dim + d] += w * factor * v[int64_t(key) * inner + h * b.dim + d];
                          });
                const uint64_t below = case_fast_drop_below(b.output_dropout);
                for (int c = 0; c < b.width; ++c) {
                    double added = 0;
                    for (int o = 0; o < inner; ++o) added += attended[o] * ow[int64_t(c) * inner + o];
                    if (b.output_dropout > 0)
                        added *=
                            case_fast_keep(SEED + 100 + i, int64_t(row) * b.width + c, 0, below) ? 1 / (1 - b.output_dropout) : 0;
                    x[c] += added;
                }
            }
    }
    std::vector<double> before;
    for (int again = 0; again < (dtype<T>() == CASE_FAST_F32 ? 2 : 1); ++again) {
        auto out = poisoned(hidden.size() * sizeof(T)), space = poisoned(case_fast_cross_attention_workspace_cuda(&call));
        int32_t flag = 0;
        const int launches = emulated_launches;
        const int status = case_fast_cross_attention_forward_cuda(&call, given.data(), hidden.data(), out.data(), space.data(),
                                                                  space.size(), &flag, nullptr);
        const std::string what = "block, " + b.name + ", dtype " + std::to_string(dtype<T>());
        expect(status == CASE_FAST_OK && flag == 0, what + ": status or flag");
        expect(emulated_launches - launches == (rows ? sources * (b.dropout > 0 ? 3 : 2) : 0), what + ": launches");
        const auto found = wide<T>(out);
        if (again) {
            expect(found == before, what + " changes between runs");
        } else {
            compare(found, state, tolerance, what);
        }
        before = found;
    }
}

void damaged_block() {
    const int32_t cu_hidden[] = {0, 1, 2}, cu_key[] = {0, 2, 1 << 30};
    const std::vector<float> x(64, 0.5f);
    const case_fast_source source = {2,        5,        4,        4,        cu_key,   nullptr, nullptr, x.data(),
                                     x.data(), x.data(), x.data(), x.data(), x.data(), 0,       0};
    const case_fast_cross_attention call = {2, 2, 1, 6, 2, 2, CASE_FAST_F32, 32, cu_hidden, 1e-5, 0, 0};
    std::vector<char> space(case_fast_cross_attention_workspace_cuda(&call));
    float out[12];
    int32_t flag = 0;
    expect(case_fast_cross_attention_forward_cuda(&call, &source, x.data(), out, space.data(), space.size(), &flag, nullptr) ==
                   CASE_FAST_OK &&
               flag == CASE_FAST_BAD_CU_KEY,
           "damaged block: flag");
    for (int n = 0; n < 12; ++n) expect(std::isnan(out[n]) == (n >= 6), "damaged block: NaN elsewhere than in its row");
}

template <class T> void check_drop() {
    Random random{std::mt19937(3), {}};
    const auto from = random.of<T>(1000), base = random.of<T>(1000);
    for (const double p : {0.0, 0.3, 1.0})
        for (const bool add : {false, true}) {
            std::vector<T> to = base;
            expect(case_fast_cross_attention_drop_cuda(1000, dtype<T>(), p, SEED, from.data(), add ? to.data() : nullptr,
                                                       to.data(), nullptr) == CASE_FAST_OK,
                   "drop: status");
            for (int e = 0; e < 1000; ++e) {
                const Sum<T> kept = p == 0                                                ? 1
                                    : p == 1                                              ? 0
                                    : case_fast_keep(SEED, e, 0, case_fast_drop_below(p)) ? Sum<T>(1 / (1 - p))
                                                                                          : 0;
                const Sum<T> expected = widened(from[e]) * kept + (add ? widened(base[e]) : 0);
                expect(std::abs(widened(to[e]) - widened(narrowed<T>(expected))) <= 1e-2 * std::abs(expected),
                       "drop: an element");
            }
        }
}

void searches() {
    std::mt19937 random(1);
    for (const int count : {1, 2, 3, 31, 32, 33, 100, 1023, 1025, 5000}) {
        std::vector<int> first = {0};
        while (int(first.size()) < count) first.push_back(first.back() + int(random() % 4));
        for (int trial = 0; trial < 20; ++trial) {
            const int x = int(random() % unsigned(first.back() + 3));
            const int expected = int(std::upper_bound(first.begin(), first.end(), x) - first.begin()) - 1;
            static int found;
            CASE_FAST_LAUNCH((+[](const int *first, int count, int x, int *found) {
                                 const int s = last_at_most(count, x, int(threadIdx.x), [&](int s) { return first[s]; });
                                 if (threadIdx.x == 5) *found = s;
                             }),
                             1, WARP, 0, nullptr, static_cast<const int *>(first.data()), count, x, &found);
            expect(found == expected, "search among " + std::to_string(count));
        }
    }
}

}  // namespace

int main() {
    const std::vector<Case> cases = {
        {"usual", {3, 5, 2}, {7, 4, 9}, {}, {}, 2, 10, false, 0.0},
        {"the paper's head", {17, 6}, {40, 35}, {}, {}, 2, 150, false, 0.1},
        {"causal", {20, 5, 3, 33}, {20, 9, 1, 33}, {}, {}, 2, 12, true, 0.0},
        {"causal, more keys and fewer", {4, 37, 6}, {50, 20, 0}, {}, {}, 1, 7, true, 0.2},
        {"primes", {1, 13, 7, 0, 19}, {11, 3, 0, 5, 67}, {}, {}, 3, 13, false, 0.3},
        {"no rows", {0, 0}, {3, 2}, {}, {}, 2, 4, false, 0.1},
        {"no keys", {3, 2}, {0, 0}, {}, {}, 2, 4, false, 0.1},
        {"no sequences", {}, {}, {}, {}, 2, 4, false, 0.1},
        {"one key", {1, 18}, {1, 1}, {}, {}, 1, 1, false, 0.0},
        {"shared keys", {2, 1, 0, 5, 35, 1}, {33, 6, 4}, {1, 1, 0, 0, 1, 0}, {}, 2, 6, false, 0.2},
        {"room in the cache", {1, 4, 1, 40}, {9, 64, 5}, {1, 0, 1, 1}, {4, 50, 0}, 2, 8, true, 0.2},
        {"rows apart", {3, 21}, {9, 40}, {}, {}, 2, 10, true, 0.1, 6},
        {"rows apart by an odd number", {3, 4}, {9, 5}, {}, {}, 2, 10, false, 0.1, 3},
        {"largest head", {2, 9}, {34, 3}, {}, {}, 1, 256, false, 0.1},
        {"largest head of pairs", {2, 17}, {34, 3}, {}, {}, 1, 192, true, 0.0},
        {"190", {3}, {34}, {}, {}, 1, 190, false, 0.0},
        {"long", {70}, {150}, {}, {}, 1, 4, true, 0.5},
        {"one row a sequence", Lengths(70, 1), Lengths(70, 3), {}, {}, 1, 4, false, 0.0},
        {"one row, many keys", {1}, {700}, {}, {}, 1, 6, false, 0.1},
        {"all dropped but few", {4}, {9}, {}, {}, 1, 4, false, 0.95},
    };
    searches();
    for (size_t place = 0; place < cases.size(); ++place)
        for (const int plan : {CASE_FAST_ATTENTION_ROWS, CASE_FAST_ATTENTION_TILES}) {
            const Case &c = cases[place];
            check<float, int32_t>(c, plan, 3e-6);
            if (place % 3 == 0) check<double, int64_t>(c, plan, 1e-13);
            if (place % 3 == 1) check<__nv_bfloat16, int64_t>(c, plan, 8e-3);
            if (place % 3 == 2) check<__half, int32_t>(c, plan, 2e-3);
        }
    for (const size_t place : {0, 10, 17}) check<float, int32_t>(cases[place], CASE_FAST_ATTENTION_AUTO, 3e-6);
    for (const int plan : {CASE_FAST_ATTENTION_ROWS, CASE_FAST_ATTENTION_TILES}) damaged(plan), contained(plan);

    const std::vector<Block> blocks = {
        {"usual", {1, 1, 1}, {{7, 4, 9}, {3, 0, 40}}, {}, 20, 2, 10, 0.0, 0.0},
        {"the paper's", {1, 1}, {{40, 70}, {100, 33}, {3, 0}}, {}, 300, 2, 150, 0.1, 0.2},
        {"beams", {3, 0, 2}, {{5, 6, 7}}, {}, 12, 2, 4, 0.0, 0.1},
        {"shared keys", {1, 2, 1}, {{9, 3}, {2, 0}}, {1, 0, 1}, 13, 3, 5, 0.3, 0.3},
        {"primes", {11}, {{37}}, {}, 31, 1, 13, 0.0, 0.0},
        {"wide", {2}, {{5}}, {}, 700, 1, 256, 0.0, 0.0},
        {"no rows", {0, 0}, {{1, 2}}, {}, 6, 1, 2, 0.1, 0.1},
        {"no keys", {2, 1}, {{0, 0}}, {}, 6, 1, 2, 0.0, 0.0},
        {"one of all", {1}, {{1}}, {}, 1, 1, 1, 0.0, 0.0},
    };
    for (size_t place = 0; place < blocks.size(); ++place) {
        const Block &b = blocks[place];
        check_block<float, int32_t>(b, 2e-5);
        if (place % 3 == 0) check_block<double, int64_t>(b, 1e-12);
        if (place % 3 == 1) check_block<__nv_bfloat16, int32_t>(b, 4e-2);
        if (place % 3 == 2) check_block<__half, int64_t>(b, 4e-3);
    }
    damaged_block();
    check_drop<float>(), check_drop<double>(), check_drop<__half>(), check_drop<__nv_bfloat16>();
    std::printf("%d launches, %d failures\n", emulated_launches, failures);
    return failures != 0;
}
