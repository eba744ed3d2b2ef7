// The linear cross-entropy on the CPU: checks, the division of the vocabulary into chunks, threads. The arithmetic is in cpu_kernels.cpp.
//
// A chunk is some blocks of words with all rows. Chunks give sums of e^z and parts of grad_hidden, which are added in their order,
// and own their words' gradients. They depend on shapes alone, whoever computes them: hence the same bits for any number of threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/calls.h"
#include "common/indices.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "linear_cross_entropy/cpu.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace {

constexpr int64_t most_chunks = 64;
constexpr int64_t forward_rows = 16 * block_rows, backward_rows = 2 * block_rows;  // at once; for more, weight is packed again
constexpr int64_t part_bytes = int64_t(8) << 20;  // of all parts of grad_hidden
constexpr int64_t top_rows = 96;                  // of a tile when the most probable words are looked for

// ---- checks

template <class I>
int check_contents(const case_fast_linear_cross_entropy &c) {
    if (c.cu_target && !rises(static_cast<const I *>(c.cu_target), c.rows + 1, c.targets)) return CASE_FAST_BAD_CU_TARGET;
    if (!all_within(static_cast<const I *>(c.target), c.targets, c.vocabulary)) return CASE_FAST_BAD_TARGET;
    return CASE_FAST_OK;
}

bool sizes_are_good(int64_t rows, int64_t vocabulary, int32_t dim, int32_t dtype) {
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    return rows >= 0 && vocabulary >= 1 && vocabulary <= most && dim >= 1 && dim <= most / 2048 &&
           (dtype == CASE_FAST_F32 || dtype == CASE_FAST_F64);
}

int check(const case_fast_linear_cross_entropy *call, std::initializer_list<const void *> arrays, const void *of_targets) {
    if (!call || !sizes_are_good(call->rows, call->vocabulary, call->dim, call->dtype)) return CASE_FAST_BAD_ARGUMENT;
    const case_fast_linear_cross_entropy &c = *call;
    if (c.targets < 0 || (c.index_bits != 32 && c.index_bits != 64)) return CASE_FAST_BAD_ARGUMENT;
    if (!c.cu_target && c.targets != c.rows) return CASE_FAST_BAD_ARGUMENT;
    if (c.targets > 0 && (!c.target || !of_targets)) return CASE_FAST_BAD_ARGUMENT;
    if (c.rows > 0 && missing(arrays)) return CASE_FAST_BAD_ARGUMENT;
    return c.index_bits == 64 ? check_contents<int64_t>(c) : check_contents<int32_t>(c);
}

// ---- division

// Bounds of `chunks` ranges of whole blocks of words.
std::vector<int64_t> chunk_bounds(int64_t vocabulary, int64_t chunks) {
    const int64_t blocks = (vocabulary + block_words - 1) / block_words;
    chunks = std::max<int64_t>(1, std::min(chunks, blocks));
    std::vector<int64_t> bounds;
    for (int64_t i = 0; i <= chunks; ++i) bounds.push_back(std::min(vocabulary, i * blocks / chunks * block_words));
    return bounds;
}

// Calls run(task, worker) for each task; those of one worker do not overlap.
template <class Run>
void share(int workers, int64_t tasks, Run run) {
    std::atomic<int64_t> next{0};
    case_fast_parallel(workers, workers, [&](int64_t worker) {
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run(task, worker);
    });
}

template <class T>
std::vector<Scratch<T>> scratches(const VocabularyKernels<T> &kernel, Workspace &workspace, int64_t dim, int count) {
    int64_t elements = 0;
    kernel.scratch(nullptr, dim, &elements);
    std::vector<Scratch<T>> found;
    for (int i = 0; i < count; ++i)
        found.push_back(kernel.scratch(workspace.take<T>(elements), dim, &elements));
    return found;
}

// The targets of each row, as 64-bit integers.
struct Targets {
    const int64_t *target, *begin;
    Targets(const case_fast_linear_cross_entropy &c, Workspace &workspace) {
        int64_t *const words = workspace.take<int64_t>(c.targets), *const first = workspace.take<int64_t>(c.rows + 1);
        const auto read = [&](const void *from, int64_t i) {
            return c.index_bits == 64 ? static_cast<const int64_t *>(from)[i] : static_cast<const int32_t *>(from)[i];
        };
        for (int64_t i = 0; i < c.targets; ++i) words[i] = read(c.target, i);
        for (int64_t i = 0; i <= c.rows; ++i) first[i] = c.cu_target ? read(c.cu_target, i) : i;
        target = words;
        begin = first;
    }
};

