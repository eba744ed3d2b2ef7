#include "common/simd.h"

extern "C" case_fast_simd case_fast_simd_level(void) {
#if defined(__x86_64__)
    // The builtin also asks the operating system whether it saves the wide registers.
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return CASE_FAST_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CASE_FAST_AVX2;
#elif defined(__aarch64__)
    return CASE_FAST_NEON;
#endif
    return CASE_FAST_SCALAR;
}

extern "C" const char *case_fast_simd_name(case_fast_simd level) {
    switch (level) {
        case CASE_FAST_NEON: return "neon";
        case CASE_FAST_AVX2: return "avx2";
        case CASE_FAST_AVX512: return "avx512";
        case CASE_FAST_SCALAR: break;
    }
    return "scalar";
}
