// Many rows a sequence: a block takes a tile of rows of one sequence and head, and walks over the rows of the other side, a tile
// in shared memory at a time. With P the weights, M what dropout multiplies them by, W = P M, g the gradient of out:
//   delta_i = g_i . out_i        S = P (M (g value^T) - delta) scale
//   grad_query = S key        grad_key = S^T query        grad_value = W^T g
// A warp has ROWS / WARPS of the block's rows for itself; of a score it is the lane that says which row of the other side, of a
// sum of rows the lanes share the dimensions as in `Held`. So no sum passes from one warp to another.
#pragma once

#include "common/sequences.cuh"

namespace case_fast::packed_attention {

template <class H> struct Tiles {
    using T = typename H::T;
    using A = typename H::A;
    static constexpr int WARPS = 4, THREADS = WARPS * WARP;
    static constexpr int BLOCKS = 3, GRAD_KEY_BLOCKS = 2;                   // on a multiprocessor: registers for none to spill
    static constexpr int MINE = H::SIZE <= 6 ? 4 : sizeof(A) == 4 ? 2 : 1;  // rows of a warp: their sums are in registers
    static constexpr int ROWS = WARPS * MINE, COLUMNS = sizeof(A) == 4 ? 32 : 16;
    static constexpr int AT_ONCE = 16 / sizeof(A);  // numbers of one load from shared memory
    struct alignas(16) Numbers {
        A x[AT_ONCE];
    };
    struct alignas(sizeof(A) * H::VEC) Pack {
        A x[H::VEC];
    };

    // Numbers from row to row in shared memory: an odd count of 16 bytes, so that 8 rows' loads meet in no bank.
    __host__ __device__ static int stride(int dim) { return ((dim * static_cast<int>(sizeof(A)) + 15) / 16 | 1) * AT_ONCE; }
    // Bytes for so many tiles of the block's rows and of the other side's, and so many of weights.
    __host__ static int shared_bytes(int dim, int own, int other, int weights) {
        return ((own * ROWS + other * COLUMNS) * stride(dim) + weights * ROWS * COLUMNS) * static_cast<int>(sizeof(A));
    }

    int dim, head, lane, warp, step;

    __device__ Tiles(int dim)
        : dim(dim),
          head(static_cast<int>(blockIdx.y)),
          lane(static_cast<int>(threadIdx.x) & (WARP - 1)),
          warp(static_cast<int>(threadIdx.x) / WARP),
          step(stride(dim)) {}

    // Rows first .. first + count - 1 to shared memory, the rest of `most` zero; by the whole block.
    __device__ void hold(A *to, const Strided<const T> &from, int64_t first, int count, int most) const {
        constexpr int AHEAD = H::AHEAD;
        for (int base = warp; base < most; base += WARPS * AHEAD) {
            H rows[AHEAD];
#pragma unroll
            for (int u = 0; u < AHEAD; ++u) {
                const int r = base + u * WARPS;
                if (r < count)
                    rows[u].load(from.row(first + r, head, dim), lane, dim);
                else
                    rows[u].zero();
            }
#pragma unroll
            for (int u = 0; u < AHEAD; ++u) {
                const int r = base + u * WARPS;
                if (r >= most) continue;
#pragma unroll
                for (int c = 0; c < H::CHUNKS; ++c) {
                    const int d = (c * WARP + lane) * H::VEC;
                    if (d >= step) continue;
                    Pack pack;
#pragma unroll
                    for (int i = 0; i < H::VEC; ++i) pack.x[i] = rows[u].x[c * H::VEC + i];
                    *reinterpret_cast<Pack *>(to + r * step + d) = pack;
                }
            }
        }
    }
    // Of this warp's rows with this lane's row of the other side.
    __device__ __forceinline__ void dots(A (&out)[MINE], const A *own, const A *other) const {
        own += warp * MINE * step;
        other += (lane & (COLUMNS - 1)) * step;
#pragma unroll
        for (int r = 0; r < MINE; ++r) out[r] = 0;
#pragma unroll 2
        for (int d = 0; d < dim; d += AT_ONCE) {
            const Numbers y = *reinterpret_cast<const Numbers *>(other + d);
#pragma unroll
            for (int r = 0; r < MINE; ++r) {
                const Numbers x = *reinterpret_cast<const Numbers *>(own + r * step + d);
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i) out[r] += x.x[i] * y.x[i];
            }
        }
    }
    __device__ __forceinline__ A *of_warp(A *weights) const { return weights + warp * MINE * COLUMNS; }

