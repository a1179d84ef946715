#include "amx_tiles.hpp"

#if defined(__x86_64__) && defined(__linux__)

#include <immintrin.h>

#include <bit>
#include <cmath>
#include <cstring>

#ifdef __FAST_MATH__
#error "the emulator promises exact bits: compile it without -ffast-math"
#endif

namespace ktv::emulation {
namespace {

constexpr std::uint32_t kNan = 0xffc00000;
constexpr int kHighHalf = static_cast<int>(0xffff0000);  // of a bf16 pair: the odd element, widened to fp32

// Sets AMX's own mode instead of the caller's: round to nearest even, denormals are zero, results flush to zero, no
// exception traps. The compiler does not know that arithmetic depends on it, so the arithmetic is in functions that are
// not inlined into this object's scope.
class AmxRounding {
  public:
    AmxRounding() { _mm_setcsr(0x9fc0); }
    ~AmxRounding() { _mm_setcsr(saved_); }
    AmxRounding(const AmxRounding&) = delete;
    AmxRounding& operator=(const AmxRounding&) = delete;

  private:
    unsigned saved_ = _mm_getcsr();
};

// fp32 fma(a, b, c) for bf16 values a and b, without the FMA instruction. The product has 16 significant bits and is exact
// in fp64. So is the sum, unless one operand is more than 2^29 times smaller than the other; it is then too small to move
// the other, an fp32 value, to a neighbour or to a tie. In both cases only the rounding to fp32 counts.
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

// In the vector paths a lane is a column n. They compute four rows at a time, which hides the latency of the
// multiply-adds and shares the unpacking of b; rows and lanes outside the shape too, where they store zero.
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
    constexpr __mmask16 kAll = 0xffff;  // gcc 12 reports the unmasked shift as a use of an uninitialized value
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

}  // namespace

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

}  // namespace ktv::emulation

#endif
