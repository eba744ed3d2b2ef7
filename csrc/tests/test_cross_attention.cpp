// Packed attention and the cross-attention block on the CPU against plain loops in double: every vector width this machine has,
// 1 to 3 threads, ragged sequences, damaged inputs, outputs full of NaN. What ASan, UBSan and TSan run on.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "common/philox.h"
#include "common/simd.h"
#include "cross_attention/cross_attention.h"

namespace {

std::mt19937_64 random_bits(7);
int64_t below(int64_t n) { return int64_t(random_bits() % uint64_t(n)); }

template <class T>
using List = std::vector<T>;

template <class T>
List<T> noise(int64_t count, double size = 1) {
    List<T> x(static_cast<size_t>(count));
    for (T &value : x) value = T(size * (double(random_bits() >> 11) / double(1ull << 52) - 1));
    return x;
}
template <class T>
constexpr int32_t dtype_of = std::is_same_v<T, float> ? CASE_FAST_F32 : CASE_FAST_F64;
template <class T>
constexpr T nan_of = std::numeric_limits<T>::quiet_NaN();

// Offsets of sequences of 0 to 2 * length rows, some of them empty.
List<int64_t> offsets(int64_t sequences, int64_t length) {
    List<int64_t> cu = {0};
    for (int64_t s = 0; s < sequences; ++s) cu.push_back(cu.back() + (below(6) ? below(2 * length + 1) : 0));
    return cu;
}

// A list as int32 or int64, NULL where it is empty.
struct Integers {
    List<int64_t> wide;
    List<int32_t> narrow;
    bool is_wide;
    Integers(const List<int64_t> &list, int bits) : wide(list), narrow(list.begin(), list.end()), is_wide(bits == 64) {}
    const void *data() const {
        if (wide.empty()) return nullptr;
        return is_wide ? static_cast<const void *>(wide.data()) : narrow.data();
    }
};

// Which keys each query sequence has.
struct Layout {
    List<int64_t> cu_query, cu_key, key_of, key_length;
    bool causal = false;
    int64_t batch() const { return int64_t(cu_query.size()) - 1; }
    int64_t sequences() const { return int64_t(cu_key.size()) - 1; }
    int64_t rows() const { return cu_query.back(); }
    int64_t keys() const { return cu_key.back(); }
    int64_t longest() const {
        int64_t most = 0;
        for (size_t s = 1; s < cu_key.size(); ++s) most = std::max(most, cu_key[s] - cu_key[s - 1]);
        return most;
    }
    // body(query row, key row, place of the key)
    template <class Body>
    void each_pair(int64_t row, Body body) const {
        size_t s = 0;
        while (cu_query[s + 1] <= row) ++s;
        const size_t k = key_of.empty() ? s : size_t(key_of[s]);
        const int64_t count = key_length.empty() ? cu_key[k + 1] - cu_key[k] : key_length[k];
        const int64_t shift = causal ? count - (cu_query[s + 1] - cu_query[s]) : count;
        for (int64_t j = 0; j < count; ++j)
            if (j <= row - cu_query[s] + shift) body(cu_key[k] + j, j);
    }
};

Layout random_layout(int64_t batch, int64_t queries, int64_t keys, bool causal, bool shared, bool cut) {
    Layout x;
    shared = shared && batch > 0;
    x.causal = causal;
    x.cu_query = offsets(batch, queries);
    x.cu_key = causal && !shared && below(2) ? x.cu_query : offsets(shared ? batch / 2 + 1 : batch, keys);
    if (shared)
        for (int64_t s = 0; s < batch; ++s) x.key_of.push_back(below(2) && s ? x.key_of.back() : below(x.sequences()));
    if (cut)
        for (size_t s = 1; s < x.cu_key.size(); ++s) x.key_length.push_back(below(x.cu_key[s] - x.cu_key[s - 1] + 1));
    return x;
}

struct Setting {
    int heads, dim;
    double scale, dropout_p;
    uint64_t seed;
    int64_t row() const { return int64_t(heads) * dim; }
};

// The definition, in double.
struct Attended {
    List<double> out, lse, weights;  // weights: (rows, heads, longest), before dropout
};
double factor(double dropout_p, uint64_t seed, int64_t number, int head) {
    if (dropout_p == 0) return 1;
    return case_fast_keep(seed, number, head, case_fast_drop_below(dropout_p)) ? 1 / (1 - dropout_p) : 0;
}
Attended attend(const Layout &x, const Setting &s, const List<double> &query, const List<double> &key, const List<double> &value) {
    const int64_t longest = x.longest(), d = s.dim;
    Attended o = {List<double>(size_t(x.rows() * s.row())), List<double>(size_t(x.rows() * s.heads), -INFINITY),
                  List<double>(size_t(x.rows() * s.heads * longest))};
    for (int64_t i = 0; i < x.rows(); ++i)
        for (int h = 0; h < s.heads; ++h) {
            double *const w = o.weights.data() + (i * s.heads + h) * longest;
            double top = -INFINITY, sum = 0;
            x.each_pair(i, [&](int64_t k, int64_t j) {
                w[j] = 0;
                for (int64_t c = 0; c < d; ++c) w[j] += query[size_t(i * s.row() + h * d + c)] * key[size_t(k * s.row() + h * d + c)];
                w[j] *= s.scale;
                top = std::max(top, w[j]);
            });
            x.each_pair(i, [&](int64_t, int64_t j) { sum += w[j] = std::exp(w[j] - top); });
            if (sum > 0) o.lse[size_t(i * s.heads + h)] = top + std::log(sum);
            x.each_pair(i, [&](int64_t k, int64_t j) {
                w[j] /= sum;
                for (int64_t c = 0; c < d; ++c)
                    o.out[size_t(i * s.row() + h * d + c)] +=
                        factor(s.dropout_p, s.seed, i * longest + j, h) * w[j] * value[size_t(k * s.row() + h * d + c)];
            });
        }
    return o;
}
struct Slopes {
    List<double> query, key, value;
};
Slopes attend_backward(const Layout &x, const Setting &s, const List<double> &query, const List<double> &key, const List<double> &value,
                       const Attended &o, const List<double> &grad_out) {
    const int64_t longest = x.longest(), d = s.dim;
    Slopes g = {List<double>(query.size()), List<double>(key.size()), List<double>(value.size())};
    for (int64_t i = 0; i < x.rows(); ++i)
        for (int h = 0; h < s.heads; ++h) {
            const double *const w = o.weights.data() + (i * s.heads + h) * longest;
            List<double> slope(static_cast<size_t>(longest));
            double mean = 0;
            x.each_pair(i, [&](int64_t k, int64_t j) {
                const double kept = factor(s.dropout_p, s.seed, i * longest + j, h);
                for (int64_t c = 0; c < d; ++c) {
                    const size_t own = size_t(i * s.row() + h * d + c), other = size_t(k * s.row() + h * d + c);
                    slope[size_t(j)] += kept * grad_out[own] * value[other];
                    g.value[other] += kept * w[j] * grad_out[own];
                }
                mean += w[j] * slope[size_t(j)];
            });
            x.each_pair(i, [&](int64_t k, int64_t j) {
                const double by = s.scale * w[j] * (slope[size_t(j)] - mean);
                for (int64_t c = 0; c < d; ++c) {
                    const size_t own = size_t(i * s.row() + h * d + c), other = size_t(k * s.row() + h * d + c);
                    g.query[own] += by * key[other];
                    g.key[other] += by * query[own];
                }
            });
        }
    return g;
}

template <class T>
void check_close(const List<T> &got, const List<double> &want, const char *what, double times = 1) {
    CHECK(got.size() == want.size());
    double largest = 1;
    for (double x : want)
        if (std::isfinite(x)) largest = std::max(largest, std::fabs(x));
    for (size_t i = 0; i < want.size(); ++i) {
        const bool close = double(got[i]) == want[i] || std::fabs(double(got[i]) - want[i]) / largest < times * (sizeof(T) == 4 ? 2e-5 : 1e-13);
        if (!close) std::fprintf(stderr, "%s[%zu]: %g, not %g\n", what, i, double(got[i]), want[i]);
        CHECK(close);
    }
}
template <class T>
bool same_bits(const List<T> &a, const List<T> &b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}
// Rows of `row` elements, `stride` apart, and back.
template <class T>
List<T> spread(const List<T> &x, int64_t row, int64_t stride) {
    List<T> y(x.size() / size_t(row) * size_t(stride), nan_of<T>);
    for (size_t i = 0; i < x.size(); ++i) y[i / size_t(row) * size_t(stride) + i % size_t(row)] = x[i];
    return y;
}
template <class T>
List<T> gather(const List<T> &y, int64_t row, int64_t stride) {
    List<T> x(y.size() / size_t(stride) * size_t(row));
    for (size_t i = 0; i < x.size(); ++i) x[i] = y[i / size_t(row) * size_t(stride) + i % size_t(row)];
    return x;
}
template <class T>
List<double> doubles(const List<T> &x) {
    return List<double>(x.begin(), x.end());
}

// ------------------------------------------------------------------------------------------------------------ packed attention

template <class T>
struct Packed {
    Integers cu_query, cu_key, key_of, key_length;
    List<T> query, key, value, grad_out;
    case_fast_attention call;
    int64_t row, gap;

