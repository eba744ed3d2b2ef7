#include "common/simd.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

static case_fast_simd widest() {
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

extern "C" case_fast_simd case_fast_simd_level(void) {
    static const case_fast_simd level = widest();
    // Asked on each call, so that a test can go through the levels; a level that the machine lacks changes nothing.
    const char *const asked = std::getenv("CASE_FAST_SIMD");
    if (!asked) return level;
    for (const case_fast_simd lower : {CASE_FAST_SCALAR, CASE_FAST_AVX2})
        if (lower < level && std::strcmp(asked, case_fast_simd_name(lower)) == 0) return lower;
    return level;
}

extern "C" int case_fast_simd_bf16(void) {
#if defined(__x86_64__)
    static const bool there = __builtin_cpu_supports("avx512bf16");
    return there && case_fast_simd_level() == CASE_FAST_AVX512;
#else
    return 0;
#endif
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
