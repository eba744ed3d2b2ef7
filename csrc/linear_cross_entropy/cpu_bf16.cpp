#include "linear_cross_entropy/cpu_kernels.h"

const VocabularyKernels<float> linear_cross_entropy_bf16 = vocabulary_kernels<Bf16Pair>();