    Packed(const Layout &x, const Setting &s, int bits, int64_t spare)
        : cu_query(x.cu_query, bits), cu_key(x.cu_key, bits), key_of(x.key_of, bits), key_length(x.key_length, bits),
          query(noise<T>(x.rows() * s.row())), key(noise<T>(x.keys() * s.row())), value(noise<T>(x.keys() * s.row())),
          grad_out(noise<T>(x.rows() * s.row())), row(s.row()), gap(spare) {
        call = {x.batch(), x.rows(), x.sequences(), x.keys(), s.heads, s.dim, dtype_of<T>, bits, x.causal, cu_query.data(), cu_key.data(),
                key_of.data(), key_length.data(), row + gap, row + 2 * gap, row + 3 * gap, s.scale, s.dropout_p, s.seed};
    }
    struct Results {
        List<T> out, lse, grad_query, grad_key, grad_value;
        bool operator==(const Results &o) const {
            return same_bits(out, o.out) && same_bits(lse, o.lse) && same_bits(grad_query, o.grad_query) && same_bits(grad_key, o.grad_key) &&
                   same_bits(grad_value, o.grad_value);
        }
    };
    Results blank(T fill) const {
        return {List<T>(query.size(), fill), List<T>(size_t(call.queries * call.heads), fill),
                List<T>(size_t(call.queries * (row + gap)), fill), List<T>(size_t(call.keys * (row + 3 * gap)), fill),
                List<T>(size_t(call.keys * row), fill)};
    }
    int forward(Results &r, int threads) const {
        const List<T> q = spread(query, row, row + gap), k = spread(key, row, row + 2 * gap), v = spread(value, row, row + 3 * gap);
        return case_fast_packed_attention_forward_cpu(&call, q.data(), k.data(), v.data(), r.out.data(), r.lse.data(), threads);
    }
    int backward(Results &r, int threads) const {
        const List<T> q = spread(query, row, row + gap), k = spread(key, row, row + 2 * gap), v = spread(value, row, row + 3 * gap);
        return case_fast_packed_attention_backward_cpu(&call, q.data(), k.data(), v.data(), r.out.data(), r.lse.data(), grad_out.data(),
                                                       r.grad_query.data(), row + gap, r.grad_key.data(), row + 3 * gap,
                                                       r.grad_value.data(), row, threads);
    }
    Results run(int threads, T fill) const {
        Results r = blank(fill);
        CHECK(forward(r, threads) == CASE_FAST_OK && backward(r, threads) == CASE_FAST_OK);
        for (size_t i = 0; gap && i < r.grad_query.size(); i += size_t(row + gap))  // what lies between rows stays
            CHECK(std::memcmp(&r.grad_query[i + size_t(row)], &fill, sizeof(T)) == 0);
        r.grad_query = gather(r.grad_query, row, row + gap);
        r.grad_key = gather(r.grad_key, row, row + 3 * gap);
        return r;
    }
};

template <class T>
void compare_packed(const Layout &x, const Setting &s) {
    const Packed<T> call(x, s, below(2) ? 64 : 32, below(2) ? 0 : below(9));
    const auto query = doubles(call.query), key = doubles(call.key), value = doubles(call.value);
    const Attended want = attend(x, s, query, key, value);
    const Slopes slopes = attend_backward(x, s, query, key, value, want, doubles(call.grad_out));
    const auto got = call.run(1, nan_of<T>);
    check_close(got.out, want.out, "out");
    check_close(got.lse, want.lse, "lse");
    check_close(got.grad_query, slopes.query, "grad_query");
    check_close(got.grad_key, slopes.key, "grad_key");
    check_close(got.grad_value, slopes.value, "grad_value");
    for (int threads : {2, 3}) CHECK(call.run(threads, T(threads)) == got);
    auto without = call.blank(nan_of<T>);  // lse is not wanted
    without.lse.clear();
    const List<T> q = spread(call.query, call.row, call.row + call.gap), k = spread(call.key, call.row, call.row + 2 * call.gap),
                  v = spread(call.value, call.row, call.row + 3 * call.gap);
    CHECK(case_fast_packed_attention_forward_cpu(&call.call, q.data(), k.data(), v.data(), without.out.data(), nullptr, 2) == CASE_FAST_OK);
    CHECK(same_bits(without.out, got.out));
}

void test_packed(const char *level) {
    int cases = 0;
    const auto both = [&](const Layout &x, const Setting &s) {
        compare_packed<float>(x, s);
        compare_packed<double>(x, s);
        cases += 2;
    };
    const auto setting = [](int dim) {
        return Setting{1 + int(below(3)), dim, below(4) ? 1 / std::sqrt(double(dim)) : -0.2, below(2) ? 0.0 : 0.3, random_bits()};
    };
    for (int dim : {1, 7, 16, 64, 75, 150, 256, 300})
        for (bool causal : {false, true})
            for (bool shared : {false, true}) both(random_layout(1 + below(6), 1 + below(20), 1 + below(25), causal, shared, below(2)), setting(dim));
    for (int dim = 2; dim <= 40; ++dim) both(random_layout(3, 5, 9, below(2), below(2), below(2)), setting(dim));
    for (int64_t keys = 0; keys < 20; ++keys) {
        Layout x;
        x.cu_query = {0, 1 + keys % 7};
        x.cu_key = {0, keys};
        x.causal = keys % 3 == 0;
        both(x, setting(20));
    }
    both({{0}, {0}, {}, {}, false}, setting(5));                                    // no sequence
    both({{0, 0, 0}, {0, 3, 3}, {}, {}, true}, setting(5));                         // no query
    both({{0, 1, 2, 3, 4, 5}, {0, 40, 90}, {1, 1, 1, 0, 0}, {}, false}, setting(33));  // beams
    both(random_layout(40, 1, 30, false, false, false), setting(10));               // one query row each, or two or none
    both(random_layout(2, 100, 150, false, false, false), setting(24));             // several blocks of rows
    both(random_layout(1, 130, 130, true, false, false), setting(12));
    both({{0, 33}, {0, 2000}, {}, {}, false}, setting(9));                          // keys beyond the budget of a block
    std::printf("%s: %d cases of packed attention\n", level, cases);
}

// A sequence's rows have the same bits alone, among others, and one at a time as in decoding.
void test_alone_is_together() {
    const Setting s = {2, 37, 0.2, 0.0, 0};
    for (bool causal : {false, true}) {
        const Layout all = random_layout(7, 12, 30, causal, false, false);
        const Packed<float> call(all, s, 64, 0);
        const auto together = call.run(2, 0.0f);
        for (size_t b = 0; b < size_t(all.batch()); ++b) {
            const int64_t q0 = all.cu_query[b], q1 = all.cu_query[b + 1], k0 = all.cu_key[b], k1 = all.cu_key[b + 1];
            for (int64_t i = q0; i < q1; ++i) {
                const int64_t seen = causal ? std::max<int64_t>(0, std::min(k1 - k0, i - q0 + 1 + (k1 - k0) - (q1 - q0))) : k1 - k0;
                Packed<float> one({{0, 1}, {0, seen}, {}, {}, false}, s, 32, 0);
                std::copy_n(call.query.begin() + i * call.row, call.row, one.query.begin());
                std::copy_n(call.key.begin() + k0 * call.row, seen * call.row, one.key.begin());
                std::copy_n(call.value.begin() + k0 * call.row, seen * call.row, one.value.begin());
                auto r = one.blank(0.0f);
                CHECK(one.forward(r, 1) == CASE_FAST_OK);
                CHECK(std::equal(r.out.begin(), r.out.end(), together.out.begin() + i * call.row));
                CHECK(std::equal(r.lse.begin(), r.lse.end(), together.lse.begin() + i * s.heads));
            }
        }
    }
}

void test_large_scores() {
    const Setting s = {1, 16, 1.0, 0.0, 0};
    Packed<float> call({{0, 3}, {0, 50}, {}, {}, false}, s, 64, 0);
    for (float &x : call.query) x *= 1e3f;  // scores of some thousands: one weight 1, the others 0
    const auto r = call.run(1, nan_of<float>);
    for (const auto *list : {&r.out, &r.lse, &r.grad_query, &r.grad_key, &r.grad_value})
        for (float x : *list) CHECK(std::isfinite(x));
}

void test_nan_stays_in_its_sequence() {
    const Setting s = {2, 19, 0.3, 0.1, 3};
    for (int round = 0; round < 20; ++round) {
        const Layout x = random_layout(12, 6, 9, below(2), false, false);
        Packed<float> call(x, s, 64, 0);
        const auto clean = call.run(2, 0.0f);
        const size_t hit = size_t(below(x.batch()));
        const float bad[] = {nan_of<float>, INFINITY, -INFINITY};
        for (int64_t i = x.cu_query[hit]; i < x.cu_query[hit + 1]; ++i) call.query[size_t(i * call.row + below(call.row))] = bad[below(3)];
        for (int64_t i = x.cu_key[hit]; i < x.cu_key[hit + 1]; ++i) {
            call.key[size_t(i * call.row + below(call.row))] = bad[below(3)];
            call.value[size_t(i * call.row + below(call.row))] = bad[below(3)];
        }
        const auto damaged = call.run(2, 0.0f);
        const auto others_equal = [&](const List<float> &a, const List<float> &b, const List<int64_t> &cu) {
            for (size_t i = 0; i < a.size(); ++i) {
                const int64_t row = int64_t(i) / call.row;
                if (row < cu[hit] || row >= cu[hit + 1]) CHECK(a[i] == b[i]);
            }
        };
        others_equal(clean.out, damaged.out, x.cu_query);
        others_equal(clean.grad_query, damaged.grad_query, x.cu_query);
        others_equal(clean.grad_key, damaged.grad_key, x.cu_key);
        others_equal(clean.grad_value, damaged.grad_value, x.cu_key);
    }
}

void test_bad_packed() {
    const Setting s = {2, 11, 0.3, 0.0, 0};
    for (int round = 0; round < 1000; ++round) {
        const Layout x = random_layout(4, 5, 6, false, true, true);
        Packed<float> call(x, s, below(2) ? 32 : 64, 0);
        const int64_t wrong[] = {-1, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()};
        const int64_t bad = wrong[below(3)];
        int expected = 0;
        const auto damage = [&](Integers &list, size_t i, int64_t value, int status) {
            list.wide[i] = value;
            list.narrow[i] = int32_t(value);
            expected = status;
        };
        const auto some = [](const Integers &list) { return size_t(below(int64_t(list.wide.size()))); };
        switch (below(6)) {
            case 0: damage(call.cu_query, some(call.cu_query), bad, CASE_FAST_BAD_CU_QUERY); break;
            case 1: damage(call.cu_query, call.cu_query.wide.size() - 1, x.rows() + (below(2) ? 1 : -1), CASE_FAST_BAD_CU_QUERY); break;
            case 2: damage(call.cu_key, some(call.cu_key), bad, CASE_FAST_BAD_CU_KEY); break;
            case 3: damage(call.key_of, some(call.key_of), below(2) ? bad : x.sequences(), CASE_FAST_BAD_KEY_OF); break;
            case 4: damage(call.key_length, some(call.key_length), bad, CASE_FAST_BAD_KEY_LENGTH); break;
            case 5: damage(call.cu_query, 0, 1, CASE_FAST_BAD_CU_QUERY); break;
        }
        auto r = call.blank(3.0f);
        const auto before = r;
        CHECK(call.forward(r, 2) == expected && call.backward(r, 2) == expected && r == before);
    }
    const Layout x = random_layout(3, 5, 6, false, false, false);
    Packed<float> call({{0, 4}, {0, 3}, {}, {}, false}, s, 64, 0);
    auto r = call.blank(3.0f);
    const auto before = r;
    const auto refused = [&](auto change) {
        const auto kept = call.call;
        change(call.call);
        CHECK(call.forward(r, 1) == CASE_FAST_BAD_ARGUMENT && call.backward(r, 1) == CASE_FAST_BAD_ARGUMENT && r == before);
        call.call = kept;
    };
    refused([](case_fast_attention &c) { c.batch = -1; });
    refused([](case_fast_attention &c) { c.queries = -1; });
    refused([](case_fast_attention &c) { c.keys = -1; });
    refused([](case_fast_attention &c) { c.key_sequences = 2; });
    refused([](case_fast_attention &c) { c.heads = 0; });
    refused([](case_fast_attention &c) { c.dim = 0; });
    refused([](case_fast_attention &c) { c.dtype = CASE_FAST_BF16; });
    refused([](case_fast_attention &c) { c.index_bits = 16; });
    refused([](case_fast_attention &c) { c.cu_query = nullptr; });
    refused([](case_fast_attention &c) { c.cu_key = nullptr; });
    refused([](case_fast_attention &c) { c.query_stride = 21; });
    refused([](case_fast_attention &c) { c.value_stride = 21; });
    refused([](case_fast_attention &c) { c.scale = NAN; });
    refused([](case_fast_attention &c) { c.dropout_p = 1.1; });
    refused([](case_fast_attention &c) { c.dropout_p = NAN; });
    CHECK(case_fast_packed_attention_forward_cpu(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 1) == CASE_FAST_BAD_ARGUMENT);
}

// ------------------------------------------------------------------------------------------------------ cross-attention block

// c (rows, columns) = or += a b^T
void plain_product(int64_t rows, int64_t columns, int64_t depth, const double *a, int64_t a_row, int64_t a_depth, const double *b, int64_t b_column,
                   int64_t b_depth, double *c) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)
            for (int64_t k = 0; k < depth; ++k) c[i * columns + j] += a[i * a_row + k * a_depth] * b[j * b_column + k * b_depth];
}

