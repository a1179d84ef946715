// AVX-512 with vdpbf16ps: sixteen fp32 lanes, two products a lane and instruction.
#include <immintrin.h>

#include <cstring>

#include "kernels.hpp"

namespace ktv {
namespace {

#include "avx512_pack.inl"
#include "elementwise.inl"

void nothing() {}

KTV_INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
// One k-pair to all lanes.
KTV_INLINE __m512i broadcast_pair(const bf16* p) {
    std::int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
}

// Lanes are tokens. A register block is N rows of W by G groups; a k-pair of W is broadcast, one of the tokens is a
// load. N * G + G + 1 registers of 32.
template <int N, int G>
KTV_INLINE void nt_block(const bf16* w, const bf16* x, std::size_t group_stride, int kblocks, bool fetch, float* c,
                         std::size_t ldc, bool add) {
    __m512 sum[N][G];
    for (int n = 0; n < N; ++n) {
        for (int g = 0; g < G; ++g) sum[n][g] = add ? _mm512_loadu_ps(c + n * ldc + g * kGroup) : _mm512_setzero_ps();
    }
    for (int kb = 0; kb < kblocks; ++kb, w += kBlockSize, x += kPackSize) {
        if (fetch) {
            for (int n = 0; n < N; ++n)
                _mm_prefetch(reinterpret_cast<const char*>(w + kblocks * kBlockSize + n * kBlock), _MM_HINT_T0);
        }
        for (int pair = 0; pair < kBlock / 2; ++pair) {
            __m512i token[G];
            for (int g = 0; g < G; ++g) token[g] = _mm512_loadu_si512(x + g * group_stride + pair * 2 * kGroup);
            for (int n = 0; n < N; ++n) {
                const __m512i weight = broadcast_pair(w + n * kBlock + 2 * pair);
                for (int g = 0; g < G; ++g) sum[n][g] = dot(sum[n][g], weight, token[g]);
            }
        }
    }
    for (int n = 0; n < N; ++n) {
        for (int g = 0; g < G; ++g) _mm512_storeu_ps(c + n * ldc + g * kGroup, sum[n][g]);
    }
}

template <int N, int G>
void nt_rows(const bf16* w, const bf16* x, std::size_t group_stride, int kblocks, bool fetch, float* c, std::size_t ldc,
             bool add) {
    for (int n = 0; n < kBlock; n += N) {
        nt_block<N, G>(w + n * kBlock, x, group_stride, kblocks, fetch, c + n * ldc, ldc, add);
    }
}

// k goes in chunks that leave W's 32 rows in L1 while all groups pass over them: W is read from memory once.
void nt(const NtSegment* segments, int count, int groups, float* c, std::size_t ldc) {
    constexpr int chunk = 8;
    bool add = false;
    for (int s = 0; s < count; ++s) {
        const NtSegment& seg = segments[s];
        for (int kb = 0; kb < seg.kblocks; kb += chunk, add = true) {
            const int blocks = seg.kblocks - kb < chunk ? seg.kblocks - kb : chunk;
            const bf16* w = seg.weights + kb * kBlockSize;
            for (int g = 0; g < groups;) {
                const bf16* x = seg.tokens + g * seg.group_stride + kb * kPackSize;
                float* out = c + g * kGroup;
                const bool fetch = g == 0;
                const int left = groups - g;
                if (left == 4 || left >= 6) {
                    nt_rows<4, 4>(w, x, seg.group_stride, blocks, fetch, out, ldc, add);
                    g += 4;
                } else if (left == 3 || left == 5) {
                    nt_rows<8, 3>(w, x, seg.group_stride, blocks, fetch, out, ldc, add);
                    g += 3;
                } else if (left == 2) {
                    nt_rows<8, 2>(w, x, seg.group_stride, blocks, fetch, out, ldc, add);
                    g += 2;
                } else {
                    nt_rows<16, 1>(w, x, seg.group_stride, blocks, fetch, out, ldc, add);
                    g += 1;
                }
            }
        }
    }
}

// Lanes are columns. A register block is R rows of G by one block of 32 columns.
template <int R>
KTV_INLINE void nn_block(const bf16* g, std::size_t ld, const bf16* panel, int kblocks, float* c, std::size_t ldc,
                         bool add) {
    __m512 sum[R][2];
    for (int r = 0; r < R; ++r) {
        for (int half = 0; half < 2; ++half)
            sum[r][half] = add ? _mm512_loadu_ps(c + r * ldc + half * 16) : _mm512_setzero_ps();
    }
    for (int kb = 0; kb < kblocks; ++kb, panel += kBlockSize, g += kBlock) {
        for (int pair = 0; pair < 16; ++pair) {
            const __m512i lower = _mm512_load_si512(panel + pair * 32);
            const __m512i upper = _mm512_load_si512(panel + kHalf + pair * 32);
            for (int r = 0; r < R; ++r) {
                const __m512i value = broadcast_pair(g + r * ld + 2 * pair);
                sum[r][0] = dot(sum[r][0], value, lower);
                sum[r][1] = dot(sum[r][1], value, upper);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int half = 0; half < 2; ++half) _mm512_storeu_ps(c + r * ldc + half * 16, sum[r][half]);
    }
}

void nn(const NnSegment* segments, int count, int rows, int cblocks, float* c, std::size_t ldc) {
    alignas(64) bf16 panel[kNnBlocks * kBlockSize];
    bool add = false;
    for (int s = 0; s < count; ++s) {
        const NnSegment& seg = segments[s];
        for (int kb = 0; kb < seg.kblocks; kb += kNnBlocks, add = true) {
            const int blocks = seg.kblocks - kb < kNnBlocks ? seg.kblocks - kb : kNnBlocks;
            for (int cb = 0; cb < cblocks; ++cb) {
                const bool last = cb + 1 == cblocks;
                for (int i = 0; i < blocks; ++i) {
                    interleave_block(seg, kb + i, cb, panel + i * kBlockSize);
                    prefetch_block(seg, last ? kb + i + kNnBlocks : kb + i, last ? 0 : cb + 1);
                }
                float* out = c + cb * kBlock;
                const bf16* g = seg.rows + kb * kBlock;
                int r = 0;
                for (; r + 12 <= rows; r += 12)
                    nn_block<12>(g + r * seg.ld, seg.ld, panel, blocks, out + r * ldc, ldc, add);
                for (; r + 4 <= rows; r += 4)
                    nn_block<4>(g + r * seg.ld, seg.ld, panel, blocks, out + r * ldc, ldc, add);
                for (; r < rows; ++r) nn_block<1>(g + r * seg.ld, seg.ld, panel, blocks, out + r * ldc, ldc, add);
            }
        }
    }
}

}  // namespace

const Kernels* avx512_bf16_kernels() {
    static const Kernels table{Isa::avx512_bf16, nothing, nothing, nt, nn, KTV_ELEMENTWISE};
    return &table;
}

}  // namespace ktv
