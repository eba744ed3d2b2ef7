#include "bilinear_mim/cpu_kernels.h"

const MimKernelSet bilinear_mim_baseline = CASE_FAST_MIM_KERNELS;
