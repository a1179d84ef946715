#include "amx_trap.hpp"

#if defined(__x86_64__) && defined(__linux__)

#include <immintrin.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <new>

#ifdef __FAST_MATH__
#error "the emulator promises exact bits: compile it without -ffast-math"
#endif

namespace ktv::emulation {
namespace {

constexpr unsigned kTiles = 8;      // palette 1: eight tiles
constexpr unsigned kRows = 16;      // of at most 16 rows
constexpr unsigned kRowBytes = 64;  // of at most 64 bytes

// ---------------------------------------------------------------------------------------------------------------
// Arithmetic
// ---------------------------------------------------------------------------------------------------------------

constexpr std::uint32_t kNan = 0xffc00000;
constexpr int kHighHalf = static_cast<int>(0xffff0000);  // of a bf16 pair: the odd element, as the fp32 it stands for

// Round to nearest even, denormals are zero, results flush to zero, no exception traps: AMX's own mode, not MXCSR's.
// The compiler does not know that arithmetic depends on it, so it must not be inlined into this object's scope.
class AmxRounding {
  public:
    AmxRounding() { _mm_setcsr(0x9fc0); }
    ~AmxRounding() { _mm_setcsr(saved_); }
    AmxRounding(const AmxRounding&) = delete;
    AmxRounding& operator=(const AmxRounding&) = delete;

  private:
    unsigned saved_ = _mm_getcsr();
};

// fp32 fma(a, b, c) for a and b that were bf16, without the instruction: the product has 16 significant bits and is
// exact in fp64. So is the sum, unless one operand lies more than 2^29 below the other; it is then too small to move
// the other, an fp32 itself, to a neighbour or to a tie. Either way only the rounding to fp32 counts.
float fma_of_bf16(float a, float b, float c) {
    return static_cast<float>(static_cast<double>(a) * b + c);
}

[[gnu::noinline]] void tdpbf16ps_scalar(Tile& dest, const Tile& a, const Tile& b, Shape shape) {
    const auto pair = [](const Tile& tile, unsigned row, unsigned column) {
        std::uint32_t bits;
        std::memcpy(&bits, &tile.bytes[row][4 * column], 4);
        return bits;
    };
    const auto even = [](std::uint32_t bits) { return std::bit_cast<float>(bits << 16); };
    const auto odd = [](std::uint32_t bits) { return std::bit_cast<float>(bits & kHighHalf); };
    for (unsigned m = 0; m < kRows; ++m) {
        for (unsigned n = 0; n < kRowBytes / 4; ++n) {
            std::uint32_t bits = 0;
            if (m < shape.rows && n < shape.columns) {
                float even_sum = 0, odd_sum = 0;
                for (unsigned k = 0; k < shape.depth; ++k) {
                    const std::uint32_t left = pair(a, m, k), right = pair(b, k, n);
                    even_sum = fma_of_bf16(even(left), even(right), even_sum);
                    odd_sum = fma_of_bf16(odd(left), odd(right), odd_sum);
                }
                const float result = std::bit_cast<float>(pair(dest, m, n)) + (even_sum + odd_sum);
                bits = std::isnan(result) ? kNan : std::bit_cast<std::uint32_t>(result);
            }
            std::memcpy(&dest.bytes[m][4 * n], &bits, 4);
        }
    }
}

// The vector paths take lane for n and four rows at a time, which hides the latency of the multiply-adds and shares
// the unpacking of b. They compute the rows and lanes outside the shape too, and store zero there.
constexpr unsigned kBlock = 4;

[[gnu::target("avx2,fma")]] void tdpbf16ps_avx2(Tile& dest, const Tile& a, const Tile& b, Shape shape) {
    const __m256i high_half = _mm256_set1_epi32(kHighHalf);
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(kNan)));
    for (unsigned first = 0; first < kRowBytes / 4; first += 8) {
        const __m256i lanes = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
        const __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(shape.columns), lanes);
        for (unsigned block = 0; block < kRows; block += kBlock) {
            __m256 even[kBlock], odd[kBlock];
#pragma GCC unroll 4
            for (unsigned m = 0; m < kBlock; ++m) even[m] = odd[m] = _mm256_setzero_ps();
            for (unsigned k = 0; k < shape.depth; ++k) {
                const __m256i right = _mm256_load_si256(reinterpret_cast<const __m256i*>(&b.bytes[k][4 * first]));
                const __m256 right_even = _mm256_castsi256_ps(_mm256_slli_epi32(right, 16));
                const __m256 right_odd = _mm256_castsi256_ps(_mm256_and_si256(right, high_half));
#pragma GCC unroll 4
                for (unsigned m = 0; m < kBlock; ++m) {
                    int pair;
                    std::memcpy(&pair, &a.bytes[block + m][4 * k], 4);
                    const __m256i left = _mm256_set1_epi32(pair);
                    const __m256 left_even = _mm256_castsi256_ps(_mm256_slli_epi32(left, 16));
                    const __m256 left_odd = _mm256_castsi256_ps(_mm256_and_si256(left, high_half));
                    even[m] = _mm256_fmadd_ps(left_even, right_even, even[m]);
                    odd[m] = _mm256_fmadd_ps(left_odd, right_odd, odd[m]);
                }
            }
#pragma GCC unroll 4
            for (unsigned m = 0; m < kBlock; ++m) {
                auto* row = reinterpret_cast<float*>(&dest.bytes[block + m][4 * first]);
                const __m256 sum = _mm256_add_ps(_mm256_load_ps(row), _mm256_add_ps(even[m], odd[m]));
                const __m256 result = _mm256_blendv_ps(sum, nan, _mm256_cmp_ps(sum, sum, _CMP_UNORD_Q));
                const __m256i keep = block + m < shape.rows ? inside : _mm256_setzero_si256();
                _mm256_store_ps(row, _mm256_and_ps(result, _mm256_castsi256_ps(keep)));
            }
        }
    }
}

