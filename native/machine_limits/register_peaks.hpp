// One loop for each instruction set that multiplies registers only: the peak of the arithmetic units, without memory.
//
// Each runs for some microseconds (milliseconds where tiles are emulated) and returns the floating-point operations it
// did. A loop has enough accumulators to hide the latency of its instruction. The x86-64 loops are asm: compiled code
// would keep such sums in memory or fold them away, and asm needs no compiler flags.
#pragma once

namespace ktv {

inline double peak_of_scalar() {
    using Four = float __attribute__((vector_size(16)));
    constexpr int sums = 8, repeats = 4096;
    Four sum[sums] = {}, half = {0.5f, 0.5f, 0.5f, 0.5f}, one = {1, 1, 1, 1};
    for (int i = 0; i < repeats; ++i) {
        for (Four& s : sum) {
            s = s * half + one;  // s in both operands, so that the product is computed in every round
#if defined(__x86_64__)
            asm volatile("" : "+x"(s));
#elif defined(__aarch64__)
            asm volatile("" : "+w"(s));
#endif
        }
    }
    return 2.0 * 4 * sums * repeats;
}

#if defined(__x86_64__)

// Clears the registers whose numbers are listed in SUMS and OPERANDS, then executes MULTIPLY `repeats` times for each
// register in SUMS. \\r is the register's number; `flops` are those of one instruction.
#define KTV_PEAK_LOOP(name, sums, SUMS, OPERANDS, CLEAR, MULTIPLY, LEAVE, repeats, flops)                          \
    inline double name() {                                                                                         \
        int left = repeats;                                                                                        \
        asm volatile(".irp r, " SUMS "," OPERANDS "\n " CLEAR "\n .endr\n1:\n.irp r, " SUMS "\n " MULTIPLY         \
                     "\n .endr\ndec %0\n jnz 1b\n " LEAVE "\n"                                                     \
                     : "+r"(left)::"xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
                       "xmm10", "xmm11", "xmm12", "xmm13", "cc");                                                  \
        return 1.0 * (flops) * (sums) * (repeats);                                                                 \
    }

// 12 accumulators: four to six cycles of latency on two units.
KTV_PEAK_LOOP(peak_of_avx2, 12, "0,1,2,3,4,5,6,7,8,9,10,11", "12,13", "vxorps %%ymm\\r, %%ymm\\r, %%ymm\\r",
              "vfmadd231ps %%ymm13, %%ymm12, %%ymm\\r", "vzeroupper", 4096, 2 * 8)
KTV_PEAK_LOOP(peak_of_avx512, 12, "0,1,2,3,4,5,6,7,8,9,10,11", "12,13", "vpxord %%zmm\\r, %%zmm\\r, %%zmm\\r",
              "vfmadd231ps %%zmm13, %%zmm12, %%zmm\\r", "vzeroupper", 4096, 2 * 16)
KTV_PEAK_LOOP(peak_of_avx512_bf16, 12, "0,1,2,3,4,5,6,7,8,9,10,11", "12,13", "vpxord %%zmm\\r, %%zmm\\r, %%zmm\\r",
              "vdpbf16ps %%zmm13, %%zmm12, %%zmm\\r", "vzeroupper", 4096, 2 * 32)
// 6 tiles: 52 cycles of latency, one product every 16. The worker must have entered the kernels (tile configuration).
KTV_PEAK_LOOP(peak_of_amx_bf16, 6, "0,1,2,3,4,5", "6,7", "tilezero %%tmm\\r", "tdpbf16ps %%tmm7, %%tmm6, %%tmm\\r", "",
              16, 2 * 16 * 16 * 32)

#undef KTV_PEAK_LOOP
#endif

}  // namespace ktv
