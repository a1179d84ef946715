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

// Lanes are k: one load of W serves every token, so that few of them leave the layer what it is then, a race to read W
// once. The sixteen lanes are added up at the end of k.
constexpr int few_rows = 6;

template <int T>
void nt_dots(const NtSegment* segments, int count, float* c, std::size_t ldc) {
    constexpr int N = 4;
    for (int n = 0; n < kBlock; n += N) {
        __m512 sum[N][T];
        for (int i = 0; i < N; ++i) {
            for (int t = 0; t < T; ++t) sum[i][t] = _mm512_setzero_ps();
        }
        for (int s = 0; s < count; ++s) {
            const bf16* w = segments[s].weights + n * kBlock;
            const bf16* x = segments[s].tokens;
            for (int kb = 0; kb < segments[s].kblocks; ++kb, w += kBlockSize, x += kPackSize) {
                for (int i = 0; i < N; ++i)
                    _mm_prefetch(reinterpret_cast<const char*>(w + 16 * kBlockSize + i * kBlock), _MM_HINT_T0);
                __m512i token[T];
                for (int t = 0; t < T; ++t) token[t] = _mm512_loadu_si512(x + t * kBlock);
                for (int i = 0; i < N; ++i) {
                    const __m512i weight = _mm512_loadu_si512(w + i * kBlock);
                    for (int t = 0; t < T; ++t) sum[i][t] = dot(sum[i][t], weight, token[t]);
                }
            }
        }
        for (int i = 0; i < N; ++i) {
            for (int t = 0; t < T; ++t) c[(n + i) * ldc + t] = sum_of_lanes((F)sum[i][t]);
        }
    }
}

void nt_few(const NtSegment* segments, int count, int rows, float* c, std::size_t ldc) {
    constexpr void (*dots[])(const NtSegment*, int, float*, std::size_t) = {nt_dots<1>, nt_dots<2>, nt_dots<3>,
                                                                            nt_dots<4>, nt_dots<5>, nt_dots<6>};
    static_assert(sizeof dots / sizeof *dots == few_rows);
    dots[rows - 1](segments, count, c, ldc);
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

// What is left below eight rows, in one block: two accumulators a row hide the latency only when they are many.
void nn_rest(int rows, const bf16* g, std::size_t ld, const bf16* panel, int kblocks, float* c, std::size_t ldc,
             bool add) {
    switch (rows) {
        case 1:
            return nn_block<1>(g, ld, panel, kblocks, c, ldc, add);
        case 2:
            return nn_block<2>(g, ld, panel, kblocks, c, ldc, add);
        case 3:
            return nn_block<3>(g, ld, panel, kblocks, c, ldc, add);
        case 4:
            return nn_block<4>(g, ld, panel, kblocks, c, ldc, add);
        case 5:
            return nn_block<5>(g, ld, panel, kblocks, c, ldc, add);
        case 6:
            return nn_block<6>(g, ld, panel, kblocks, c, ldc, add);
        case 7:
            return nn_block<7>(g, ld, panel, kblocks, c, ldc, add);
        default:
            return;
    }
}

void nn(const NnSegment* segments, int count, int rows, int cblocks, float* c, std::size_t ldc) {
    alignas(64) bf16 panel[kNnBlocks * kBlockSize];
    bool add = false;
    for (int s = 0; s < count; ++s) {
        const NnSegment& seg = segments[s];
        for (int kb = 0; kb < seg.kblocks; kb += kNnBlocks, add = true) {
            const int blocks = seg.kblocks - kb < kNnBlocks ? seg.kblocks - kb : kNnBlocks;
            prefetch_gathered(seg, kb, blocks, cblocks);
            for (int cb = 0; cb < cblocks; ++cb) {
                const bool last = cb + 1 == cblocks;
                for (int i = 0; i < blocks; ++i) {
                    interleave_block(seg, kb + i, cb, panel + i * kBlockSize);
                    prefetch_block(seg, last ? kb + i + kNnBlocks : kb + i, last ? 0 : cb + 1);
                }
                float* out = c + cb * kBlock;
                const bf16* g = seg.rows + kb * kBlock;
                int r = 0;
                for (; r + 8 <= rows; r += 8)
                    nn_block<8>(g + r * seg.ld, seg.ld, panel, blocks, out + r * ldc, ldc, add);
                nn_rest(rows - r, g + r * seg.ld, seg.ld, panel, blocks, out + r * ldc, ldc, add);
            }
        }
    }
}

}  // namespace

const Kernels* avx512_bf16_kernels() {
    static const Kernels table{Isa::avx512_bf16, nothing, nothing, nt, few_rows, nt_few, nn, KTV_ELEMENTWISE};
    return &table;
}

}  // namespace ktv