    // sum += weights (MINE, COLUMNS) x rows of the other side, of which the first `count` are there.
    __device__ __forceinline__ void add(H (&sum)[MINE], const A *weights, const A *other, int count) const {
        int at[H::CHUNKS];
#pragma unroll
        for (int c = 0; c < H::CHUNKS; ++c) {
            const int d = (c * WARP + lane) * H::VEC;
            at[c] = d < step ? d : 0;  // beyond a row, its sum is not used
        }
#pragma unroll 1
        for (int j = 0; j < count; j += AT_ONCE) {
            Numbers w[MINE];
#pragma unroll
            for (int r = 0; r < MINE; ++r) w[r] = *reinterpret_cast<const Numbers *>(weights + r * COLUMNS + j);
#pragma unroll
            for (int u = 0; u < AT_ONCE; ++u) {
                const A *const row = other + (j + u) * step;
#pragma unroll
                for (int c = 0; c < H::CHUNKS; ++c) {
                    const Pack pack = *reinterpret_cast<const Pack *>(row + at[c]);
#pragma unroll
                    for (int i = 0; i < H::VEC; ++i)
#pragma unroll
                        for (int r = 0; r < MINE; ++r) sum[r].x[c * H::VEC + i] += w[r].x[u] * pack.x[i];
                }
            }
        }
    }
};

template <class H> struct Forward {
    using T = typename H::T;
    Strided<const T> query, key, value;
    Strided<T> out;
    typename H::A *lse;  // or NULL
};

template <class H> struct Backward {
    using T = typename H::T;
    using A = typename H::A;
    Strided<const T> query, key, value, out, grad_out;
    Strided<T> grad_query, grad_key, grad_value;
    const A *lse;
    A *delta;
};

// e^(score - lse), of lane's weight: at most 1, since of scores beyond 1e6 the rounding of lse would make it of any size.
template <class A> __device__ __forceinline__ A weight_of(A log_weight) {
    return exponential(log_weight > 0 ? A(0) : log_weight);  // NaN goes through
}