// Row panels of hidden where they are many, by blocks of rows.
template <class T>
void pack_rows(const VocabularyKernels<T> &kernel, VocabularyRows<T> &a, T *panels, int threads) {
    if (a.few) return;
    a.hidden_rows = panels;
    case_fast_parallel(threads, (a.rows + block_rows - 1) / block_rows, [&](int64_t i) {
        const int64_t first = i * block_rows, count = std::min(block_rows, a.rows - first);
        kernel.pack_rows(a.hidden + first * a.dim, count, a.dim, panels + kernel.row_panels(first, a.dim));
    });
}

// The sums of a row over all chunks, in their order; `stride` apart.
template <class T>
RowSum<T> join(const RowSum<T> *sums, int64_t chunks, int64_t stride) {
    RowSum<T> whole = sums[0];
    for (int64_t i = 1; i < chunks; ++i) {
        const RowSum<T> &part = sums[i * stride];
        if (part.top > whole.top) {
            if (whole.sum != 0) whole.sum *= std::exp(double(whole.top) - double(part.top));
            whole.top = part.top;
            if (!whole.nan) whole.word = part.word;
            whole.sum += part.sum;
        } else if (part.sum != 0) {
            whole.sum += part.sum * (part.top == whole.top ? 1.0 : std::exp(double(part.top) - double(whole.top)));
        }
        if (part.nan && !whole.nan) {
            whole.nan = true;
            whole.word = part.word;
        }
    }
    return whole;
}

template <class T>
void clear(RowSum<T> *sums, int64_t count, int64_t word) {
    for (int64_t i = 0; i < count; ++i) sums[i] = {0.0, word, -std::numeric_limits<T>::infinity(), false};
}

// ---- forward

template <class T>
int forward(const case_fast_linear_cross_entropy &c, const T *hidden, const T *weight, const T *bias, T *nll, int64_t *prediction, T *state,
            T *kept, int threads) {
    const VocabularyKernels<T> &kernel = CASE_FAST_KERNELS(linear_cross_entropy, T, c.bf16);
    Workspace workspace;
    const Targets targets(c, workspace);
    const auto bounds = chunk_bounds(c.vocabulary, most_chunks);
    const int64_t chunks = int64_t(bounds.size()) - 1, most = even_block(c.rows, forward_rows);
    const int workers = int(std::max<int64_t>(1, std::min<int64_t>(threads, chunks)));
    const auto scratch = scratches(kernel, workspace, c.dim, workers);
    RowSum<T> *const sums = workspace.take<RowSum<T>>(chunks * most);
    T *const panels = workspace.take<T>(c.rows <= few_rows ? 0 : kernel.row_panels(most, c.dim));
    if (kept) prepare_output(kept, size_t(c.rows) * size_t(c.vocabulary) * sizeof(T));
    for (int64_t first = 0; first < c.rows; first += most) {
        VocabularyRows<T> a = {};
        a.rows = std::min(most, c.rows - first);
        a.vocabulary = c.vocabulary;
        a.dim = c.dim;
        a.hidden = hidden + first * c.dim;
        a.weight = weight;
        a.bias = bias;
        a.few = c.rows <= few_rows;
        a.target = targets.target;
        a.target_begin = targets.begin + first;
        a.target_end = targets.begin + first + 1;
        a.kept = kept;
        a.kept_rows = c.rows;
        a.kept_first = first;
        a.target_score = nll;
        pack_rows(kernel, a, panels, threads);
        share(workers, chunks, [&](int64_t chunk, int64_t worker) {
            const int64_t begin = bounds[size_t(chunk)], end = bounds[size_t(chunk) + 1];
            clear(sums + chunk * a.rows, a.rows, begin);
            kernel.forward(a, begin, end, sums + chunk * a.rows, scratch[size_t(worker)]);
        });
        for (int64_t i = 0; i < a.rows; ++i) {
            const RowSum<T> sum = join(sums + i, chunks, a.rows);
            const T log_sum = T(std::log(sum.sum));
            prediction[first + i] = sum.word;
            state[2 * (first + i)] = sum.top;
            state[2 * (first + i) + 1] = log_sum;
            for (int64_t m = a.target_begin[i]; m < a.target_end[i]; ++m) nll[m] = (sum.top - nll[m]) + log_sum;
        }
    }
    return CASE_FAST_OK;
}

