// Tile instructions for the tests of the emulator: in every form that the assembler can write, and as functions.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "../emulation/amx_tiles.hpp"

using namespace ktv::emulation;

// Every register that an instruction could change. The assembly below uses the offsets.
struct Context {
    std::uint64_t gpr[16];  // 0, in the order of their numbers: rax rcx rdx rbx rsp rbp rsi rdi r8 ...
    std::uint64_t flags;    // 128
    // 192, as XSAVE stores them: MXCSR at 24, xmm0 to xmm15 at 160, XSTATE_BV at 512, the others where CPUID says.
    alignas(64) std::uint8_t vectors[4096];
};
static_assert(offsetof(Context, vectors) == 192);

extern "C" {
// Loads every register from the context, jumps to the code, and stores the registers when the code jumps to
// snippet_return.
void run_snippet(const void* code, Context* context);
extern const char snippet_return[];
extern const char load_forms[], store_forms[], absolute_forms[],
    absolute_extended[];                                                   // 32 bytes each, ending in a jump
extern const char config_load_forms[], config_store_forms[];               // to snippet_return
extern const char load_tile[], load_t1_tile[], store_tile[], zero_tile[];  // 16 bytes each, ending in ret
extern const char release_tiles[], padded_load[], load_rip_config[], store_rip_config[], illegal_ret[];
extern const char product_bf16[];
extern const char no_sib[], malformed[], tmm_eight[], same_tile_twice[], run_of_eight[];
extern std::uint8_t rip_config[64], rip_stored[64];
}

constexpr std::uint64_t kVectorStates = 0xe6;    // of XCR0: xmm, ymm, masks, zmm; as in run_snippet
constexpr std::uint64_t kAbsolute = 0x20000000;  // as in absolute_forms
constexpr std::array<std::int32_t, 5> kDisplacements = {0, 64, -64, 0x1240, -0x1240};
constexpr unsigned kRsp = 4;

