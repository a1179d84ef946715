#if defined(__x86_64__) && defined(__linux__)

#include "amx_execute.hpp"

#include <cstdarg>
#include <cstdio>
#include <initializer_list>

namespace ktv::emulation {
namespace {

// The general registers in the order in which instructions number them.
std::uint64_t read_register(const greg_t* registers, unsigned number) {
    static constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                     REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return static_cast<std::uint64_t>(registers[kOrder[number]]);
}

// The address without the index, because the index is part of the address for ldtilecfg and sttilecfg only; for the others
// it is the stride.
std::uint64_t base_address(const Instruction& instruction, const greg_t* registers) {
    std::uint64_t base = 0;
    if (instruction.base == kInstructionPointer) {
        base = static_cast<std::uint64_t>(registers[REG_RIP]) + instruction.length;
    } else if (instruction.base != kNoRegister) {
        base = read_register(registers, instruction.base);
    }
    return base + static_cast<std::uint64_t>(std::int64_t{instruction.displacement});
}

std::uint64_t scaled_index(const Instruction& instruction, const greg_t* registers) {
    if (instruction.index == kNoRegister) return 0;
    return read_register(registers, instruction.index) << instruction.scale;
}

bool load_config(ThreadState& state, const void* memory, Fault& fault) {
    Config config;
    std::memcpy(&config, memory, sizeof config);
    if (config.palette == 0) {
        state.clear();
        return true;
    }
    if (config.palette != 1) return fault.because("#GP: palette %u, there are 0 and 1", config.palette);
    const auto is_zero = [](const auto& bytes) {
        for (const std::uint8_t byte : bytes) {
            if (byte != 0) return false;
        }
        return true;
    };
    if (!is_zero(config.reserved_a) || !is_zero(config.reserved_b) || !is_zero(config.reserved_c)) {
        return fault.because("#GP: bytes 2-15, 32-47 and 56-63 of the configuration must be zero");
    }
    for (unsigned tile = 0; tile < kTiles; ++tile) {
        const unsigned rows = config.rows[tile], colsb = config.colsb[tile];
        if (rows > kRows || colsb > kRowBytes) {
            return fault.because("#GP: tmm%u has %u rows of %u bytes, at most %u of %u fit", tile, rows, colsb, kRows,
                                 kRowBytes);
        }
        if ((rows == 0) != (colsb == 0)) {
            return fault.because("#GP: tmm%u has %u rows of %u bytes: both must be zero, or neither", tile, rows,
                                 colsb);
        }
    }
    state.clear();
    state.config = config;
    return true;
}

bool require_configured(const ThreadState& state, Fault& fault) {
    return state.config.palette != 0 || fault.because("#UD: no tile is configured, ldtilecfg must come first");
}

bool require_tile(const ThreadState& state, unsigned tile, Fault& fault) {
    if (!require_configured(state, fault)) return false;
    if (tile >= kTiles) return fault.because("#UD: there is no tmm%u, only tmm0 to tmm7", tile);
    if (state.config.rows[tile] == 0) return fault.because("#UD: tmm%u has no rows in the loaded configuration", tile);
    return true;
}

bool require_whole_elements(const ThreadState& state, unsigned tile, Fault& fault) {
    const unsigned colsb = state.config.colsb[tile];
    return colsb % 4 == 0 || fault.because("#UD: rows of tmm%u have %u bytes, no multiple of 4", tile, colsb);
}

bool move_tile(ThreadState& state, const Instruction& instruction, const greg_t* registers, Fault& fault) {
    const unsigned number = instruction.tile;
    if (!instruction.has_sib) return fault.because("#UD: the address must be encoded with a SIB byte");
    if (!require_tile(state, number, fault) || !require_whole_elements(state, number, fault)) return false;
    const unsigned rows = state.config.rows[number], colsb = state.config.colsb[number];
    const unsigned start = state.config.start_row;
    if (start >= rows) return fault.because("#UD: start_row is %u, tmm%u has %u rows", start, number, rows);

    Tile& tile = state.tiles[number];
    const std::uint64_t base = base_address(instruction, registers);
    const std::uint64_t stride = scaled_index(instruction, registers);
    if (instruction.encoding->op == Op::tilestored) {
        for (unsigned row = start; row < rows; ++row) {
            std::memcpy(reinterpret_cast<void*>(base + row * stride), tile.bytes[row], colsb);
        }
    } else {
        std::memset(tile.bytes[start], 0, (kRows - start) * kRowBytes);
        for (unsigned row = start; row < rows; ++row) {
            std::memcpy(tile.bytes[row], reinterpret_cast<const void*>(base + row * stride), colsb);
        }
    }
    state.config.start_row = 0;
    return true;
}

bool multiply(ThreadState& state, const Instruction& instruction, Fault& fault) {
    const unsigned c = instruction.tile, a = instruction.source1, b = instruction.source2;
    for (const unsigned tile : {c, a, b}) {
        if (!require_tile(state, tile, fault) || !require_whole_elements(state, tile, fault)) return false;
    }
    if (c == a || c == b || a == b) return fault.because("#UD: its three tiles must differ");
    const auto& rows = state.config.rows;
    const auto& colsb = state.config.colsb;
    if (rows[c] != rows[a]) {
        return fault.because("#UD: tmm%u has %u rows, tmm%u has %u: they must be equal", c, rows[c], a, rows[a]);
    }
    if (colsb[a] / 4u != rows[b]) {
        return fault.because("#UD: rows of tmm%u have %u 4-byte elements, tmm%u has %u rows: they must be equal", a,
                             colsb[a] / 4u, b, rows[b]);
    }
    if (colsb[c] != colsb[b]) {
        return fault.because("#UD: rows of tmm%u have %u bytes, of tmm%u %u: they must be equal", c, colsb[c], b,
                             colsb[b]);
    }
    tdpbf16ps(state.tiles[c], state.tiles[a], state.tiles[b], {rows[c], rows[b], colsb[c] / 4u}, best_path());
    state.config.start_row = 0;
    return true;
}

}  // namespace

bool Fault::because(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(reason, sizeof reason, format, arguments);
    va_end(arguments);
    return false;
}

bool execute(ThreadState& state, const Instruction& instruction, const greg_t* registers, Fault& fault) {
    switch (instruction.encoding->op) {
        case Op::ldtilecfg: {
            const std::uint64_t address = base_address(instruction, registers) + scaled_index(instruction, registers);
            return load_config(state, reinterpret_cast<const void*>(address), fault);
        }
        case Op::sttilecfg: {
            const std::uint64_t address = base_address(instruction, registers) + scaled_index(instruction, registers);
            std::memcpy(reinterpret_cast<void*>(address), &state.config, sizeof state.config);
            return true;
        }
        case Op::tilerelease:
            state.clear();
            return true;
        case Op::tilezero:
            if (!require_tile(state, instruction.tile, fault)) return false;
            state.tiles[instruction.tile] = Tile{};
            state.config.start_row = 0;
            return true;
        case Op::tileloadd:
        case Op::tileloaddt1:
        case Op::tilestored:
            return move_tile(state, instruction, registers, fault);
        default:
            return multiply(state, instruction, fault);
    }
}

}  // namespace ktv::emulation

#endif