// ---- backward

template <class T>
void zero(T *array, int64_t count) {
    if (array) std::memset(array, 0, size_t(count) * sizeof(T));
}

template <class T>
int backward(const case_fast_linear_cross_entropy &c, const T *hidden, const T *weight, const T *bias, const T *state, const T *kept,
             const T *grad_nll, T *grad_hidden, T *grad_weight, T *grad_bias, int threads) {
    const VocabularyKernels<T> &kernel = CASE_FAST_KERNELS(linear_cross_entropy, T, c.bf16);
    Workspace workspace;
    const Targets targets(c, workspace);

    int64_t *const active = workspace.take<int64_t>(c.rows);  // the rows that have a gradient
    int64_t count = 0;
    for (int64_t row = 0; row < c.rows; ++row) {
        bool any = false;
        for (int64_t m = targets.begin[row]; m < targets.begin[row + 1]; ++m) any |= grad_nll[m] != 0;
        if (any) active[count++] = row;
    }
    const int64_t most = even_block(count, backward_rows), part = most * c.dim;
    int64_t chunks = most_chunks;
    if (grad_hidden && part) chunks = std::max<int64_t>(1, std::min(chunks, part_bytes / (part * int64_t(sizeof(T)))));
    const auto bounds = chunk_bounds(c.vocabulary, chunks);
    chunks = int64_t(bounds.size()) - 1;
    const int workers = int(std::max<int64_t>(1, std::min<int64_t>(threads, chunks)));
    const auto scratch = scratches(kernel, workspace, c.dim, workers);
    T *const parts = workspace.take<T>(grad_hidden ? chunks * part : 0);
    T *const gathered = workspace.take<T>(count < c.rows ? part : 0);
    const bool few = c.rows <= few_rows;  // as in forward, however many are active: scores in other bits could exceed `top`
    T *const row_panels = workspace.take<T>(kept || few ? 0 : kernel.row_panels(most, c.dim));
    T *const column_panels = workspace.take<T>(grad_weight ? kernel.column_panels(most, c.dim) : 0);
    T *const numbers = workspace.take<T>(3 * most);
    int64_t *const offsets = workspace.take<int64_t>(2 * most);
    if (grad_weight) prepare_output(grad_weight, size_t(c.vocabulary) * size_t(c.dim) * sizeof(T));

    if (count == 0) {
        zero(grad_weight, c.vocabulary * c.dim);
        zero(grad_bias, c.vocabulary);
    }
    if (count < c.rows) zero(grad_hidden, c.rows * c.dim);
    for (int64_t first = 0; first < count; first += most) {
        VocabularyRows<T> a = {};
        a.rows = std::min(most, count - first);
        a.vocabulary = c.vocabulary;
        a.dim = c.dim;
        a.weight = weight;
        a.bias = bias;
        a.few = few;
        a.target = targets.target;
        const int64_t *const rows = active + first;
        T *const top = numbers, *const log_sum = numbers + most, *const scale = numbers + 2 * most;
        int64_t *const begin = offsets, *const end = offsets + most;
        for (int64_t i = 0; i < a.rows; ++i) {
            begin[i] = targets.begin[rows[i]];
            end[i] = targets.begin[rows[i] + 1];
            top[i] = state[2 * rows[i]];
            log_sum[i] = state[2 * rows[i] + 1];
            scale[i] = 0;
            for (int64_t m = begin[i]; m < end[i]; ++m) scale[i] += grad_nll[m];
            if (count < c.rows) std::memcpy(gathered + i * c.dim, hidden + rows[i] * c.dim, size_t(c.dim) * sizeof(T));
        }
        a.hidden = count < c.rows ? gathered : hidden + first * c.dim;
        a.target_begin = begin;
        a.target_end = end;
        a.kept_scores = kept;
        a.kept_rows = c.rows;
        a.kept_row = rows;
        a.top = top;
        a.log_sum = log_sum;
        a.scale = scale;
        a.grad_nll = grad_nll;
        a.grad_weight = grad_weight;
        a.grad_bias = grad_bias;
        a.more = first > 0;
        if (!kept) pack_rows(kernel, a, row_panels, threads);
        if (grad_weight) {
            a.hidden_columns = column_panels;
            const int64_t block = even_block(a.rows, block_rows);
            for (int64_t i = 0; i < a.rows; i += block)
                kernel.pack_columns(a.hidden + i * c.dim, std::min(block, a.rows - i), c.dim,
                                    column_panels + kernel.column_panels(i, c.dim));
        }
        share(workers, chunks, [&](int64_t chunk, int64_t worker) {
            kernel.backward(a, bounds[size_t(chunk)], bounds[size_t(chunk) + 1], grad_hidden ? parts + chunk * part : nullptr,
                            scratch[size_t(worker)]);
        });
        if (!grad_hidden) continue;
        case_fast_parallel(threads, (a.rows + 15) / 16, [&](int64_t group) {
            for (int64_t i = 16 * group; i < std::min(a.rows, 16 * group + 16); ++i) {
                T *const to = grad_hidden + rows[i] * c.dim;
                std::memcpy(to, parts + i * c.dim, size_t(c.dim) * sizeof(T));
                for (int64_t chunk = 1; chunk < chunks; ++chunk) {
                    const T *const from = parts + chunk * part + i * c.dim;
                    for (int64_t k = 0; k < c.dim; ++k) to[k] += from[k];
                }
            }
        });
    }
    return CASE_FAST_OK;
}

