// The CUDA kernels of cross_attention, emulated on the CPU, against plain loops in double: every dtype and index
// type, ugly shapes, damaged lists; outputs and workspace NaN beforehand.
#define CASE_FAST_EMULATE
#include "cross_attention/cuda_kernels.cu"

#include "cross_attention/cuda.cu"

#include "attention_cuda_checks.h"

namespace {

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
    case_fast_cross_attention call = {
        int64_t(b.rows.size()), rows, sources,   b.width,         b.heads, b.dim, dtype<T>(), 8 * sizeof(I),
        cu_hidden.data(),       1e-5, b.dropout, b.output_dropout, nullptr};
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
        if (again) {  // the same seeds by a pointer
            call.seed_at = &ELSEWHERE;
            for (case_fast_source &s : given) s.seed ^= SEED ^ OTHER, s.output_seed ^= SEED ^ OTHER;
        }
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
    const case_fast_cross_attention call = {2, 2, 1, 6, 2, 2, CASE_FAST_F32, 32, cu_hidden, 1e-5, 0, 0, nullptr};
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
            expect(case_fast_cross_attention_drop_cuda(1000, dtype<T>(), p, add ? OTHER : SEED, add ? &ELSEWHERE : nullptr,
                                                       from.data(), add ? to.data() : nullptr, to.data(),
                                                       nullptr) == CASE_FAST_OK,
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

}  // namespace

int main() {
    const std::vector<Block> blocks = {
        {"usual", {1, 1, 1}, {{7, 4, 9}, {3, 0, 40}}, {}, 20, 2, 10, 0.0, 0.0},
        {"the paper's", {1, 1}, {{40, 70}, {100, 33}, {3, 0}}, {}, 300, 2, 150, 0.1, 0.2},
        {"beams", {3, 0, 2}, {{5, 6, 7}}, {}, 12, 2, 4, 0.0, 0.1},
        {"shared keys", {1, 2, 1}, {{9, 3}, {2, 0}}, {1, 0, 1}, 13, 3, 5, 0.3, 0.3},
        {"primes", {11}, {{37}}, {}, 31, 1, 13, 0.0, 0.0},
        {"pairs in weights of no fours", {3}, {{12}}, {}, 22, 1, 10, 0.1, 0.0},
        {"heads of 64", {2, 1}, {{9, 30}}, {}, 128, 2, 64, 0.1, 0.1},
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
