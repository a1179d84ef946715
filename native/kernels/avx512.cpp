// AVX-512 without bf16 instructions: 16 fp32 lanes; a shift or a mask widens bf16.
// x86-64 flags: -mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mprefer-vector-width=512
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.hpp"

namespace ktv {
namespace {

#include "avx512.inl"
#include "wide_rows.inl"

#include "decode.inl"

#include "decode_fp32.inl"

constexpr int row_floats = 2 * 16;  // of a row of a block as fp32: its even columns, then its odd ones

// ---- nt. Lanes are tokens. W's rows and the tokens of a chunk of k-blocks lie widened in the first-level cache.

constexpr int nt_chunk = 2, nt_groups = 3;

// N rows of W by G groups. w [row][nt_chunk k-blocks][even, odd][16], x [group][k-block][16 pairs][2][16 tokens]. Prefetches
// the same rows of the next chunk at `later`, if that is not null.
template <int N, int G>
KTV_INLINE void nt_block(const float* w, const float* x, int kblocks, const bf16* later, float* c, bool add) {
    __m512 sum[N][G];
    const auto at = [&](int n, int g) { return c + g * kResultSize + n * kGroup; };
    for (int n = 0; n < N; ++n) {
        for (int g = 0; g < G; ++g) sum[n][g] = add ? _mm512_loadu_ps(at(n, g)) : _mm512_setzero_ps();
    }
    for (int kb = 0; kb < kblocks; ++kb, w += row_floats, x += kPackSize) {
        for (int pair = 0; pair < kBlock / 2; ++pair) {
            if (later && pair < N) prefetch<2>(later + (kb * kBlock + pair) * kBlock);
            for (int o = 0; o < 2; ++o) {
                __m512 token[G];
                for (int g = 0; g < G; ++g)
                    token[g] = _mm512_load_ps(x + g * nt_chunk * kPackSize + (2 * pair + o) * kGroup);
                for (int n = 0; n < N; ++n) {
                    const __m512 weight = _mm512_set1_ps(w[n * nt_chunk * row_floats + o * 16 + pair]);
                    for (int g = 0; g < G; ++g) sum[n][g] = _mm512_fmadd_ps(weight, token[g], sum[n][g]);
                }
            }
        }
    }
    for (int n = 0; n < N; ++n) {
        for (int g = 0; g < G; ++g) _mm512_storeu_ps(at(n, g), sum[n][g]);
    }
}

// All 32 rows of W. later: the next chunk, or null.
template <int N, int G>
void nt_rows(const float* w, const float* x, int kblocks, const bf16* later, float* c, bool add) {
    for (int n = 0; n < kBlock; n += N) {
        nt_block<N, G>(w + n * nt_chunk * row_floats, x, kblocks, later ? later + n * kBlock : nullptr, c + n * kGroup,
                       add);
    }
}

void nt_strip(const NtSegment* segments, int count, int tokens, const bf16* next, float* c) {
    alignas(64) float w[kBlock * nt_chunk * row_floats], x[nt_groups * nt_chunk * kPackSize];
    DecodeScratch scratch;
    constexpr decltype(&nt_rows<8, 1>) run[nt_groups] = {nt_rows<16, 1>, nt_rows<8, 2>, nt_rows<8, 3>};
    const int groups = (tokens + kGroup - 1) / kGroup;
    bool add = false;
    for (int s = 0; s < count; ++s, next = nullptr) {
        const NtSegment& seg = segments[s];
        for (int kb = 0, blocks; kb < seg.kblocks; kb += blocks, add = true) {
            blocks = even_chunk(seg.kblocks - kb, nt_chunk);
            const auto widen_all = [&](const auto* all) {
                for (int i = 0; i < blocks; ++i)
                    widen_block(all[i], kBlock / 2, w + i * row_floats, nt_chunk * row_floats);
            };
            const bf16* later = nullptr;
            if (seg.codes) {
                const CodedRun run{*seg.codes, {seg.strip, kb}, blocks};
                decode_blocks<Fp32Kinds>(run, next_codes_of_row(run), scratch, widen_all);
            } else {
                PlainBlock all[nt_chunk];
                for (int i = 0; i < blocks; ++i) all[i] = {seg.weights + (kb + i) * kBlockSize, nullptr};
                widen_all(all);
                later = seg.from(kb + blocks, blocks, next);
            }
            for (int g = 0, at_once; g < groups; g += at_once, later = nullptr) {
                at_once = even_chunk(groups - g, nt_groups);
                for (int i = 0; i < at_once; ++i)
                    widen_pairs(seg.tokens + (g + i) * seg.group_stride + kb * kPackSize, blocks * kBlock / 2,
                                x + i * nt_chunk * kPackSize);
                run[at_once - 1](w, x, blocks, later, c + g * kResultSize, add);
            }
        }
    }
}

void nt(const NtSegment* segments, int count, int strips, int tokens, float* c) {
    const std::size_t result = (tokens + kGroup - 1) / kGroup * kResultSize;
    for (int s = 0; s < strips; ++s, c += result)
        nt_strip(segments + s * count, count, tokens, following(segments, count, strips, s, 1), c);
}

// ---- Few tokens. Lanes are k: even elements of a row of a block, then the odd ones. The sums wait in the first-level
// cache from one chunk of k-blocks to the next; their lanes are added up after the last.

constexpr int few_rows = kGroup, few_chunk = kAtOnce, few_at_once = 12;

// Rows n to n + N of some blocks by T of `tokens` tokens. x [k-block][even, odd][tokens][16], sums [n][tokens][16].
template <int T, int tokens, int N, typename Block>
KTV_INLINE void dots_block(const Block* blocks, int kblocks, int n, const float* x, float* sums, bool add) {
    __m512 sum[N][T];
    sums += n * tokens * 16;
    for (int i = 0; i < N; ++i) {
        for (int t = 0; t < T; ++t)
            sum[i][t] = add ? _mm512_load_ps(sums + (i * tokens + t) * 16) : _mm512_setzero_ps();
    }
    for (int kb = 0; kb < kblocks; ++kb, x += 2 * tokens * 16) {
        const Block block = blocks[kb];
#pragma GCC unroll 8
        for (int i = 0; i < N; i += 2) {
            block.prefetch_rows(n + i);
            const TwoRows w = block.rows(n + i);
            for (int o = 0; o < 2; ++o) {
                for (int t = 0; t < T; ++t) {
                    __m512 token = _mm512_load_ps(x + (o * tokens + t) * 16);
                    asm("" : "+v"(token));  // else gcc loads it for each row
                    sum[i][t] = _mm512_fmadd_ps(w.at[0][o], token, sum[i][t]);
                    sum[i + 1][t] = _mm512_fmadd_ps(w.at[1][o], token, sum[i + 1][t]);
                }
            }
        }
    }
    for (int i = 0; i < N; ++i) {
        for (int t = 0; t < T; ++t) _mm512_store_ps(sums + (i * tokens + t) * 16, sum[i][t]);
    }
}

// All rows of W by T tokens, or by the first half of them and then the other.
template <int T, typename Block>
[[gnu::noinline]] void dots_of_rows(const Block* blocks, int kblocks, const float* x, float* sums, bool add) {
    constexpr int first = T <= few_at_once ? T : T / 2, second = T - first;
    constexpr int N = T == 1 ? 8 : first <= 6 ? 4 : 2;
    for (int n = 0; n < kBlock; n += N) {
        dots_block<first, T, N>(blocks, kblocks, n, x, sums, add);
        if constexpr (second > 0) dots_block<second, T, N>(blocks, kblocks, n, x + first * 16, sums + first * 16, add);
    }
}

template <int T>
void nt_dots(const NtSegment* segments, int count, const bf16* next, float* c) {
    DecodeScratch scratch;
    alignas(64) float x[few_chunk * T * kBlock], sums[kBlock * T * 16];
    bool add = false;
    for (int s = 0; s < count; ++s, next = nullptr) {
        const NtSegment& seg = segments[s];
        for (int kb = 0, some; kb < seg.kblocks; kb += some, add = true) {
            some = even_chunk(seg.kblocks - kb, few_chunk);
            for (int b = 0; b < some; ++b) widen_tokens<T>(seg.tokens + (kb + b) * T * kBlock, x + b * T * kBlock);
            if (seg.codes) {
                const CodedRun run{*seg.codes, {seg.strip, kb}, some};
                decode_blocks<Fp32Kinds>(run, next_codes_of_row(run), scratch,
                                         [&](const auto* blocks) { dots_of_rows<T>(blocks, some, x, sums, add); });
            } else {
                const bf16 *w = seg.weights + kb * kBlockSize, *later = seg.from(kb + some, some, next);
                PlainBlock blocks[few_chunk];
                for (int b = 0; b < some; ++b) blocks[b] = {w + b * kBlockSize, later + b * kBlockSize};
                dots_of_rows<T>(blocks, some, x, sums, add);
            }
        }
    }
    add_lanes<T>(sums, c);
}

template <int... less_one>
constexpr auto dots_of(std::integer_sequence<int, less_one...>) {
    return std::array{nt_dots<less_one + 1>...};
}
void nt_few(const NtSegment* segments, int count, int strips, int tokens, float* c) {
    constexpr auto dots = dots_of(std::make_integer_sequence<int, few_rows>());
    for (int s = 0; s < strips; ++s, c += tokens * kBlock)
        dots[tokens - 1](segments + s * count, count, following(segments, count, strips, s, 1), c);
}

// ---- nn. Lanes are columns, even and odd ones of a block apart until the last k-block.

// nn_at_once: rows of a register block; up to so many take single k-blocks, and W is prefetched nn_ahead k-blocks ahead.
// More take nn_depth k-blocks, which beyond nn_direct rows are widened once for all.
constexpr int nn_at_once = 12, nn_ahead = 2, nn_depth = 4, nn_direct = 48;

// R rows of G by some k-blocks, the last of which has `last_pairs` pairs of rows. g: fp32, [row][ld], a k-block as its even
// and its odd elements. Prefetches with the pairs in `turns`.
template <int R, typename Block>
KTV_INLINE void nn_block(const Block* blocks, int kblocks, int last_pairs, const float* g, std::size_t ld,
                         std::uint32_t turns, float* c, bool add) {
    __m512 sum[R][2];
    for (int r = 0; r < R; ++r) {
        for (int o = 0; o < 2; ++o) sum[r][o] = add ? _mm512_loadu_ps(c + r * kBlock + o * 16) : _mm512_setzero_ps();
    }
    for (int kb = 0; kb < kblocks; ++kb, g += row_floats) {
        const Block block = blocks[kb];
        const int pairs = kb + 1 < kblocks ? kBlock / 2 : last_pairs;
        for (int pair = 0; pair < pairs; ++pair) {
            if (turns >> pair & 1) block.prefetch_rows(2 * pair);
            const TwoRows w = block.rows(2 * pair);
            for (int k = 0; k < 2; ++k) {
                for (int r = 0; r < R; ++r) {
                    const __m512 value = _mm512_set1_ps(g[r * ld + k * 16 + pair]);
                    for (int o = 0; o < 2; ++o) sum[r][o] = _mm512_fmadd_ps(value, w.at[k][o], sum[r][o]);
                }
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int o = 0; o < 2; ++o) _mm512_storeu_ps(c + r * kBlock + o * 16, sum[r][o]);
    }
}

template <int R, typename Block>
KTV_INLINE void nn_rows(int rows, const Block* blocks, int kblocks, int last_pairs, const float* g, std::size_t ld,
                        std::uint32_t turns, float* c, bool add) {
    if constexpr (R < nn_at_once) {
        if (rows > R) return nn_rows<R + 1>(rows, blocks, kblocks, last_pairs, g, ld, turns, c, add);
    }
    nn_block<R>(blocks, kblocks, last_pairs, g, ld, turns, c, add);
}

// All rows. Each pass prefetches its share.
template <typename Block>
[[gnu::noinline]] void nn_blocks(int rows, const Block* blocks, int kblocks, int last_pairs, const float* g,
                                 std::size_t ld, float* c, bool add) {
    const int some = even_chunk(rows, nn_at_once), passes = (rows + some - 1) / some;
    for (int pass = 0; pass < passes; ++pass) {
        const int first = pass * some;
        std::uint32_t turns = passes == 1 ? ~0u : 0;
        for (int pair = pass; passes > 1 && pair < kBlock / 2; pair += passes) turns |= 1u << pair;
        nn_rows<1>(std::min(rows - first, some), blocks, kblocks, last_pairs, g + first * ld, ld, turns,
                   c + first * kBlock, add);
    }
}

KTV_INLINE void natural_order(float* row) {
    const __m512i lower = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                  upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
    const __m512 e = _mm512_loadu_ps(row), o = _mm512_loadu_ps(row + 16);
    _mm512_storeu_ps(row, _mm512_permutex2var_ps(e, lower, o));
    _mm512_storeu_ps(row + 16, _mm512_permutex2var_ps(e, upper, o));
}

// The block `ahead` k-blocks after a position, or `none` where W has none.
inline const bf16* later_block(const NnSegment* segments, int count, int cblocks, int ahead, PanelPosition at,
                               const bf16* none) {
    const PanelPosition then = position_after(segments, count, kPanelBlocks, ahead, at);
    const NnSegment& seg = segments[then.s];
    if (then.kb >= seg.kblocks || !seg.weights) return none;
    const bool here = then.cb < cblocks;
    const bf16* from = here ? seg.weights : seg.next;
    const int cb = here ? then.cb : at.cb % kPanelBlocks;
    return from ? from + then.kb * seg.kblock_stride + cb * kBlockSize : none;
}

// What a call of nn has between two products.
struct NnScratch {
    DecodeScratch decoded;
    alignas(64) float g[kMostRows * nn_depth * row_floats], panel[nn_depth * kBlock * row_floats];
};

// `some` k-blocks of one segment from kb on, widened to `scratch.g`, by the column blocks first to last.
void nn_columns(const NnSegment* segments, int count, int rows, int cblocks, PanelPosition at, int some, int last,
                NnScratch& scratch, float* c, bool add) {
    const NnSegment& seg = segments[at.s];
    const int last_pairs = kBlock / 2 - (at.kb + some == seg.kblocks ? seg.idle_pairs : 0);
    const std::size_t ld = some * row_floats, stride = nn_stride(rows);
    const bool few = rows <= nn_at_once;
    if (seg.codes && few) {
        const PanelPosition then = position_after(segments, count, kPanelBlocks, nn_ahead, at);
        const CodedBlocks& next = segments[then.s].codes ? *segments[then.s].codes : *seg.codes;
        const CodesAhead ahead = single(next.prefetch_scales({then.kb, seg.column_block + then.cb}, last - at.cb));
        decode_blocks<Fp32Kinds>({*seg.codes, {at.kb, seg.column_block + at.cb}, last - at.cb}, ahead, scratch.decoded,
                                 [&](const auto* blocks) {
                                     for (int cb = at.cb; cb < last; ++cb)
                                         nn_blocks(rows, blocks + cb - at.cb, 1, last_pairs, scratch.g, ld,
                                                   c + cb * stride, add);
                                 });
        return;
    }
    for (int cb = at.cb; cb < last; ++cb) {
        PlainBlock plain[nn_depth];
        PanelBlock wide[nn_depth];
        for (int b = 0; b < some; ++b) {
            const int pairs = b + 1 < some ? kBlock / 2 : last_pairs;
            float* panel = scratch.panel + b * kBlock * row_floats;
            const auto widen_to_panel = [&](const auto& from) { widen_block(from, pairs, panel, row_floats); };
            wide[b] = {panel, scratch.decoded.unpacked};
            if (seg.codes) {
                const CodesAhead ahead =
                    single(seg.codes->prefetch_scales({at.kb + some + b, seg.column_block + cb}, 1));
                decode_blocks<Fp32Kinds>({*seg.codes, {at.kb + b, seg.column_block + cb}, 1}, ahead, scratch.decoded,
                                         [&](const auto* blocks) { widen_to_panel(*blocks); });
            } else if (!seg.weights) {
                widen_to_panel(GatheredBlock{seg.gathered + (at.kb + b) * kBlock, seg.column + cb * kBlock});
            } else {
                const bf16* block = seg.weights + (at.kb + b) * seg.kblock_stride + cb * kBlockSize;
                wide[b].later =
                    later_block(segments, count, cblocks, few ? nn_ahead : some, {at.s, at.kb + b, cb}, block);
                plain[b] = {block, wide[b].later};
                if (rows > nn_direct) widen_to_panel(plain[b]);
            }
        }
        float* to = c + cb * stride;
        if (seg.weights && rows <= nn_direct) nn_blocks(rows, plain, some, last_pairs, scratch.g, ld, to, add);
        else nn_blocks(rows, wide, some, last_pairs, scratch.g, ld, to, add);
    }
}

// Neighbouring column blocks in turn, because W is then read in longer pieces.
void nn(const NnSegment* segments, int count, int rows, int cblocks, float* c) {
    NnScratch scratch;
    for (int first = 0; first < cblocks; first += kPanelBlocks) {
        const int last = std::min(cblocks, first + kPanelBlocks);
        bool add = false;
        for (int s = 0; s < count; ++s) {
            const NnSegment& seg = segments[s];
            const bool single = rows <= nn_at_once && (seg.weights || seg.codes);
            for (int kb = 0, some; kb < seg.kblocks; kb += some, add = true) {
                some = single ? 1 : even_chunk(seg.kblocks - kb, nn_depth);
                for (int r = 0; r < rows; ++r) {
                    for (int b = 0; b < some; ++b)
                        widen_tokens<1>(seg.rows + r * seg.ld + (kb + b) * kBlock,
                                        scratch.g + (r * some + b) * row_floats);
                }
                nn_columns(segments, count, rows, cblocks, {s, kb, first}, some, last, scratch, c, add);
            }
        }
        for (int cb = first; cb < last; ++cb) {
            for (int r = 0; r < rows; ++r) natural_order(c + cb * nn_stride(rows) + r * kBlock);
        }
    }
}

}  // namespace

extern const Kernels avx512_kernels;
const Kernels avx512_kernels{.enter = nothing,
                             .leave = wait_for_streams,
                             KTV_SMALL_CALLS,
                             .nt = nt,
                             .few_rows = few_rows,
                             .nt_few = nt_few,
                             .nn = nn,
                             KTV_ELEMENTWISE};

}  // namespace ktv
