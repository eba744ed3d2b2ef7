// What cpu.cpp hands to the row kernels, which are compiled once per instruction set. See cpu_rows.h for the kernels.
#pragma once

#include <cstdint>

template <class T>
struct Attention {
    int32_t heads, dim;
    bool causal;
    int64_t query_stride, key_stride, value_stride, out_stride;  // from row to row, of all heads
    int64_t first, longest;  // the weights' numbers for dropout: (first + row) * longest + place of the key
    T scale, kept_scale;                                         // kept_scale: 1 / (1 - dropout_p)
    uint64_t seed, drop_below;                                   // drop_below 0: no dropout
    const T *query, *key, *value;
    T *out, *lse;  // backward only reads them; lse NULL: not wanted

    // backward only
    const T *grad_out;
    T *grad_query, *grad_key, *grad_value;
    int64_t grad_query_stride, grad_key_stride, grad_value_stride;
};

// Consecutive query rows that attend to the same keys.
struct Segment {
    int64_t row, rows;   // rows of query
    int64_t key, keys;   // rows of key and value
    int64_t shift;       // causal: the i-th row sees the keys 0 .. i + shift
};

// Rows are done in blocks whose weights stay in the second cache. Elements of workspace for a segment of so many rows and keys:
__attribute__((always_inline)) static inline int64_t attention_row_block(int64_t rows, int64_t keys) {
    int64_t block = (int64_t(24) << 10) / (keys > 0 ? keys : 1);
    block = block < 15 ? 15 : block > 60 ? 60 : block;
    return rows < block ? rows : block;
}
__attribute__((always_inline)) static inline int64_t padded_keys(int64_t keys) { return (keys + 15) / 16 * 16; }
__attribute__((always_inline)) static inline int64_t attention_workspace(int64_t rows, int64_t keys, bool backward) {
    return (backward ? 2 : 1) * attention_row_block(rows, keys) * padded_keys(keys);
}

// Dropout of the elements of a matrix, by the number of each.
struct ElementDropout {
    uint64_t seed, drop_below;
    double kept_scale;
};

template <class T>
struct AttentionKernels {
    // One head of a segment. Forward: out, lse. Backward: grad_query; grad_key and grad_value are added to.
    void (*forward)(const Attention<T> &, const Segment &, int head, T *workspace);
    void (*backward)(const Attention<T> &, const Segment &, int head, T *workspace);

    // c (rows, columns) = a (rows, depth) b (columns, depth)^T
    void (*multiply_transposed)(int64_t rows, int64_t columns, int64_t depth, const T *a, int64_t a_stride, const T *b, int64_t b_stride,
                                T *c, int64_t c_stride);
    // c (rows, columns) = a b with b (depth, columns); a(i, k) = a[i * a_row + k * a_depth]
    void (*multiply)(int64_t rows, int64_t columns, int64_t depth, const T *a, int64_t a_row, int64_t a_depth, const T *b,
                     int64_t b_stride, T *c, int64_t c_stride);

    // out = x * weight + bias where x = (hidden - mean) / deviation; x and 1 / deviation are kept where asked for (not NULL)
    void (*normalise)(int64_t rows, int64_t width, const T *hidden, const T *weight, const T *bias, double eps, T *out, T *kept,
                      T *inverse_deviation);
    // grad += gradient of the normalised hidden rows; the gradients of weight and bias are summed into norm_grads (2, width)
    void (*normalise_backward)(int64_t rows, int64_t width, const T *kept, const T *inverse_deviation, const T *weight,
                               const T *grad_normed, T *grad, T *norm_grads);
    void (*scale_and_shift)(int64_t rows, int64_t width, const T *kept, const T *weight, const T *bias, T *out);
    // to = or += dropout(from), elements numbered from `first`
    void (*drop)(const ElementDropout &, int64_t first, int64_t count, const T *from, T *to, bool add);
};

struct CrossAttentionKernels {
    AttentionKernels<float> f32;
    AttentionKernels<double> f64;
};
extern const CrossAttentionKernels cross_attention_baseline;
#if defined(__x86_64__)
extern const CrossAttentionKernels cross_attention_avx2, cross_attention_avx512;
#endif