struct BlockSetting {
    int width;
    Setting attention;
    double output_dropout_p, eps;
};

template <class T>
struct Block {
    BlockSetting setting;
    List<Layout> layouts;
    List<T> hidden, grad_out;
    struct Arrays {
        List<T> key, value, norm_weight, norm_bias, query_weight, output_weight;
        List<List<T> *> all() { return {&key, &value, &norm_weight, &norm_bias, &query_weight, &output_weight}; }
    };
    List<Arrays> arrays;
    List<Integers> lists;  // cu_hidden, then cu_key, key_of, key_length of each source
    case_fast_cross_attention call;
    List<case_fast_source> sources;

    Block(const BlockSetting &b, const List<Layout> &all, const List<int64_t> &cu_hidden, int bits) : setting(b), layouts(all) {
        const Setting &s = b.attention;
        hidden = noise<T>(cu_hidden.back() * b.width);
        grad_out = noise<T>(cu_hidden.back() * b.width);
        lists.reserve(1 + 3 * all.size());
        lists.emplace_back(cu_hidden, bits);
        arrays.resize(all.size());
        for (size_t i = 0; i < all.size(); ++i) {
            const Layout &x = all[i];
            Arrays &a = arrays[i];
            const double size = 1 / std::sqrt(double(b.width));
            a = {noise<T>(x.keys() * s.row()), noise<T>(x.keys() * s.row()), noise<T>(b.width), noise<T>(b.width),
                 noise<T>(s.row() * b.width, size), noise<T>(b.width * s.row(), size)};
            for (const auto *list : {&x.cu_key, &x.key_of, &x.key_length}) lists.emplace_back(*list, bits);
            const Integers *const own = lists.data() + 1 + 3 * i;
            sources.push_back({x.sequences(), x.keys(), s.row(), s.row(), own[0].data(), own[1].data(), own[2].data(), a.key.data(), a.value.data(),
                               a.norm_weight.data(), a.norm_bias.data(), a.query_weight.data(), a.output_weight.data(), s.seed + i,
                               s.seed + 100 + i});
        }
        call = {int64_t(cu_hidden.size()) - 1, cu_hidden.back(), int32_t(all.size()), b.width, s.heads, s.dim, dtype_of<T>, bits,
                lists[0].data(), b.eps, s.dropout_p, b.output_dropout_p};
    }

