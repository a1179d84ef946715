// Intel AMX in user space: real machine code with tile instructions runs, and is checked, on a CPU that has none.
//
// A tile instruction raises SIGILL where the CPU lacks AMX. The handler installed here decodes it at the faulting
// address, does what Intel's manual (SDM volume 2, ch. 3 to 5) says, and goes on behind it. Correctness only, about
// a thousand times slower than the hardware, and never on unless somebody asked: nothing here installs itself.
#pragma once

#include <cstdint>

namespace ktv::emulation {

// Emulates from now on, in every thread of the process: ldtilecfg, sttilecfg, tilerelease, tilezero, tileloadd,
// tileloaddt1, tilestored, tdpbf16ps. A SIGILL with any other cause goes to the handler that was there before; if that
// was the default, the process ends as it would have.
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

}  // namespace ktv::emulation