[[gnu::target("avx512f")]] void tdpbf16ps_avx512(Tile& dest, const Tile& a, const Tile& b, Shape shape) {
    const __m512i high_half = _mm512_set1_epi32(kHighHalf);
    const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(kNan)));
    const auto inside = static_cast<__mmask16>((1u << shape.columns) - 1);
    constexpr __mmask16 kAll = 0xffff;  // gcc 12 takes the unmasked shift for a use of something uninitialized
    for (unsigned block = 0; block < kRows; block += kBlock) {
        __m512 even[kBlock], odd[kBlock];
#pragma GCC unroll 4
        for (unsigned m = 0; m < kBlock; ++m) even[m] = odd[m] = _mm512_setzero_ps();
        for (unsigned k = 0; k < shape.depth; ++k) {
            const __m512i right = _mm512_load_si512(b.bytes[k]);
            const __m512 right_even = _mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAll, right, 16));
            const __m512 right_odd = _mm512_castsi512_ps(_mm512_and_si512(right, high_half));
#pragma GCC unroll 4
            for (unsigned m = 0; m < kBlock; ++m) {
                int pair;
                std::memcpy(&pair, &a.bytes[block + m][4 * k], 4);
                const __m512i left = _mm512_set1_epi32(pair);
                const __m512 left_even = _mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAll, left, 16));
                const __m512 left_odd = _mm512_castsi512_ps(_mm512_and_si512(left, high_half));
                even[m] = _mm512_fmadd_ps(left_even, right_even, even[m]);
                odd[m] = _mm512_fmadd_ps(left_odd, right_odd, odd[m]);
            }
        }
#pragma GCC unroll 4
        for (unsigned m = 0; m < kBlock; ++m) {
            const __m512 sum = _mm512_add_ps(_mm512_load_ps(dest.bytes[block + m]), _mm512_add_ps(even[m], odd[m]));
            const __m512 result = _mm512_mask_mov_ps(sum, _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q), nan);
            const auto keep = static_cast<__mmask16>(block + m < shape.rows ? inside : 0);
            _mm512_store_ps(dest.bytes[block + m], _mm512_maskz_mov_ps(keep, result));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// A thread's tile registers
// ---------------------------------------------------------------------------------------------------------------

// TILECFG, laid out as ldtilecfg reads it and sttilecfg writes it. palette 0 is the initial, unconfigured state, in
// which every byte here and in the tiles is zero.
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

