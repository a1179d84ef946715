// The table of instruction sets: what each needs of the CPU and the OS, its kernels, its register peak.
#include "instruction_sets.hpp"

#include <algorithm>

#include "emulation/amx_trap.hpp"
#include "ktv/errors.hpp"
#include "ktv/isa.hpp"
#include "machine_limits/register_peaks.hpp"

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#define KTV_X86(pointer) pointer
// The CPU has the feature, and the OS saves its registers on a context switch.
#define KTV_CPU_HAS(feature) __builtin_cpu_supports(feature)
#define KTV_CPU_IS(maker) __builtin_cpu_is(maker)
#else
#define KTV_X86(pointer) nullptr
#define KTV_CPU_HAS(feature) false
#define KTV_CPU_IS(maker) false
#endif

namespace ktv {

extern const Kernels amx_bf16_kernels, avx512_bf16_kernels, avx512_bf16_kernels_intel, avx512_kernels, avx2_kernels,
    scalar_kernels;

namespace {

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
    return KTV_CPU_HAS("avx2") && KTV_CPU_HAS("fma") ? "" : "AVX2 with FMA not supported on this CPU";
}
bool has_avx512() {
    return KTV_CPU_HAS("avx512f") && KTV_CPU_HAS("avx512dq") && KTV_CPU_HAS("avx512bw") && KTV_CPU_HAS("avx512vl");
}
const char* missing_for_avx512() {
    return has_avx512() && KTV_CPU_HAS("fma") ? "" : "AVX-512 not supported on this CPU";
}
const char* missing_for_avx512_bf16() {
    return has_avx512() && KTV_CPU_HAS("avx512bf16") ? "" : "AVX-512 BF16 not supported on this CPU";
}

bool amx_is_emulated = false;

const char* missing_for_amx_bf16() {
    // The kernels around the tile instructions are AVX-512 code.
    if (!has_avx512()) return "Intel AMX not supported on this CPU (its kernels also need AVX-512)";
    if (amx_is_emulated) return "";
    if (!KTV_CPU_HAS("amx-bf16") || !KTV_CPU_HAS("amx-tile")) return "Intel AMX not supported on this CPU";
    return os_permits_tiles() ? "" : "the operating system does not permit Intel AMX to this process";
}

constexpr InstructionSet kTable[] = {
    {"amx_bf16", missing_for_amx_bf16, KTV_X86(&amx_bf16_kernels), KTV_X86(peak_of_amx_bf16)},
    {"avx512_bf16", missing_for_avx512_bf16, KTV_X86(&avx512_bf16_kernels), KTV_X86(peak_of_avx512_bf16),
     KTV_X86(&avx512_bf16_kernels_intel)},
    {"avx512", missing_for_avx512, KTV_X86(&avx512_kernels), KTV_X86(peak_of_avx512)},
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

const Kernels& InstructionSet::kernels_here() const {
    return on_intel && KTV_CPU_IS("intel") ? *on_intel : *kernels;
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
    std::vector<std::string> names = known_isas();
    std::erase_if(names, [](const std::string& name) { return !row_of(name).runs_here(); });
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
