// graph_attention on CUDA devices: as graph_attention.h, with device pointers and a stream.
#pragma once

#include <stddef.h>

#include "graph_attention/graph_attention.h"

#ifdef __cplusplus
extern "C" {
#endif

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
