// Attention of packed sequences, and the cross-attention block of a decoder over several sources. Plain C; no torch, no Python.
//
// Packed attention: query row i of sequence s, place p of n, attends in each head to the m keys of key sequence key_of[s].
//   score(i, j) = scale * q_i . k_j                   causal: only j <= p + m - n, so that the ends of both align
//   lse_i = log sum_j e^score(i, j)
//   out_i = sum_j dropout(e^(score(i, j) - lse_i)) v_j
// Without any key: out 0, lse -infinity. Dropout: case_fast_keep of common/philox.h with e = i * longest + j, where i is the
// row of `query`, j the place of the key in its sequence, and `longest` the greatest difference of two neighbours in cu_key.
//
// Cross-attention block: in order, for each source,
//   hidden += dropout(attention(layer_norm(hidden) query_weight^T, key, value, scale dim^-0.5) output_weight^T)
// where a sequence without keys in a source adds 0 for it. Dropout of the block's output: case_fast_keep with
// e = row * width + column, h = 0 and key `output_seed`.
//
// On the CPU: F32 and F64. Offsets and indices are checked before they are used, and on an error nothing has been written.
// Outputs are written whole, whatever stood there. The results are the same bits for any number of threads, and those of a
// sequence do not depend on the sequences beside it (but for dropout).
#pragma once

#include <stdint.h>

#include "common/types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct case_fast_attention {
    int64_t batch, queries;                           // query sequences, rows of query
    int64_t key_sequences, keys;                      // key sequences, rows of key and value
    int32_t heads, dim, dtype, index_bits, causal;    // index_bits 32 or 64: of all four lists
    const void *cu_query, *cu_key;                    // (batch + 1), (key_sequences + 1)
    const void *key_of;                               // (batch), or NULL: s, and key_sequences == batch
    const void *key_length;                           // (key_sequences), or NULL: only the first so many of its rows are keys
    int64_t query_stride, key_stride, value_stride;   // elements from one row of all heads to the next, at least heads * dim
    double scale, dropout_p;                          // dropout_p in [0, 1], on the softmax weights
    uint64_t seed;
} case_fast_attention;

// query (Tq, H, D), key and value (Tk, H, D) with the strides above; out (Tq, H, D) contiguous; lse (Tq, H), kept for backward
// (NULL: not wanted).
int case_fast_packed_attention_forward_cpu(const case_fast_attention *call, const void *query, const void *key,
                                           const void *value, void *out, void *lse, int threads);

// out, grad_out (Tq, H, D) contiguous. The gradients have the strides given here.
int case_fast_packed_attention_backward_cpu(const case_fast_attention *call, const void *query, const void *key,
                                            const void *value, const void *out, const void *lse, const void *grad_out,
                                            void *grad_query, int64_t grad_query_stride, void *grad_key,
                                            int64_t grad_key_stride, void *grad_value, int64_t grad_value_stride, int threads);

// One source of a decoder layer, for one head count, dim and width.
typedef struct case_fast_source {
    int64_t key_sequences, keys, key_stride, value_stride;  // as in case_fast_attention
    const void *cu_key, *key_of, *key_length;
    const void *key, *value;                                // (Tk, H, D)
    const void *norm_weight, *norm_bias;                    // (width)
    const void *query_weight, *output_weight;               // (H * D, width), (width, H * D), contiguous
    uint64_t seed, output_seed;                             // of dropout_p, of output_dropout_p
} case_fast_source;

typedef struct case_fast_cross_attention {
    int64_t batch, rows;                                   // sequences, rows of hidden
    int32_t sources, width, heads, dim, dtype, index_bits;
    const void *cu_hidden;                                 // (batch + 1)
    double eps, dropout_p, output_dropout_p;
} case_fast_cross_attention;

// Elements of the dtype that backward needs from forward: for each source, end to end, the normalised rows (T, width) before
// weight and bias, 1 / deviation (T), query (T, H, D), attended (T, H, D) and lse (T, H).
int64_t case_fast_cross_attention_saved(const case_fast_cross_attention *call);

// hidden, out (T, width) contiguous, not the same. saved: as above, or NULL where no backward follows.
// Of source i (from 0), a status of its own arrays is that status + 16 i.
int case_fast_cross_attention_forward_cpu(const case_fast_cross_attention *call, const case_fast_source *sources,
                                          const void *hidden, void *out, void *saved, int threads);

typedef struct case_fast_source_gradients {
    void *key, *value;                  // (Tk, H, D) contiguous
    void *norm_weight, *norm_bias;      // (width)
    void *query_weight, *output_weight; // as the weights
} case_fast_source_gradients;

// grad_out, grad_hidden (T, width).
int case_fast_cross_attention_backward_cpu(const case_fast_cross_attention *call, const case_fast_source *sources,
                                           const void *saved, const void *grad_out, void *grad_hidden,
                                           const case_fast_source_gradients *gradients, int threads);

#ifdef __cplusplus
}
#endif
