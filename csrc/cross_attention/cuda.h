// Packed attention and a decoder's cross-attention on CUDA devices: as cross_attention.h, with device pointers and a stream.
#pragma once

#include <stddef.h>

#include "cross_attention/cross_attention.h"

#ifdef __cplusplus
extern "C" {
#endif

// How forward's work is laid out. ROWS: one block a (row, head), its warps sharing the keys; for one row a sequence, or a few.
// TILES: one block a (rows of one sequence, head), keys and values in shared memory. Same results up to rounding; each gives the
// same bits every time. Backward knows TILES alone.
enum case_fast_attention_plan { CASE_FAST_ATTENTION_AUTO = 0, CASE_FAST_ATTENTION_ROWS = 1, CASE_FAST_ATTENTION_TILES = 2 };

// Bytes of device memory that a call needs beside its arguments; 0 where it is not one that CUDA serves.
size_t case_fast_packed_attention_workspace_cuda(const case_fast_attention *call, int backward);

// Asynchronous, on `stream` of the current device; every dtype; lse in float32 (float64 for float64). Needs rows and sequences
// < 2^31 and dim <= 256, else CASE_FAST_BAD_ARGUMENT. The contents of the lists are not known here: kernels never follow a bad
// entry and write a case_fast_status to *flag (device-accessible memory, or NULL); what they write to outputs is then
// unspecified, and NaN where a sequence's own entries were bad. Else outputs are written whole.
int case_fast_packed_attention_forward_cuda(const case_fast_attention *call, const void *query, const void *key,
                                            const void *value, void *out, void *lse, int plan, void *workspace,
                                            size_t workspace_bytes, int32_t *flag, void *stream);

// With key_of, every block looks through all of it for the sequences that share its keys.
int case_fast_packed_attention_backward_cuda(const case_fast_attention *call, const void *query, const void *key,
                                             const void *value, const void *out, const void *lse, const void *grad_out,
                                             void *grad_query, int64_t grad_query_stride, void *grad_key, int64_t grad_key_stride,
                                             void *grad_value, int64_t grad_value_stride, void *workspace, size_t workspace_bytes,
                                             int32_t *flag, void *stream);

size_t case_fast_cross_attention_workspace_cuda(const case_fast_cross_attention *call);

// For few rows, without backward: two launches a source, one more with dropout of weights. Rows < 65536; width * 4 bytes
// (8 for float64) must fit shared memory beside the rest: width <= 4096.
int case_fast_cross_attention_forward_cuda(const case_fast_cross_attention *call, const case_fast_source *sources,
                                           const void *hidden, void *out, void *workspace, size_t workspace_bytes, int32_t *flag,
                                           void *stream);

// to = base + dropout(from), element by element, with case_fast_keep of (output_seed, e, 0); base NULL: 0. base may be to.
int case_fast_cross_attention_drop_cuda(int64_t count, int dtype, double output_dropout_p, uint64_t output_seed, const void *from,
                                        const void *base, void *to, void *stream);

#ifdef __cplusplus
}
#endif