    struct Results {
        List<T> out, saved, grad_hidden;
        List<Arrays> gradients;
        bool operator==(Results &o) {
            bool same = same_bits(out, o.out) && same_bits(saved, o.saved) && same_bits(grad_hidden, o.grad_hidden);
            for (size_t i = 0; i < gradients.size(); ++i)
                for (size_t j = 0; j < 6; ++j) same = same && same_bits(*gradients[i].all()[j], *o.gradients[i].all()[j]);
            return same;
        }
    };
    Results blank(T fill) {
        Results r = {List<T>(hidden.size(), fill), List<T>(size_t(case_fast_cross_attention_saved(&call)), fill), List<T>(hidden.size(), fill), arrays};
        for (Arrays &g : r.gradients)
            for (List<T> *list : g.all()) std::fill(list->begin(), list->end(), fill);
        return r;
    }
    int forward(Results &r, int threads) const {
        return case_fast_cross_attention_forward_cpu(&call, sources.data(), hidden.data(), r.out.data(), r.saved.data(), threads);
    }
    int backward(Results &r, int threads) const {
        List<case_fast_source_gradients> into;
        for (Arrays &g : r.gradients)
            into.push_back({g.key.data(), g.value.data(), g.norm_weight.data(), g.norm_bias.data(), g.query_weight.data(), g.output_weight.data()});
        return case_fast_cross_attention_backward_cpu(&call, sources.data(), r.saved.data(), grad_out.data(), r.grad_hidden.data(), into.data(),
                                                      threads);
    }
    Results run(int threads, T fill) {
        Results r = blank(fill);
        CHECK(forward(r, threads) == CASE_FAST_OK && backward(r, threads) == CASE_FAST_OK);
        return r;
    }
};

