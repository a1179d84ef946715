#include "amx_decode.hpp"

#include <cstring>

namespace ktv::emulation {
namespace {

constexpr Encoding kEncodings[] = {
    {Op::ldtilecfg, "ldtilecfg", 0x49, 0, true, 0x38, 0},      {Op::sttilecfg, "sttilecfg", 0x49, 1, true, 0x38, 0},
    {Op::tilerelease, "tilerelease", 0x49, 0, false, 0x3f, 0}, {Op::tilezero, "tilezero", 0x49, 3, false, 0x07, 1},
    {Op::tileloadd, "tileloadd", 0x4b, 3, true, 0, 1},         {Op::tileloaddt1, "tileloaddt1", 0x4b, 1, true, 0, 1},
    {Op::tilestored, "tilestored", 0x4b, 2, true, 0, 1},       {Op::tdpbf16ps, "tdpbf16ps", 0x5c, 2, false, 0, 3},
};

// Decodes the memory operand behind a ModRM byte whose mod is not 3. Returns the address behind the operand.
const std::uint8_t* decode_address(const std::uint8_t* at, unsigned modrm, unsigned extend_base, unsigned extend_index,
                                   Instruction& out) {
    const unsigned mod = modrm >> 6, rm = modrm & 7;
    unsigned displacement_bytes = mod == 1 ? 1 : mod == 2 ? 4 : 0;
    if (rm == 4) {
        const unsigned sib = *at++;
        out.has_sib = true;
        out.scale = sib >> 6;
        out.index = (sib >> 3 & 7) | extend_index;
        if (out.index == 4) out.index = kNoRegister;  // rsp cannot be an index, r12 can
        out.base = (sib & 7) | extend_base;
        if ((sib & 7) == 5 && mod == 0) {  // rbp and r13 alike
            out.base = kNoRegister;
            displacement_bytes = 4;
        }
    } else if (rm == 5 && mod == 0) {
        out.base = kInstructionPointer;
        displacement_bytes = 4;
    } else {
        out.base = rm | extend_base;
    }
    if (displacement_bytes == 1) {
        out.displacement = static_cast<std::int8_t>(*at);
    } else if (displacement_bytes == 4) {
        std::memcpy(&out.displacement, at, 4);
    }
    return at + displacement_bytes;
}

}  // namespace

bool decode(const std::uint8_t* code, Instruction& out) {
    const std::uint8_t* at = code;
    // Segment prefixes without effect in 64-bit mode: assemblers pad with them.
    while ((*at == 0x26 || *at == 0x2e || *at == 0x36 || *at == 0x3e) && at - code < 4) ++at;

    if (*at++ != 0xc4) return false;
    const unsigned vex1 = *at++;
    if ((vex1 & 0x1f) != 0x02) return false;  // opcode map 0F38
    const unsigned vex2 = *at++;
    if ((vex2 & 0x84) != 0) return false;  // W = 0, L = 0
    const unsigned opcode = *at++;
    if (opcode != 0x49 && opcode != 0x4b && opcode != 0x5c) return false;
    const unsigned modrm = *at++;

    // VEX contains the extension bits and vvvv inverted.
    const unsigned extend_reg = (vex1 & 0x80) ? 0 : 8;
    const unsigned extend_index = (vex1 & 0x40) ? 0 : 8;
    const unsigned extend_rm = (vex1 & 0x20) ? 0 : 8;
    const unsigned vvvv = ~(vex2 >> 3) & 15;

    out = Instruction{};
    out.tile = (modrm >> 3 & 7) | extend_reg;
    out.source1 = (modrm & 7) | extend_rm;
    out.source2 = vvvv;
    out.base = out.index = kNoRegister;
    const bool memory = modrm >> 6 != 3;
    for (const Encoding& encoding : kEncodings) {
        if (encoding.opcode == opcode && encoding.pp == (vex2 & 3) && encoding.memory == memory &&
            (modrm & encoding.zero_bits) == 0 && (vvvv == 0 || encoding.tiles == 3))
            out.encoding = &encoding;
    }
    if (out.encoding == nullptr) return false;
    if (memory) at = decode_address(at, modrm, extend_rm, extend_index, out);
    out.length = static_cast<unsigned>(at - code);
    return true;
}

}  // namespace ktv::emulation