template <class H> __global__ void __launch_bounds__(Tiles<H>::THREADS, Tiles<H>::BLOCKS)
    tile_forward(Sequences sequences, Numbers numbers, Forward<H> arrays) {
    using K = Tiles<H>;
    using A = typename H::A;
    CASE_FAST_DYNAMIC_SHARED(memory);
    numbers.dropout.read_seed();
    const K tiles(numbers.dim);
    const int lane = tiles.lane, warp = tiles.warp, head = tiles.head, dim = numbers.dim;
    sequences.check();
    const Tile tile =
        tile_at(sequences, sequences.cu_query, sequences.batch, sequences.queries, K::ROWS, static_cast<int>(blockIdx.x), lane);
    const Span span = sequences.span(tile.sequence);
    const int count = span.rows - tile.first < K::ROWS ? span.rows - tile.first : K::ROWS;
    if (count <= 0) return;
    A *const query = reinterpret_cast<A *>(memory), *const key = query + K::ROWS * tiles.step;
    A *const value = key + K::COLUMNS * tiles.step, *const weights = tiles.of_warp(value + K::COLUMNS * tiles.step);
    const int place = tile.first + warp * K::MINE, mine = count - warp * K::MINE;  // of this warp; mine may be <= 0
    const int64_t row = static_cast<int64_t>(span.row) + place, longest = numbers.longest_keys();
    const A scale = static_cast<A>(numbers.scale);

    H sum[K::MINE];
    A peak[K::MINE], total[K::MINE];  // total: this lane's share
#pragma unroll
    for (int r = 0; r < K::MINE; ++r) sum[r].zero(), peak[r] = minus_infinity<A>(), total[r] = 0;
    tiles.hold(query, arrays.query, static_cast<int64_t>(span.row) + tile.first, count, K::ROWS);
    const int last = span.visible(tile.first + count - 1, sequences.causal);
    for (int first = 0; first < last; first += K::COLUMNS) {
        const int there = last - first < K::COLUMNS ? last - first : K::COLUMNS;
        __syncthreads();
        tiles.hold(key, arrays.key, static_cast<int64_t>(span.key) + first, there, K::COLUMNS);
        tiles.hold(value, arrays.value, static_cast<int64_t>(span.key) + first, there, K::COLUMNS);
        __syncthreads();
        if (mine <= 0) continue;
        A score[K::MINE];
        tiles.dots(score, query, key);
#pragma unroll
        for (int r = 0; r < K::MINE; ++r) {
            const bool seen = lane < there && first + lane < span.visible(place + r, sequences.causal);
            score[r] *= scale;
            const A next = larger(peak[r], warp_max(seen ? score[r] : minus_infinity<A>()));
            const A shrink = peak[r] == next ? A(1) : exponential(peak[r] - next);
            A weight = seen ? exponential(score[r] - next) : A(0);
            total[r] = total[r] * shrink + weight;
            sum[r].scale(shrink);
            peak[r] = next;
            if (numbers.dropout.drop_below && seen)
                weight *= numbers.dropout.template factor<A>((row + r) * longest + first + lane, head);
            if (lane < K::COLUMNS) weights[r * K::COLUMNS + lane] = weight;
        }
        __syncwarp();
        tiles.add(sum, weights, value, there);
    }
#pragma unroll
    for (int r = 0; r < K::MINE; ++r) {
        const A all = warp_sum(total[r]);
        if (r >= mine) continue;
        const bool none = span.visible(place + r, sequences.causal) == 0;
        sum[r].scale(span.bad ? not_a_number<A>() : none ? A(0) : 1 / all);
        sum[r].store(arrays.out.row(row + r, head, dim), lane, dim);
        if (arrays.lse && lane == 0)
            arrays.lse[(row + r) * numbers.heads + head] = none ? minus_infinity<A>() : peak[r] + logarithm(all);
    }
}

