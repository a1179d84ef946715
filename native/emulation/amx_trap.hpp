// Intel AMX in user space: real machine code with tile instructions runs, and is checked, on a CPU that has none.
//
// A tile instruction raises SIGILL where the CPU lacks AMX. The handler installed here decodes it at the faulting
// address, does what Intel's manual (SDM volume 2, ch. 3 to 5) says, and goes on behind it. Correctness only, about
// a thousand times slower than the hardware, and never on unless somebody asked: nothing here installs itself.
#pragma once

#include <cstdint>

namespace ktv::emulation {

// Emulates from now on, in every thread of the process: ldtilecfg, sttilecfg, tilerelease, tilezero, tileloadd,
// tileloaddt1, tilestored, tdpbf16ps, tdpbssd, tdpbsud, tdpbusd, tdpbuud. A SIGILL with any other cause goes to the
// handler that was there before; if that was the default, the process ends as it would have.
// A tile instruction that AMX itself would refuse ends the process too, after one line on stderr that says why.
//
// May be called again, and from several threads. True: the handler is in place. False: this is not x86-64 Linux, or
// somebody has put another SIGILL handler in its place since (taking it back could make the two call each other for
// ever). The object file that contains this must stay loaded until the process ends.
bool amx_trap_install();

// Whether the process's SIGILL handler is this one now.
bool amx_trap_installed() noexcept;

// Tile instructions emulated so far, in all threads. Neighbours in the code share one trap: this counts each.
std::uint64_t amx_trap_count() noexcept;

// The arithmetic alone, for comparison with hardware that has AMX. On x86-64 Linux only, like the handler.

// One tile register: 16 rows of 64 bytes, that is fp32 or int32 [16][16], bf16 pairs [16][16][2], int8 [16][16][4].
struct alignas(64) Tile {
    std::uint8_t bytes[16][64];
};

// dest [rows][columns] += a [rows][depth] * b [depth][columns], counted in 4-byte elements, each at most 16.
struct Shape {
    unsigned rows, depth, columns;
};

// How tdpbf16ps is computed. The bits are the same; scalar is the reference and needs no more than SSE2.
enum class Path { scalar, avx2, avx512 };
bool path_available(Path path) noexcept;
Path best_path() noexcept;

// dest fp32, a and b bf16 pairs. Per element: the even and the odd products each summed over depth by fused
// multiply-add from zero, the two sums added, the result added to dest. Rounds to nearest even; denormal inputs and
// outputs are zero; the caller's MXCSR neither matters nor changes. What lies outside [rows][columns] becomes zero.
// The manual leaves open which NaN comes out; here it is always 0xffc00000.
void tdpbf16ps(Tile& dest, const Tile& a, const Tile& b, Shape shape, Path path) noexcept;

// dest int32, a and b four int8 each, signed or not: tdpbssd, tdpbsud, tdpbusd, tdpbuud. Wraps modulo 2^32.
void tdpb_int8(Tile& dest, const Tile& a, const Tile& b, Shape shape, bool a_signed, bool b_signed) noexcept;

}  // namespace ktv::emulation
