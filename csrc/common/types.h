// What the C interfaces of all families share.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

enum case_fast_dtype { CASE_FAST_F32 = 0, CASE_FAST_F64 = 1, CASE_FAST_F16 = 2, CASE_FAST_BF16 = 3 };

enum case_fast_status {
    CASE_FAST_OK = 0,
    CASE_FAST_BAD_INDPTR = 1,    // does not start with 0, falls, or does not end with the number of edges
    CASE_FAST_BAD_INDICES = 2,   // names a vertex that does not exist
    CASE_FAST_BAD_RELATION = 3,  // names a relation that does not exist
    CASE_FAST_BAD_ARGUMENT = 4,  // a size, a dtype, a probability or a missing pointer
    CASE_FAST_NO_MEMORY = 5,
    CASE_FAST_CUDA_ERROR = 6,
    CASE_FAST_BAD_CU_QUERY = 7,    // does not start with 0, falls, or does not end with the number of rows
    CASE_FAST_BAD_CU_KEY = 8,      // likewise
    CASE_FAST_BAD_KEY_OF = 9,      // names a key sequence that does not exist
    CASE_FAST_BAD_KEY_LENGTH = 10, // outside [0, rows of that key sequence]
    CASE_FAST_BAD_TARGET = 11,     // names a word that does not exist
    CASE_FAST_BAD_CU_TARGET = 12,  // does not start with 0, falls, or does not end with the number of targets
    CASE_FAST_BAD_SEGMENT = 13,    // names a segment that does not exist
    CASE_FAST_BAD_CU = 14,         // does not start with 0, falls, or does not end with the number of rows
};

#ifdef __cplusplus
}
#endif
