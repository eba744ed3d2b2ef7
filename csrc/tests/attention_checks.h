// Attention of packed sequences by its definition, in double, and what the tests of packed and cross-attention share.
#pragma once

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
#include "common/types.h"
#include "levels.h"

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

[[maybe_unused]] Layout random_layout(int64_t batch, int64_t queries, int64_t keys, bool causal, bool shared, bool cut) {
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

}  // namespace
