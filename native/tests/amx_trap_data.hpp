// Operands of every kind for test_amx_*.cpp, and a product written with intrinsics.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

#include <immintrin.h>

#include "amx_trap_code.hpp"
#include "amx_trap_harness.hpp"
#include "amx_trap_oracle.hpp"

enum class Data { integer, gaussian, wide, tiny, huge, special, bits };
constexpr const char* kDataNames[] = {"integer", "gaussian", "wide", "tiny", "huge", "special", "bits"};

std::uint32_t truncate_to_bf16(float x) {
    return std::bit_cast<std::uint32_t>(x) & 0xffff0000;
}

// An fp32 whose lower half is zero: a bf16.
std::uint32_t draw(Data data, Random& random) {
    const std::uint32_t sign = random() & kSign, fraction = random() & 0x7f0000;
    const auto scaled = [&](unsigned low, unsigned count) {
        return sign | (low + random.below(count)) << 23 | fraction;
    };
    switch (data) {
        case Data::integer:
            return truncate_to_bf16(static_cast<float>(static_cast<int>(random.below(17)) - 8));
        case Data::gaussian:
            return truncate_to_bf16(random.gaussian());
        case Data::wide:
            return scaled(90, 75);
        case Data::tiny:
            return random.below(4) ? scaled(60, 8) : scaled(0, 2);  // products around 2^-126, denormals
        case Data::huge:
            return scaled(186, 6);  // products around 2^127
        case Data::special: {
            constexpr std::uint32_t kValues[] = {0x7f800000, 0xff800000, 0x7fc00000, 0xff810000,
                                                 0,          kSign,      0x00010000, 0x3f800000};
            return random.below(8) ? truncate_to_bf16(random.gaussian()) : kValues[random.below(8)];
        }
        case Data::bits:
            return static_cast<std::uint32_t>(random()) & 0xffff0000;
    }
    return 0;
}

void fill(Tile& tile, Data data, Random& random) {
    for (unsigned i = 0; i < 256; ++i) set_element(tile, i / 16, i % 16, draw(data, random) | draw(data, random) >> 16);
}
void fill_dest(Tile& tile, Data data, Random& random) {
    for (unsigned i = 0; i < 256; ++i) {
        std::uint32_t bits = draw(data, random);
        if (data == Data::tiny) bits = random.below(2) ? bits & 0x80ffffff : 0;  // near the smallest normal number
        if (data != Data::integer && random.below(2)) bits |= static_cast<std::uint32_t>(random()) & 0xffff;
        set_element(tile, i / 16, i % 16, bits);
    }
}

constexpr Path kPaths[] = {Path::scalar, Path::avx2, Path::avx512};
constexpr const char* kPathNames[] = {"scalar", "avx2", "avx512"};

// 32 x 32 outputs in four tiles, by intrinsics. gcc 12's intrinsics do not declare the memory that they access: hence
// the barriers.
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")
void matmul_32x32(float* c, const std::uint16_t* a, const std::uint16_t* b, int depth) {
    const Config config = Config::full();
    asm volatile("" : : "r"(&config), "r"(c), "r"(a), "r"(b) : "memory");
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int k = 0; k < depth; k += 32) {
        _tile_loadd(4, a + k, 2 * depth);
        _tile_loadd(5, a + 16 * depth + k, 2 * depth);
        _tile_stream_loadd(6, b + k * 32, 128);
        _tile_stream_loadd(7, b + k * 32 + 32, 128);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
    _tile_stored(2, c + 16 * 32, 128);
    _tile_stored(3, c + 16 * 32 + 16, 128);
    _tile_release();
    asm volatile("" : : : "memory");
}
#pragma GCC pop_options

// Integers, because their sums are exact in any order.
bool matmul_is_right(Random& random) {
    constexpr int kDepth = 96;
    std::vector<std::uint16_t> a(32 * kDepth), b(32 * kDepth);  // b: [depth / 2][32][2]
    std::vector<float> c(32 * 32, -1.0f);
    for (auto& x : a) x = static_cast<std::uint16_t>(draw(Data::integer, random) >> 16);
    for (auto& x : b) x = static_cast<std::uint16_t>(draw(Data::integer, random) >> 16);
    matmul_32x32(c.data(), a.data(), b.data(), kDepth);
    const auto value = [](std::uint16_t x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x) << 16); };
    for (int m = 0; m < 32; ++m) {
        for (int n = 0; n < 32; ++n) {
            float sum = 0;
            for (int k = 0; k < kDepth; ++k) sum += value(a[m * kDepth + k]) * value(b[(k / 2 * 32 + n) * 2 + k % 2]);
            if (c[m * 32 + n] != sum) return false;
        }
    }
    return true;
}
