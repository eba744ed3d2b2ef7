#include "linear/cpu_kernels.h"

const LinearKernels<float> linear_bf16 = {scratch<Bf16Pair>, product<Bf16Pair>, differentiate<float>};
