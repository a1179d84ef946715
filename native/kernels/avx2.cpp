// AVX2 with FMA: eight lanes; a shift widens bf16 to fp32.
// x86-64 flags: -mavx2 -mfma
#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.hpp"

namespace ktv {
namespace {

#include "elementwise.inl"

KTV_INLINE __m256 even(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
}
KTV_INLINE __m256 odd(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
KTV_INLINE __m256i broadcast_pair(const bf16* p) {
    std::int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return _mm256_set1_epi32(pair);
}

// Lanes are tokens: N rows of W by one group, or by its first eight tokens; c [N][16].
template <int N, int halves>
KTV_INLINE void nt_block(const bf16* w, const bf16* x, int kblocks, float* c, bool add) {
    __m256 sum[N][halves];
    for (int n = 0; n < N; ++n) {
        for (int half = 0; half < halves; ++half)
            sum[n][half] = add ? _mm256_loadu_ps(c + n * kGroup + half * 8) : _mm256_setzero_ps();
    }
    for (int kb = 0; kb < kblocks; ++kb, w += kBlockSize, x += kPackSize) {
        for (int pair = 0; pair < kBlock / 2; ++pair) {
            const bf16* two = x + pair * 2 * kGroup;
            __m256 x0[halves], x1[halves];
            for (int half = 0; half < halves; ++half) {
                const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(two + half * kGroup));
                x0[half] = even(pairs);
                x1[half] = odd(pairs);
            }
            for (int n = 0; n < N; ++n) {
                const __m256i weight = broadcast_pair(w + n * kBlock + 2 * pair);
                const __m256 w0 = even(weight), w1 = odd(weight);
                for (int half = 0; half < halves; ++half) {
                    sum[n][half] = _mm256_fmadd_ps(w0, x0[half], sum[n][half]);
                    sum[n][half] = _mm256_fmadd_ps(w1, x1[half], sum[n][half]);
                }
            }
        }
    }
    for (int n = 0; n < N; ++n) {
        for (int half = 0; half < halves; ++half) _mm256_storeu_ps(c + n * kGroup + half * 8, sum[n][half]);
    }
}

void nt_strip(const NtSegment* segments, int count, int tokens, float* c) {
    constexpr int chunk = 8, N = 4, M = 8;  // rows of W in a register block: N, or M with half a group
    const int groups = (tokens + kGroup - 1) / kGroup;
    bool add = false;
    for (int s = 0; s < count; ++s) {
        const NtSegment& seg = segments[s];
        for (int kb = 0; kb < seg.kblocks; kb += chunk, add = true) {
            const int blocks = seg.kblocks - kb < chunk ? seg.kblocks - kb : chunk;
            for (int g = 0; g < groups; ++g) {
                const bf16* x = seg.tokens + g * seg.group_stride + kb * kPackSize;
                const bf16* w = seg.weights + kb * kBlockSize;
                float* out = c + g * kResultSize;
                if (tokens - g * kGroup > kGroup / 2) {
                    for (int n = 0; n < kBlock; n += N)
                        nt_block<N, 2>(w + n * kBlock, x, blocks, out + n * kGroup, add);
                } else {
                    for (int n = 0; n < kBlock; n += M)
                        nt_block<M, 1>(w + n * kBlock, x, blocks, out + n * kGroup, add);
                }
            }
        }
    }
}

void nt(const NtSegment* segments, int count, int strips, int tokens, float* c) {
    const std::size_t result = (tokens + kGroup - 1) / kGroup * kResultSize;
    for (int s = 0; s < strips; ++s) nt_strip(segments + s * count, count, tokens, c + s * result);
}

// Lanes are columns: R rows of G by one block of 32 columns (four registers), W widened to fp32 once per block.
template <int R>
KTV_INLINE void nn_block(const bf16* g, std::size_t ld, const float* panel, float* c, bool add) {
    __m256 sum[R][4];
    for (int r = 0; r < R; ++r) {
        for (int q = 0; q < 4; ++q) sum[r][q] = add ? _mm256_loadu_ps(c + r * kBlock + q * 8) : _mm256_setzero_ps();
    }
    for (int k = 0; k < kBlock; ++k) {
        __m256 w[4];
        for (int q = 0; q < 4; ++q) w[q] = _mm256_load_ps(panel + k * kBlock + q * 8);
        for (int r = 0; r < R; ++r) {
            const __m256 value = _mm256_set1_ps(to_float(g[r * ld + k]));
            for (int q = 0; q < 4; ++q) sum[r][q] = _mm256_fmadd_ps(value, w[q], sum[r][q]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int q = 0; q < 4; ++q) _mm256_storeu_ps(c + r * kBlock + q * 8, sum[r][q]);
    }
}

void nn(const NnSegment* segments, int count, int rows, int cblocks, float* c) {
    alignas(64) float panel[kBlockSize];
    for (int cb = 0; cb < cblocks; ++cb, c += nn_stride(rows)) {
        bool add = false;
        for (int s = 0; s < count; ++s) {
            const NnSegment& seg = segments[s];
            for (int kb = 0; kb < seg.kblocks; ++kb, add = true) {
                for (int k = 0; k < kBlock; ++k) {
                    const bf16* w = seg.weights ? seg.weights + kb * seg.kblock_stride + cb * kBlockSize + k * kBlock
                                                : seg.gathered[kb * kBlock + k] + seg.column + cb * kBlock;
                    for (int q = 0; q < 4; ++q) {
                        const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + q * 8));
                        const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16);
                        _mm256_store_ps(panel + k * kBlock + q * 8, _mm256_castsi256_ps(wide));
                    }
                }
                const bf16* g = seg.rows + kb * kBlock;
                int r = 0;
                for (; r + 2 <= rows; r += 2) nn_block<2>(g + r * seg.ld, seg.ld, panel, c + r * kBlock, add);
                for (; r < rows; ++r) nn_block<1>(g + r * seg.ld, seg.ld, panel, c + r * kBlock, add);
            }
        }
    }
}

}  // namespace

extern const Kernels avx2_kernels;
const Kernels avx2_kernels{.enter = nothing, .leave = nothing, KTV_SMALL_CALLS, .nt = nt, .nn = nn, KTV_ELEMENTWISE};

}  // namespace ktv
