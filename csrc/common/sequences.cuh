// What the kernels need to know of sequences: where they lie, what they may read, which weights dropout leaves.
#pragma once

#include "common/device.cuh"
#include "common/philox.h"
#include "common/types.h"

namespace case_fast {

struct Span {  // of a sequence, within bounds whatever the lists hold
    int row, rows, key, keys;
    bool bad;

    // How many keys, from the first, the row at this place sees.
    __device__ __forceinline__ int visible(int place, bool causal) const {
        if (!causal) return keys;
        const int seen = place + 1 + keys - rows;
        return seen < 0 ? 0 : seen < keys ? seen : keys;
    }
};

struct Sequences {  // passed to kernels by value
    int batch, queries, key_sequences, keys;
    bool wide, causal;  // wide: 64-bit lists
    const void *cu_query, *cu_key, *key_of, *key_length;
    int32_t *flag;

    __device__ __forceinline__ int64_t read(const void *list, int64_t at) const {
        return wide ? static_cast<const int64_t *>(list)[at] : static_cast<const int32_t *>(list)[at];
    }
    __device__ void report(int status) const {
        if (flag) *static_cast<volatile int32_t *>(flag) = status;
    }
    __device__ void check_offsets(const void *cu, int i, int count, int rows, int status) const {
        const int64_t here = read(cu, i);
        if (i == 0 ? here != 0 : here < read(cu, i - 1)) report(status);
        if (i == count && here != rows) report(status);
    }
    // All entries of all lists, a share for each thread of the grid.
    __device__ void check() const {
        if (blockIdx.y) return;
        const int most = batch > key_sequences ? batch : key_sequences;
        for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at <= most;
             at += static_cast<int64_t>(gridDim.x) * blockDim.x) {
            const int i = static_cast<int>(at);
            if (i <= batch) check_offsets(cu_query, i, batch, queries, CASE_FAST_BAD_CU_QUERY);
            if (i <= key_sequences) check_offsets(cu_key, i, key_sequences, keys, CASE_FAST_BAD_CU_KEY);
            if (key_of && i < batch) {
                const int64_t t = read(key_of, i);
                if (t < 0 || t >= key_sequences) report(CASE_FAST_BAD_KEY_OF);
            }
            if (key_length && i < key_sequences) {
                const int64_t length = read(key_length, i);
                if (length < 0 || length > read(cu_key, i + 1) - read(cu_key, i)) report(CASE_FAST_BAD_KEY_LENGTH);
            }
        }
    }
    __device__ __forceinline__ bool bounds(const void *cu, int s, int rows, int &begin, int &count) const {
        const int64_t from = read(cu, s), to = read(cu, s + 1);
        const bool good = from >= 0 && to >= from && to <= rows;
        begin = good ? static_cast<int>(from) : 0;
        count = good ? static_cast<int>(to - from) : 0;
        return good;
    }
    // begin, count: rows of the key sequence, of which the first `length` are keys.
    __device__ __forceinline__ bool key_bounds(int t, int &begin, int &count, int &length) const {
        bool good = bounds(cu_key, t, keys, begin, count);
        length = count;
        if (key_length) {
            const int64_t given = read(key_length, t);
            good = good && given >= 0 && given <= count;
            length = good ? static_cast<int>(given) : 0;
        }
        return good;
    }
    __device__ __forceinline__ Span span(int s) const {
        Span x;
        const bool good = bounds(cu_query, s, queries, x.row, x.rows);
        const int64_t t = key_of ? read(key_of, s) : s;
        const bool found = t >= 0 && t < key_sequences;
        int count;
        x.bad = !key_bounds(found ? static_cast<int>(t) : 0, x.key, count, x.keys) || !good || !found;
        return x;
    }
};

// The greatest s in [0, count) with first(s) <= x, where first rises from first(0) <= x; some s where it does not. A warp.
template <class First> __device__ __forceinline__ int last_at_most(int count, int64_t x, int lane, First first) {
    int low = 0, high = count;
    while (high - low > 1) {
        const int step = (high - low + WARP - 1) / WARP, probe = low + lane * step;
        const unsigned below = __ballot_sync(ALL, lane > 0 && probe > low && probe < high && first(probe) <= x);
        low += __popc(below) * step;
        high = high - low < step ? high : low + step;
    }
    return low;
}

// Tiles of `size` rows, none of two sequences. Which tiles there are depends on offsets that the host does not know; as many
// places for them as there may be: sequence s has those from cu[s] / size + s on.
struct Tile {
    int sequence, first;  // row within the sequence; beyond its end where the place is empty
};
__host__ __device__ inline int64_t tile_places(int64_t rows, int64_t sequences, int size) { return rows / size + sequences; }

__device__ __forceinline__ Tile tile_at(const Sequences &x, const void *cu, int count, int rows, int size, int place, int lane) {
    const auto first = [&](int s) {
        const int64_t at = x.read(cu, s);
        return (at < 0 ? 0 : at > rows ? rows : at) / size + s;
    };
    const int s = last_at_most(count, place, lane, first);
    const int64_t before = place - first(s);
    return {s, static_cast<int>(before < 0 || before > rows / size ? rows : before * size)};  // outside: bad offsets
}

struct Dropout {
    uint64_t seed, drop_below;  // drop_below 0: none
    double kept_scale;
    const uint64_t *seed_at;

    // First in every kernel that drops.
    __device__ __forceinline__ void read_seed() {
        if (drop_below) seed = case_fast_seed(seed, seed_at);
    }
    template <class A> __device__ __forceinline__ A factor(int64_t number, int head) const {
        return case_fast_keep(seed, number, head, drop_below) ? static_cast<A>(kept_scale) : A(0);
    }
};
inline Dropout dropout_of(double p, uint64_t seed, const uint64_t *seed_at) {
    return {seed, p > 0 ? case_fast_drop_below(p) : 0, p > 0 && p < 1 ? 1 / (1 - p) : 1, seed_at};
}

constexpr int FIND_THREADS = 256;

// One block: the longest key sequence, which numbers the weights for dropout.
static __global__ void __launch_bounds__(FIND_THREADS) find_longest(Sequences x, int64_t *longest) {
    __shared__ int64_t most[FIND_THREADS];
    int64_t mine = 0;
    for (int t = threadIdx.x; t < x.key_sequences; t += FIND_THREADS) {
        const int64_t rows = x.read(x.cu_key, t + 1) - x.read(x.cu_key, t);
        mine = rows > mine ? rows : mine;
    }
    most[threadIdx.x] = mine;
    for (int step = FIND_THREADS / 2; step; step /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < step && most[threadIdx.x + step] > most[threadIdx.x])
            most[threadIdx.x] = most[threadIdx.x + step];
    }
    if (threadIdx.x == 0) *longest = most[0];
}

struct Numbers {  // of the weights
    int heads, dim;
    double scale;
    Dropout dropout;
    const int64_t *longest;  // only with dropout

    __device__ __forceinline__ int64_t longest_keys() const { return dropout.drop_below ? *longest : 0; }
};

template <class T> struct Strided {  // rows of all heads
    T *base;
    int64_t stride;
    __device__ __forceinline__ T *row(int64_t row, int head, int dim) const { return base + row * stride + head * dim; }
};

}  // namespace case_fast
