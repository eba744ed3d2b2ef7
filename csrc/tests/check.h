// CHECK for the C++ tests: prints what failed and ends the program; works under every sanitizer. Seeds in two parts.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                                  \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);  \
            std::exit(1);                                                                 \
        }                                                                                 \
    } while (0)

// A seed as the functions take it: a number, and where there is one the place of another that it is XORed with, modulo 2^63. The
// greater half of all seeds stay whole.
struct SeedParts {
    uint64_t number;
    const uint64_t *at;
};
inline SeedParts parts_of(uint64_t seed) {
    static const uint64_t other = 0xC3A5C85C97CB3127u;
    if (seed >> 63) return {seed, nullptr};
    return {(seed ^ other) << 1 >> 1, &other};
}
