// The CUDA kernels of packed_attention, emulated on the CPU, against plain loops in double: both plans, every dtype and index
// type, ugly shapes, damaged lists; outputs and workspace NaN beforehand.
#define CASE_FAST_EMULATE
#include "packed_attention/cuda_kernels.cu"

#include "packed_attention/cuda.cu"

#include "attention_cuda_checks.h"

namespace {

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

template <class T, class I>
Results run(const Problem<T> &p, const Lists &lists, int plan, int32_t *flag, bool &sound, uint64_t seed = SEED,
            const uint64_t *seed_at = nullptr) {
    using A = Sum<T>;
    const Case &c = p.c;
    const auto narrow = [](const std::vector<int64_t> &x) { return std::vector<I>(x.begin(), x.end()); };
    const auto cu_query = narrow(lists.cu_query), cu_key = narrow(lists.cu_key), key_of = narrow(lists.key_of),
               key_length = narrow(lists.key_length);
    const int inner = c.heads * c.dim;
    const case_fast_packed_attention call = {int64_t(c.rows.size()),
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
                                      seed,
                                      seed_at};
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
    const Results again =
        dtype<T>() == CASE_FAST_F32 ? run<T, I>(p, lists_of(p), plan, &flag, again_sound, OTHER, &ELSEWHERE) : found;
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

void ways_to_read() {
    const auto read_at_once = [](int dim, int numbers) {
        return with_rows<float>(dim, numbers, [](auto held) { return decltype(held)::VEC; });
    };
    expect(read_at_once(4, 4) == 4 && read_at_once(128, 4) == 4 && read_at_once(132, 4) == 2 && read_at_once(192, 4) == 2 &&
               read_at_once(256, 4) == 1 && read_at_once(150, 2) == 2 && read_at_once(128, 1) == 1,
           "numbers read at once");
    alignas(16) const char memory[64] = {};
    expect(at_once(4, {12, 300, 0}, {memory, memory + 32, nullptr}) == 4 && at_once(4, {12, 6}, {memory}) == 2 &&
               at_once(4, {12, 301}, {memory}) == 1 && at_once(4, {12}, {memory, memory + 8}) == 2 &&
               at_once(2, {12}, {memory + 8}) == 4 && at_once(4, {12}, {memory + 4}) == 1,
           "how rows lie");
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
        {"largest head of fours", {2, 17}, {34, 3}, {}, {}, 1, 128, true, 0.1},
        {"fours in rows apart by pairs", {5, 3}, {9, 40}, {}, {}, 2, 12, false, 0.0, 2},
        {"long", {70}, {150}, {}, {}, 1, 4, true, 0.5},
        {"one row a sequence", Lengths(70, 1), Lengths(70, 3), {}, {}, 1, 4, false, 0.0},
        {"one row, many keys", {1}, {700}, {}, {}, 1, 6, false, 0.1},
        {"all dropped but few", {4}, {9}, {}, {}, 1, 4, false, 0.95},
    };
    searches();
    ways_to_read();
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
    std::printf("%d launches, %d failures\n", emulated_launches, failures);
    return failures != 0;
}
