// AVX2 with FMA: eight lanes; a shift widens bf16 to fp32.
// x86-64 flags: -mavx2 -mfma
#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.hpp"

namespace ktv {
namespace {

#define KTV_BYTE_SHUFFLES
#include "elementwise.inl"
#include "prefetch_schedule.inl"

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
    alignas(64) bf16 unpacked[chunk * kBlockSize];
    const int groups = (tokens + kGroup - 1) / kGroup;
    bool add = false;
    for (int s = 0; s < count; ++s) {
        const NtSegment& seg = segments[s];
        for (int kb = 0; kb < seg.kblocks; kb += chunk, add = true) {
            const int blocks = seg.kblocks - kb < chunk ? seg.kblocks - kb : chunk;
            const bf16* w = seg.chunk(kb, blocks, unpacked);
            for (int g = 0; g < groups; ++g) {
                const bf16* x = seg.tokens + g * seg.group_stride + kb * kPackSize;
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

// Few tokens. Lanes are k: even elements of half a row of a block, then the odd ones. The sums wait in the first-level
// cache from one chunk of k-blocks to the next; their eight lanes are added up after the last.
constexpr int few_rows = 8, few_chunk = 8;

// T tokens of a chunk as fp32: [k-block][half][even, odd][token][8].
template <int T>
KTV_INLINE void widen_tokens(const bf16* x, int kblocks, float* to) {
    for (int kb = 0; kb < kblocks; ++kb, x += T * kBlock) {
        for (int half = 0; half < kBlock; half += kBlock / 2, to += 2 * T * 8) {
            for (int t = 0; t < T; ++t) {
                const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + t * kBlock + half));
                _mm256_store_ps(to + t * 8, even(pairs));
                _mm256_store_ps(to + (T + t) * 8, odd(pairs));
            }
        }
    }
}

// N rows of W, or T tokens, stay in registers. The same rows of the next chunk are prefetched, at `later`.
template <int T, int N>
KTV_INLINE void dots_block(const bf16* w, const float* x, int kblocks, const bf16* later, float* sums, bool add) {
    __m256 sum[N][T];
    for (int n = 0; n < N; ++n) {
        for (int t = 0; t < T; ++t) sum[n][t] = add ? _mm256_load_ps(sums + (n * T + t) * 8) : _mm256_setzero_ps();
    }
    const auto multiply = [&](const auto& weight) __attribute__((always_inline)) {
        __m256 few[N < T ? N : T];
        if constexpr (N < T) {
            for (int n = 0; n < N; ++n) few[n] = weight(n);
            for (int t = 0; t < T; ++t) {
                const __m256 token = _mm256_load_ps(x + t * 8);
                for (int n = 0; n < N; ++n) sum[n][t] = _mm256_fmadd_ps(few[n], token, sum[n][t]);
            }
        } else {
            for (int t = 0; t < T; ++t) few[t] = _mm256_load_ps(x + t * 8);
            for (int n = 0; n < N; ++n) {
                const __m256 row = weight(n);
                for (int t = 0; t < T; ++t) sum[n][t] = _mm256_fmadd_ps(row, few[t], sum[n][t]);
            }
        }
        x += T * 8;
    };
    for (int kb = 0; kb < kblocks; ++kb, w += kBlockSize, later += kBlockSize) {
        for (int n = 0; n < N; ++n) prefetch<2>(later + n * kBlock);
        for (int half = 0; half < kBlock; half += kBlock / 2) {
            const auto pairs = [&](int n) {
                return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + n * kBlock + half));
            };
            multiply([&](int n) { return even(pairs(n)); });
            multiply([&](int n) { return odd(pairs(n)); });
        }
    }
    for (int n = 0; n < N; ++n) {
        for (int t = 0; t < T; ++t) _mm256_store_ps(sums + (n * T + t) * 8, sum[n][t]);
    }
}

// The sums of the lanes of eight registers, `stride` elements apart.
KTV_INLINE __m256 sums_of_lanes(const float* v, std::size_t stride) {
    const auto two = [&](int i) {
        return _mm256_hadd_ps(_mm256_load_ps(v + i * stride), _mm256_load_ps(v + (i + 1) * stride));
    };
    const __m256 a = _mm256_hadd_ps(two(0), two(2)), b = _mm256_hadd_ps(two(4), two(6));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

template <int T>
void nt_dots(const NtSegment* segments, int count, const bf16* next, float* c) {
    constexpr int chunk = few_chunk, N = T == 1 ? 8 : T == 2 ? 4 : T <= 6 ? 2 : 1;
    alignas(64) bf16 unpacked[chunk * kBlockSize];
    alignas(64) float x[chunk * T * kBlock], sums[kBlock * T * 8];  // sums [n][t][8 lanes]
    bool add = false;
    for (int s = 0; s < count; ++s, next = nullptr) {
        const NtSegment& seg = segments[s];
        for (int kb = 0, blocks; kb < seg.kblocks; kb += blocks, add = true) {
            blocks = even_chunk(seg.kblocks - kb, chunk);
            const bf16* w = seg.chunk(kb, blocks, unpacked);
            const bf16* later = seg.codes ? w : seg.from(kb + blocks, blocks, next);
            widen_tokens<T>(seg.tokens + kb * T * kBlock, blocks, x);
            for (int n = 0; n < kBlock; n += N)
                dots_block<T, N>(w + n * kBlock, x, blocks, later + n * kBlock, sums + n * T * 8, add);
        }
    }
    for (int t = 0; t < T; ++t) {
        for (int n = 0; n < kBlock; n += 8)
            _mm256_storeu_ps(c + t * kBlock + n, sums_of_lanes(sums + (n * T + t) * 8, T * 8));
    }
}

void nt_few(const NtSegment* segments, int count, int strips, int tokens, float* c) {
    constexpr decltype(&nt_dots<1>) dots[] = {nt_dots<1>, nt_dots<2>, nt_dots<3>, nt_dots<4>,
                                              nt_dots<5>, nt_dots<6>, nt_dots<7>, nt_dots<8>};
    static_assert(sizeof dots / sizeof *dots == few_rows);
    for (int s = 0; s < strips; ++s, c += tokens * kBlock)
        dots[tokens - 1](segments + s * count, count, following(segments, count, strips, s, 1), c);
}

// A row of 32 columns of W as fp32: even and odd columns of its first half, then of the other. Sums keep that order until
// the last k-block.
struct WideRow {
    __m256 part[4];
};
KTV_INLINE WideRow widen(const bf16* row) {
    const __m256i lower = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)),
                  upper = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + kBlock / 2));
    return {{even(lower), odd(lower), even(upper), odd(upper)}};
}
KTV_INLINE void natural_order(float* row) {
    for (int half = 0; half < kBlock; half += kBlock / 2) {
        const __m256 e = _mm256_loadu_ps(row + half), o = _mm256_loadu_ps(row + half + 8);
        const __m256 a = _mm256_unpacklo_ps(e, o), b = _mm256_unpackhi_ps(e, o);
        _mm256_storeu_ps(row + half, _mm256_permute2f128_ps(a, b, 0x20));
        _mm256_storeu_ps(row + half + 8, _mm256_permute2f128_ps(a, b, 0x31));
    }
}

