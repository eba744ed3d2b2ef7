// The cross-attention block on the CPU against plain loops in double: every vector width this machine has,
// 1 to 3 threads, ragged sequences, damaged inputs, outputs full of NaN. What ASan, UBSan and TSan run on.
#include "attention_checks.h"
#include "cross_attention/cross_attention.h"

namespace {

// c (rows, columns) = or += a b^T
void plain_product(int64_t rows, int64_t columns, int64_t depth, const double *a, int64_t a_row, int64_t a_depth, const double *b, int64_t b_column,
                   int64_t b_depth, double *c) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)
            for (int64_t k = 0; k < depth; ++k) c[i * columns + j] += a[i * a_row + k * a_depth] * b[j * b_column + k * b_depth];
}

const uint64_t elsewhere = 0xC3A5C85C97CB3127u;  // what half of the calls find at seed_at

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
        List<T> key, value, norm_weight, norm_bias, query_weight, output_weight, key_weight, value_weight;
        bool over_rows = false;  // key holds rows then, value nothing
        List<List<T> *> all() { return {&key, &value, &norm_weight, &norm_bias, &query_weight, &output_weight, &key_weight, &value_weight}; }
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
            const bool over = below(2);
            const int64_t projections = over ? s.row() * b.width : 0;
            a = {noise<T>(x.keys() * (over ? b.width : s.row())), noise<T>(over ? 0 : x.keys() * s.row()), noise<T>(b.width), noise<T>(b.width),
                 noise<T>(s.row() * b.width, size), noise<T>(b.width * s.row(), size), noise<T>(projections, size), noise<T>(projections, size),
                 over};
            for (const auto *list : {&x.cu_key, &x.key_of, &x.key_length}) lists.emplace_back(*list, bits);
            const Integers *const own = lists.data() + 1 + 3 * i;
            sources.push_back({x.sequences(), x.keys(), over ? b.width : s.row(), s.row(), own[0].data(), own[1].data(), own[2].data(), a.key.data(),
                               a.value.data(), a.norm_weight.data(), a.norm_bias.data(), a.query_weight.data(), a.output_weight.data(),
                               s.seed + i, s.seed + 100 + i, over ? a.key_weight.data() : nullptr, over ? a.value_weight.data() : nullptr});
        }
        call = {int64_t(cu_hidden.size()) - 1, cu_hidden.back(), int32_t(all.size()), b.width, s.heads, s.dim, dtype_of<T>, bits,
                lists[0].data(), b.eps, s.dropout_p, b.output_dropout_p, s.seed >> 63 ? nullptr : &elsewhere};
    }

    // Keys or values of a source.
    List<double> projected(size_t i, bool values) const {
        const Arrays &a = arrays[i];
        if (!a.over_rows) return doubles(values ? a.value : a.key);
        const int64_t keys = sources[i].keys, row = setting.attention.row(), width = setting.width;
        List<double> made(static_cast<size_t>(keys * row));
        plain_product(keys, row, width, doubles(a.key).data(), width, 1, doubles(values ? a.value_weight : a.key_weight).data(), width, 1, made.data());
        return made;
    }

    struct Results {
        List<T> out, saved, grad_hidden;
        List<Arrays> gradients;
        bool operator==(Results &o) {
            bool same = same_bits(out, o.out) && same_bits(saved, o.saved) && same_bits(grad_hidden, o.grad_hidden);
            for (size_t i = 0; i < gradients.size(); ++i)
                for (size_t j = 0; j < 8; ++j) same = same && same_bits(*gradients[i].all()[j], *o.gradients[i].all()[j]);
            return same;
        }
    };
    Results blank(T fill) {
        Results r = {List<T>(hidden.size(), fill), List<T>(size_t(case_fast_cross_attention_saved(&call, sources.data())), fill), List<T>(hidden.size(), fill), arrays};
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
            into.push_back({g.key.data(), g.value.data(), g.norm_weight.data(), g.norm_bias.data(), g.query_weight.data(), g.output_weight.data(),
                            g.key_weight.data(), g.value_weight.data()});
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
    const auto seed_of = [&](uint64_t seed) { return call.call.seed_at ? (seed ^ elsewhere) << 1 >> 1 : seed; };
    List<Kept> kept(layouts.size());
    List<double> state = doubles(call.hidden);
    for (size_t i = 0; i < layouts.size(); ++i) {
        Kept &k = kept[i];
        const auto &a = call.arrays[i];
        k.setting = b.attention;
        k.setting.scale = 1 / std::sqrt(double(b.attention.dim));
        k.setting.seed = seed_of(call.sources[i].seed);
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
        k.attended = attend(layouts[i], k.setting, k.query, call.projected(i, false), call.projected(i, true));
        List<double> projected(static_cast<size_t>(rows * width));
        plain_product(rows, width, row, k.attended.out.data(), row, 1, doubles(a.output_weight).data(), row, 1, projected.data());
        for (size_t j = 0; j < projected.size(); ++j) state[j] += factor(b.output_dropout_p, seed_of(call.sources[i].output_seed), int64_t(j), 0) * projected[j];
    }
    check_close(got.out, state, "out");

    List<double> grad = doubles(call.grad_out);
    for (size_t i = layouts.size(); i-- > 0;) {
        const Kept &k = kept[i];
        const auto &a = call.arrays[i];
        const auto &g = got.gradients[i];
        List<double> projected(grad), attended(size_t(rows * row)), normed(size_t(rows * width)), output_weight(size_t(width * row)),
            query_weight(size_t(row * width)), norm_weight(static_cast<size_t>(width)), norm_bias(static_cast<size_t>(width));
        for (size_t j = 0; j < grad.size(); ++j) projected[j] *= factor(b.output_dropout_p, seed_of(call.sources[i].output_seed), int64_t(j), 0);
        plain_product(rows, row, width, projected.data(), width, 1, doubles(a.output_weight).data(), 1, row, attended.data());
        plain_product(width, row, rows, projected.data(), 1, width, k.attended.out.data(), 1, row, output_weight.data());
        const Slopes slopes = attend_backward(layouts[i], k.setting, k.query, call.projected(i, false), call.projected(i, true), k.attended, attended);
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
        if (a.over_rows) {
            const int64_t keys = call.sources[i].keys;
            List<double> of_rows(static_cast<size_t>(keys * width)), key_weight(static_cast<size_t>(row * width)), value_weight(key_weight);
            plain_product(keys, width, row, slopes.key.data(), row, 1, doubles(a.key_weight).data(), 1, width, of_rows.data());
            plain_product(keys, width, row, slopes.value.data(), row, 1, doubles(a.value_weight).data(), 1, width, of_rows.data());
            plain_product(row, width, keys, slopes.key.data(), 1, row, doubles(a.key).data(), 1, width, key_weight.data());
            plain_product(row, width, keys, slopes.value.data(), 1, row, doubles(a.key).data(), 1, width, value_weight.data());
            check_close(g.key, of_rows, "grad rows", 4);
            check_close(g.key_weight, key_weight, "grad key_weight", 4);
            check_close(g.value_weight, value_weight, "grad value_weight", 4);
        } else {
            check_close(g.key, slopes.key, "grad key", 4);
            check_close(g.value, slopes.value, "grad value", 4);
        }
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
    gives(CASE_FAST_BAD_ARGUMENT, [](Block<float> &x) { x.sources[0].value_weight = x.sources[0].key_weight ? nullptr : x.hidden.data(); });
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
    test_bad_block();
    at_each_level(test_block);
}
