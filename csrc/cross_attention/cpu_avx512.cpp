#include "cross_attention/cpu_rows.h"

const CrossAttentionKernels cross_attention_avx512 = CASE_FAST_CROSS_ATTENTION_KERNELS;
