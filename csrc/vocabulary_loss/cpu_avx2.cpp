#include "vocabulary_loss/cpu_kernels.h"

const VocabularyLossKernels vocabulary_loss_avx2 = CASE_FAST_VOCABULARY_LOSS_KERNELS;
