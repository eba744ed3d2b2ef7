// Attention of packed sequences and its gradients. Plain C; no torch, no Python.
//
// Query row i of sequence s, place p of n, attends in each head to the m keys of key sequence key_of[s].
//   score(i, j) = scale * q_i . k_j                   causal: only j <= p + m - n, so that the ends of both align
//   lse_i = log sum_j e^score(i, j)
//   out_i = sum_j dropout(e^(score(i, j) - lse_i)) v_j
// Without any key: out 0, lse -infinity. Dropout: case_fast_keep of common/philox.h with e = i * longest + j, where i is the
// row of `query`, j the place of the key in its sequence, and `longest` the greatest difference of two neighbours in cu_key.
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

typedef struct case_fast_packed_attention {
    int64_t batch, queries;                           // query sequences, rows of query
    int64_t key_sequences, keys;                      // key sequences, rows of key and value
    int32_t heads, dim, dtype, index_bits, causal;    // index_bits 32 or 64: of all four lists
    const void *cu_query, *cu_key;                    // (batch + 1), (key_sequences + 1)
    const void *key_of;                               // (batch), or NULL: s, and key_sequences == batch
    const void *key_length;                           // (key_sequences), or NULL: only the first so many of its rows are keys
    int64_t query_stride, key_stride, value_stride;   // elements from one row of all heads to the next, at least heads * dim
    double scale, dropout_p;                          // dropout_p in [0, 1], on the softmax weights
    uint64_t seed;                                    // see case_fast_seed in common/philox.h
    const uint64_t *seed_at;                          // where the kernels run, or NULL
} case_fast_packed_attention;

// query (Tq, H, D), key and value (Tk, H, D) with the strides above; out (Tq, H, D) contiguous; lse (Tq, H), kept for backward
// (NULL: not wanted).
int case_fast_packed_attention_forward_cpu(const case_fast_packed_attention *call, const void *query, const void *key,
                                           const void *value, void *out, void *lse, int threads);

// out, grad_out (Tq, H, D) contiguous. The gradients have the strides given here.
int case_fast_packed_attention_backward_cpu(const case_fast_packed_attention *call, const void *query, const void *key,
                                            const void *value, const void *out, const void *lse, const void *grad_out,
                                            void *grad_query, int64_t grad_query_stride, void *grad_key,
                                            int64_t grad_key_stride, void *grad_value, int64_t grad_value_stride, int threads);

// ---- on CUDA devices: device pointers and a stream

// How forward's work is laid out. ROWS: one block a (row, head), its warps sharing the keys; for one row a sequence, or a few.
// TILES: one block a (rows of one sequence, head), keys and values in shared memory. Same results up to rounding; each gives the
// same bits every time. Backward knows TILES alone.
enum case_fast_packed_attention_plan { CASE_FAST_ATTENTION_AUTO = 0, CASE_FAST_ATTENTION_ROWS = 1, CASE_FAST_ATTENTION_TILES = 2 };

// Bytes of device memory that a call needs beside its arguments; 0 where it is not one that CUDA serves.
size_t case_fast_packed_attention_workspace_cuda(const case_fast_packed_attention *call, int backward);

// Asynchronous, on `stream` of the current device; every dtype; lse in float32 (float64 for float64). Needs rows and sequences
// < 2^31 and dim <= 256, else CASE_FAST_BAD_ARGUMENT. The contents of the lists are not known here: kernels never follow a bad
// entry and write a case_fast_status to *flag (device-accessible memory, or NULL); what they write to outputs is then
// unspecified, and NaN where a sequence's own entries were bad. Else outputs are written whole.
int case_fast_packed_attention_forward_cuda(const case_fast_packed_attention *call, const void *query, const void *key,
                                            const void *value, void *out, void *lse, int plan, void *workspace,
                                            size_t workspace_bytes, int32_t *flag, void *stream);

// With key_of, every block looks through all of it for the sequences that share its keys.
int case_fast_packed_attention_backward_cuda(const case_fast_packed_attention *call, const void *query, const void *key,
                                             const void *value, const void *out, const void *lse, const void *grad_out,
                                             void *grad_query, int64_t grad_query_stride, void *grad_key, int64_t grad_key_stride,
                                             void *grad_value, int64_t grad_value_stride, void *workspace, size_t workspace_bytes,
                                             int32_t *flag, void *stream);

#ifdef __cplusplus
}
#endif
