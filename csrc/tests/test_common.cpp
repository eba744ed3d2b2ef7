#include <cstring>
#include <thread>
#include <vector>

#include "check.h"
#include "common/cuda.h"
#include "common/simd.h"
#include "gemm_checks.h"

#if defined(__x86_64__)
#include <immintrin.h>

// Executes the instructions that the reported level promises: a wrong promise dies of SIGILL here, not in a user's run.
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) static float sum_avx512(const float *x) {
    return _mm512_reduce_add_ps(_mm512_maskz_loadu_ps(0x7fff, x));
}
__attribute__((target("avx2,fma"))) static float sum_avx2(const float *x) {
    float lanes[8], sum = 0;
    _mm256_storeu_ps(lanes, _mm256_fmadd_ps(_mm256_loadu_ps(x), _mm256_set1_ps(1.0f), _mm256_loadu_ps(x + 7)));
    for (int i = 0; i < 8; ++i) sum += lanes[i];
    return sum;
}
#endif

static void test_simd() {
    const case_fast_simd level = case_fast_simd_level();
    const char *name = case_fast_simd_name(level);
#if defined(__x86_64__)
    float x[16];
    for (int i = 0; i < 16; ++i) x[i] = float(i + 1);
    if (level == CASE_FAST_AVX512) CHECK(sum_avx512(x) == 120.0f);                             // 1 + ... + 15, lane 16 masked
    if (level == CASE_FAST_AVX512 || level == CASE_FAST_AVX2) CHECK(sum_avx2(x) == 128.0f);  // 1 + ... + 15, and 8 again
    CHECK(level != CASE_FAST_NEON);
#elif defined(__aarch64__)
    CHECK(level == CASE_FAST_NEON);
#endif
    CHECK(std::strcmp(case_fast_simd_name(CASE_FAST_SCALAR), "scalar") == 0);
    CHECK(level == CASE_FAST_SCALAR || std::strcmp(name, "scalar") != 0);
    std::printf("simd: %s\n", name);
}

static void test_cuda_report() {
    case_fast_cuda_info info;
    std::memset(&info, 0xff, sizeof info);
    case_fast_cuda_report(&info);
    CHECK(info.architecture_count >= 0 && info.architecture_count <= CASE_FAST_MAX_ARCHITECTURES);
    CHECK((info.compiled != 0) == (info.architecture_count > 0));
    CHECK((info.compiled != 0) == (info.runtime_version > 0));
    CHECK(info.device_count >= 0);
    CHECK((info.device_count == 0) == (info.status[0] != '\0'));
    CHECK(std::memchr(info.status, 0, sizeof info.status) != nullptr);
    std::printf("cuda: %d, devices: %d %s\n", info.compiled, info.device_count, info.status);
}

static void test_reports_agree_across_threads() {
    std::vector<case_fast_cuda_info> infos(8);
    std::vector<std::thread> threads;
    for (auto &info : infos) threads.emplace_back([&info] { case_fast_cuda_report(&info); });
    for (auto &thread : threads) thread.join();
    for (auto &info : infos) CHECK(info.device_count == infos[0].device_count && info.compiled == infos[0].compiled);
}

static void test_gemm() {
    std::printf("gemm: %d products", gemm_checks_baseline.check());
#if defined(__x86_64__)
    if (case_fast_simd_level() >= CASE_FAST_AVX2) std::printf(", avx2 %d", gemm_checks_avx2.check());
    if (case_fast_simd_level() == CASE_FAST_AVX512) std::printf(", avx512 %d", gemm_checks_avx512.check());
    if (case_fast_simd_bf16()) std::printf(", bf16 %d", gemm_checks_bf16.check());
#endif
    std::printf("\n");
}

int main() {
    test_simd();
    test_gemm();
    test_cuda_report();
    test_reports_agree_across_threads();
}
