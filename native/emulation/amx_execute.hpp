// Executes a tile instruction on a thread's tile registers and on memory.
#pragma once

#include <sys/ucontext.h>

#include <cstdint>
#include <cstring>

#include "amx_decode.hpp"
#include "amx_tiles.hpp"

namespace ktv::emulation {

// TILECFG in the layout that ldtilecfg reads and sttilecfg writes. palette 0 is the initial, unconfigured state: every
// byte here and in the tiles is zero.
struct Config {
    std::uint8_t palette;
    std::uint8_t start_row;
    std::uint8_t reserved_a[14];
    std::uint16_t colsb[kTiles];
    std::uint8_t reserved_b[16];
    std::uint8_t rows[kTiles];
    std::uint8_t reserved_c[8];
};
static_assert(sizeof(Config) == 64);

struct ThreadState {
    Config config;
    Tile tiles[kTiles];

    void clear() { std::memset(static_cast<void*>(this), 0, sizeof *this); }
};

// Why AMX would refuse an instruction.
struct Fault {
    char reason[160];

    // Returns false, so that callers can `return fault.because(...)`. printf is safe in this signal handler, because the
    // SIGILL interrupts a tile instruction and never libc.
    [[gnu::format(printf, 2, 3)]] bool because(const char* format, ...);
};

// False, with the reason in `fault`, when AMX would refuse the instruction; nothing has changed then.
bool execute(ThreadState& state, const Instruction& instruction, const greg_t* registers, Fault& fault);

}  // namespace ktv::emulation