// The registers are 8 KiB, too much to ask of the static TLS that a library loaded by dlopen has to share; any other
// TLS may call malloc at its first touch, here inside a signal handler. So: a pointer in static TLS, the block from
// the kernel, and a pthread key to give it back when the thread ends.
[[gnu::tls_model("initial-exec")]] thread_local constinit ThreadState* this_thread_state = nullptr;
pthread_key_t release_key;

void release_thread_state(void* state) {
    this_thread_state = nullptr;
    syscall(SYS_munmap, state, sizeof(ThreadState));
}

ThreadState* thread_state() {
    if (this_thread_state == nullptr) {
        const long block =
            syscall(SYS_mmap, nullptr, sizeof(ThreadState), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (block == -1) return nullptr;
        this_thread_state = new (reinterpret_cast<void*>(block)) ThreadState{};
        pthread_setspecific(release_key, this_thread_state);
    }
    return this_thread_state;
}

// ---------------------------------------------------------------------------------------------------------------
// Decoding
// ---------------------------------------------------------------------------------------------------------------

enum class Op {
    ldtilecfg,
    sttilecfg,
    tilerelease,
    tilezero,
    tileloadd,
    tileloaddt1,
    tilestored,
    tdpbf16ps,
    tdpbssd,
    tdpbsud,
    tdpbusd,
    tdpbuud
};

enum class Form { config, nothing, tile, tile_and_memory, three_tiles };

// All are VEX.128.0F38.W0; they differ in the opcode, the implied prefix (the VEX field pp) and the ModRM byte.
struct Encoding {
    Op op;
    const char* name;
    Form form;
    std::uint8_t opcode;
    std::uint8_t pp;  // 0: none, 1: 66, 2: F3, 3: F2
};

constexpr Encoding kEncodings[] = {
    {Op::ldtilecfg, "ldtilecfg", Form::config, 0x49, 0},
    {Op::sttilecfg, "sttilecfg", Form::config, 0x49, 1},
    {Op::tilerelease, "tilerelease", Form::nothing, 0x49, 0},
    {Op::tilezero, "tilezero", Form::tile, 0x49, 3},
    {Op::tileloadd, "tileloadd", Form::tile_and_memory, 0x4b, 3},
    {Op::tileloaddt1, "tileloaddt1", Form::tile_and_memory, 0x4b, 1},
    {Op::tilestored, "tilestored", Form::tile_and_memory, 0x4b, 2},
    {Op::tdpbf16ps, "tdpbf16ps", Form::three_tiles, 0x5c, 2},
    {Op::tdpbssd, "tdpbssd", Form::three_tiles, 0x5e, 3},
    {Op::tdpbsud, "tdpbsud", Form::three_tiles, 0x5e, 2},
    {Op::tdpbusd, "tdpbusd", Form::three_tiles, 0x5e, 1},
    {Op::tdpbuud, "tdpbuud", Form::three_tiles, 0x5e, 0},
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

// False: not one of ours. Reads no byte before those ahead of it have matched, so never beyond mapped code.
bool decode(const std::uint8_t* code, Instruction& out) {
    const std::uint8_t* at = code;
    // Without meaning in 64-bit mode: assemblers pad with them.
    while ((*at == 0x26 || *at == 0x2e || *at == 0x36 || *at == 0x3e) && at - code < 4) ++at;

    if (*at++ != 0xc4) return false;
    const unsigned vex1 = *at++;
    if ((vex1 & 0x1f) != 0x02) return false;  // opcode map 0F38
    const unsigned vex2 = *at++;
    if ((vex2 & 0x84) != 0) return false;  // W = 0, L = 0
    const unsigned opcode = *at++;
    if (opcode != 0x49 && opcode != 0x4b && opcode != 0x5c && opcode != 0x5e) return false;
    const unsigned modrm = *at++;
    const unsigned mod = modrm >> 6;

    // VEX holds the extension bits and vvvv inverted.
    const unsigned extend_reg = (vex1 & 0x80) ? 0 : 8;
    const unsigned extend_index = (vex1 & 0x40) ? 0 : 8;
    const unsigned extend_rm = (vex1 & 0x20) ? 0 : 8;
    const unsigned vvvv = ~(vex2 >> 3) & 15;

    const unsigned reg = modrm >> 3 & 7;
    const unsigned rm = modrm & 7;
    out = Instruction{};
    out.tile = reg | extend_reg;
    out.source1 = rm | extend_rm;
    out.source2 = vvvv;
    out.base = out.index = kNoRegister;
    for (const Encoding& encoding : kEncodings) {
        if (encoding.opcode != opcode || encoding.pp != (vex2 & 3)) continue;
        bool match = false;
        switch (encoding.form) {
            case Form::config:
                match = mod != 3 && reg == 0 && vvvv == 0;
                break;
            case Form::nothing:
                match = modrm == 0xc0 && vvvv == 0;
                break;
            case Form::tile:
                match = mod == 3 && rm == 0 && vvvv == 0;
                break;
            case Form::tile_and_memory:
                match = mod != 3 && vvvv == 0;
                break;
            case Form::three_tiles:
                match = mod == 3;
                break;
        }
        if (match) out.encoding = &encoding;
    }
    if (out.encoding == nullptr) return false;

    if (mod != 3) {
        unsigned displacement_bytes = mod == 1 ? 1 : mod == 2 ? 4 : 0;
        if (rm == 4) {
            const unsigned sib = *at++;
            out.has_sib = true;
            out.scale = sib >> 6;
            out.index = (sib >> 3 & 7) | extend_index;
            if (out.index == 4) out.index = kNoRegister;  // rsp cannot be an index, r12 can
            out.base = (sib & 7) | extend_rm;
            if ((sib & 7) == 5 && mod == 0) {  // rbp and r13 alike
                out.base = kNoRegister;
                displacement_bytes = 4;
            }
        } else if (rm == 5 && mod == 0) {
            out.base = kInstructionPointer;
            displacement_bytes = 4;
        } else {
            out.base = rm | extend_rm;
        }
        if (displacement_bytes == 1) {
            out.displacement = static_cast<std::int8_t>(*at);
        } else if (displacement_bytes == 4) {
            std::memcpy(&out.displacement, at, 4);
        }
        at += displacement_bytes;
    }
    out.length = static_cast<unsigned>(at - code);
    return true;
}

// ---------------------------------------------------------------------------------------------------------------
// Executing
// ---------------------------------------------------------------------------------------------------------------

// Why AMX would refuse an instruction.
struct Fault {
    char reason[160];

    // Returns false, for `return fault.because(...)`. printf is safe here: this SIGILL interrupts a tile instruction,
    // never libc.
    [[gnu::format(printf, 2, 3)]] bool because(const char* format, ...) {
        va_list arguments;
        va_start(arguments, format);
        std::vsnprintf(reason, sizeof reason, format, arguments);
        va_end(arguments);
        return false;
    }
};

// The general registers in the order in which instructions number them.
std::uint64_t read_register(const greg_t* registers, unsigned number) {
    static constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                     REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return static_cast<std::uint64_t>(registers[kOrder[number]]);
}

// The address without the index, which scales memory operands of ldtilecfg and sttilecfg but is a stride elsewhere.
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
    const Shape shape{rows[c], rows[b], colsb[c] / 4u};
    Tile& dest = state.tiles[c];
    const Tile &left = state.tiles[a], &right = state.tiles[b];
    switch (instruction.encoding->op) {
        case Op::tdpbssd:
            tdpb_int8(dest, left, right, shape, true, true);
            break;
        case Op::tdpbsud:
            tdpb_int8(dest, left, right, shape, true, false);
            break;
        case Op::tdpbusd:
            tdpb_int8(dest, left, right, shape, false, true);
            break;
        case Op::tdpbuud:
            tdpb_int8(dest, left, right, shape, false, false);
            break;
        default:
            tdpbf16ps(dest, left, right, shape, best_path());
            break;
    }
    state.config.start_row = 0;
    return true;
}

// False, with the reason, for what AMX would refuse; nothing has changed then.
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

// ---------------------------------------------------------------------------------------------------------------
// The signal
// ---------------------------------------------------------------------------------------------------------------

std::atomic<std::uint64_t> emulated{0};
struct sigaction previous_action;  // written once, before the handler is in place

void complain(const Instruction& instruction, std::uint64_t address, const Fault& fault) {
    char operands[48] = "";
    switch (instruction.encoding->form) {
        case Form::tile:
        case Form::tile_and_memory:
            std::snprintf(operands, sizeof operands, " tmm%u", instruction.tile);
            break;
        case Form::three_tiles:
            std::snprintf(operands, sizeof operands, " tmm%u, tmm%u, tmm%u", instruction.tile, instruction.source1,
                          instruction.source2);
            break;
        default:
            break;
    }
    char line[320];
    const int length =
        std::snprintf(line, sizeof line, "AMX emulation: %s%s at 0x%llx: %s\n", instruction.encoding->name, operands,
                      static_cast<unsigned long long>(address), fault.reason);
    if (length > 0) [[maybe_unused]]
        const auto written = write(STDERR_FILENO, line, static_cast<std::size_t>(length));
}

void restore_default() {
    struct sigaction action{};
    action.sa_handler = SIG_DFL;
    sigaction(SIGILL, &action, nullptr);
}

// To whoever handled SIGILL before, as the kernel would have called them. When the interrupted code goes on, its own
// signal mask comes back with it.
void pass_on(siginfo_t* info, void* context) {
    const bool sent = info->si_code <= 0;  // by kill() or its like, not raised by an instruction
    if (previous_action.sa_handler == SIG_IGN && sent) return;
    if (previous_action.sa_handler == SIG_DFL || previous_action.sa_handler == SIG_IGN) {
        restore_default();
        if (sent) raise(SIGILL);
        return;  // to the same instruction, which raises it again
    }
    pthread_sigmask(SIG_BLOCK, &previous_action.sa_mask, nullptr);
    if (previous_action.sa_flags & SA_NODEFER) {
        sigset_t self;
        sigemptyset(&self);
        sigaddset(&self, SIGILL);
        pthread_sigmask(SIG_UNBLOCK, &self, nullptr);
    }
    if (previous_action.sa_flags & SA_SIGINFO) {
        previous_action.sa_sigaction(SIGILL, info, context);
    } else {
        previous_action.sa_handler(SIGILL);
    }
}

void on_sigill(int, siginfo_t* info, void* context) {
    greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    const auto code = [registers] { return reinterpret_cast<const std::uint8_t*>(registers[REG_RIP]); };

    Instruction instruction;
    if (info->si_code <= 0 || !decode(code(), instruction)) {
        pass_on(info, context);
        return;
    }
    // A trap costs far more than what it is for, and tile instructions come in runs: take the whole run.
    ThreadState* state = thread_state();
    Fault fault;
    do {
        const bool done = state != nullptr ? execute(*state, instruction, registers, fault)
                                           : fault.because("no memory for the thread's tile registers");
        if (!done) {
            complain(instruction, static_cast<std::uint64_t>(registers[REG_RIP]), fault);
            restore_default();
            break;  // back to that instruction, which now ends the process
        }
        registers[REG_RIP] += instruction.length;
        emulated.fetch_add(1, std::memory_order_relaxed);
    } while (decode(code(), instruction));
}

}  // namespace