// ---- the most probable words

template <class T>
struct Candidate {
    T score;
    int32_t word;
};

// Whether a comes first: the greater score, NaN counting as greatest; the lower word among equals.
template <class T>
bool precedes(const Candidate<T> &a, const Candidate<T> &b) {
    const bool a_nan = a.score != a.score, b_nan = b.score != b.score;
    if (a_nan != b_nan) return a_nan;
    if (!a_nan && a.score != b.score) return a.score > b.score;
    return a.word < b.word;
}

// The best words of a row that one worker has seen, and others beside them.
template <class T>
struct Best {
    Candidate<T> *found;
    int64_t count;
    T limit;  // what the k-th best had when there were last too many: none below it matters

    void add(const T *scores, int64_t words, int64_t begin, int64_t k, int64_t enough) {
        for (int64_t i = 0; i < words; ++i)
            if (!(scores[i] < limit)) found[count++] = {scores[i], int32_t(begin + i)};
        if (count <= enough) return;
        std::nth_element(found, found + k - 1, found + count, precedes<T>);
        count = k;
        limit = found[k - 1].score;
    }
};

template <class T>
int top(int64_t rows, int64_t vocabulary, int64_t k, int32_t dim, const T *hidden, const T *weight, const T *bias,
        T *log_probability, int64_t *word, int threads) {
    Workspace workspace;
    const VocabularyKernels<T> &kernel = CASE_FAST_KERNELS(linear_cross_entropy, T, false);
    const auto bounds = chunk_bounds(vocabulary, most_chunks);
    const int64_t chunks = int64_t(bounds.size()) - 1;
    const int workers = int(std::max<int64_t>(1, std::min<int64_t>(threads, chunks)));
    const int64_t enough = std::max(2 * k, k + 32), room = enough + block_words;
    const int64_t most = std::min<int64_t>(rows, 10 * top_rows);  // rows at once
    const auto scratch = scratches(kernel, workspace, dim, workers);
    RowSum<T> *const sums = workspace.take<RowSum<T>>(chunks * most);
    T *const highest = workspace.take<T>(workers * top_rows);
    const bool many = k > 1;  // else the sums know the word
    Candidate<T> *const found = workspace.take<Candidate<T>>(many ? workers * most * room : 0);
    Best<T> *const best = workspace.take<Best<T>>(many ? workers * most : 0);
    std::vector<Candidate<T>> all(many ? size_t(workers * enough) : 0);
    for (int64_t first = 0; first < rows; first += most) {
        VocabularyRows<T> a = {};
        a.rows = std::min(most, rows - first);
        a.vocabulary = vocabulary;
        a.dim = dim;
        a.hidden = hidden + first * dim;
        a.weight = weight;
        a.bias = bias;
        a.few = true;
        for (int64_t i = 0; many && i < workers * most; ++i) best[i] = {found + i * room, 0, -std::numeric_limits<T>::infinity()};
        share(workers, chunks, [&](int64_t chunk, int64_t worker) {
            const Scratch<T> &s = scratch[size_t(worker)];
            T *const peak = highest + worker * top_rows;
            RowSum<T> *const own = sums + chunk * a.rows;
            clear(own, a.rows, bounds[size_t(chunk)]);
            for (int64_t begin = bounds[size_t(chunk)]; begin < bounds[size_t(chunk) + 1]; begin += block_words) {
                const int64_t end = std::min(begin + block_words, bounds[size_t(chunk) + 1]);
                for (int64_t from = 0; from < a.rows; from += top_rows) {
                    const int64_t count = std::min(top_rows, a.rows - from);
                    kernel.scores(a, from, count, begin, end, own + from, peak, s);
                    for (int64_t i = 0; many && i < count; ++i) {
                        Best<T> &row = best[worker * most + from + i];
                        if (!(peak[i] < row.limit)) row.add(s.tile + i * tile_stride, end - begin, begin, k, enough);
                    }
                }
            }
        });
        for (int64_t i = 0; i < a.rows; ++i) {
            const RowSum<T> sum = join(sums + i, chunks, a.rows);
            const T log_sum = T(std::log(sum.sum));
            const int64_t to = (first + i) * k;
            if (!many) {
                word[to] = sum.word;
                log_probability[to] = (sum.top - sum.top) - log_sum;
                continue;
            }
            auto last = all.begin();
            for (int worker = 0; worker < workers; ++worker) {
                const Best<T> &part = best[worker * most + i];
                last = std::copy(part.found, part.found + part.count, last);
            }
            std::partial_sort(all.begin(), all.begin() + k, last, precedes<T>);
            for (int64_t j = 0; j < k; ++j) {
                const Candidate<T> &chosen = all[size_t(j)];
                word[to + j] = chosen.word;
                log_probability[to + j] = (chosen.score - sum.top) - log_sum;
            }
        }
    }
    return CASE_FAST_OK;
}

}  // namespace

