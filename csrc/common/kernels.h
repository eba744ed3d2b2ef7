// CPU kernels, which are compiled once per instruction set: how a file declares, defines and finds them.
//
// cpu_kernels.cpp defines CASE_FAST_KERNELS_HERE(name) for the set that CMake compiles it for, CASE_FAST_SET: baseline, avx2 or
// avx512. cpu_bf16.cpp, compiled for AVX-512 with its products of bfloat16, defines name_bf16. cpu.h declares all of them, and
// cpu.cpp takes the widest that this machine has.
#pragma once

#include <type_traits>

#include "common/simd.h"

template <template <class> class Kernels>
struct KernelsOf {
    Kernels<float> f32;
    Kernels<double> f64;

    template <class T>
    const Kernels<T> &of() const {
        if constexpr (std::is_same_v<T, float>)
            return f32;
        else
            return f64;
    }
};

#define CASE_FAST_JOIN(name, set) name##_##set
#define CASE_FAST_EXPAND(name, set) CASE_FAST_JOIN(name, set)
#define CASE_FAST_KERNELS_HERE(name) CASE_FAST_EXPAND(name, CASE_FAST_SET)

#if defined(__x86_64__)
#define CASE_FAST_DECLARE_KERNELS(Set, name) extern const Set name##_baseline, name##_avx2, name##_avx512
#define CASE_FAST_WIDEST(name) widest(name##_baseline, name##_avx2, name##_avx512)
#else
#define CASE_FAST_DECLARE_KERNELS(Set, name) extern const Set name##_baseline
#define CASE_FAST_WIDEST(name) name##_baseline
#endif

template <class Set>
const Set &widest(const Set &baseline, const Set &avx2, const Set &avx512) {
    const case_fast_simd level = case_fast_simd_level();
    return level == CASE_FAST_AVX512 ? avx512 : level == CASE_FAST_AVX2 ? avx2 : baseline;
}

// The kernels of T for a call: name_bf16 for float where the call allows it and this machine has them.
#define CASE_FAST_DECLARE_BF16_KERNELS(Kernels, name) extern const Kernels<float> name##_bf16
#if defined(__x86_64__)
#define CASE_FAST_KERNELS(name, T, bf16) kernels_of<T>(CASE_FAST_WIDEST(name), name##_bf16, bf16)
#else
#define CASE_FAST_KERNELS(name, T, bf16) CASE_FAST_WIDEST(name).template of<T>()
#endif

template <class T, template <class> class Kernels>
const Kernels<T> &kernels_of(const KernelsOf<Kernels> &all, [[maybe_unused]] const Kernels<float> &rounded, [[maybe_unused]] bool bf16) {
    if constexpr (std::is_same_v<T, float>)
        if (bf16 && case_fast_simd_bf16()) return rounded;
    return all.template of<T>();
}