bool amx_trap_installed() noexcept {
    struct sigaction current{};
    return sigaction(SIGILL, nullptr, &current) == 0 && (current.sa_flags & SA_SIGINFO) != 0 &&
           current.sa_sigaction == on_sigill;
}

bool amx_trap_install() {
    static std::mutex mutex;
    static bool was_installed = false;
    const std::lock_guard lock(mutex);
    if (amx_trap_installed()) return true;
    if (was_installed || pthread_key_create(&release_key, release_thread_state) != 0) return false;
    sigaction(SIGILL, nullptr, &previous_action);
    // SIGILL stays blocked meanwhile: an illegal instruction in the emulator itself ends the process at once.
    struct sigaction action{};
    action.sa_sigaction = on_sigill;
    action.sa_flags = SA_SIGINFO | SA_RESTART;
    sigemptyset(&action.sa_mask);
    was_installed = sigaction(SIGILL, &action, nullptr) == 0;
    return was_installed;
}

std::uint64_t amx_trap_count() noexcept {
    return emulated.load(std::memory_order_relaxed);
}

bool path_available(Path path) noexcept {
    switch (path) {
        case Path::scalar:
            return true;
        case Path::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case Path::avx512:
            return __builtin_cpu_supports("avx512f");
    }
    return false;
}

