// The table of instruction sets.
#pragma once

#include <span>
#include <string>

#include "kernels/kernels.hpp"

namespace ktv {

// One row. To add an instruction set: docs/engine.md.
struct InstructionSet {
    const char* name;
    // What the CPU or the OS lacks, as a sentence for the user; "" when nothing is missing.
    const char* (*missing)();
    const Kernels* kernels;     // null where they are not compiled in
    double (*register_peak)();  // machine_limits/register_peaks.hpp; null without kernels
    // The same kernels with the counts that are faster on Intel's processors, where there are such; else null.
    const Kernels* on_intel = nullptr;

    // Why it cannot run here; "" when it can.
    const char* why_not() const;
    bool runs_here() const { return !*why_not(); }
    // The kernels with the counts for this processor.
    const Kernels& kernels_here() const;
};

// Best first. The last row is scalar, which runs everywhere.
std::span<const InstructionSet> instruction_sets();
// Throws as require_isa does.
const InstructionSet& instruction_set(const std::string& name);

// Installs the trap handler for tile instructions, so that amx_bf16 runs on a CPU with AVX-512 but without AMX: for
// checks of the kernels, far too slow for anything else. Does nothing on a CPU with AMX. True when emulation is on.
bool emulate_amx();

}  // namespace ktv
