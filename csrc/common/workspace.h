// Memory of one call on the CPU.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

// Arrays for the length of one call, aligned to 64 bytes.
class Workspace {
public:
    static constexpr int64_t alignment = 64;

    template <class T>
    T *take(int64_t count) {
        const size_t bytes = (size_t(std::max<int64_t>(count, 1)) * sizeof(T) + alignment - 1) / alignment * alignment;
        void *const block = std::aligned_alloc(alignment, bytes);
        if (!block) throw std::bad_alloc();
        blocks_.emplace_back(block, &std::free);
        return static_cast<T *>(block);
    }

private:
    std::vector<std::unique_ptr<void, void (*)(void *)>> blocks_;
};

// A large result lies in fresh memory, where each first touch of a page is a fault: as huge pages, 512 times fewer.
inline void prepare_output(void *array, size_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t huge = uintptr_t(2) << 20;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(array) + huge - 1) / huge * huge;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(array) + bytes) / huge * huge;
    if (last > first + huge) madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);  // may fail: a hint
#else
    (void)array, (void)bytes;
#endif
}
