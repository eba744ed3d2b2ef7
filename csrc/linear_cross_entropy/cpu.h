// What cpu.cpp hands to the kernels, which are compiled once per instruction set: cpu_kernels.cpp.
#pragma once

#include <cstdint>

#include "common/kernels.h"

constexpr int64_t block_words = 192;  // scores are computed in tiles of so many words: whole panels of every instruction set
constexpr int64_t block_rows = 264;   // and at most so many rows, likewise
constexpr int64_t tile_stride = block_words + 16;  // from row to row: a column of the tile lies in all sets of the first cache
constexpr int64_t few_rows = 24;      // up to so many, rows of `weight` are read as they lie; beyond, packing them is repaid

// How many of `rows` make a block, where each has at most `most`: about equally many, and whole panels.
__attribute__((always_inline)) static inline int64_t even_block(int64_t rows, int64_t most) {
    const int64_t blocks = rows > most ? (rows + most - 1) / most : 1;
    return ((rows + blocks - 1) / blocks + 11) / 12 * 12;
}

// Sums of a row over the words seen so far.
template <class T>
struct RowSum {
    double sum;     // of e^(z - top)
    int64_t word;   // the first that has the greatest score
    T top;
    bool nan;       // `word` is the first NaN; it stays
};

// Arrays of one thread. Panels hold elements of common/gemm.h, which are as large as T.
template <class T>
struct Scratch {
    T *tile;           // (block_rows, tile_stride)
    T *word_columns;   // a block of `weight` transposed, as column panels
    T *word_rows;      // the same untransposed, as column panels
    T *bias_sum;       // (2, block_words): of all rows, and of a few
    T *rounded;        // the tile as row panels, where they are not of T
};

// The rows of one call, or a part of them.
template <class T>
struct VocabularyRows {
    int64_t rows, vocabulary, dim;
    const T *hidden, *weight, *bias;  // (rows, dim), (V, dim), (V)
    const T *hidden_rows;             // row panels, as those of Scratch; not needed where few
    bool few;
    const int64_t *target, *target_begin, *target_end;  // of row i: target[target_begin[i]] up to target[target_end[i]]

    // forward
    T *kept;                          // block by block of words, each (kept_rows, width of the block); or NULL
    int64_t kept_rows, kept_first;    // rows of the whole call; the place there of row 0
    T *target_score;                  // (M)

    // backward
    const T *kept_scores;             // as kept, or NULL
    const int64_t *kept_row;          // (rows): where each row lies there
    const T *hidden_columns;          // per even_block of rows: column panels
    const T *top, *log_sum, *scale;   // (rows): state; sum of grad_nll over the row's targets
    const T *grad_nll;                // (M)
    T *grad_weight, *grad_bias;       // whole, or NULL
    bool more;                        // add to them: not the first rows of the call
};

template <class T>
struct VocabularyKernels {
    int64_t (*row_panels)(int64_t rows, int64_t dim);     // elements of hidden_rows
    int64_t (*column_panels)(int64_t rows, int64_t dim);  // elements of hidden_columns
    void (*pack_rows)(const T *hidden, int64_t rows, int64_t dim, T *panels);
    void (*pack_columns)(const T *hidden, int64_t rows, int64_t dim, T *panels);
    Scratch<T> (*scratch)(T *memory, int64_t dim, int64_t *elements);  // memory NULL: how many elements it takes
    // Words [begin, end), which begin a block; the sums of each row over them.
    void (*forward)(const VocabularyRows<T> &, int64_t begin, int64_t end, RowSum<T> *sums, const Scratch<T> &);
    // grad_hidden (rows, dim): the part of these words; NULL: not wanted
    void (*backward)(const VocabularyRows<T> &, int64_t begin, int64_t end, T *grad_hidden, const Scratch<T> &);
    // Scores of rows [first, first + count) and one block of words into the tile; adds to their sums. highest (count): of the tile.
    void (*scores)(const VocabularyRows<T> &, int64_t first, int64_t count, int64_t begin, int64_t end, RowSum<T> *sums, T *highest,
                   const Scratch<T> &);
};

CASE_FAST_DECLARE_KERNELS(KernelsOf<VocabularyKernels>, linear_cross_entropy);
CASE_FAST_DECLARE_BF16_KERNELS(VocabularyKernels, linear_cross_entropy);
