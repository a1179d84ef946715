// AVX-512 with vdpbf16ps: 16 fp32 lanes, two products in each lane with one instruction.
// x86-64 flags: -mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx512bf16 -mfma -mprefer-vector-width=512
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.hpp"
#include "tuning.hpp"

namespace ktv {
namespace {

#include "avx512.inl"

#include "decode.inl"

#include "decode_bf16.inl"

KTV_INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
// One k-pair to all lanes.
KTV_INLINE __m512i broadcast_pair(const bf16* p) {
    std::int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
}

// The same by one instruction that gcc cannot split: for two uses in different widths it would generate a scalar load and
// two moves between register files.
KTV_INLINE __m512i broadcast_pair_once(const bf16* p) {
    using Pair = std::int32_t __attribute__((may_alias, aligned(alignof(bf16))));
    __m512i all;
    asm("vpbroadcastd %1, %0" : "=v"(all) : "m"(*reinterpret_cast<const Pair*>(p)));
    return all;
}

// The first eight lanes, without an instruction. (_mm512_castsi512_si256 makes gcc 12 warn about its own header.)
KTV_INLINE __m256i lower_half(__m512i v) {
    using Lanes = std::int32_t __attribute__((vector_size(64)));
    return (__m256i)__builtin_shufflevector((Lanes)v, (Lanes)v, 0, 1, 2, 3, 4, 5, 6, 7);
}

constexpr int few_rows = 11;  // dot products along k for so many tokens
static_assert(few_rows <= kGroup, "few tokens lie in one group");

#include "avx512_bf16_codes.inl"

// The products other than those of few tokens are compiled once: their counts are the same on all processors.
constexpr tuning::Avx512 kTune = tuning::kAvx512;
using NtUpcoming = Upcoming<kTune.nt.times>;

// Lanes are tokens. A register block is N rows of W by G groups, with `half` by eight more tokens. A k-pair of W is
// broadcast, a k-pair of the tokens is loaded. It needs at most N * (G + half) + G + half + 1 of the 32 registers.
// c [group][..][16]: kResultSize elements a group.
template <int N, int G, bool half>
KTV_INLINE void nt_block(const bf16* w, const bf16* x, std::size_t group_stride, int kblocks, NtUpcoming upcoming,
                         float* c, bool add) {
    __m512 sum[N][G + 1];
    __m256 rest[N];
    const auto at = [&](int n, int g) { return c + g * kResultSize + n * kGroup; };
    for (int n = 0; n < N; ++n) {
        for (int g = 0; g < G; ++g) sum[n][g] = add ? _mm512_loadu_ps(at(n, g)) : _mm512_setzero_ps();
        if constexpr (half) rest[n] = add ? _mm256_loadu_ps(at(n, G)) : _mm256_setzero_ps();
    }
    for (int kb = 0; kb < kblocks; ++kb, w += kBlockSize, x += kPackSize) {
        for (int pair = 0; pair < kBlock / 2; ++pair) {
            if (upcoming && pair < N) prefetch_lines(upcoming + (kb * kBlock + pair) * kBlock, 1);
            const bf16* two = x + pair * 2 * kGroup;
            __m512i token[G + 1];
            for (int g = 0; g < G; ++g) token[g] = _mm512_loadu_si512(two + g * group_stride);
            const __m256i few =
                half ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(two + G * group_stride)) : __m256i{};
            for (int n = 0; n < N; ++n) {
                const bf16* two_k = w + n * kBlock + 2 * pair;
                const __m512i weight = half ? broadcast_pair_once(two_k) : broadcast_pair(two_k);
                for (int g = 0; g < G; ++g) sum[n][g] = dot(sum[n][g], weight, token[g]);
                if constexpr (half) rest[n] = _mm256_dpbf16_ps(rest[n], (__m256bh)lower_half(weight), (__m256bh)few);
            }
        }
    }
    for (int n = 0; n < N; ++n) {
        for (int g = 0; g < G; ++g) _mm512_storeu_ps(at(n, g), sum[n][g]);
        if constexpr (half) _mm256_storeu_ps(at(n, G), rest[n]);
    }
}

template <int N, int G, bool half>
void nt_rows(const bf16* w, const bf16* x, std::size_t group_stride, int kblocks, NtUpcoming upcoming, float* c,
             bool add) {
    for (int n = 0; n < kBlock; n += N) {
        nt_block<N, G, half>(w + n * kBlock, x, group_stride, kblocks, upcoming ? upcoming + n * kBlock : upcoming,
                             c + n * kGroup, add);
    }
}

// Calls multiply(segment, w, kb, blocks, upcoming, add) for the chunks of a strip; codes are decoded to `decoded` before.
template <typename Multiply>
void visit_decoded(const NtSegment* segments, int count, const bf16* next, const Multiply& multiply) {
    alignas(64) bf16 decoded[kAtOnce * kBlockSize];
    DecodeScratch scratch;
    bool add = false;
    for (; count > 0 && segments->codes; ++segments, --count) {
        const NtSegment& seg = *segments;
        for (int kb = 0, some; kb < seg.kblocks; kb += some, add = true) {
            some = even_chunk(seg.kblocks - kb, std::min(kTune.nt.chunk, kAtOnce));
            const CodedRun run{*seg.codes, {seg.strip, kb}, some};
            decode_blocks<Bf16Kinds>(run, next_codes_of_row(run), scratch,
                                     [&](const auto* blocks) { store_blocks(blocks, some, decoded); });
            multiply(seg, decoded, kb, some, NtUpcoming(), add);
        }
    }
    visit_chunks<kTune.nt.times>(segments, count, next, kTune.nt.chunk, kTune.nt.step,
                                 [&](const NtSegment& seg, int kb, int some, NtUpcoming upcoming, bool more) {
                                     multiply(seg, seg.weights + kb * kBlockSize, kb, some, upcoming, add || more);
                                 });
}

// k is split into chunks, so that W's 32 rows stay in the first-level cache while all groups are multiplied by them: W is
// read from memory once.
void nt(const NtSegment* segments, int count, int strips, int tokens, float* c) {
    // [groups at once][with half a group]: as many rows of W as the registers allow
    constexpr decltype(&nt_rows<16, 1, false>) run[5][2] = {{nullptr, nt_rows<16, 0, true>},
                                                            {nt_rows<16, 1, false>, nt_rows<8, 1, true>},
                                                            {nt_rows<8, 2, false>, nt_rows<8, 2, true>},
                                                            {nt_rows<8, 3, false>, nt_rows<4, 3, true>},
                                                            {nt_rows<4, 4, false>, nt_rows<4, 4, true>}};
    const int rest = tokens % kGroup, groups = tokens / kGroup + (rest > kGroup / 2);
    const bool half = rest > 0 && rest <= kGroup / 2;
    const auto multiply = [&](const NtSegment& seg, const bf16* w, int kb, int blocks, NtUpcoming upcoming, bool add) {
        for (int g = 0, at_once;; g += at_once) {
            const int left = groups - g;
            at_once = left >= 6 ? 4 : left == 5 ? 3 : left;
            const bool last = at_once == left;
            run[at_once][last && half](w, seg.tokens + g * seg.group_stride + kb * kPackSize, seg.group_stride, blocks,
                                       g == 0 ? upcoming : NtUpcoming(), c + g * kResultSize, add);
            if (last) break;
        }
    };
    for (int s = 0; s < strips; ++s, c += (tokens + kGroup - 1) / kGroup * kResultSize)
        visit_decoded(segments + s * count, count, following(segments, count, strips, s, 1), multiply);
}

// Few tokens. Lanes are k: one load of W serves every token, because the time of such a product is that of reading W
// once. W is read in its order in memory, because pieces of 256 bytes far apart leave the memory idle half of the time.
// So the sums of two or more tokens, which do not all fit the registers, wait in the first-level cache from one chunk of
// k-blocks to the next. The sixteen lanes of a sum are added up after the last k-block.

// T tokens on one class of processors.
template <int T, tuning::Avx512 tune>
struct Few {
    static constexpr int block = T <= 6 ? 4 : 2;  // rows of W in a register block
    static constexpr tuning::Stream stream = T <= 4 ? tune.few_to_four : tune.few;
};

// One k-block of N rows of W. The upcoming lines are prefetched one by one between the products, because in a burst they
// would find the miss buffers full. Up to two rows stay in registers, with more rows the tokens do.
template <int T, int N, typename Ahead>
KTV_INLINE void dots(__m512 (&sum)[N][T], const bf16* w, const bf16* x, const Ahead& upcoming) {
    const auto row = [&](int n) {
        prefetch_lines(upcoming + n * kBlock, 1);
        return _mm512_loadu_si512(w + n * kBlock);
    };
    if constexpr (N <= 2) {
        __m512i weight[N];
        for (int n = 0; n < N; ++n) weight[n] = row(n);
        for (int t = 0; t < T; ++t) {
            const __m512i token = _mm512_loadu_si512(x + t * kBlock);
            for (int n = 0; n < N; ++n) sum[n][t] = dot(sum[n][t], weight[n], token);
        }
    } else {
        __m512i token[T];
        for (int t = 0; t < T; ++t) token[t] = _mm512_loadu_si512(x + t * kBlock);
        for (int n = 0; n < N; ++n) {
            const __m512i weight = row(n);
            for (int t = 0; t < T; ++t) sum[n][t] = dot(sum[n][t], weight, token[t]);
        }
    }
}

template <int T, int N, typename Ahead>
KTV_INLINE void dots_block(const bf16* w, const bf16* x, int kblocks, const Ahead& upcoming, float* sums, bool add) {
    __m512 sum[N][T];
    for (int n = 0; n < N; ++n) {
        for (int t = 0; t < T; ++t) sum[n][t] = add ? _mm512_load_ps(sums + (n * T + t) * 16) : _mm512_setzero_ps();
    }
    for (int kb = 0; kb < kblocks; ++kb)
        dots(sum, w + kb * kBlockSize, x + kb * T * kBlock, upcoming + kb * N * kBlock);
    for (int n = 0; n < N; ++n) {
        for (int t = 0; t < T; ++t) _mm512_store_ps(sums + (n * T + t) * 16, sum[n][t]);
    }
}

template <int T, tuning::Avx512 tune>
void sum_chunks(const NtSegment* segments, int count, const bf16* next, float* sums) {
    using Counts = Few<T, tune>;
    bool begun = false;
    for (; count > 0 && segments->codes; ++segments, --count, begun = true) sum_codes(*segments, T, sums, begun);
    if (begun && count == 0) return;
    if constexpr (T > 1) {
        constexpr int N = Counts::block;
        const auto multiply = [&](const NtSegment& seg, int kb, int blocks, const auto& upcoming, bool add) {
            const bf16 *w = seg.weights + kb * kBlockSize, *x = seg.tokens + kb * T * kBlock;
            for (int n = 0; n < kBlock; n += N)
                dots_block<T, N>(w + n * kBlock, x, blocks, upcoming + n * blocks * kBlock, sums + n * T * 16,
                                 begun || add);
        };
        visit_chunks<Counts::stream.times>(segments, count, next, Counts::stream.chunk, Counts::stream.step, multiply);
    } else {
        // One token: all rows at once for all of k, which is nearest to a plain reading of W. The compiler keeps some of
        // the 32 sums in memory; that costs less than chunks.
        constexpr int step = Counts::stream.step;
        __m512 sum[kBlock][1];
        for (int n = 0; n < kBlock; ++n) sum[n][0] = begun ? _mm512_load_ps(sums + n * 16) : _mm512_setzero_ps();
        for (const NtSegment* seg = segments; seg != segments + count; ++seg, next = nullptr) {
            for (int kb = 0; kb < seg->kblocks; ++kb) {
                dots(sum, seg->weights + kb * kBlockSize, seg->tokens + kb * kBlock,
                     upcoming_after<Counts::stream.times>(*seg, next, kb, step, step, 1));
            }
        }
        for (int n = 0; n < kBlock; ++n) _mm512_store_ps(sums + n * 16, sum[n][0]);
    }
}

template <int T, tuning::Avx512 tune>
void nt_dots(const NtSegment* segments, int count, const bf16* next, float* c) {
    alignas(64) float sums[kBlock * T * 16];  // [n][t][16 lanes]
    // The segments after the first are short, and no product before them prefetches them: 4 % of one token's forward.
    for (int i = 1; i < count; ++i) {
        const int lines = segments[i].codes ? 0 : segments[i].kblocks * kBlock;
        for (int line = 0; line < lines; ++line) prefetch<2>(segments[i].weights + line * kBlock);
    }
    sum_chunks<T, tune>(segments, count, next, sums);
    add_lanes<T>(sums, c);
}

template <tuning::Avx512 tune>
void nt_few(const NtSegment* segments, int count, int strips, int tokens, float* c) {
    constexpr decltype(&nt_dots<1, tune>) dots[] = {
        nt_dots<1, tune>, nt_dots<2, tune>, nt_dots<3, tune>, nt_dots<4, tune>,  nt_dots<5, tune>, nt_dots<6, tune>,
        nt_dots<7, tune>, nt_dots<8, tune>, nt_dots<9, tune>, nt_dots<10, tune>, nt_dots<11, tune>};
    static_assert(sizeof dots / sizeof *dots == few_rows);
    for (int s = 0; s < strips; ++s, c += tokens * kBlock)
        dots[tokens - 1](segments + s * count, count, following(segments, count, strips, s, 1), c);
}

// Where the blocks of a panel come from: either they are interleaved already, or they are interleaved while the first rows
// are multiplied, which hides that work behind the memory and spreads the prefetches over more arithmetic. Both are
// always_inline, because gcc would call some of them for each pair of rows and pass the pair through memory.
struct Interleaved {
    static constexpr int least = 1;           // rows
    static constexpr bool prefetches = true;  // what comes after them
    const bf16* blocks;
    KTV_INLINE auto block(int kb) const {
        return [at = blocks + kb * kBlockSize](int pair) __attribute__((always_inline)) {
            return RowPair{_mm512_load_si512(at + pair * 32), _mm512_load_si512(at + kHalf + pair * 32)};
        };
    }
};
template <bool gathered>
struct Interleaving {
    static constexpr int least = 1;
    static constexpr bool prefetches = true;
    const NnSegment& segment;
    const Panel& panel;
    KTV_INLINE auto block(int kb) const {
        return [raw = RawBlock<gathered>(segment, panel.kb + kb, panel.cb, true), to = panel.blocks + kb * kBlockSize](
                   int pair) __attribute__((always_inline)) { return raw.interleave(pair, to); };
    }
};

// Codes, one block below the other. keep: further rows multiply what is interleaved.
template <typename Block, bool keep>
struct Decoding {
    static constexpr int least = nn_code_rows + 1;  // nn_codes multiplies fewer
    static constexpr bool prefetches = false;       // each block does
    const Block* blocks;
    bf16* panel;
    KTV_INLINE auto block(int kb) const {
        return [block = blocks[kb], to = panel + kb * kBlockSize](int pair) __attribute__((always_inline)) {
            block.prefetch_rows(2 * pair);
            const RowPair two = block.interleaved(2 * pair);
            if constexpr (keep) two.store(to, pair);
            return two;
        };
    }
};

// Lanes are columns. A register block is R rows of G by one block of 32 columns.
template <int R, typename Blocks>
KTV_INLINE void nn_block(const bf16* g, std::size_t ld, Blocks blocks, const Panel& panel, UpcomingPanels upcoming,
                         float* c, bool add) {
    constexpr int times = R <= 2 ? kTune.nn_few_times : kTune.nn_times;
    __m512 sum[R][2];
    for (int r = 0; r < R; ++r) {
        for (int half = 0; half < 2; ++half)
            sum[r][half] = add ? _mm512_loadu_ps(c + r * kBlock + half * 16) : _mm512_setzero_ps();
    }
    for (int kb = 0; kb < panel.count; ++kb, g += kBlock) {
        const auto now = upcoming.at<times>(kb, panel.blocks);
        const auto rows_of = blocks.block(kb);
        for (int pair = 0, pairs = panel.pairs(kb); pair < pairs; ++pair) {
            if constexpr (Blocks::prefetches) prefetch_lines(now + 2 * pair * kBlock, 2);
            const RowPair two = rows_of(pair);
            for (int r = 0; r < R; ++r) {
                const __m512i value = broadcast_pair(g + r * ld + 2 * pair);
                sum[r][0] = dot(sum[r][0], value, two.lower);
                sum[r][1] = dot(sum[r][1], value, two.upper);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int half = 0; half < 2; ++half) _mm512_storeu_ps(c + r * kBlock + half * 16, sum[r][half]);
    }
}

template <int R, typename Blocks>
void nn_rows(int rows, const bf16* g, std::size_t ld, Blocks blocks, const Panel& panel, UpcomingPanels upcoming,
             float* c, bool add) {
    if (rows == R) return nn_block<R>(g, ld, blocks, panel, upcoming, c, add);
    if constexpr (R > Blocks::least) nn_rows<R - 1>(rows, g, ld, blocks, panel, upcoming, c, add);
}

void nn(const NnSegment* segments, int count, int rows, int cblocks, float* c) {
    const int coded = rows <= nn_code_rows ? nn_codes(segments, count, rows, cblocks, c) : 0;
    if (coded == count) return;
    segments += coded, count -= coded;
    const std::size_t stride = nn_stride(rows);
    constexpr int most = 12;
    // With few rows, reading W takes longer than the arithmetic: small panels shorten the time between two prefetches of
    // a line.
    const PanelDepth depth{rows <= kTune.nn_few ? kTune.nn_depth / 2 : kTune.nn_depth, kTune.nn_depth};
    DecodeScratch scratch;
    visit_panels(segments, count, cblocks, depth, coded > 0,
                 [&](const NnSegment& seg, const Panel& panel, UpcomingPanels upcoming, bool add) {
                     const int some = even_chunk(rows, most);
                     for (int r = 0; r < rows; r += some) {
                         const auto run = [&](auto blocks) {
                             nn_rows<most>(std::min(rows - r, some), seg.rows + panel.kb * kBlock + r * seg.ld, seg.ld,
                                           blocks, panel, upcoming, c + panel.cb * stride + r * kBlock, add);
                         };
                         if (r > 0 || !panel.raw) run(Interleaved{panel.blocks});
                         else if (seg.weights) run(Interleaving<false>{seg, panel});
                         else if (seg.gathered) run(Interleaving<true>{seg, panel});
                         else {
                             const PanelPosition at{static_cast<int>(&seg - segments), panel.kb, panel.cb};
                             decode_blocks<Bf16Kinds>(
                                 {*seg.codes, {panel.kb, seg.column_block + panel.cb}, panel.count, true},
                                 single(next_codes_of_column(segments, count, cblocks, depth, at)), scratch,
                                 [&](const auto* blocks) {
                                     using Block = std::remove_cvref_t<decltype(*blocks)>;
                                     if (some < rows) run(Decoding<Block, true>{blocks, panel.blocks});
                                     else run(Decoding<Block, false>{blocks, panel.blocks});
                                 });
                         }
                         upcoming = UpcomingPanels();  // the first rows have prefetched them
                     }
                 });
}

template <tuning::Avx512 tune>
constexpr Kernels kernels_of() {
    return {.enter = nothing,
            .leave = wait_for_streams,
            KTV_SMALL_CALLS,
            .nt = nt,
            .few_rows = few_rows,
            .nt_few = nt_few<tune>,
            .nn = nn,
            KTV_ELEMENTWISE};
}

}  // namespace

extern const Kernels avx512_bf16_kernels, avx512_bf16_kernels_intel;
const Kernels avx512_bf16_kernels = kernels_of<tuning::kAvx512>(),
              avx512_bf16_kernels_intel = kernels_of<tuning::kAvx512Intel>();

}  // namespace ktv
