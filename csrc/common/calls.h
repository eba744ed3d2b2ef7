// What the C functions of every family do around their work on the CPU.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <new>

#include "common/types.h"

inline bool missing(std::initializer_list<const void *> arrays) {
    return std::any_of(arrays.begin(), arrays.end(), [](const void *array) { return array == nullptr; });
}

// run(T()) for the dtype, F32 or F64, of a call that was checked. All is allocated before the first write.
template <class Run>
int guarded(int dtype, Run run) {
    try {
        return dtype == CASE_FAST_F64 ? run(double{}) : run(float{});
    } catch (const std::bad_alloc &) {
        return CASE_FAST_NO_MEMORY;
    }
}
