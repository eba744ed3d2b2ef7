#include "graph_attention/cpu_rows.h"

const GraphAttentionKernels graph_attention_avx2 = CASE_FAST_GRAPH_ATTENTION_KERNELS;
