#include "linear/cpu_kernels.h"

const KernelsOf<LinearKernels> CASE_FAST_KERNELS_HERE(linear) = {{scratch<float>, product<float>, differentiate<float>},
                                                               {scratch<double>, product<double>, differentiate<double>}};