template <class H> __global__ void __launch_bounds__(Tiles<H>::THREADS, Tiles<H>::BLOCKS)
    tile_grad_query(Sequences sequences, Numbers numbers, Backward<H> arrays) {
    using K = Tiles<H>;
    using A = typename H::A;
    CASE_FAST_DYNAMIC_SHARED(memory);
    numbers.dropout.read_seed();
    const K tiles(numbers.dim);
    const int lane = tiles.lane, warp = tiles.warp, head = tiles.head, dim = numbers.dim;
    sequences.check();
    const Tile tile =
        tile_at(sequences, sequences.cu_query, sequences.batch, sequences.queries, K::ROWS, static_cast<int>(blockIdx.x), lane);
    const Span span = sequences.span(tile.sequence);
    const int count = span.rows - tile.first < K::ROWS ? span.rows - tile.first : K::ROWS;
    if (count <= 0) return;
    A *const query = reinterpret_cast<A *>(memory), *const grad_out = query + K::ROWS * tiles.step;
    A *const key = grad_out + K::ROWS * tiles.step, *const value = key + K::COLUMNS * tiles.step;
    A *const weights = tiles.of_warp(value + K::COLUMNS * tiles.step);
    const int place = tile.first + warp * K::MINE, mine = count - warp * K::MINE;
    const int64_t row = static_cast<int64_t>(span.row) + place, longest = numbers.longest_keys();
    const A scale = static_cast<A>(numbers.scale);

    tiles.hold(query, arrays.query, static_cast<int64_t>(span.row) + tile.first, count, K::ROWS);
    tiles.hold(grad_out, arrays.grad_out, static_cast<int64_t>(span.row) + tile.first, count, K::ROWS);
    H sum[K::MINE];
    A lse[K::MINE], delta[K::MINE];
#pragma unroll
    for (int r = 0; r < K::MINE; ++r) {
        sum[r].zero(), lse[r] = 0, delta[r] = 0;
        if (r >= mine) continue;
        H out, grad;
        out.load(arrays.out.row(row + r, head, dim), lane, dim);
        grad.load(arrays.grad_out.row(row + r, head, dim), lane, dim);
        delta[r] = warp_sum(out.dot(grad));
        lse[r] = arrays.lse[(row + r) * numbers.heads + head];
        if (lane == 0) arrays.delta[(row + r) * numbers.heads + head] = delta[r];
    }
    const int last = span.visible(tile.first + count - 1, sequences.causal);
    for (int first = 0; first < last; first += K::COLUMNS) {
        const int there = last - first < K::COLUMNS ? last - first : K::COLUMNS;
        __syncthreads();
        tiles.hold(key, arrays.key, static_cast<int64_t>(span.key) + first, there, K::COLUMNS);
        tiles.hold(value, arrays.value, static_cast<int64_t>(span.key) + first, there, K::COLUMNS);
        __syncthreads();
        if (mine <= 0) continue;
        A score[K::MINE], slope[K::MINE];
        tiles.dots(score, query, key);
        tiles.dots(slope, grad_out, value);
#pragma unroll
        for (int r = 0; r < K::MINE; ++r) {
            const bool seen = lane < there && r < mine && first + lane < span.visible(place + r, sequences.causal);
            if (numbers.dropout.drop_below && seen)
                slope[r] *= numbers.dropout.template factor<A>((row + r) * longest + first + lane, head);
            const A weight = weight_of(score[r] * scale - lse[r]);
            if (lane < K::COLUMNS) weights[r * K::COLUMNS + lane] = seen ? weight * (slope[r] - delta[r]) * scale : A(0);
        }
        __syncwarp();
        tiles.add(sum, weights, key, there);
    }
#pragma unroll
    for (int r = 0; r < K::MINE; ++r) {
        if (r >= mine) continue;
        if (span.bad) sum[r].scale(not_a_number<A>());
        sum[r].store(arrays.grad_query.row(row + r, head, dim), lane, dim);
    }
}