Path best_path() noexcept {
    if (path_available(Path::avx512)) return Path::avx512;
    return path_available(Path::avx2) ? Path::avx2 : Path::scalar;
}

void tdpbf16ps(Tile& dest, const Tile& a, const Tile& b, Shape shape, Path path) noexcept {
    const AmxRounding rounding;
    switch (path) {
        case Path::scalar:
            return tdpbf16ps_scalar(dest, a, b, shape);
        case Path::avx2:
            return tdpbf16ps_avx2(dest, a, b, shape);
        case Path::avx512:
            return tdpbf16ps_avx512(dest, a, b, shape);
    }
}

// Bytes become 16-bit words, the even and the odd ones of each element apart, so that pmaddwd multiplies and adds two
// products exactly. SSE2 is enough: the trap costs more than this.
void tdpb_int8(Tile& dest, const Tile& a, const Tile& b, Shape shape, bool a_signed, bool b_signed) noexcept {
    struct Words {
        Tile even, odd;
    };
    const auto widen = [](const Tile& tile, bool is_signed, Words& words) {
        const __m128i low_byte = _mm_set1_epi16(0xff);
        for (unsigned at = 0; at < sizeof(Tile); at += 16) {
            const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(&tile.bytes[0][0] + at));
            const __m128i even =
                is_signed ? _mm_srai_epi16(_mm_slli_epi16(bytes, 8), 8) : _mm_and_si128(bytes, low_byte);
            const __m128i odd = is_signed ? _mm_srai_epi16(bytes, 8) : _mm_srli_epi16(bytes, 8);
            _mm_store_si128(reinterpret_cast<__m128i*>(&words.even.bytes[0][0] + at), even);
            _mm_store_si128(reinterpret_cast<__m128i*>(&words.odd.bytes[0][0] + at), odd);
        }
    };
    const auto broadcast = [](const std::uint8_t* element) {
        int bits;
        std::memcpy(&bits, element, 4);
        return _mm_set1_epi32(bits);
    };
    const auto load = [](const std::uint8_t* bytes) { return _mm_load_si128(reinterpret_cast<const __m128i*>(bytes)); };

    Words left, right;
    widen(a, a_signed, left);
    widen(b, b_signed, right);
    for (unsigned m = 0; m < shape.rows; ++m) {
        __m128i sum[4];
        for (unsigned v = 0; v < 4; ++v) sum[v] = load(&dest.bytes[m][16 * v]);
        for (unsigned k = 0; k < shape.depth; ++k) {
            const __m128i left_even = broadcast(&left.even.bytes[m][4 * k]);
            const __m128i left_odd = broadcast(&left.odd.bytes[m][4 * k]);
#pragma GCC unroll 4
            for (unsigned v = 0; v < 4; ++v) {
                const __m128i evens = _mm_madd_epi16(left_even, load(&right.even.bytes[k][16 * v]));
                const __m128i odds = _mm_madd_epi16(left_odd, load(&right.odd.bytes[k][16 * v]));
                sum[v] = _mm_add_epi32(sum[v], _mm_add_epi32(evens, odds));
            }
        }
        for (unsigned v = 0; v < 4; ++v) _mm_store_si128(reinterpret_cast<__m128i*>(&dest.bytes[m][16 * v]), sum[v]);
        std::memset(&dest.bytes[m][4 * shape.columns], 0, kRowBytes - 4 * shape.columns);
    }
    std::memset(dest.bytes[shape.rows], 0, (kRows - shape.rows) * kRowBytes);
}

}  // namespace ktv::emulation

#else

namespace ktv::emulation {

bool amx_trap_install() {
    return false;
}
bool amx_trap_installed() noexcept {
    return false;
}
std::uint64_t amx_trap_count() noexcept {
    return 0;
}

}  // namespace ktv::emulation

#endif
