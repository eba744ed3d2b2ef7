#include "linear_cross_entropy/cpu_kernels.h"

const KernelsOf<VocabularyKernels> CASE_FAST_KERNELS_HERE(linear_cross_entropy) = {vocabulary_kernels<float>(),
                                                                                   vocabulary_kernels<double>()};
