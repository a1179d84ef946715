// The table of instruction sets: what each needs of the CPU and the OS, its kernels, its register peak.
#include "instruction_sets.hpp"

#include <algorithm>

#include "emulation/amx_trap.hpp"
#include "ktv/errors.hpp"
#include "ktv/isa.hpp"
#include "machine_limits/register_peaks.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define KTV_X86(pointer) pointer
#else
#define KTV_X86(pointer) nullptr
#endif

namespace ktv {

extern const Kernels amx_bf16_kernels, avx512_bf16_kernels, avx2_kernels, scalar_kernels;

namespace {

struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};
// Zeros where the CPU has no such leaf, and on other processors than x86-64.
Registers cpuid([[maybe_unused]] unsigned leaf, [[maybe_unused]] unsigned subleaf) {
    Registers r;
#if defined(__x86_64__)
    if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return {};
#endif
    return r;
}
bool bit(unsigned word, int index) {
    return (word >> index) & 1u;
}

constexpr unsigned kAvxState = 0x6, kAvx512State = 0xe6, kTileState = 0x60000;

// Whether the OS saves these parts of the register file on a context switch: XCR0.
bool os_saves([[maybe_unused]] unsigned parts) {
    if (!bit(cpuid(1, 0).c, 27)) return false;  // OSXSAVE
#if defined(__x86_64__)
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & parts) == parts;
#else
    return false;
#endif
}
// Linux gives the 8 KB of tile state only to a process that asks for it: cpuid alone is not enough.
bool os_permits_tiles() {
#if defined(__x86_64__)
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
    return granted;
#else
    return false;
#endif
}

const char* missing_for_scalar() {
    return "";
}
const char* missing_for_avx2() {
    const bool has = os_saves(kAvxState) && bit(cpuid(1, 0).c, 12) && bit(cpuid(7, 0).b, 5);  // FMA, AVX2
    return has ? "" : "AVX2 with FMA not supported on this CPU";
}
const char* missing_for_avx512_bf16() {
    const Registers r = cpuid(7, 0);
    const bool has = os_saves(kAvx512State) && bit(r.b, 16) && bit(r.b, 17) && bit(r.b, 30) && bit(r.b, 31) &&
                     bit(cpuid(7, 1).a, 5);  // F, DQ, BW, VL; BF16
    return has ? "" : "AVX-512 BF16 not supported on this CPU";
}

bool amx_is_emulated = false;

const char* missing_for_amx_bf16() {
    // The kernels around the tile instructions are AVX-512 code.
    if (*missing_for_avx512_bf16()) return "Intel AMX not supported on this CPU (its kernels also need AVX-512 BF16)";
    if (amx_is_emulated) return "";
    const Registers r = cpuid(7, 0);
    if (!bit(r.d, 22) || !bit(r.d, 24) || !os_saves(kTileState))  // AMX-BF16, AMX-TILE
        return "Intel AMX not supported on this CPU";
    return os_permits_tiles() ? "" : "the operating system does not permit Intel AMX to this process";
}

constexpr InstructionSet kTable[] = {
    {"amx_bf16", missing_for_amx_bf16, KTV_X86(&amx_bf16_kernels), KTV_X86(peak_of_amx_bf16)},
    {"avx512_bf16", missing_for_avx512_bf16, KTV_X86(&avx512_bf16_kernels), KTV_X86(peak_of_avx512_bf16)},
    {"avx2", missing_for_avx2, KTV_X86(&avx2_kernels), KTV_X86(peak_of_avx2)},
    {"scalar", missing_for_scalar, &scalar_kernels, peak_of_scalar},
};

std::string joined(const std::vector<std::string>& names) {
    std::string text;
    for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
    return text;
}

const InstructionSet& row_of(const std::string& name) {
    for (const InstructionSet& row : kTable) {
        if (name == row.name) return row;
    }
    throw BadInput("isa='" + name + "' is unknown; it takes one of " + joined(known_isas()) +
                   ", or none for the best that runs here");
}

}  // namespace

const char* InstructionSet::why_not() const {
    return kernels ? missing() : "its kernels are not compiled into this build";
}

std::span<const InstructionSet> instruction_sets() {
    return kTable;
}

const InstructionSet& instruction_set(const std::string& name) {
    const InstructionSet& row = row_of(name);
    if (row.runs_here()) return row;
    throw BadState("isa='" + name + "' cannot run: " + row.why_not() +
                   "; what can run here: " + joined(available_isas()));
}

std::vector<std::string> known_isas() {
    std::vector<std::string> names;
    for (const InstructionSet& row : kTable) names.emplace_back(row.name);
    return names;
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const InstructionSet& row : kTable) {
        if (row.runs_here()) names.emplace_back(row.name);
    }
    return names;
}

std::string why_not(const std::string& isa) {
    return row_of(isa).why_not();
}

void require_isa(const std::string& isa) {
    (void)instruction_set(isa);
}

bool emulate_amx() {
    if (!row_of("amx_bf16").runs_here() && emulation::amx_trap_install()) amx_is_emulated = true;
    return emulation::amx_trap_installed();
}

}  // namespace ktv
