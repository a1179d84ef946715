// What this CPU has and this OS permits, and the table of kernels for it.
#include <algorithm>
#include <array>

#include "kernels/kernels.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu.hpp"

namespace ktv {
namespace {

constexpr std::array kIsas{Isa::amx_bf16, Isa::avx512_bf16, Isa::avx2, Isa::scalar};  // best first

#if defined(__x86_64__)
struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};
Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r;
    if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return {};
    return r;
}
bool bit(unsigned word, int index) {
    return (word >> index) & 1u;
}

// The parts of the register file that the OS saves on a context switch: XCR0.
std::uint64_t saved_state() {
    if (!bit(cpuid(1, 0).c, 27)) return 0;  // OSXSAVE
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<std::uint64_t>(high) << 32) | low;
}
constexpr std::uint64_t kAvxState = 0x6, kAvx512State = 0xe6, kTileState = 0x60000;

bool has_avx2() {
    return (saved_state() & kAvxState) == kAvxState && bit(cpuid(1, 0).c, 12) && bit(cpuid(7, 0).b, 5);  // FMA, AVX2
}
bool has_avx512_bf16() {
    const Registers r = cpuid(7, 0);
    return (saved_state() & kAvx512State) == kAvx512State && bit(r.b, 16) && bit(r.b, 17) && bit(r.b, 30) &&
           bit(r.b, 31) && bit(cpuid(7, 1).a, 5);  // F, DQ, BW, VL; BF16
}
// Linux gives the 8 KB of tile state only to a process that asks: cpuid alone is not enough.
bool tiles_permitted() {
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
    return granted;
}
bool has_amx_bf16() {
    const Registers r = cpuid(7, 0);
    return bit(r.d, 22) && bit(r.d, 24) && (saved_state() & kTileState) == kTileState;  // AMX-BF16, AMX-TILE
}
#else
bool has_avx2() {
    return false;
}
bool has_avx512_bf16() {
    return false;
}
bool has_amx_bf16() {
    return false;
}
bool tiles_permitted() {
    return false;
}
#endif

bool emulate_amx = false;

const Kernels* table_of(Isa isa) {
    switch (isa) {
        case Isa::amx_bf16:
            return amx_bf16_kernels();
        case Isa::avx512_bf16:
            return avx512_bf16_kernels();
        case Isa::avx2:
            return avx2_kernels();
        case Isa::scalar:
            return scalar_kernels();
    }
    return nullptr;
}

}  // namespace

void set_amx_emulation(bool on) {
    emulate_amx = on;
}

// Empty when the ISA runs here.
std::string why_not(Isa isa) {
    if (!table_of(isa)) return "its kernels are not compiled into this build";
    switch (isa) {
        case Isa::amx_bf16:
            // The kernels around the tiles are AVX-512 code.
            if (!has_avx512_bf16()) return "Intel AMX not supported on this CPU (its kernels also need AVX-512 BF16)";
            if (emulate_amx) return "";
            if (!has_amx_bf16()) return "Intel AMX not supported on this CPU";
            return tiles_permitted() ? "" : "the operating system does not permit Intel AMX to this process";
        case Isa::avx512_bf16:
            return has_avx512_bf16() ? "" : "AVX-512 BF16 not supported on this CPU";
        case Isa::avx2:
            return has_avx2() ? "" : "AVX2 with FMA not supported on this CPU";
        case Isa::scalar:
            return "";
    }
    return "";
}

const char* name_of(Isa isa) {
    switch (isa) {
        case Isa::amx_bf16:
            return "amx_bf16";
        case Isa::avx512_bf16:
            return "avx512_bf16";
        case Isa::avx2:
            return "avx2";
        case Isa::scalar:
            return "scalar";
    }
    return "";
}

std::vector<Isa> available_isas() {
    std::vector<Isa> isas;
    std::copy_if(kIsas.begin(), kIsas.end(), std::back_inserter(isas), [](Isa isa) { return why_not(isa).empty(); });
    return isas;
}

Isa require_isa(const std::string& name) {
    std::string known;
    for (const Isa isa : kIsas) {
        if (name == name_of(isa)) {
            const std::string reason = why_not(isa);
            if (reason.empty()) return isa;
            std::string can;
            for (const Isa other : available_isas()) can += (can.empty() ? "" : ", ") + std::string(name_of(other));
            throw BadState("isa='" + name + "' cannot run: " + reason + "; what can run here: " + can);
        }
        known += (known.empty() ? "" : ", ") + std::string(name_of(isa));
    }
    throw BadInput("isa='" + name + "' is unknown; it takes one of " + known + ", or none for the best that runs here");
}

const Kernels& kernels_for(Isa isa) {
    return *table_of(isa);
}

}  // namespace ktv
