#include "bilinear_mim/cpu_kernels.h"

const MimKernelSet bilinear_mim_avx2 = CASE_FAST_MIM_KERNELS;
