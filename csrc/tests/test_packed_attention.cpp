// Packed attention on the CPU against plain loops in double: every vector width this machine has,
// 1 to 3 threads, ragged sequences, damaged inputs, outputs full of NaN. What ASan, UBSan and TSan run on.
#include "attention_checks.h"
#include "packed_attention/packed_attention.h"

namespace {

template <class T>
struct Packed {
    Integers cu_query, cu_key, key_of, key_length;
    List<T> query, key, value, grad_out;
    case_fast_packed_attention call;
    int64_t row, gap;

    Packed(const Layout &x, const Setting &s, int bits, int64_t spare)
        : cu_query(x.cu_query, bits), cu_key(x.cu_key, bits), key_of(x.key_of, bits), key_length(x.key_length, bits),
          query(noise<T>(x.rows() * s.row())), key(noise<T>(x.keys() * s.row())), value(noise<T>(x.keys() * s.row())),
          grad_out(noise<T>(x.rows() * s.row())), row(s.row()), gap(spare) {
        const SeedParts seed = parts_of(s.seed);
        call = {x.batch(), x.rows(), x.sequences(), x.keys(), s.heads, s.dim, dtype_of<T>, bits, x.causal, cu_query.data(), cu_key.data(),
                key_of.data(), key_length.data(), row + gap, row + 2 * gap, row + 3 * gap, s.scale, s.dropout_p, seed.number, seed.at};
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
    refused([](case_fast_packed_attention &c) { c.batch = -1; });
    refused([](case_fast_packed_attention &c) { c.queries = -1; });
    refused([](case_fast_packed_attention &c) { c.keys = -1; });
    refused([](case_fast_packed_attention &c) { c.key_sequences = 2; });
    refused([](case_fast_packed_attention &c) { c.heads = 0; });
    refused([](case_fast_packed_attention &c) { c.dim = 0; });
    refused([](case_fast_packed_attention &c) { c.dtype = CASE_FAST_BF16; });
    refused([](case_fast_packed_attention &c) { c.index_bits = 16; });
    refused([](case_fast_packed_attention &c) { c.cu_query = nullptr; });
    refused([](case_fast_packed_attention &c) { c.cu_key = nullptr; });
    refused([](case_fast_packed_attention &c) { c.query_stride = 21; });
    refused([](case_fast_packed_attention &c) { c.value_stride = 21; });
    refused([](case_fast_packed_attention &c) { c.scale = NAN; });
    refused([](case_fast_packed_attention &c) { c.dropout_p = 1.1; });
    refused([](case_fast_packed_attention &c) { c.dropout_p = NAN; });
    CHECK(case_fast_packed_attention_forward_cpu(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 1) == CASE_FAST_BAD_ARGUMENT);
}

}  // namespace

int main() {
    test_bad_packed();
    at_each_level([](const char *level) {
        test_packed(level);
        test_alone_is_together();
        test_large_scores();
        test_nan_stays_in_its_sequence();
    });
}
