// Expected results of tile instructions: fp32 arithmetic in integers, without a floating-point instruction.
#pragma once

#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "../emulation/amx_tiles.hpp"
#include "amx_trap_harness.hpp"

using namespace ktv::emulation;

constexpr std::uint32_t kSign = 0x80000000, kInfinity = 0x7f800000, kNan = 0xffc00000;

bool is_nan(std::uint32_t x) {
    return (x & ~kSign) > kInfinity;
}
bool is_infinite(std::uint32_t x) {
    return (x & ~kSign) == kInfinity;
}
bool is_zero(std::uint32_t x) {
    return (x & kInfinity) == 0;
}  // denormals are zero

__extension__ typedef unsigned __int128 Wide;

struct Number {
    Wide magnitude;
    int exponent;  // value = magnitude * 2^exponent
    bool negative;
};
Number unpack(std::uint32_t x) {
    if (is_zero(x)) return {0, 0, (x & kSign) != 0};
    return {(x & 0x7fffff) | 0x800000, static_cast<int>(x >> 23 & 255) - 150, (x & kSign) != 0};
}
int top_bit(Wide x) {
    const auto high = static_cast<std::uint64_t>(x >> 64), low = static_cast<std::uint64_t>(x);
    return high != 0 ? 127 - std::countl_zero(high) : 63 - std::countl_zero(low);
}

// Nearest even, then zero if the result is below the normal range (x86 tests for tininess after rounding).
std::uint32_t round_to_fp32(Number x) {
    const std::uint32_t sign = x.negative ? kSign : 0;
    if (x.magnitude == 0) return sign;
    const int drop = top_bit(x.magnitude) - 23;
    auto significand = static_cast<std::uint32_t>(drop > 0 ? x.magnitude >> drop : x.magnitude << -drop);
    if (drop > 0) {
        const Wide rest = x.magnitude & ((static_cast<Wide>(1) << drop) - 1);
        const Wide half = static_cast<Wide>(1) << (drop - 1);
        if (rest > half || (rest == half && (significand & 1))) ++significand;
    }
    int exponent = x.exponent + drop;
    if (significand == 0x1000000) significand >>= 1, ++exponent;
    const int biased = exponent + 150;
    if (biased < 1) return sign;
    if (biased > 254) return sign | kInfinity;
    return sign | static_cast<std::uint32_t>(biased) << 23 | (significand & 0x7fffff);
}

std::uint32_t oracle_fma(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
    const bool negative = ((a ^ b) & kSign) != 0;
    if (is_nan(a) || is_nan(b) || is_nan(c)) return kNan;
    if (is_infinite(a) || is_infinite(b)) {
        if (is_zero(a) || is_zero(b) || (is_infinite(c) && negative != ((c & kSign) != 0))) return kNan;
        return (negative ? kSign : 0) | kInfinity;
    }
    if (is_infinite(c)) return c;
    const Number left = unpack(a), right = unpack(b);
    Number x{left.magnitude * right.magnitude, left.exponent + right.exponent, negative}, y = unpack(c);
    if (x.magnitude == 0 && y.magnitude == 0) return x.negative && y.negative ? kSign : 0;
    if (x.magnitude == 0) return round_to_fp32(y);
    if (y.magnitude == 0) return round_to_fp32(x);
    if (top_bit(x.magnitude) + x.exponent < top_bit(y.magnitude) + y.exponent) std::swap(x, y);
    // The larger one's top bit goes to bit 100; bits of the smaller one below bit 0 become a sticky bit.
    const int up = 100 - top_bit(x.magnitude);
    x.magnitude <<= up;
    x.exponent -= up;
    const int shift = y.exponent - x.exponent;
    if (shift >= 0) {
        y.magnitude <<= shift;
    } else if (shift > -128) {
        const Wide kept = y.magnitude >> -shift;
        y.magnitude = kept | (kept << -shift != y.magnitude ? 1 : 0);
    } else {
        y.magnitude = 1;
    }
    if (x.negative == y.negative) {
        x.magnitude += y.magnitude;
    } else if (x.magnitude == y.magnitude) {
        return 0;
    } else {
        x.negative = x.magnitude > y.magnitude ? x.negative : y.negative;
        x.magnitude = x.magnitude > y.magnitude ? x.magnitude - y.magnitude : y.magnitude - x.magnitude;
    }
    return round_to_fp32(x);
}
std::uint32_t oracle_add(std::uint32_t a, std::uint32_t b) {
    return oracle_fma(a, std::bit_cast<std::uint32_t>(1.0f), b);
}

std::uint32_t element(const Tile& tile, unsigned row, unsigned column) {
    std::uint32_t bits;
    std::memcpy(&bits, &tile.bytes[row][4 * column], 4);
    return bits;
}
void set_element(Tile& tile, unsigned row, unsigned column, std::uint32_t bits) {
    std::memcpy(&tile.bytes[row][4 * column], &bits, 4);
}

Tile oracle_bf16(const Tile& dest, const Tile& a, const Tile& b, Shape shape) {
    Tile result{};
    for (unsigned m = 0; m < shape.rows; ++m) {
        for (unsigned n = 0; n < shape.columns; ++n) {
            std::uint32_t even = 0, odd = 0;
            for (unsigned k = 0; k < shape.depth; ++k) {
                const std::uint32_t left = element(a, m, k), right = element(b, k, n);
                even = oracle_fma(left << 16, right << 16, even);
                odd = oracle_fma(left & 0xffff0000, right & 0xffff0000, odd);
            }
            set_element(result, m, n, oracle_add(element(dest, m, n), oracle_add(even, odd)));
        }
    }
    return result;
}

// Equal bits; on hardware any two NaNs are equal, because the manual does not specify which NaN results.
bool same(const Tile& actual, const Tile& expected, bool any_nan = hardware) {
    for (unsigned row = 0; row < 16; ++row) {
        for (unsigned column = 0; column < 16; ++column) {
            const std::uint32_t x = element(actual, row, column), y = element(expected, row, column);
            if (x != y && !(any_nan && is_nan(x) && is_nan(y))) {
                std::printf("     [%u, %u]: 0x%08x, expected 0x%08x\n", row, column, x, y);
                return false;
            }
        }
    }
    return true;
}
bool same_int(const Tile& actual, const Tile& expected) {
    return std::memcmp(&actual, &expected, sizeof(Tile)) == 0;
}