template <class T>
void compare_block(const BlockSetting &b, const List<Layout> &layouts, const List<int64_t> &cu_hidden) {
    Block<T> call(b, layouts, cu_hidden, below(2) ? 64 : 32);
    const int64_t rows = cu_hidden.back(), width = b.width, row = b.attention.row();
    auto got = call.run(1, nan_of<T>);

    struct Kept {
        List<double> normalised, inverse, normed, query;
        Attended attended;
        Setting setting;
    };
    List<Kept> kept(layouts.size());
    List<double> state = doubles(call.hidden);
    for (size_t i = 0; i < layouts.size(); ++i) {
        Kept &k = kept[i];
        const auto &a = call.arrays[i];
        k.setting = b.attention;
        k.setting.scale = 1 / std::sqrt(double(b.attention.dim));
        k.setting.seed = call.sources[i].seed;
        k.normalised = k.normed = state;
        for (int64_t r = 0; r < rows; ++r) {
            double mean = 0, square = 0;
            for (int64_t c = 0; c < width; ++c) mean += state[size_t(r * width + c)] / double(width);
            for (int64_t c = 0; c < width; ++c) square += std::pow(state[size_t(r * width + c)] - mean, 2) / double(width);
            k.inverse.push_back(1 / std::sqrt(square + b.eps));
            for (int64_t c = 0; c < width; ++c) {
                const size_t at = size_t(r * width + c);
                k.normalised[at] = (state[at] - mean) * k.inverse.back();
                k.normed[at] = k.normalised[at] * a.norm_weight[size_t(c)] + a.norm_bias[size_t(c)];
            }
        }
        k.query.assign(size_t(rows * row), 0);
        plain_product(rows, row, width, k.normed.data(), width, 1, doubles(a.query_weight).data(), width, 1, k.query.data());
        k.attended = attend(layouts[i], k.setting, k.query, doubles(a.key), doubles(a.value));
        List<double> projected(static_cast<size_t>(rows * width));
        plain_product(rows, width, row, k.attended.out.data(), row, 1, doubles(a.output_weight).data(), row, 1, projected.data());
        for (size_t j = 0; j < projected.size(); ++j) state[j] += factor(b.output_dropout_p, call.sources[i].output_seed, int64_t(j), 0) * projected[j];
    }
    check_close(got.out, state, "out");

    List<double> grad = doubles(call.grad_out);
    for (size_t i = layouts.size(); i-- > 0;) {
        const Kept &k = kept[i];
        const auto &a = call.arrays[i];
        const auto &g = got.gradients[i];
        List<double> projected(grad), attended(size_t(rows * row)), normed(size_t(rows * width)), output_weight(size_t(width * row)),
            query_weight(size_t(row * width)), norm_weight(static_cast<size_t>(width)), norm_bias(static_cast<size_t>(width));
        for (size_t j = 0; j < grad.size(); ++j) projected[j] *= factor(b.output_dropout_p, call.sources[i].output_seed, int64_t(j), 0);
        plain_product(rows, row, width, projected.data(), width, 1, doubles(a.output_weight).data(), 1, row, attended.data());
        plain_product(width, row, rows, projected.data(), 1, width, k.attended.out.data(), 1, row, output_weight.data());
        const Slopes slopes = attend_backward(layouts[i], k.setting, k.query, doubles(a.key), doubles(a.value), k.attended, attended);
        plain_product(rows, width, row, slopes.query.data(), row, 1, doubles(a.query_weight).data(), 1, width, normed.data());
        plain_product(row, width, rows, slopes.query.data(), 1, row, k.normed.data(), 1, width, query_weight.data());
        for (int64_t r = 0; r < rows; ++r) {
            double mean = 0, slope = 0;
            for (int64_t c = 0; c < width; ++c) {
                const size_t at = size_t(r * width + c);
                norm_weight[size_t(c)] += normed[at] * k.normalised[at];
                norm_bias[size_t(c)] += normed[at];
                mean += normed[at] * a.norm_weight[size_t(c)] / double(width);
                slope += normed[at] * a.norm_weight[size_t(c)] * k.normalised[at] / double(width);
            }
            for (int64_t c = 0; c < width; ++c) {
                const size_t at = size_t(r * width + c);
                grad[at] += (normed[at] * a.norm_weight[size_t(c)] - mean - k.normalised[at] * slope) * k.inverse[size_t(r)];
            }
        }
        check_close(g.key, slopes.key, "grad key", 4);
        check_close(g.value, slopes.value, "grad value", 4);
        check_close(g.norm_weight, norm_weight, "grad norm_weight", 4);
        check_close(g.norm_bias, norm_bias, "grad norm_bias", 4);
        check_close(g.query_weight, query_weight, "grad query_weight", 4);
        check_close(g.output_weight, output_weight, "grad output_weight", 4);
    }
    check_close(got.grad_hidden, grad, "grad_hidden", 4);

    for (int threads : {2, 3, 40}) {  // 40: more than there are columns in a tile
        auto again = call.run(threads, T(threads));
        CHECK(again == got);
        auto decoding = call.blank(T(0));
        CHECK(case_fast_cross_attention_forward_cpu(&call.call, call.sources.data(), call.hidden.data(), decoding.out.data(), nullptr, threads) ==
              CASE_FAST_OK);
        CHECK(same_bits(decoding.out, got.out));
    }
}