asm(R"asm(
    .data
    .balign 64
rip_config:      .zero 64
rip_stored:      .zero 64
initial_vectors: .zero 24
                 .long 0x1f80   # MXCSR
                 .zero 548
snippet_context: .quad 0
snippet_target:  .quad 0
snippet_stack:   .quad 0
snippet_rsi:     .quad 0
snippet_rsp:     .quad 0

    .text
    # All general registers but rsi from or to the context at rsi.
    .macro registers direction
        .set at, 0
        .irp register, rax,rcx,rdx,rbx,rsp,rbp,rsi,rdi,r8,r9,r10,r11,r12,r13,r14,r15
            .ifnc \register, rsi
                .ifc \direction, load
                    mov at(%rsi), %\register
                .else
                    mov %\register, at(%rsi)
                .endif
            .endif
            .set at, at + 8
        .endr
    .endm

run_snippet:
    .irp register, rbx, rbp, r12, r13, r14, r15
        push %\register
    .endr
    mov %rdi, snippet_target(%rip)
    mov %rsi, snippet_context(%rip)
    mov %rsp, snippet_stack(%rip)
    mov $0xe6, %eax
    xor %edx, %edx
    xrstor64 192(%rsi)
    pushq 128(%rsi)
    popfq
    registers load
    mov 48(%rsi), %rsi
    jmp *snippet_target(%rip)

snippet_return:
    mov %rsi, snippet_rsi(%rip)
    mov %rsp, snippet_rsp(%rip)
    mov snippet_stack(%rip), %rsp
    mov snippet_context(%rip), %rsi
    pushfq
    popq 128(%rsi)
    cld
    registers store
    mov snippet_rsi(%rip), %rax
    mov %rax, 48(%rsi)
    mov snippet_rsp(%rip), %rax
    mov %rax, 32(%rsi)
    mov $0xe6, %eax
    xor %edx, %edx
    xsave64 192(%rsi)
    xrstor64 initial_vectors(%rip)
    .irp register, r15, r14, r13, r12, rbp, rbx
        pop %\register
    .endr
    ret

    # [base 16][index 16, rsp for none][scale 4][displacement 5]
    .macro address_forms before, after
        .irp base, rax,rcx,rdx,rbx,rsp,rbp,rsi,rdi,r8,r9,r10,r11,r12,r13,r14,r15
            .irp index, rax,rcx,rdx,rbx,rsp,rbp,rsi,rdi,r8,r9,r10,r11,r12,r13,r14,r15
                .irp scale, 1,2,4,8
                    .irp displacement, 0, 64, -64, 0x1240, -0x1240
                        .balign 32
                        .ifc \index, rsp
                            \before \displacement(%\base)\after
                        .else
                            \before \displacement(%\base,%\index,\scale)\after
                        .endif
                        jmp snippet_return
                    .endr
                .endr
            .endr
        .endr
    .endm
    .balign 32
load_forms:
    address_forms "tileloadd", ", %tmm5"
    .balign 32
store_forms:
    address_forms "tilestored %tmm5,"

    # [index 16, rsp for none][scale 4]
    .balign 32
absolute_forms:
    .irp index, rax,rcx,rdx,rbx,rsp,rbp,rsi,rdi,r8,r9,r10,r11,r12,r13,r14,r15
        .irp scale, 1,2,4,8
            .balign 32
            .ifc \index, rsp
                tileloadd 0x20000000, %tmm5
            .else
                tileloadd 0x20000000(,%\index,\scale), %tmm5
            .endif
            jmp snippet_return
        .endr
    .endr

absolute_extended:
    .byte 0xc4, 0xc2, 0x7b, 0x4b, 0x2c, 0x05  # as tileloadd 0x20000000(,%rax), %tmm5, with a VEX.B that has no meaning
    .long 0x20000000
    jmp snippet_return

    # [base 16][displacement 5, then displacement 0x1240 with an index 4 * (r8, or r9 beside r8)]
    .macro config_forms instruction
        .irp base, rax,rcx,rdx,rbx,rsp,rbp,rsi,rdi,r8,r9,r10,r11,r12,r13,r14,r15
            .irp displacement, 0, 64, -64, 0x1240, -0x1240
                .balign 32
                \instruction \displacement(%\base)
                jmp snippet_return
            .endr
            .balign 32
            .ifc \base, r8
                \instruction 0x1240(%\base,%r9,4)
            .else
                \instruction 0x1240(%\base,%r8,4)
            .endif
            jmp snippet_return
        .endr
    .endm
    .balign 32
config_load_forms:
    config_forms ldtilecfg
    .balign 32
config_store_forms:
    config_forms sttilecfg

    # Called as functions: base in rdi, stride in rsi.
    .macro per_tile name, before, after
        .balign 16
    \name:
        .irp tile, 0,1,2,3,4,5,6,7
            .balign 16
            \before\tile\after
            ret
        .endr
    .endm
    .macro function name, instruction:vararg
    \name:
        \instruction
        ret
    .endm
    per_tile load_tile, "tileloadd (%rdi,%rsi), %tmm"
    per_tile load_t1_tile, "tileloaddt1 (%rdi,%rsi), %tmm"
    per_tile zero_tile, "tilezero %tmm"
    per_tile store_tile, "tilestored %tmm", ", (%rdi,%rsi)"
    function release_tiles, tilerelease
    function load_rip_config, ldtilecfg rip_config(%rip)
    function store_rip_config, sttilecfg rip_stored(%rip)
    function illegal_ret, ud2
    function no_sib, .byte 0xc4, 0xe2, 0x7b, 0x4b, 0x07           # tileloadd (%rdi), %tmm0 without its SIB byte
    function tmm_eight, .byte 0xc4, 0x62, 0x7b, 0x4b, 0x04, 0x37  # tileloadd (%rdi,%rsi), %tmm8
    function same_tile_twice, .byte 0xc4, 0xe2, 0x72, 0x5c, 0xc0  # tdpbf16ps tmm0, tmm0, tmm1: the assembler refuses it
padded_load:
    .byte 0x2e, 0x3e
    tileloadd (%rdi,%rsi), %tmm0
    ret
    .balign 16
malformed:                                  # tileloadd (%rdi,%rsi), %tmm0, but
    .byte 0xc4, 0xe2, 0x73, 0x4b, 0x04, 0x37, 0xc3  # with a second operand in vvvv
    .balign 16
    .byte 0xc4, 0xe2, 0xfb, 0x4b, 0x04, 0x37, 0xc3  # with W = 1
    .balign 16
    .byte 0xc4, 0xe2, 0x7f, 0x4b, 0x04, 0x37, 0xc3  # with L = 1
    .balign 16
    .byte 0xc4, 0xe1, 0x7b, 0x4b, 0x04, 0x37, 0xc3  # in another opcode map
    .balign 16
    .byte 0xc4, 0xe2, 0x7b, 0x4b, 0xc7, 0xc3        # from a register
run_of_eight:
    tileloadd (%rdi,%rsi), %tmm4
    tileloadd (%rdi,%rsi), %tmm5
    tileloadd (%rdi,%rsi), %tmm6
    tileloadd (%rdi,%rsi), %tmm7
    tdpbf16ps %tmm6, %tmm4, %tmm0
    tdpbf16ps %tmm7, %tmm4, %tmm1
    tdpbf16ps %tmm6, %tmm5, %tmm2
    tdpbf16ps %tmm7, %tmm5, %tmm3
    ret

    # [dest 8][a 8][b 8], empty where two are the same
    .balign 16
product_bf16:
    .irp dest, 0,1,2,3,4,5,6,7
        .irp a, 0,1,2,3,4,5,6,7
            .irp b, 0,1,2,3,4,5,6,7
                .balign 16
                .if (\dest - \a) * (\dest - \b) * (\a - \b)
                    tdpbf16ps %tmm\b, %tmm\a, %tmm\dest
                .endif
                ret
            .endr
        .endr
    .endr
)asm");