// Lanes are columns: R rows of G by the first `pairs` pairs of rows of one block of 32 columns (four registers).
// row_of(k): the block's rows.
template <int R, typename RowOf>
KTV_INLINE void nn_block(const bf16* g, std::size_t ld, int pairs, const RowOf& row_of, float* c, bool add) {
    __m256 sum[R][4];
    for (int r = 0; r < R; ++r) {
        for (int q = 0; q < 4; ++q) sum[r][q] = add ? _mm256_loadu_ps(c + r * kBlock + q * 8) : _mm256_setzero_ps();
    }
    for (int pair = 0; pair < pairs; ++pair) {
        __m256i values[R];
        for (int r = 0; r < R; ++r) values[r] = broadcast_pair(g + r * ld + 2 * pair);
        for (int k = 0; k < 2; ++k) {
            const WideRow row = row_of(2 * pair + k);
            for (int r = 0; r < R; ++r) {
                const __m256 value = k == 0 ? even(values[r]) : odd(values[r]);
                for (int q = 0; q < 4; ++q) sum[r][q] = _mm256_fmadd_ps(value, row.part[q], sum[r][q]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int q = 0; q < 4; ++q) _mm256_storeu_ps(c + r * kBlock + q * 8, sum[r][q]);
    }
}

// Multiplies one block by all rows. More than two of them share what is widened of it.
template <typename RowOf>
KTV_INLINE void nn_rows(const bf16* g, std::size_t ld, int rows, int pairs, const RowOf& row_of, float* c, bool add) {
    if (rows == 1) return nn_block<1>(g, ld, pairs, row_of, c, add);
    if (rows == 2) return nn_block<2>(g, ld, pairs, row_of, c, add);
    alignas(64) float panel[kBlockSize];
    for (int k = 0; k < 2 * pairs; ++k) {
        const WideRow row = row_of(k);
        for (int q = 0; q < 4; ++q) _mm256_store_ps(panel + k * kBlock + q * 8, row.part[q]);
    }
    const auto wide = [&](int k) __attribute__((always_inline)) {
        WideRow row;
        for (int q = 0; q < 4; ++q) row.part[q] = _mm256_load_ps(panel + k * kBlock + q * 8);
        return row;
    };
    int r = 0;
    for (; r + 2 <= rows; r += 2) nn_block<2>(g + r * ld, ld, pairs, wide, c + r * kBlock, add);
    if (r < rows) nn_block<1>(g + r * ld, ld, pairs, wide, c + r * kBlock, add);
}

// nn: most rows that take four column blocks in turn; how many k-blocks ahead W is prefetched.
constexpr int nn_few = 32, nn_ahead = 2;

// A few rows take neighbouring column blocks in turn, because W is then read in longer pieces. With more rows, their
// results would leave the first-level cache between two k-blocks.
void nn(const NnSegment* segments, int count, int rows, int cblocks, float* c) {
    const int columns = rows <= nn_few ? kPanelBlocks : 1;
    const std::size_t stride = nn_stride(rows);
    alignas(64) bf16 unpacked[kPanelBlocks * kBlockSize];
    const auto block_of = [&](const NnSegment& seg, int kb, int cb) {
        return seg.weights + kb * seg.kblock_stride + cb * kBlockSize;
    };
    for (int first = 0; first < cblocks; first += columns) {
        const int some = cblocks - first < columns ? cblocks - first : columns;
        bool add = false;
        for (int s = 0; s < count; ++s) {
            const NnSegment& seg = segments[s];
            for (int kb = 0; kb < seg.kblocks; ++kb, add = true) {
                const int pairs = kBlock / 2 - (kb + 1 == seg.kblocks ? seg.idle_pairs : 0);
                const bf16* g = seg.rows + kb * kBlock;
                const PanelPosition then = position_after(segments, count, columns, nn_ahead, {s, kb, first});
                const NnSegment& later = segments[then.s];
                const bf16 *from = unpacked, *ahead = nullptr;
                if (seg.codes) {
                    const CodedBlocks& next = later.codes ? *later.codes : *seg.codes;
                    seg.codes->unpack({kb, seg.column_block + first}, some,
                                      next.prefetch_scales({then.kb, seg.column_block + then.cb}, some), unpacked);
                } else if (seg.weights) {
                    from = block_of(seg, kb, first);
                    ahead = from;
                    if (then.kb < later.kblocks && later.weights) {
                        if (then.cb + some <= cblocks) ahead = block_of(later, then.kb, then.cb);
                        else if (later.next) ahead = later.next + then.kb * later.kblock_stride;
                    }
                }
                for (int cb = first; cb < first + some; ++cb, from += kBlockSize) {
                    float* to = c + cb * stride;
                    if (ahead) {
                        const auto row_of = [&](int k) __attribute__((always_inline)) {
                            prefetch<2>(ahead + k * kBlock);
                            return widen(from + k * kBlock);
                        };
                        nn_rows(g, seg.ld, rows, pairs, row_of, to, add);
                        ahead += kBlockSize;
                    } else if (seg.codes) {
                        const auto row_of = [&](int k)
                                                __attribute__((always_inline)) { return widen(from + k * kBlock); };
                        nn_rows(g, seg.ld, rows, pairs, row_of, to, add);
                    } else {
                        const bf16* const* gathered = seg.gathered + kb * kBlock;
                        const std::size_t column = seg.column + cb * kBlock;
                        const auto row_of = [&](int k)
                                                __attribute__((always_inline)) { return widen(gathered[k] + column); };
                        nn_rows(g, seg.ld, rows, pairs, row_of, to, add);
                    }
                }
            }
        }
        for (int cb = first; cb < first + some; ++cb) {
            for (int r = 0; r < rows; ++r) natural_order(c + cb * stride + r * kBlock);
        }
    }
}

}  // namespace

extern const Kernels avx2_kernels;
const Kernels avx2_kernels{.enter = nothing,
                           .leave = nothing,
                           KTV_SMALL_CALLS,
                           .nt = nt,
                           .few_rows = few_rows,
                           .nt_few = nt_few,
                           .nn = nn,
                           KTV_ELEMENTWISE};

}  // namespace ktv