List<Layout> random_sources(int64_t count, const List<int64_t> &cu_hidden, int64_t keys) {
    List<Layout> all;
    for (int64_t i = 0; i < count; ++i) {
        Layout x = random_layout(int64_t(cu_hidden.size()) - 1, 1, keys, false, below(2), below(2));
        x.cu_query = cu_hidden;
        all.push_back(x);
    }
    return all;
}

void test_block(const char *level) {
    int cases = 0;
    const auto both = [&](int64_t sources, const List<int64_t> &cu_hidden, int64_t keys, int width, int dim, double dropout_p) {
        const BlockSetting b = {width, {1 + int(below(3)), dim, 0, dropout_p, random_bits()}, dropout_p / 2, 1e-5};
        const auto layouts = random_sources(sources, cu_hidden, keys);
        compare_block<float>(b, layouts, cu_hidden);
        compare_block<double>(b, layouts, cu_hidden);
        cases += 2;
    };
    for (int round = 0; round < 12; ++round)
        both(below(4), offsets(1 + below(5), 6), 1 + below(20), 2 + int(below(70)), 1 + int(below(40)), round % 2 ? 0.2 : 0.0);
    both(3, {0}, 5, 8, 4, 0.0);                                     // no sequence
    both(2, {0, 0, 0}, 5, 8, 4, 0.1);                               // no row
    both(3, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, 12, 33, 19, 0.0);       // decoding
    both(2, {0, 70, 71, 150}, 9, 21, 10, 0.3);                      // several tasks
    both(1, {0, 3, 8}, 100, 300, 150, 0.1);
    both(3, {0, 1, 2, 3}, 12, 150, 150, 0.0);                       // columns are shared out: decoding
    both(2, {0, 0, 4, 7}, 9, 203, 150, 0.2);
    std::printf("%s: %d cases of the block\n", level, cases);
}

