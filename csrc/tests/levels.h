// The instruction sets that the C++ tests run with.
#pragma once

#include <cstdlib>

#include "common/simd.h"

// Calls body(name) with each vector width that this machine has.
template <class Body>
void at_each_level(Body body) {
    unsetenv("CASE_FAST_SIMD");
    const case_fast_simd widest = case_fast_simd_level();
    for (const case_fast_simd level : {CASE_FAST_SCALAR, CASE_FAST_NEON, CASE_FAST_AVX2, CASE_FAST_AVX512}) {
        setenv("CASE_FAST_SIMD", case_fast_simd_name(level), 1);
        if (level > widest || case_fast_simd_level() != level) continue;
        body(case_fast_simd_name(level));
    }
}
