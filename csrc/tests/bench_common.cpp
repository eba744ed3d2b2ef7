// Rate of common/gemm.h on one thread, in Gflop/s of CPU time: bench_common [rows columns depth].
#include <cstdio>
#include <cstdlib>

#include "common/simd.h"
#include "gemm_checks.h"

int main(int count, char **arguments) {
    const auto size = [&](int i, int64_t otherwise) { return count > i ? std::atoll(arguments[i]) : otherwise; };
    const int64_t rows = size(1, 512), columns = size(2, 1024), depth = size(3, 300);
    const auto show = [&](const char *name, const GemmChecks &gemm) {
        std::printf("%s %lld x %lld x %lld: float %.1f, double %.1f\n", name, static_cast<long long>(rows),
                    static_cast<long long>(columns), static_cast<long long>(depth), gemm.float_rate(rows, columns, depth),
                    gemm.double_rate(rows, columns, depth));
    };
    show("baseline", gemm_checks_baseline);
#if defined(__x86_64__)
    if (case_fast_simd_level() >= CASE_FAST_AVX2) show("avx2", gemm_checks_avx2);
    if (case_fast_simd_level() == CASE_FAST_AVX512) show("avx512", gemm_checks_avx512);
#endif
}