void test_bad_block() {
    const List<int64_t> cu = {0, 2, 5};
    const BlockSetting b = {12, {2, 5, 0, 0.1, 1}, 0.1, 1e-5};
    List<Layout> layouts(2);
    for (Layout &x : layouts) x = {cu, {0, 3, 7}, {1, 0}, {2, 4}, false};
    Block<float> call(b, layouts, cu, 64);
    auto r = call.blank(3.0f);
    auto before = r;
    const auto gives = [&](int status, auto change) {
        Block<float> damaged = call;
        damaged.call.cu_hidden = damaged.lists[0].data();
        for (size_t i = 0; i < 2; ++i) {
            damaged.sources[i].cu_key = damaged.lists[1 + 3 * i].data();
            damaged.sources[i].key_of = damaged.lists[2 + 3 * i].data();
            damaged.sources[i].key_length = damaged.lists[3 + 3 * i].data();
        }
        change(damaged);
        CHECK(damaged.forward(r, 2) == status && damaged.backward(r, 2) == status && r == before);
    };
    gives(CASE_FAST_BAD_CU_QUERY, [](Block<float> &x) { x.lists[0].wide[1] = 6; });
    gives(CASE_FAST_BAD_CU_KEY, [](Block<float> &x) { x.lists[1].wide[2] = 8; });
    gives(CASE_FAST_BAD_CU_KEY + 16, [](Block<float> &x) { x.lists[4].wide[1] = -1; });
    gives(CASE_FAST_BAD_KEY_OF + 16, [](Block<float> &x) { x.lists[5].wide[1] = 2; });
    gives(CASE_FAST_BAD_KEY_LENGTH, [](Block<float> &x) { x.lists[3].wide[0] = 4; });
    gives(CASE_FAST_BAD_ARGUMENT + 16, [](Block<float> &x) { x.sources[1].query_weight = nullptr; });
    gives(CASE_FAST_BAD_ARGUMENT, [](Block<float> &x) { x.sources[0].key_stride = 9; });
    gives(CASE_FAST_BAD_ARGUMENT, [](Block<float> &x) { x.sources[0].key = nullptr; });
    gives(CASE_FAST_BAD_ARGUMENT, [](Block<float> &x) { x.call.width = 0; });
    gives(CASE_FAST_BAD_ARGUMENT, [](Block<float> &x) { x.call.rows = -1; });
    gives(CASE_FAST_BAD_ARGUMENT, [](Block<float> &x) { x.call.eps = -1; });
    gives(CASE_FAST_BAD_ARGUMENT, [](Block<float> &x) { x.call.output_dropout_p = 2; });
    gives(CASE_FAST_BAD_ARGUMENT, [](Block<float> &x) { x.call.cu_hidden = nullptr; });
    CHECK(case_fast_cross_attention_forward_cpu(nullptr, nullptr, nullptr, nullptr, nullptr, 1) == CASE_FAST_BAD_ARGUMENT);
}

}  // namespace

int main() {
    test_bad_packed();
    test_bad_block();
    unsetenv("CASE_FAST_SIMD");
    const case_fast_simd widest = case_fast_simd_level();
    for (const case_fast_simd level : {CASE_FAST_SCALAR, CASE_FAST_NEON, CASE_FAST_AVX2, CASE_FAST_AVX512}) {
        setenv("CASE_FAST_SIMD", case_fast_simd_name(level), 1);
        if (level > widest || case_fast_simd_level() != level) continue;
        test_packed(case_fast_simd_name(level));
        test_block(case_fast_simd_name(level));
        test_alone_is_together();
        test_large_scores();
        test_nan_stays_in_its_sequence();
    }
}
