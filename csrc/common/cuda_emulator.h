// CUDA kernels as plain C++ on one CPU thread: enough of the language for this project's kernels, so that their logic can be run,
// checked and sanitised without a GPU. Every thread of a block is a fiber; it runs until a barrier or a warp operation. Blocks
// run one after the other. Not emulated: timing, memory ordering, alignment. A barrier that not all threads reach ends the
// program.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static  // one block runs at a time

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- half-precision numbers
struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {0x7FFF};
    return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
struct __half {
    _Float16 value;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline float __int_as_float(int bits) {
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int atomicAdd(int *at, int x) {
    const int old = *at;
    *at += x;
    return old;
}
inline int atomicMax(int *at, int x) {
    const int old = *at;
    if (x > old) *at = x;
    return old;
}

// ---- threads
namespace emulator {

constexpr int WARP = 32;
constexpr size_t STACK = 128 << 10;

struct Barrier {
    int size = 0;
    std::vector<int> waiting;
};
struct Fiber {  // lives on from block to block
    ucontext_t start;
    void *state[5];  // of __builtin_setjmp: a switch without system calls, unlike swapcontext
    std::unique_ptr<char[]> stack;
    bool started = false, done = false;
};

inline dim3 grid, block, block_index;
inline int thread, threads;
inline void *scheduler[5];
inline std::deque<Fiber> fibers;
inline std::deque<int> ready;
inline Barrier whole;
inline std::vector<Barrier> warps;
inline std::vector<uint64_t> exchanged;
inline std::vector<char> shared;
inline const std::function<void()> *kernel;

__attribute__((noinline)) inline void to_scheduler() { __builtin_longjmp(scheduler, 1); }
__attribute__((noinline)) inline void to_fiber(Fiber &fiber) {
    if (fiber.started) __builtin_longjmp(fiber.state, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}
__attribute__((noinline)) inline void yield() {
    if (__builtin_setjmp(fibers[thread].state) == 0) to_scheduler();
}
__attribute__((noinline)) inline void resume(int t) {
    thread = t;
    if (__builtin_setjmp(scheduler) == 0) to_fiber(fibers[t]);
}
inline void release(Barrier &barrier) {
    ready.insert(ready.end(), barrier.waiting.begin(), barrier.waiting.end());
    barrier.waiting.clear();
}
inline void wait(Barrier &barrier) {
    if (static_cast<int>(barrier.waiting.size()) + 1 == barrier.size) return release(barrier);
    barrier.waiting.push_back(thread);
    yield();
}
inline void left(Barrier &barrier) {  // a thread that has returned is not waited for
    if (--barrier.size && static_cast<int>(barrier.waiting.size()) == barrier.size) release(barrier);
}
inline void fiber_main() {
    while (true) {
        (*kernel)();
        fibers[thread].done = true;
        left(whole);
        left(warps[thread / WARP]);
        yield();
    }
}
inline void run_block() {
    whole = {threads, {}};
    warps.assign((threads + WARP - 1) / WARP, Barrier{});
    exchanged.assign(threads, 0);
    while (static_cast<int>(fibers.size()) < threads) {
        Fiber &fiber = fibers.emplace_back();
        fiber.stack.reset(new char[STACK]);
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = STACK;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, fiber_main, 0);
    }
    for (int t = 0; t < threads; ++t) {
        ++warps[t / WARP].size;
        fibers[t].done = false;
        ready.push_back(t);
    }
    while (!ready.empty()) {
        const int next = ready.front();
        ready.pop_front();
        resume(next);
    }
    for (int t = 0; t < threads; ++t) {
        if (fibers[t].done) continue;
        std::fprintf(stderr, "cuda_emulator: threads of a block wait for threads that never come\n");
        std::abort();
    }
}
template <class Kernel, class... Args>
void launch(Kernel kernel_function, dim3 blocks, dim3 block_size, size_t shared_bytes, Args... args) {
    const std::function<void()> body = [&] { kernel_function(args...); };
    kernel = &body;
    grid = blocks, block = block_size;
    threads = static_cast<int>(block_size.x);
    if (!blocks.x || !blocks.y || !blocks.z || blocks.y > 65535 || blocks.z > 65535 || threads < 1 || threads > 1024) {
        std::fprintf(stderr, "cuda_emulator: a launch that CUDA would refuse\n");
        std::abort();
    }
    for (block_index.z = 0; block_index.z < blocks.z; ++block_index.z)
        for (block_index.y = 0; block_index.y < blocks.y; ++block_index.y)
            for (block_index.x = 0; block_index.x < blocks.x; ++block_index.x) {
                shared = std::vector<char>(shared_bytes + 16, static_cast<char>(0xFF));  // unwritten floats are NaN
                run_block();
            }
}
template <class T> T exchange(T x, int from) {
    static_assert(sizeof(T) <= 8, "");
    Barrier &barrier = warps[thread / WARP];
    std::memcpy(&exchanged[thread], &x, sizeof x);
    wait(barrier);
    T out;
    std::memcpy(&out, &exchanged[thread / WARP * WARP + from], sizeof out);
    wait(barrier);
    return out;
}
struct ThreadIndex {
    struct X {
        operator unsigned() const { return thread; }
    } x;
};

}  // namespace emulator

static const emulator::ThreadIndex threadIdx;
#define blockIdx emulator::block_index
#define blockDim emulator::block
#define gridDim emulator::grid

inline void __syncthreads() { emulator::wait(emulator::whole); }
inline void __syncwarp() { emulator::wait(emulator::warps[emulator::thread / emulator::WARP]); }
template <class T> T __shfl_sync(unsigned, T x, int from) { return emulator::exchange(x, from & 31); }
template <class T> T __shfl_xor_sync(unsigned, T x, int mask) { return emulator::exchange(x, (emulator::thread & 31) ^ mask); }
template <class T> T __shfl_up_sync(unsigned, T x, int step) {
    const int lane = emulator::thread & 31;
    return emulator::exchange(x, lane >= step ? lane - step : lane);
}
inline unsigned __ballot_sync(unsigned, bool x) {
    unsigned all = 0;
    emulator::Barrier &barrier = emulator::warps[emulator::thread / emulator::WARP];
    emulator::exchanged[emulator::thread] = x;
    emulator::wait(barrier);
    for (int lane = 0; lane < 32; ++lane)
        all |= static_cast<unsigned>(emulator::exchanged[emulator::thread / 32 * 32 + lane] != 0) << lane;
    emulator::wait(barrier);
    return all;
}

// ---- the runtime
using cudaStream_t = void *;
enum cudaError_t { cudaSuccess = 0 };
enum { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaFuncAttributeMaxDynamicSharedMemorySize };
inline int emulated_shared_bytes = 64 << 10;  // a block's; tests lower it so that graphs do not fit
inline int emulated_launches = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int *out, int attribute, int) {
    *out = attribute == cudaDevAttrMultiProcessorCount ? 3 : emulated_shared_bytes;
    return cudaSuccess;
}
template <class Kernel> cudaError_t cudaFuncSetAttribute(Kernel, int, int) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void *at, int byte, size_t size, cudaStream_t) {
    return std::memset(at, byte, size), cudaSuccess;
}

#define CASE_FAST_LAUNCH(kernel, blocks, threads, shared, stream, ...) \
    (++emulated_launches, (void)(stream), emulator::launch([](auto... a) { kernel(a...); }, blocks, threads, shared, __VA_ARGS__))
#define CASE_FAST_DYNAMIC_SHARED(name) \
    char *name = reinterpret_cast<char *>((reinterpret_cast<uintptr_t>(emulator::shared.data()) + 15) / 16 * 16)
