// Memory of one call on the CPU.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

// One block of memory that stays for the next call: fresh memory would cost a page fault every 4 KiB, more than a small call's
// arithmetic. Empty while a call has it.
struct SpareBlock {
    void *block = nullptr;
    size_t bytes = 0;
};
inline std::atomic<SpareBlock *> spare_block{new SpareBlock};

// Arrays for the length of one call, aligned to 64 bytes: from the spare block while it lasts, else each on its own; what a call
// had to take besides makes the block larger for the next, up to a limit.
class Workspace {
public:
    static constexpr int64_t alignment = 64;
    static constexpr size_t most_spare = size_t(8) << 20;

    Workspace() : spare_(spare_block.exchange(nullptr, std::memory_order_acquire)) {}
    ~Workspace() {
        if (!spare_) return;
        if (wanted_ > spare_->bytes && spare_->bytes < most_spare && keeps) {
            std::free(spare_->block);
            spare_->bytes = std::min(wanted_, most_spare) / alignment * alignment;
            spare_->block = std::aligned_alloc(alignment, spare_->bytes);
            if (!spare_->block) spare_->bytes = 0;
        }
        spare_block.store(spare_, std::memory_order_release);
    }
    Workspace(const Workspace &) = delete;
    Workspace &operator=(const Workspace &) = delete;

    template <class T>
    T *take(int64_t count) {
        const size_t bytes = (size_t(std::max<int64_t>(count, 1)) * sizeof(T) + alignment - 1) / alignment * alignment;
        wanted_ += bytes;
        if (spare_ && used_ + bytes <= spare_->bytes) {
            used_ += bytes;
            return reinterpret_cast<T *>(static_cast<char *>(spare_->block) + used_ - bytes);
        }
        void *const block = std::aligned_alloc(alignment, bytes);
        if (!block) throw std::bad_alloc();
        blocks_.emplace_back(block, &std::free);
        return static_cast<T *>(block);
    }

private:
#if defined(__SANITIZE_ADDRESS__)
    static constexpr bool keeps = false;  // an array of its own each, for a step beyond to be seen
#else
    static constexpr bool keeps = true;
#endif
    SpareBlock *spare_;
    size_t used_ = 0, wanted_ = 0;  // bytes of the spare block; of all arrays
    std::vector<std::unique_ptr<void, void (*)(void *)>> blocks_;
};

// As many equal workspaces as threads; a running task holds one.
template <class T>
class Slots {
public:
    Slots(Workspace &workspace, int threads, int64_t elements)
        : count_(std::max(threads, 1)), size_((elements + 15) / 16 * 16), data_(workspace.take<T>(count_ * size_)),
          busy_(new std::atomic<bool>[size_t(count_)]) {
        for (int64_t i = 0; i < count_; ++i) busy_[size_t(i)].store(false, std::memory_order_relaxed);
    }
    template <class Task>
    void with(Task task) {
        for (int64_t i = 0;; i = (i + 1) % count_)
            if (!busy_[size_t(i)].exchange(true, std::memory_order_acquire)) {
                task(data_ + i * size_);
                return busy_[size_t(i)].store(false, std::memory_order_release);
            }
    }

private:
    int64_t count_, size_;
    T *data_;
    std::unique_ptr<std::atomic<bool>[]> busy_;
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
