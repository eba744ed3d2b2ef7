// The kernel of segment sums, for the instruction set that this is compiled for.
//
// Rows are taken as they come, a run of one segment at a time: its sums stay in registers. Where segments lie end to end, as
// everywhere in a packed batch, a run is a segment, and its row of `out` is written once.
#include "common/vector.h"
#include "segment_sum/cpu.h"

namespace {

constexpr int most_vectors = 8;  // of a row, summed at once

// out (count vectors) += the rows of x, one after the other; the last vector goes through `tail`.
template <class T, int count, bool tailed>
CASE_FAST_INLINE void add_block(const T *x, int64_t rows, int64_t stride, T *out, Tail<T> tail) {
    constexpr int width = Lanes<T>::width;
    const auto get = [tail](const T *from, int v) __attribute__((always_inline)) {
        return tailed && v == count - 1 ? load(from + v * width, tail) : load(from + v * width);
    };
    Vector<T> sum[count];
    for (int v = 0; v < count; ++v) sum[v] = get(out, v);
    for (int64_t i = 0; i < rows; ++i, x += stride)
        for (int v = 0; v < count; ++v) sum[v] += get(x, v);
    for (int v = 0; v < count; ++v) {
        if (tailed && v == count - 1)
            store(out + v * width, sum[v], tail);
        else
            store(out + v * width, sum[v]);
    }
}

template <class T>
CASE_FAST_INLINE void add_rows(const T *x, int64_t rows, int64_t stride, int64_t columns, T *out, Tail<T> tail) {
    constexpr int width = Lanes<T>::width;
    int64_t j = 0;
    for (; j + most_vectors * width <= columns; j += most_vectors * width)
        add_block<T, most_vectors, false>(x + j, rows, stride, out + j, tail);
    const int64_t whole = (columns - j) / width;
    if (whole > 0) {
        with_constant<most_vectors - 1>(whole, [&](auto n) __attribute__((always_inline)) {
            add_block<T, decltype(n)::value, false>(x + j, rows, stride, out + j, tail);
        });
        j += whole * width;
    }
    if (j < columns) add_block<T, 1, true>(x + j, rows, stride, out + j, tail);
}

template <class T, class I>
CASE_FAST_INLINE void forward_of(const SegmentRows<T> &a, int64_t begin, int64_t end, int64_t from, int64_t to, int64_t first,
                                 int64_t last) {
    const I *const segment = static_cast<const I *>(a.segment);
    const T *const x = a.x;
    T *const out = a.out;
    const int64_t width = a.width, stride = a.stride, columns = last - first;
    const Tail<T> tail = make_tail<T>(int(columns % Lanes<T>::width));
    for (int64_t s = begin; s < end; ++s)
        for (int64_t j = first; j < last; ++j) out[s * width + j] = T(0);
    for (int64_t i = from, next; i < to; i = next) {
        const int64_t s = segment[i];
        for (next = i + 1; next < to && segment[next] == s;) ++next;
        if (s < begin || s >= end) continue;
        if (width == 1) {
            T sum = out[s];
            for (int64_t k = i; k < next; ++k) sum += x[k * stride];
            out[s] = sum;
        } else {
            add_rows(x + i * stride + first, next - i, stride, columns, out + s * width + first, tail);
        }
    }
}

template <class T>
void forward(const SegmentRows<T> &a, int64_t begin, int64_t end, int64_t from, int64_t to, int64_t first, int64_t last) {
    a.wide ? forward_of<T, int64_t>(a, begin, end, from, to, first, last)
           : forward_of<T, int32_t>(a, begin, end, from, to, first, last);
}

}  // namespace

const KernelsOf<SegmentKernels> CASE_FAST_KERNELS_HERE(segment_sum) = {{forward<float>}, {forward<double>}};
