// Decodes AMX's tile instructions from machine code.
#pragma once

#include <cstdint>

namespace ktv::emulation {

enum class Op { ldtilecfg, sttilecfg, tilerelease, tilezero, tileloadd, tileloaddt1, tilestored, tdpbf16ps };

// All are VEX.128.0F38.W0; they differ in the opcode, the implied prefix (the VEX field pp) and the ModRM byte.
struct Encoding {
    Op op;
    const char* name;
    std::uint8_t opcode;
    std::uint8_t pp;         // 0: none, 1: 66, 2: F3, 3: F2
    bool memory;             // has a memory operand: ModRM.mod is not 3
    std::uint8_t zero_bits;  // of ModRM
    int tiles;               // operands that are tiles; VEX.vvvv is 0 unless it names the third
};

constexpr unsigned kNoRegister = 16;
constexpr unsigned kInstructionPointer = 17;

struct Instruction {
    const Encoding* encoding;
    unsigned length;
    unsigned tile, source1, source2;  // ModRM.reg, ModRM.rm and VEX.vvvv with their VEX extension bits: 0 to 15
    bool has_sib;
    unsigned base, index, scale;  // numbers of general registers, or one of the two above; scale is a shift
    std::int32_t displacement;
};

// False when it is not one of these instructions. It reads a byte only after the bytes before it have matched, so it never
// reads beyond mapped code.
bool decode(const std::uint8_t* code, Instruction& out);

}  // namespace ktv::emulation
