// What the CUDA kernels of every family share: number types, warps, rows in registers.
//
// With CASE_FAST_EMULATE the same kernels compile as plain C++ and run on the CPU (common/cuda_emulator.h), so that their logic
// is tested, under sanitizers, where there is no GPU.
#pragma once

#ifdef CASE_FAST_EMULATE
#include "common/cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define CASE_FAST_LAUNCH(kernel, blocks, threads, shared, stream, ...) kernel<<<blocks, threads, shared, stream>>>(__VA_ARGS__)
#define CASE_FAST_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#endif

#include <cstdint>

namespace case_fast {

constexpr unsigned ALL = 0xFFFFFFFFu;  // the lanes that take part in every warp operation
constexpr int WARP = 32;

// ---- numbers: stored as T, summed as Sum<T>
template <class T> struct SumOf {
    using type = float;
};
template <> struct SumOf<double> {
    using type = double;
};
template <class T> using Sum = typename SumOf<T>::type;

__device__ inline float widened(float x) { return x; }
__device__ inline double widened(double x) { return x; }
__device__ inline float widened(__half x) { return __half2float(x); }
__device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T> __device__ inline T narrowed(Sum<T> x) { return x; }
template <> __device__ inline __half narrowed<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 narrowed<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// 16 bytes at once, to wherever; the compiler makes four stores of the plain assignment.
__device__ __forceinline__ void store_16(void *to, const void *from) {
#ifdef CASE_FAST_EMULATE
    std::memcpy(to, from, 16);
#else
    const uint4 x = *static_cast<const uint4 *>(from);
    asm volatile("st.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
#endif
}

template <class A> __device__ inline A not_a_number() { return static_cast<A>(__int_as_float(0x7FC00000)); }
template <class A> __device__ inline A minus_infinity() { return static_cast<A>(__int_as_float(0xFF800000)); }
__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }  // the number, where one is NaN
__device__ inline double larger(double a, double b) { return fmax(a, b); }

// ---- warps
template <class A> __device__ inline A warp_sum(A x) {
#pragma unroll
    for (int step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}
template <class A> __device__ inline A warp_max(A x) {
#pragma unroll
    for (int step = WARP / 2; step; step /= 2) x = larger(x, __shfl_xor_sync(ALL, x, step));
    return x;
}

// ---- how a warp holds a row of `dim` numbers: lane l has numbers (c * 32 + l) * VEC + i of every chunk c. VEC numbers are read
// at once: rows must be aligned to VEC numbers, and dim a multiple of VEC.
template <class T_, int VEC_, int CHUNKS_> struct Held {
    using T = T_;
    using A = Sum<T>;
    static constexpr int VEC = VEC_, CHUNKS = CHUNKS_, SIZE = VEC * CHUNKS;
    static constexpr int AHEAD = SIZE > 6 ? 2 : 4;         // rows whose loads are under way at once
    static constexpr int BLOCKS = sizeof(A) == 8 ? 1 : 2;  // of 256 threads on a multiprocessor: registers for none to spill
    struct alignas(sizeof(T) * VEC) Pack {
        T x[VEC];
    };
    A x[SIZE];

    __device__ __forceinline__ void zero() {
#pragma unroll
        for (int i = 0; i < SIZE; ++i) x[i] = 0;
    }
    __device__ __forceinline__ void load(const T *row, int lane, int dim) {
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            const int d = (c * WARP + lane) * VEC;
            if (d < dim) {
                const Pack pack = *reinterpret_cast<const Pack *>(row + d);
#pragma unroll
                for (int i = 0; i < VEC; ++i) x[c * VEC + i] = widened(pack.x[i]);
            } else {
#pragma unroll
                for (int i = 0; i < VEC; ++i) x[c * VEC + i] = 0;
            }
        }
    }
    __device__ __forceinline__ void store(T *row, int lane, int dim) const {
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            const int d = (c * WARP + lane) * VEC;
            if (d >= dim) continue;
            Pack pack;
#pragma unroll
            for (int i = 0; i < VEC; ++i) pack.x[i] = narrowed<T>(x[c * VEC + i]);
            if constexpr (sizeof(Pack) == 16)
                store_16(row + d, &pack);
            else
                *reinterpret_cast<Pack *>(row + d) = pack;
        }
    }
    __device__ __forceinline__ void add(const Held &other) {
#pragma unroll
        for (int i = 0; i < SIZE; ++i) x[i] += other.x[i];
    }
    __device__ __forceinline__ void add(A factor, const Held &other) {
#pragma unroll
        for (int i = 0; i < SIZE; ++i) x[i] += factor * other.x[i];
    }
    __device__ __forceinline__ void scale(A factor) {
#pragma unroll
        for (int i = 0; i < SIZE; ++i) x[i] *= factor;
    }
    __device__ __forceinline__ A dot(const Held &other) const {  // this lane's share of it
        A sum = 0;
#pragma unroll
        for (int i = 0; i < SIZE; ++i) sum += x[i] * other.x[i];
        return sum;
    }
};

// ---- rows in global or shared memory, by vertex
template <class T> struct Rows {
    const T *base;
    int64_t stride;
    int first;  // the vertex whose row stands at base
    __device__ __forceinline__ const T *operator[](int vertex) const { return base + (vertex - first) * stride; }
};

// ---- the warps that share one row: one warp, or all WARPS of a block where a row is long. Sums over warps have a fixed order.
struct OneWarp {
    static constexpr int WARPS = 1;
    int lane;
    static constexpr int warp = 0;
    template <class A> __device__ __forceinline__ A sum(A x) const { return x; }
    template <class A> __device__ __forceinline__ A max(A x) const { return x; }
    template <class H> __device__ __forceinline__ void sum_rows(H &) const {}
};

template <int WARPS_, class A> struct WholeBlock {
    static constexpr int WARPS = WARPS_;
    static constexpr int SHARED = WARPS * WARP * 8;  // numbers
    int lane, warp;
    A *shared;
    template <class F> __device__ A over_warps(A x, F combine) const {
        if (lane == 0) shared[warp] = x;
        __syncthreads();
        A all = shared[0];
        for (int w = 1; w < WARPS; ++w) all = combine(all, shared[w]);
        __syncthreads();
        return all;
    }
    __device__ A sum(A x) const {
        return over_warps(x, [](A a, A b) { return a + b; });
    }
    __device__ A max(A x) const {
        return over_warps(x, [](A a, A b) { return larger(a, b); });
    }
    template <class H> __device__ void sum_rows(H &row) const {
        static_assert(H::SIZE <= 8, "a row of up to 256 numbers");
#pragma unroll
        for (int i = 0; i < H::SIZE; ++i) shared[(i * WARPS + warp) * WARP + lane] = row.x[i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < H::SIZE; ++i) {
            A all = 0;
            for (int w = 0; w < WARPS; ++w) all += shared[(i * WARPS + w) * WARP + lane];
            row.x[i] = all;
        }
        __syncthreads();
    }
};

}  // namespace case_fast
