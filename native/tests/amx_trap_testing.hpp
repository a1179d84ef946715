// What the tests of the AMX emulator share: child processes, operands of every kind, and the expected results.
#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../emulation/amx_trap.hpp"
#include "amx_trap_code.hpp"
#include "check.hpp"

bool hardware = false;  // this CPU runs tile instructions itself

struct Outcome {
    int status;
    std::string errors;
    bool killed_by(int signal) const { return WIFSIGNALED(status) && WTERMSIG(status) == signal; }
    bool exited_with(int code) const { return WIFEXITED(status) && WEXITSTATUS(status) == code; }
};

// Runs `body` in a child process; its result is the child's exit code.
Outcome in_child(const std::function<int()>& body) {
    int ends[2];
    if (pipe(ends) != 0) std::abort();
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        const rlimit none{0, 0};
        setrlimit(RLIMIT_CORE, &none);
        dup2(ends[1], STDERR_FILENO);
        close(ends[0]);
        _exit(body());
    }
    close(ends[1]);
    Outcome outcome{};
    char buffer[512];
    for (ssize_t size; (size = read(ends[0], buffer, sizeof buffer)) > 0;)
        outcome.errors.append(buffer, static_cast<std::size_t>(size));
    close(ends[0]);
    waitpid(child, &outcome.status, 0);
    return outcome;
}

bool request_hardware_amx() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// For main: installs the emulator, which does nothing on a CPU with AMX.
void begin() {
    hardware = request_hardware_amx();
    check(ktv::emulation::amx_trap_install() && ktv::emulation::amx_trap_installed(), "the emulator installs");
}

// The exit code.
int finish_amx() {
    std::printf("%s\n", hardware ? "on AMX hardware" : "by emulation");
    return finish();
}

// ---- Expected results: fp32 arithmetic in integers, without a floating-point instruction.

constexpr std::uint32_t kSign = 0x80000000, kInfinity = 0x7f800000, kNan = 0xffc00000, kOne = 0x3f800000;

bool is_nan(std::uint32_t x) {
    return (x & ~kSign) > kInfinity;
}
bool is_infinite(std::uint32_t x) {
    return (x & ~kSign) == kInfinity;
}
bool is_zero(std::uint32_t x) {
    return (x & kInfinity) == 0;  // denormals are zero
}

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
            // x * 1 + y is their sum.
            set_element(result, m, n, oracle_fma(element(dest, m, n), kOne, oracle_fma(even, kOne, odd)));
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
template <typename T>
bool same_bytes(const T& actual, const T& expected) {
    return std::memcmp(&actual, &expected, sizeof(T)) == 0;
}

// ---- Operands

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

Shape random_shape(Random& random) {
    return {1 + random.below(16), 1 + random.below(16), 1 + random.below(16)};
}

// dest fp32, a and b bf16.
struct Operands {
    Tile dest, a, b;
    Operands(Data data, Random& random) {
        for (unsigned i = 0; i < 256; ++i) {
            std::uint32_t bits = draw(data, random);
            if (data == Data::tiny) bits = random.below(2) ? bits & 0x80ffffff : 0;  // near the smallest normal number
            if (data != Data::integer && random.below(2)) bits |= static_cast<std::uint32_t>(random()) & 0xffff;
            set_element(dest, i / 16, i % 16, bits);
            for (Tile* tile : {&a, &b})
                set_element(*tile, i / 16, i % 16, draw(data, random) | draw(data, random) >> 16);
        }
    }
};

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
