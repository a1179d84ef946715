// The numbers that codes of base weights stand for, by other code than the engine's.
#pragma once

#include <cmath>
#include <cstdint>

#include "ktv/weight_format.hpp"

namespace ktv {

// zero: the zero point, of int4 alone.
inline double value_of(Format format, int code, int zero) {
    const auto minifloat = [](int magnitude, int mantissa, int least) {
        const int exponent = magnitude >> mantissa, rest = magnitude & ((1 << mantissa) - 1);
        return exponent == 0 ? std::ldexp(rest, least - mantissa)
                             : std::ldexp((1 << mantissa) + rest, least - mantissa + exponent - 1);
    };
    switch (format) {
        case Format::fp8:
            return (code & 0x80 ? -1 : 1) * minifloat(code & 0x7f, 3, -6);
        case Format::int8:
            return static_cast<std::int8_t>(code);
        case Format::int4:
            return code - 8 - zero;
        default:
            return (code & 8 ? -1 : 1) * minifloat(code & 7, 1, 0);
    }
}

}  // namespace ktv
