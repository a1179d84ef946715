// The instruction of each set of kernels, on enough accumulators to hide its latency. All stand in this one file, as
// asm: compiled code keeps such sums in memory or folds them away, and no function here needs flags of its own.
#include "multiply.hpp"

namespace ktv {
namespace {

using Four = float __attribute__((vector_size(16)));

double multiply_portable() {
    constexpr int sums = 8, repeats = 4096;
    Four sum[sums] = {}, half = {0.5f, 0.5f, 0.5f, 0.5f}, one = {1, 1, 1, 1};
    for (int i = 0; i < repeats; ++i) {
        for (Four& s : sum) {
            s = s * half + one;  // s in both, or the product would be computed only once
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

#define KTV_VECTORS                                                                                            \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", \
        "xmm13", "cc"

// Sums 0 to 11, operands 12 and 13: four to six cycles of latency on two units.
double multiply_avx2() {
    constexpr int sums = 12, repeats = 4096;
    int left = repeats;
    asm volatile(
        ".irp r, 0,1,2,3,4,5,6,7,8,9,10,11,12,13\n vxorps %%ymm\\r, %%ymm\\r, %%ymm\\r\n .endr\n"
        "1:\n"
        ".irp r, 0,1,2,3,4,5,6,7,8,9,10,11\n vfmadd231ps %%ymm13, %%ymm12, %%ymm\\r\n .endr\n"
        "dec %0\n jnz 1b\n vzeroupper\n"
        : "+r"(left)::KTV_VECTORS);
    return 2.0 * 8 * sums * repeats;
}

double multiply_avx512_bf16() {
    constexpr int sums = 12, repeats = 4096;
    int left = repeats;
    asm volatile(
        ".irp r, 0,1,2,3,4,5,6,7,8,9,10,11,12,13\n vpxord %%zmm\\r, %%zmm\\r, %%zmm\\r\n .endr\n"
        "1:\n"
        ".irp r, 0,1,2,3,4,5,6,7,8,9,10,11\n vdpbf16ps %%zmm13, %%zmm12, %%zmm\\r\n .endr\n"
        "dec %0\n jnz 1b\n vzeroupper\n"
        : "+r"(left)::KTV_VECTORS);
    return 2.0 * 32 * sums * repeats;
}

// Tiles 0 to 5 are sums, 6 and 7 the operands: 52 cycles of latency, a product every 16.
double multiply_amx() {
    constexpr int sums = 6, repeats = 16;
    int left = repeats;
    asm volatile(
        ".irp r, 0,1,2,3,4,5,6,7\n tilezero %%tmm\\r\n .endr\n"
        "1:\n"
        ".irp r, 0,1,2,3,4,5\n tdpbf16ps %%tmm7, %%tmm6, %%tmm\\r\n .endr\n"
        "dec %0\n jnz 1b\n"
        : "+r"(left)::"cc");
    return 2.0 * 16 * 16 * 32 * sums * repeats;
}

#undef KTV_VECTORS
#endif

}  // namespace

double multiply_registers(Isa isa) {
    switch (isa) {
#if defined(__x86_64__)
        case Isa::amx_bf16:
            return multiply_amx();
        case Isa::avx512_bf16:
            return multiply_avx512_bf16();
        case Isa::avx2:
            return multiply_avx2();
#endif
        default:
            return multiply_portable();
    }
}

}  // namespace ktv
