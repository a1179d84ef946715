// The arithmetic of AMX's tiles, for the emulator and for comparison with hardware. x86-64 only.
#pragma once

#include <cstdint>

namespace ktv::emulation {

constexpr unsigned kTiles = 8;      // palette 1: eight tiles
constexpr unsigned kRows = 16;      // of at most 16 rows
constexpr unsigned kRowBytes = 64;  // of at most 64 bytes

// One tile register: 16 rows of 64 bytes: fp32 [16][16] or bf16 pairs [16][16][2].
struct alignas(64) Tile {
    std::uint8_t bytes[kRows][kRowBytes];
};

// dest [rows][columns] += a [rows][depth] * b [depth][columns], counted in 4-byte elements, each at most 16.
struct Shape {
    unsigned rows, depth, columns;
};

// How tdpbf16ps is computed. All give the same bits; scalar is the reference and needs only SSE2.
enum class Path { scalar, avx2, avx512 };
bool path_available(Path path) noexcept;
Path best_path() noexcept;

// dest fp32, a and b bf16 pairs; README.md specifies the bits. Elements outside [rows][columns] become zero.
void tdpbf16ps(Tile& dest, const Tile& a, const Tile& b, Shape shape, Path path) noexcept;

}  // namespace ktv::emulation
