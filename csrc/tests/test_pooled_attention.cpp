// Pooled attention on the CPU against plain loops in double, those of packed attention with the rows for every head: every vector width
// this machine has, 1 to 7 threads, ragged sequences, damaged inputs, outputs full of NaN. What ASan, UBSan and TSan run on.
#include "attention_checks.h"
#include "pooled_attention/pooled_attention.h"

namespace {

template <class T>
struct Pooled {
    Integers cu;
    List<T> query, rows, grad_out;  // dense
    case_fast_pooled_attention call;
    int64_t heads, dim, gap;
    bool heads_first;  // query and grad_out lie as (H, s, d)

    Pooled(const List<int64_t> &offsets, const Setting &s, int bits, int64_t spare, bool turned)
        : cu(offsets, bits), query(noise<T>((int64_t(offsets.size()) - 1) * s.row())), rows(noise<T>(offsets.back() * s.dim)),
          grad_out(noise<T>(int64_t(query.size()))), heads(s.heads), dim(s.dim), gap(spare), heads_first(turned) {
        const SeedParts seed = parts_of(s.seed);
        const int64_t sequences = int64_t(offsets.size()) - 1;
        call = {sequences, offsets.back(), s.heads, s.dim, dtype_of<T>, bits, cu.data(), stride(1), head(1), dim + gap, s.scale,
                s.dropout_p, seed.number, seed.at};
    }
    // From sequence to sequence and from head to head, of query (times 1) and of grad_out (times 2).
    int64_t stride(int64_t times) const { return heads_first ? dim + times * gap : heads * (dim + times * gap); }
    int64_t head(int64_t times) const {
        return heads_first ? (int64_t(cu.wide.size()) - 1) * (dim + times * gap) : dim + times * gap;
    }
    List<T> laid(const List<T> &x, int64_t times) const {
        const int64_t sequences = int64_t(cu.wide.size()) - 1;
        List<T> y(size_t(sequences * heads * (dim + times * gap)), nan_of<T>);
        for (int64_t s = 0; s < sequences; ++s)
            for (int64_t h = 0; h < heads; ++h)
                std::copy_n(x.begin() + (s * heads + h) * dim, dim, y.begin() + s * stride(times) + h * head(times));
        return y;
    }
    struct Results {
        List<T> out, lse, grad_query, grad_rows;
        bool operator==(const Results &o) const {
            return same_bits(out, o.out) && same_bits(lse, o.lse) && same_bits(grad_query, o.grad_query) && same_bits(grad_rows, o.grad_rows);
        }
    };
    Results blank(T fill) const {
        return {List<T>(query.size(), fill), List<T>(query.size() / size_t(dim), fill), List<T>(query.size(), fill), List<T>(rows.size(), fill)};
    }
    int forward(Results &r, int threads) const {
        const List<T> q = laid(query, 1), n = spread(rows, dim, dim + gap);
        return case_fast_pooled_attention_forward_cpu(&call, q.data(), n.data(), r.out.data(), r.lse.empty() ? nullptr : r.lse.data(), threads);
    }
    int backward(Results &r, int threads) const {
        const List<T> q = laid(query, 1), n = spread(rows, dim, dim + gap), g = laid(grad_out, 2);
        return case_fast_pooled_attention_backward_cpu(&call, q.data(), n.data(), r.out.data(), r.lse.data(), g.data(), stride(2), head(2),
                                                       r.grad_query.data(), r.grad_rows.data(), threads);
    }
    Results run(int threads, T fill) const {
        Results r = blank(fill);
        CHECK(forward(r, threads) == CASE_FAST_OK && backward(r, threads) == CASE_FAST_OK);
        return r;
    }
};

template <class T>
List<double> for_every_head(const List<T> &rows, int heads, int dim) {
    List<double> x;
    for (size_t j = 0; j < rows.size(); j += size_t(dim))
        for (int h = 0; h < heads; ++h) x.insert(x.end(), rows.begin() + int64_t(j), rows.begin() + int64_t(j) + dim);
    return x;
}

template <class T>
void compare(const List<int64_t> &cu, const Setting &s) {
    const Pooled<T> call(cu, s, below(2) ? 64 : 32, below(2) ? 0 : below(9), below(2));
    Layout x;
    x.cu_key = cu;
    for (int64_t i = 0; i < int64_t(cu.size()); ++i) x.cu_query.push_back(i);
    const auto query = doubles(call.query), rows = for_every_head(call.rows, s.heads, s.dim);
    const Attended want = attend(x, s, query, rows, rows);
    const Slopes slopes = attend_backward(x, s, query, rows, rows, want, doubles(call.grad_out));
    List<double> grad_rows(call.rows.size());
    for (size_t i = 0; i < slopes.key.size(); ++i)
        grad_rows[i / size_t(s.row()) * size_t(s.dim) + i % size_t(s.dim)] += slopes.key[i] + slopes.value[i];
    const auto got = call.run(1, nan_of<T>);
    check_close(got.out, want.out, "out");
    check_close(got.lse, want.lse, "lse");
    check_close(got.grad_query, slopes.query, "grad_query");
    check_close(got.grad_rows, grad_rows, "grad_rows");
    for (int threads : {2, 3, 7}) CHECK(call.run(threads, T(threads)) == got);
    auto without = call.blank(nan_of<T>);  // lse is not wanted
    without.lse.clear();
    CHECK(call.forward(without, 2) == CASE_FAST_OK && same_bits(without.out, got.out));
}

void test_pooled(const char *level) {
    int cases = 0;
    const auto both = [&](const List<int64_t> &cu, int heads, int dim) {
        const Setting s = {heads, dim, below(4) ? 1 / std::sqrt(double(dim)) : 0.2, below(2) ? 0.0 : 0.3, random_bits()};
        compare<float>(cu, s);
        compare<double>(cu, s);
        cases += 2;
    };
    for (int dim : {1, 7, 16, 64, 75, 150, 256, 300, 701})
        for (int heads : {1, 2, 3, 5}) both(offsets(1 + below(12), 1 + below(20)), heads, dim);
    for (int dim = 2; dim <= 40; ++dim) both(offsets(3, 9), 1 + int(below(3)), dim);
    for (int64_t rows = 0; rows < 40; ++rows) both({0, rows}, 2, 20);
    both({0}, 2, 5);                 // no sequence
    both({0, 0, 0, 0}, 2, 5);        // no row
    both({0, 0, 700, 700, 701}, 2, 33);
    both(offsets(430, 3), 2, 300);   // several threads
    both(offsets(3, 900), 2, 100);
    std::printf("%s: %d cases of pooled attention\n", level, cases);
}

// A sequence has the same bits alone and among others.
void test_alone_is_together() {
    const Setting s = {2, 37, 0.2, 0.0, 0};
    const List<int64_t> cu = offsets(9, 20);
    const Pooled<float> call(cu, s, 64, 0, false);
    const auto together = call.run(2, 0.0f);
    for (size_t b = 0; b + 1 < cu.size(); ++b) {
        Pooled<float> one({0, cu[b + 1] - cu[b]}, s, 32, 0, false);
        const int64_t at = int64_t(b) * s.row(), row = cu[b] * s.dim;
        std::copy_n(call.query.begin() + at, s.row(), one.query.begin());
        std::copy_n(call.grad_out.begin() + at, s.row(), one.grad_out.begin());
        std::copy_n(call.rows.begin() + row, one.rows.size(), one.rows.begin());
        const auto r = one.run(1, 0.0f);
        CHECK(std::equal(r.out.begin(), r.out.end(), together.out.begin() + at));
        CHECK(std::equal(r.grad_query.begin(), r.grad_query.end(), together.grad_query.begin() + at));
        CHECK(std::equal(r.grad_rows.begin(), r.grad_rows.end(), together.grad_rows.begin() + row));
    }
}

void test_large_scores() {
    const Setting s = {2, 16, 1.0, 0.0, 0};
    Pooled<float> call({0, 50, 53}, s, 64, 0, false);
    for (float &x : call.query) x *= 1e3f;  // scores of some thousands: one weight 1, the others 0
    const auto r = call.run(1, nan_of<float>);
    for (const auto *list : {&r.out, &r.lse, &r.grad_query, &r.grad_rows})
        for (float x : *list) CHECK(std::isfinite(x));
}

void test_nan_stays_in_its_sequence() {
    const Setting s = {2, 19, 0.3, 0.1, 3};
    for (int round = 0; round < 20; ++round) {
        const List<int64_t> cu = offsets(12, 9);
        Pooled<float> call(cu, s, 64, 0, below(2));
        const auto clean = call.run(2, 0.0f);
        const int64_t hit = below(12);
        const float bad[] = {nan_of<float>, INFINITY, -INFINITY};
        call.query[size_t(hit * s.row() + below(s.row()))] = bad[below(3)];
        for (int64_t j = cu[size_t(hit)]; j < cu[size_t(hit) + 1]; ++j) call.rows[size_t(j * s.dim + below(s.dim))] = bad[below(3)];
        const auto damaged = call.run(2, 0.0f);
        for (int64_t i = 0; i < int64_t(clean.out.size()); ++i)
            if (i / s.row() != hit) CHECK(clean.out[size_t(i)] == damaged.out[size_t(i)] && clean.grad_query[size_t(i)] == damaged.grad_query[size_t(i)]);
        for (int64_t i = 0; i < int64_t(clean.grad_rows.size()); ++i)
            if (i / s.dim < cu[size_t(hit)] || i / s.dim >= cu[size_t(hit) + 1]) CHECK(clean.grad_rows[size_t(i)] == damaged.grad_rows[size_t(i)]);
    }
}

void test_bad_pooled() {
    const Setting s = {2, 11, 0.3, 0.0, 0};
    for (int round = 0; round < 1000; ++round) {
        const List<int64_t> good = offsets(1 + below(6), 5);
        Pooled<float> call(good, s, below(2) ? 32 : 64, 0, below(2));
        const int64_t wrong[] = {-1, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max(), good.back() + 1};
        const size_t place = size_t(below(int64_t(good.size())));
        call.cu.wide[place] = wrong[below(4)];
        call.cu.narrow[place] = int32_t(call.cu.wide[place]);
        auto r = call.blank(3.0f);
        const auto before = r;
        CHECK(call.forward(r, 2) == CASE_FAST_BAD_CU && call.backward(r, 2) == CASE_FAST_BAD_CU && r == before);
    }
    Pooled<float> call({0, 3, 4}, s, 64, 0, false);
    auto r = call.blank(3.0f);
    const auto before = r;
    const auto refused = [&](auto change) {
        const auto kept = call.call;
        change(call.call);
        CHECK(call.forward(r, 1) == CASE_FAST_BAD_ARGUMENT && call.backward(r, 1) == CASE_FAST_BAD_ARGUMENT && r == before);
        call.call = kept;
    };
    refused([](case_fast_pooled_attention &c) { c.sequences = -1; });
    refused([](case_fast_pooled_attention &c) { c.rows = -1; });
    refused([](case_fast_pooled_attention &c) { c.heads = 0; });
    refused([](case_fast_pooled_attention &c) { c.dim = 0; });
    refused([](case_fast_pooled_attention &c) { c.dtype = CASE_FAST_BF16; });
    refused([](case_fast_pooled_attention &c) { c.index_bits = 16; });
    refused([](case_fast_pooled_attention &c) { c.cu = nullptr; });
    refused([](case_fast_pooled_attention &c) { c.query_stride = -1; });
    refused([](case_fast_pooled_attention &c) { c.query_head = -1; });
    refused([](case_fast_pooled_attention &c) { c.row_stride = -1; });
    refused([](case_fast_pooled_attention &c) { c.scale = NAN; });
    refused([](case_fast_pooled_attention &c) { c.dropout_p = 1.1; });
    refused([](case_fast_pooled_attention &c) { c.dropout_p = NAN; });
    CHECK(case_fast_pooled_attention_forward_cpu(nullptr, nullptr, nullptr, nullptr, nullptr, 1) == CASE_FAST_BAD_ARGUMENT);
    CHECK(case_fast_pooled_attention_forward_cpu(&call.call, nullptr, call.rows.data(), r.out.data(), nullptr, 1) == CASE_FAST_BAD_ARGUMENT);
    CHECK(case_fast_pooled_attention_forward_cpu(&call.call, call.query.data(), nullptr, r.out.data(), nullptr, 1) == CASE_FAST_BAD_ARGUMENT);
}

}  // namespace

int main() {
    test_bad_pooled();
    at_each_level([](const char *level) {
        test_pooled(level);
        test_alone_is_together();
        test_large_scores();
        test_nan_stays_in_its_sequence();
    });
}
