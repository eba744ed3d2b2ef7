// Segment sums on the CPU: checks, and the division into tasks. The arithmetic is in cpu_kernels.cpp.
//
// No row is sorted and nothing is allocated. Where segments lie end to end, as everywhere in a packed batch, each task of forward has
// a range of rows that begins and ends with a segment. Elsewhere it reads all of `segment` to find the rows of its own range of segments,
// or where segments are few, which need not be alike, its own block of columns of them all.
#include <algorithm>

#include "common/calls.h"
#include "common/indices.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "segment_sum/cpu.h"
#include "segment_sum/segment_sum.h"

namespace {

constexpr int64_t few_elements = 1 << 16;  // of x, up to which waking a thread costs more than it takes
constexpr int64_t least_columns = 64;       // of a task
constexpr int64_t least_segments = 16;      // of a task, so that tasks are alike

int check(const case_fast_segment_sum *call, const void *x, const void *out) {
    if (!call) return CASE_FAST_BAD_ARGUMENT;
    const case_fast_segment_sum &c = *call;
    const bool sizes = c.rows >= 0 && c.size >= 0 && c.width >= 0 && c.stride >= 0;
    const bool kinds = (c.dtype == CASE_FAST_F32 || c.dtype == CASE_FAST_F64) && (c.index_bits == 32 || c.index_bits == 64);
    if (!sizes || !kinds || (c.rows > 0 && !c.segment)) return CASE_FAST_BAD_ARGUMENT;
    if (c.width > 0 && ((c.rows > 0 && !x) || (c.size > 0 && !out))) return CASE_FAST_BAD_ARGUMENT;
    const bool good = c.index_bits == 64 ? all_within(static_cast<const int64_t *>(c.segment), c.rows, c.size)
                                         : all_within(static_cast<const int32_t *>(c.segment), c.rows, c.size);
    return good ? CASE_FAST_OK : CASE_FAST_BAD_SEGMENT;
}

// The tasks of forward.
template <class T, class I, class Kernel>
int share(const SegmentRows<T> &a, const I *segment, int64_t size, int64_t wanted, int threads, Kernel kernel) {
    if (std::is_sorted(segment, segment + a.rows)) {
        const auto row = [&](int64_t task) {  // the first of a segment, from task / wanted of the rows on
            int64_t at = a.rows * task / wanted;
            while (at > 0 && at < a.rows && segment[at] == segment[at - 1]) ++at;
            return at;
        };
        case_fast_parallel(threads, wanted, [&](int64_t task) {
            const int64_t from = row(task), to = row(task + 1);  // segments without rows go with the rows before them
            kernel(a, task ? (from < a.rows ? segment[from] : size) : 0, to < a.rows ? segment[to] : size, from, to, 0, a.width);
        });
        return CASE_FAST_OK;
    }
    const bool many = size >= least_segments * wanted;
    const int64_t blocks = many ? 1 : std::max<int64_t>(1, std::min(wanted, a.width / least_columns));
    const int64_t ranges = many ? wanted : 1;
    constexpr int64_t line = 64 / sizeof(T);
    const auto column = [&](int64_t block) { return block == blocks ? a.width : a.width * block / blocks / line * line; };
    case_fast_parallel(threads, blocks * ranges, [&](int64_t task) {
        const int64_t block = task % blocks, range = task / blocks;
        kernel(a, size * range / ranges, size * (range + 1) / ranges, 0, a.rows, column(block), column(block + 1));
    });
    return CASE_FAST_OK;
}

template <class T>
int forward(const case_fast_segment_sum &c, const void *x, void *out, int threads) {
    const SegmentRows<T> a = {c.rows, c.width, c.stride, c.segment, c.index_bits == 64, static_cast<const T *>(x), static_cast<T *>(out)};
    const auto kernel = CASE_FAST_WIDEST(segment_sum).template of<T>().forward;
    prepare_output(out, size_t(c.size) * size_t(c.width) * sizeof(T));
    const int64_t wanted = c.rows * c.width <= few_elements ? 1 : std::max(threads, 1);
    if (wanted == 1) {
        kernel(a, 0, c.size, 0, c.rows, 0, c.width);
        return CASE_FAST_OK;
    }
    return a.wide ? share(a, static_cast<const int64_t *>(c.segment), c.size, wanted, threads, kernel)
                  : share(a, static_cast<const int32_t *>(c.segment), c.size, wanted, threads, kernel);
}

}  // namespace

extern "C" int case_fast_segment_sum_forward_cpu(const case_fast_segment_sum *call, const void *x, void *out, int threads) {
    const int status = check(call, x, out);
    if (status != CASE_FAST_OK || call->width == 0) return status;
    return guarded(call->dtype, [&](auto like) { return forward<decltype(like)>(*call, x, out, threads); });
}