// After tile_grad_query, which writes delta. Here the block's rows are keys, and it walks over the query rows that see them, by
// sequence and place.
template <class H> __global__ void __launch_bounds__(Tiles<H>::THREADS, Tiles<H>::GRAD_KEY_BLOCKS)
    tile_grad_key(Sequences sequences, Numbers numbers, Backward<H> arrays) {
    using K = Tiles<H>;
    using A = typename H::A;
    CASE_FAST_DYNAMIC_SHARED(memory);
    numbers.dropout.read_seed();
    const K tiles(numbers.dim);
    const int lane = tiles.lane, warp = tiles.warp, head = tiles.head, dim = numbers.dim;
    sequences.check();
    const Tile tile = tile_at(sequences, sequences.cu_key, sequences.key_sequences, sequences.keys, K::ROWS,
                              static_cast<int>(blockIdx.x), lane);
    int begin, rows, keys;
    const bool good = sequences.key_bounds(tile.sequence, begin, rows, keys);
    const int count = rows - tile.first < K::ROWS ? rows - tile.first : K::ROWS;  // rows to write
    if (count <= 0) return;
    const int real = keys - tile.first < count ? keys - tile.first : count;  // of which are keys; may be <= 0
    A *const key = reinterpret_cast<A *>(memory), *const value = key + K::ROWS * tiles.step;
    A *const query = value + K::ROWS * tiles.step, *const grad_out = query + K::COLUMNS * tiles.step;
    A *const slopes = grad_out + K::COLUMNS * tiles.step, *const weights = slopes + K::ROWS * K::COLUMNS;
    A *const my_slopes = tiles.of_warp(slopes), *const my_weights = tiles.of_warp(weights);
    const int place = tile.first + warp * K::MINE, mine = real - warp * K::MINE;
    const int64_t longest = numbers.longest_keys();
    const A scale = static_cast<A>(numbers.scale);

    H sum_key[K::MINE], sum_value[K::MINE];
#pragma unroll
    for (int r = 0; r < K::MINE; ++r) sum_key[r].zero(), sum_value[r].zero();
    tiles.hold(key, arrays.key, static_cast<int64_t>(begin) + tile.first, real, K::ROWS);
    tiles.hold(value, arrays.value, static_cast<int64_t>(begin) + tile.first, real, K::ROWS);

    const auto walk = [&](int s) {
        const Span span = sequences.span(s);
        const int later = tile.first - (span.keys - span.rows);  // the first place that sees a key of this tile
        for (int first = sequences.causal && later > 0 ? later : 0; first < span.rows; first += K::COLUMNS) {
            const int there = span.rows - first < K::COLUMNS ? span.rows - first : K::COLUMNS;
            const int64_t row = static_cast<int64_t>(span.row) + first;
            __syncthreads();
            tiles.hold(query, arrays.query, row, there, K::COLUMNS);
            tiles.hold(grad_out, arrays.grad_out, row, there, K::COLUMNS);
            __syncthreads();
            if (mine <= 0) continue;
            const bool here = lane < there;
            const int64_t number = (row + lane) * numbers.heads + head;
            const A lse = here ? arrays.lse[number] : A(0), delta = here ? arrays.delta[number] : A(0);
            const int visible = here ? span.visible(first + lane, sequences.causal) : 0;
            A score[K::MINE], slope[K::MINE];
            tiles.dots(score, key, query);
            tiles.dots(slope, value, grad_out);
#pragma unroll
            for (int r = 0; r < K::MINE; ++r) {
                const bool seen = r < mine && place + r < visible;
                A kept = 1;
                if (numbers.dropout.drop_below && seen)
                    kept = numbers.dropout.template factor<A>((row + lane) * longest + place + r, head);
                const A weight = weight_of(score[r] * scale - lse);
                if (lane < K::COLUMNS) {
                    my_weights[r * K::COLUMNS + lane] = seen ? weight * kept : A(0);
                    my_slopes[r * K::COLUMNS + lane] = seen ? weight * (slope[r] * kept - delta) * scale : A(0);
                }
            }
            __syncwarp();
            tiles.add(sum_value, my_weights, grad_out, there);
            tiles.add(sum_key, my_slopes, query, there);
        }
    };
    const bool shared = sequences.key_of != nullptr;  // else its own sequence alone
    for (int base = shared ? 0 : tile.sequence; real > 0 && base < sequences.batch; base += WARP) {
        const int s = base + lane;
        unsigned sharing = 1;
        if (shared) sharing = __ballot_sync(ALL, s < sequences.batch && sequences.read(sequences.key_of, s) == tile.sequence);
        for (; sharing; sharing &= sharing - 1) walk(base + __ffs(static_cast<int>(sharing)) - 1);
        if (!shared) break;
    }
#pragma unroll
    for (int r = 0; r < K::MINE; ++r) {
        if (r >= count - warp * K::MINE) continue;
        if (!good) sum_key[r].scale(not_a_number<A>()), sum_value[r].scale(not_a_number<A>());
        const int64_t row = static_cast<int64_t>(begin) + place + r;
        sum_key[r].store(arrays.grad_key.row(row, head, dim), lane, dim);
        sum_value[r].store(arrays.grad_value.row(row, head, dim), lane, dim);
    }
}

}  // namespace case_fast::packed_attention