extern "C" int case_fast_linear_cross_entropy_forward_cpu(const case_fast_linear_cross_entropy *call, const void *hidden, const void *weight,
                                                     const void *bias, void *nll, int64_t *prediction, void *state, void *kept,
                                                     int threads) {
    const int status = check(call, {hidden, weight, bias, prediction, state}, nll);
    if (status != CASE_FAST_OK) return status;
    return guarded(call->dtype, [&](auto like) {
        using T = decltype(like);
        return forward<T>(*call, static_cast<const T *>(hidden), static_cast<const T *>(weight), static_cast<const T *>(bias),
                          static_cast<T *>(nll), prediction, static_cast<T *>(state), static_cast<T *>(kept), threads);
    });
}

extern "C" int case_fast_linear_cross_entropy_backward_cpu(const case_fast_linear_cross_entropy *call, const void *hidden, const void *weight,
                                                      const void *bias, const void *state, const void *kept,
                                                      const void *grad_nll, void *grad_hidden, void *grad_weight,
                                                      void *grad_bias, int threads) {
    const int status = check(call, {hidden, weight, bias, state}, grad_nll);
    if (status != CASE_FAST_OK) return status;
    return guarded(call->dtype, [&](auto like) {
        using T = decltype(like);
        return backward<T>(*call, static_cast<const T *>(hidden), static_cast<const T *>(weight), static_cast<const T *>(bias),
                           static_cast<const T *>(state), static_cast<const T *>(kept), static_cast<const T *>(grad_nll),
                           static_cast<T *>(grad_hidden), static_cast<T *>(grad_weight), static_cast<T *>(grad_bias), threads);
    });
}

extern "C" int case_fast_top_words_cpu(int64_t rows, int64_t vocabulary, int64_t k, int32_t dim, int32_t dtype,
                                            const void *hidden, const void *weight, const void *bias, void *log_probability,
                                            int64_t *word, int threads) {
    if (!sizes_are_good(rows, vocabulary, dim, dtype) || k < 1 || k > vocabulary) return CASE_FAST_BAD_ARGUMENT;
    if (rows > 0 && (!hidden || !weight || !bias || !log_probability || !word)) return CASE_FAST_BAD_ARGUMENT;
    return guarded(dtype, [&](auto like) {
        using T = decltype(like);
        return top<T>(rows, vocabulary, k, dim, static_cast<const T *>(hidden), static_cast<const T *>(weight),
                      static_cast<const T *>(bias), static_cast<T *>(log_probability), word, threads);
    });
}
