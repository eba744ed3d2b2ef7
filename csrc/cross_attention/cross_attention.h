// The cross-attention block of a decoder over several sources, and its gradients. Plain C; no torch, no Python.
//
// In order, for each source,
//   hidden += dropout(attention(layer_norm(hidden) query_weight^T, key, value, scale dim^-0.5) output_weight^T)
// with the attention of packed_attention.h, where a sequence without keys in a source adds 0 for it. Keys and values may be given as
// the rows n_j that they are projections of, key = W_key,h n_j and value = W_value,h n_j of a head: they are then not made, since
// query . key = (W_key,h^T query) . n_j and sum_j p_j value_j = W_value,h (sum_j p_j n_j), projections of the rows of hidden. Dropout of the block's output:
// case_fast_keep with e = row * width + column, h = 0 and key `output_seed`.
//
// On the CPU: F32 and F64. Offsets and indices are checked before they are used, and on an error nothing has been written.
// Outputs are written whole, whatever stood there. The results are the same bits for any number of threads, and those of a
// sequence do not depend on the sequences beside it (but for dropout).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "common/types.h"

#ifdef __cplusplus
extern "C" {
#endif

// One source of a decoder layer, for one head count, dim and width.
typedef struct case_fast_source {
    int64_t key_sequences, keys, key_stride, value_stride;  // as in case_fast_packed_attention
    const void *cu_key, *key_of, *key_length;
    const void *key, *value;                                // (Tk, H, D); with weights below key are rows (Tk, width), value is not read
    const void *norm_weight, *norm_bias;                    // (width)
    const void *query_weight, *output_weight;               // (H * D, width), (width, H * D), contiguous
    uint64_t seed, output_seed;                             // of dropout_p, of output_dropout_p
    const void *key_weight, *value_weight;                  // (H, D, width) contiguous, both or neither; on CUDA neither
} case_fast_source;

typedef struct case_fast_cross_attention {
    int64_t batch, rows;                                   // sequences, rows of hidden
    int32_t sources, width, heads, dim, dtype, index_bits;
    const void *cu_hidden;                                 // (batch + 1)
    double eps, dropout_p, output_dropout_p;
    const uint64_t *seed_at;                               // of case_fast_seed, with each seed of the sources; or NULL
} case_fast_cross_attention;

// Elements of the dtype that backward needs from forward: for each source, end to end, the normalised rows (T, width) before
// weight and bias, 1 / deviation (T), query (T, H, D), attended (T, H, D) and lse (T, H); of one over rows also W_key^T query and the
// weighted rows, (T, H, width) each.
int64_t case_fast_cross_attention_saved(const case_fast_cross_attention *call, const case_fast_source *sources);

// hidden, out (T, width) contiguous, not the same. saved: as above, or NULL where no backward follows.
// Of source i (from 0), a status of its own arrays is that status + 16 i.
int case_fast_cross_attention_forward_cpu(const case_fast_cross_attention *call, const case_fast_source *sources,
                                          const void *hidden, void *out, void *saved, int threads);

typedef struct case_fast_source_gradients {
    void *key, *value;                  // (Tk, H, D) contiguous; of a source over rows key is (Tk, width), value is not written
    void *norm_weight, *norm_bias;      // (width)
    void *query_weight, *output_weight; // as the weights
    void *key_weight, *value_weight;    // of a source over rows
} case_fast_source_gradients;

// grad_out, grad_hidden (T, width).
int case_fast_cross_attention_backward_cpu(const case_fast_cross_attention *call, const case_fast_source *sources,
                                           const void *saved, const void *grad_out, void *grad_hidden,
                                           const case_fast_source_gradients *gradients, int threads);

// ---- on CUDA devices: device pointers and a stream

size_t case_fast_cross_attention_workspace_cuda(const case_fast_cross_attention *call);

// For few rows, without backward: two launches a source, one more with dropout of weights. Rows < 65536; width * 4 bytes
// (8 for float64) must fit shared memory beside the rest: width <= 4096.
int case_fast_cross_attention_forward_cuda(const case_fast_cross_attention *call, const case_fast_source *sources,
                                           const void *hidden, void *out, void *workspace, size_t workspace_bytes, int32_t *flag,
                                           void *stream);

// to = base + dropout(from), element by element, with case_fast_keep of (case_fast_seed(output_seed, seed_at), e, 0); base NULL: 0.
// base may be to.
int case_fast_cross_attention_drop_cuda(int64_t count, int dtype, double output_dropout_p, uint64_t output_seed,
                                        const uint64_t *seed_at, const void *from, const void *base, void *to, void *stream);

#ifdef __cplusplus
}
#endif
