// Intel AMX in user space: machine code with tile instructions runs, and can be checked, on a CPU without AMX.
//
// README.md describes how, what it costs and its limits.
#pragma once

#include <cstdint>

namespace ktv::emulation {

// Emulates these instructions in every thread of the process from now on: ldtilecfg, sttilecfg, tilerelease, tilezero,
// tileloadd, tileloaddt1, tilestored, tdpbf16ps. A SIGILL with any other cause goes to the previous handler; if that was
// the default, the process ends as without the emulator. A tile instruction that AMX would refuse ends the process after
// one line on stderr with the reason.
//
// May be called again, and from several threads. True: the handler is installed. False: this is not x86-64 Linux, or
// another SIGILL handler has replaced it since (if both were installed, they could call each other for ever). The object
// file that contains this must stay loaded until the process ends.
bool amx_trap_install();

// Whether this handler is the process's SIGILL handler now.
bool amx_trap_installed() noexcept;

// Tile instructions emulated so far, in all threads. Several of them may share one trap; each counts.
std::uint64_t amx_trap_count() noexcept;

}  // namespace ktv::emulation
