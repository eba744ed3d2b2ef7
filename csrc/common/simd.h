// The widest vector unit that this processor and operating system offer, found at run time. The environment variable
// CASE_FAST_SIMD=scalar|avx2 asks for a lower one, for tests.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

enum case_fast_simd {
    CASE_FAST_SCALAR = 0,
    CASE_FAST_NEON = 1,    // 64-bit ARM
    CASE_FAST_AVX2 = 2,    // AVX2 and FMA
    CASE_FAST_AVX512 = 3,  // AVX-512 F, BW, DQ, VL
};

enum case_fast_simd case_fast_simd_level(void);

// Whether it multiplies bfloat16 numbers as well: AVX512_BF16. Not where a lower level is asked for.
int case_fast_simd_bf16(void);

// "scalar" | "neon" | "avx2" | "avx512"
const char *case_fast_simd_name(enum case_fast_simd level);

#ifdef __cplusplus
}
#endif
