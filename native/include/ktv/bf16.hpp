// bfloat16 as the upper half of an fp32: portable conversions.
#pragma once

#include <bit>
#include <cstdint>

namespace ktv {

using bf16 = std::uint16_t;

inline float to_float(bf16 value) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(value) << 16);
}

// Round to nearest even. Subnormals are kept (the AVX-512 conversion would flush them); a NaN stays a quiet NaN.
inline bf16 to_bf16(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40u);
    return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// value = hi + lo to 16 significant bits. lo is 0 when hi is infinite or NaN, because inf - inf would turn an overflow
// into a NaN.
struct Split {
    bf16 hi, lo;
};
inline Split split(float value) {
    const bf16 hi = to_bf16(value);
    const float high = to_float(hi);
    const bool finite = (hi & 0x7f80u) != 0x7f80u;
    return {hi, finite ? to_bf16(value - high) : bf16{0}};
}

}  // namespace ktv
