// What offsets and indices must hold before anything is read through them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

// Whether 0 <= value < limit for all. Branch-free, for the compiler to vectorise: the sign bit of any bad value stays.
template <class I>
inline bool all_within(const I *values, int64_t count, int64_t limit) {
    using Unsigned = std::make_unsigned_t<I>;
    const Unsigned last = Unsigned(std::min<int64_t>(limit - 1, std::numeric_limits<I>::max()));
    if (limit == 0) return count == 0;
    Unsigned signs = 0;
    for (int64_t i = 0; i < count; ++i) signs |= Unsigned(values[i]) | (last - Unsigned(values[i]));
    return I(signs) >= 0;
}

// Whether offsets begin with 0, never fall and end with `last`.
template <class I>
inline bool rises(const I *values, int64_t count, int64_t last) {
    bool good = values[0] == 0 && values[count - 1] == last;
    for (int64_t i = 1; i < count; ++i) good &= values[i - 1] <= values[i];
    return good;
}
