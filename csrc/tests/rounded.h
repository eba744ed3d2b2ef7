// Factors as products of bfloat16 have them.
#pragma once

#include <cstdint>
#include <cstring>

// To bfloat16, to the nearest, ties to even. Finite numbers.
inline double rounded(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000;
    std::memcpy(&x, &bits, sizeof bits);
    return x;
}
