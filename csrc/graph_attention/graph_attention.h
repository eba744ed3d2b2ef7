// Relation-biased sparse graph attention and its gradients. Plain C; no torch, no Python.
//   score(i, k) = scale * (q_i + relation_query[r]) . (k_k + relation_key[r])
//   out_i = sum over the neighbours k of i of dropout(softmax(score(i, .)))_k * v_k; zeros where i has no neighbours
// The neighbours of vertex i are indices[indptr[i]:indptr[i+1]]; parallel edges count separately.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "common/types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct case_fast_graph {
    int64_t vertices, edges, relations;           // relations 0: plain attention, relation == NULL
    int32_t heads, dim, dtype, index_bits;        // index_bits 32 or 64: indptr, indices and relation alike
    const void *indptr, *indices, *relation;      // (vertices + 1), (edges), (edges)
    double scale, dropout_p;                      // dropout_p in [0, 1], on the softmax weights
    uint64_t seed;                                // see case_fast_seed and case_fast_keep in common/philox.h
    const uint64_t *seed_at;                      // where the kernels run, or NULL
} case_fast_graph;

// query, key, value, out: (V, H, D) contiguous. relation_query, relation_key: (R, H, D), NULL where relations is 0.
// weights: (E, H), the softmax BEFORE dropout; double for F64, else float. Kept for the backward pass.
//
// On the CPU: F32 and F64. Everything is checked before it is used, and on an error nothing has been written. Outputs are
// written whole, whatever stood there. The results are the same bits for any number of threads.
int case_fast_graph_attention_forward_cpu(const case_fast_graph *graph, const void *query, const void *key, const void *value,
                                          const void *relation_query, const void *relation_key, void *out, void *weights,
                                          int threads);

// The last two are ignored where relations is 0.
int case_fast_graph_attention_backward_cpu(const case_fast_graph *graph, const void *query, const void *key, const void *value,
                                           const void *relation_query, const void *relation_key, const void *weights,
                                           const void *grad_out, void *grad_query, void *grad_key, void *grad_value,
                                           void *grad_relation_query, void *grad_relation_key, int threads);

// ---- on CUDA devices: device pointers and a stream

// How the work is laid out. GRAPHS: one block a (graph, head), its rows in shared memory; for batches of small graphs. ROWS: one
// warp a (row, head), or one block where the row is long; backward over the edges ordered by column. Same results up to rounding;
// each gives the same bits every time.
enum case_fast_plan { CASE_FAST_PLAN_AUTO = 0, CASE_FAST_PLAN_GRAPHS = 1, CASE_FAST_PLAN_ROWS = 2 };

// Bytes of device memory that a call needs beside its arguments; 0 where the graph is not one that CUDA serves.
size_t case_fast_graph_attention_workspace_cuda(const case_fast_graph *graph, int backward, int plan);

// Asynchronous, on `stream` of the current device; every dtype. Needs vertices, edges < 2^31 and dim <= 256, else
// CASE_FAST_BAD_ARGUMENT. The contents of indptr, indices and relation are not known here: kernels never follow a bad one, make
// the rows that hold it NaN, and write a case_fast_status to *flag (device-accessible memory, or NULL). Outputs are written
// whole.
int case_fast_graph_attention_forward_cuda(const case_fast_graph *graph, const void *query, const void *key, const void *value,
                                           const void *relation_query, const void *relation_key, void *out, void *weights,
                                           int plan, void *workspace, size_t workspace_bytes, int32_t *flag, void *stream);

int case_fast_graph_attention_backward_cuda(const case_fast_graph *graph, const void *query, const void *key, const void *value,
                                            const void *relation_query, const void *relation_key, const void *weights,
                                            const void *grad_out, void *grad_query, void *grad_key, void *grad_value,
                                            void *grad_relation_query, void *grad_relation_key, int plan, void *workspace,
                                            size_t workspace_bytes, int32_t *flag, void *stream);

#ifdef __cplusplus
}
#endif