// The layout that ldtilecfg reads; a copy of its own, so that an error in the emulator's layout shows.
struct alignas(64) Config {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved_a[14] = {};
    std::uint16_t colsb[8] = {};
    std::uint8_t reserved_b[16] = {};
    std::uint8_t rows[8] = {};
    std::uint8_t reserved_c[8] = {};

    Config& set(unsigned tile, unsigned tile_rows, unsigned tile_colsb) {
        rows[tile] = static_cast<std::uint8_t>(tile_rows);
        colsb[tile] = static_cast<std::uint16_t>(tile_colsb);
        return *this;
    }
    static Config full() {
        Config config;
        for (unsigned tile = 0; tile < 8; ++tile) config.set(tile, 16, 64);
        return config;
    }
};
static_assert(sizeof(Config) == 64);

void load_config(const Config& config) {
    asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
}
Config store_config() {
    Config config;
    asm volatile("sttilecfg %0" : "=m"(config) : : "memory");
    return config;
}

using Move = void (*)(void* base, std::int64_t stride);
Move entry(const char* table, unsigned number = 0) {
    return reinterpret_cast<Move>(const_cast<char*>(table) + 16 * number);
}
void load(unsigned tile, const void* base, std::int64_t stride = 64) {
    entry(load_tile, tile)(const_cast<void*>(base), stride);
}
void store(unsigned tile, void* base, std::int64_t stride = 64) {
    entry(store_tile, tile)(base, stride);
}
void zero(unsigned tile) {
    entry(zero_tile, tile)(nullptr, 0);
}
void release() {
    entry(release_tiles)(nullptr, 0);
}
void multiply(unsigned dest, unsigned a, unsigned b) {
    entry(product_bf16, dest * 64 + a * 8 + b)(nullptr, 0);
}

int nothing() {
    return 0;
}
// dest += a * b with the instruction itself, in tiles c, l and r; zero outside the shape. Calls between() between two
// instructions.
void multiply_in_tiles(Tile& dest, const Tile& a, const Tile& b, Shape shape, unsigned c = 0, unsigned l = 1,
                       unsigned r = 2, int (*between)() = nothing) {
    load_config(Config{}
                    .set(c, shape.rows, 4 * shape.columns)
                    .set(l, shape.rows, 4 * shape.depth)
                    .set(r, shape.depth, 4 * shape.columns));
    between();
    load(c, &dest);
    between();
    load(l, &a);
    between();
    load(r, &b);
    between();
    multiply(c, l, r);
    between();
    dest = Tile{};
    store(c, &dest);
    release();
}
