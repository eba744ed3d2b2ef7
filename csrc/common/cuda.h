// What the library knows of CUDA: how it was compiled, and which devices it sees now.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

enum { CASE_FAST_MAX_ARCHITECTURES = 16 };

typedef struct {
    int compiled;                                   // 1 if CUDA code was compiled in
    int architecture_count;                         // entries in use below
    int architectures[CASE_FAST_MAX_ARCHITECTURES];  // 80 stands for sm_80
    int runtime_version;                            // 1000 * major + 10 * minor; 0 without CUDA code
    int device_count;                               // visible and usable; 0 without a driver
    char status[160];                               // why device_count is 0, else empty; ends with NUL
} case_fast_cuda_info;

// Never fails. Counting devices starts the CUDA driver in this process, which does not survive a later fork():
// call it to report, not on import.
void case_fast_cuda_report(case_fast_cuda_info *info);

#ifdef __cplusplus
}
#endif
