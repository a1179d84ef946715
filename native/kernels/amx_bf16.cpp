// AMX tiles: tdpbf16ps multiplies 16 x 32 by 32 x 16 bf16 into 16 x 16 fp32.
//
// Tiles: 0-3 are a 2 x 2 block of results, 4-5 the A operands, 6-7 the B operands. Tile instructions are asm with memory
// clobbers, because gcc's intrinsics do not declare what they read and write.
// x86-64 flags: -mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx512bf16 -mfma -mprefer-vector-width=512
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernels.hpp"

namespace ktv {
namespace {

#include "avx512.inl"

struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

void enter() {
    static constexpr TileConfig config;
    asm volatile("ldtilecfg %0" ::"m"(config));
}
// Back to the initial state: oneDNN in the same thread loads its own configuration, and the OS has less state to save.
void leave() {
    wait_for_streams();
    asm volatile("tilerelease" ::: "memory");
}

template <int T>
KTV_INLINE void tile_load(const void* p, std::size_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
KTV_INLINE void tile_store(void* p, std::size_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
KTV_INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int C, int A, int B>
KTV_INLINE void tile_dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// The results of up to 2 x 2 tiles, from or to c: tile (i, j) at row 16 i, column 16 j.
template <int M, int N>
KTV_INLINE void load_results(float* c, std::size_t ldc, bool add) {
    const std::size_t stride = ldc * sizeof(float);
    if (add) {
        tile_load<0>(c, stride);
        if constexpr (N > 1) tile_load<1>(c + 16, stride);
        if constexpr (M > 1) tile_load<2>(c + 16 * ldc, stride);
        if constexpr (M > 1 && N > 1) tile_load<3>(c + 16 * ldc + 16, stride);
    } else {
        tile_zero<0>();
        if constexpr (N > 1) tile_zero<1>();
        if constexpr (M > 1) tile_zero<2>();
        if constexpr (M > 1 && N > 1) tile_zero<3>();
    }
}
template <int M, int N>
KTV_INLINE void store_results(float* c, std::size_t ldc) {
    const std::size_t stride = ldc * sizeof(float);
    tile_store<0>(c, stride);
    if constexpr (N > 1) tile_store<1>(c + 16, stride);
    if constexpr (M > 1) tile_store<2>(c + 16 * ldc, stride);
    if constexpr (M > 1 && N > 1) tile_store<3>(c + 16 * ldc + 16, stride);
}

template <int M, int N>
KTV_INLINE void multiply() {
    tile_dot<0, 4, 6>();
    if constexpr (N > 1) tile_dot<1, 4, 7>();
    if constexpr (M > 1) tile_dot<2, 5, 6>();
    if constexpr (M > 1 && N > 1) tile_dot<3, 5, 7>();
}

// The part of each upcoming block that one of several passes over W's blocks prefetches: its share of the block's 32
// lines, so that the memory is as busy in the last pass as in the first. Arithmetic with tiles is short compared with
// reading and hides few misses, so every line is prefetched often.
struct PrefetchShare {
    int pass, lines;  // lines of a quarter
    static int lines_of(int passes) { return (kBlock / 4 + passes - 1) / passes; }
    // A quarter of the share, between two tile loads.
    template <int times>
    KTV_INLINE void prefetch_quarter(const Upcoming<times>& block, int quarter) const {
        prefetch_lines(block + std::min((4 * pass + quarter) * lines, kBlock - lines) * kBlock, lines);
    }
};
constexpr int nt_times = 6, nn_times = UpcomingPanels::most;  // prefetches of a line
constexpr int nt_chunk = 16;                                  // k-blocks in a chunk
constexpr int nt_step = 8;                                    // k-blocks between two prefetches of a line

// 32 rows of W (A, natural) by G groups of tokens (B, packed).
template <int G>
void nt_block(const bf16* w, const bf16* x, std::size_t group_stride, int kblocks, const Upcoming<nt_times>& upcoming,
              PrefetchShare share, float* c, std::size_t ldc, bool add) {
    load_results<2, G>(c, ldc, add);
    for (int kb = 0; kb < kblocks; ++kb, w += kBlockSize, x += kPackSize) {
        const Upcoming<nt_times> now = upcoming + kb * kBlockSize;
        share.prefetch_quarter(now, 0);
        tile_load<4>(w, 64);
        share.prefetch_quarter(now, 1);
        tile_load<6>(x, 64);
        if constexpr (G > 1) tile_load<7>(x + group_stride, 64);
        share.prefetch_quarter(now, 2);
        tile_load<5>(w + 16 * kBlock, 64);
        share.prefetch_quarter(now, 3);
        multiply<2, G>();
    }
    store_results<2, G>(c, ldc);
}

// k is split into chunks, so that W's 32 rows stay in the cache while all groups are multiplied by them: W is read from
// memory once.
void nt(const NtSegment* segments, int count, int rows, float* c, std::size_t ldc) {
    const int groups = (rows + kGroup - 1) / kGroup, lines = PrefetchShare::lines_of((groups + 1) / 2);
    const auto multiply = [&](const NtSegment& seg, int kb, int blocks, const Upcoming<nt_times>& upcoming, bool add) {
        const bf16* w = seg.weights + kb * kBlockSize;
        const bf16* x = seg.tokens + kb * kPackSize;
        for (int g = 0; g < groups; g += 2) {
            const auto block = groups - g > 1 ? nt_block<2> : nt_block<1>;
            block(w, x + g * seg.group_stride, seg.group_stride, blocks, upcoming, {g / 2, lines}, c + g * kGroup, ldc,
                  add);
        }
    };
    visit_chunks<nt_times>(segments, count, nt_chunk, nt_step, multiply);
}

// 16 M rows of G (A, natural) by 32 columns of W (B, interleaved in the first-level cache).
template <int M>
void nn_block(const bf16* g, std::size_t ld, const bf16* panel, int kblocks, const UpcomingPanels& upcoming,
              PrefetchShare share, float* c, std::size_t ldc, bool add) {
    load_results<M, 2>(c, ldc, add);
    const std::size_t stride = ld * sizeof(bf16);
    for (int kb = 0; kb < kblocks; ++kb, panel += kBlockSize, g += kBlock) {
        const auto now = upcoming.at<nn_times>(kb, panel);
        share.prefetch_quarter(now, 0);
        tile_load<4>(g, stride);
        share.prefetch_quarter(now, 1);
        tile_load<6>(panel, 64);
        share.prefetch_quarter(now, 2);
        tile_load<7>(panel + kHalf, 64);
        share.prefetch_quarter(now, 3);
        if constexpr (M > 1) tile_load<5>(g + 16 * ld, stride);
        multiply<M, 2>();
    }
    store_results<M, 2>(c, ldc);
}

// Interleaves the whole panel first, because a tile load right behind the stores of its block would wait for them.
template <bool gathered>
void interleave(const NnSegment& seg, const Panel& panel, const UpcomingPanels& upcoming, PrefetchShare share) {
    for (int i = 0; i < panel.count; ++i) {
        const RawBlock<gathered> block(seg, panel.kb + i, panel.cb, false);
        bf16* to = panel.blocks + i * kBlockSize;
        const auto now = upcoming.at<nn_times>(i, to);
        for (int quarter = 0; quarter < 4; ++quarter) {
            share.prefetch_quarter(now, quarter);
            for (int pair = 4 * quarter; pair < 4 * quarter + 4; ++pair) block.interleave(pair, to);
        }
    }
}

void nn(const NnSegment* segments, int count, int rows, int cblocks, float* c, std::size_t ldc) {
    // Small panels shorten the time between two prefetches of a line. With many rows, they would load and store the
    // results too often.
    const int depth = rows <= 128 ? kNnBlocks / 2 : kNnBlocks;
    // Interleaving counts as one pass.
    const int lines = PrefetchShare::lines_of(1 + (rows + 31) / 32);
    visit_panels(segments, count, cblocks, depth,
                 [&](const NnSegment& seg, const Panel& panel, const UpcomingPanels& upcoming, bool add) {
                     if (panel.raw)
                         (seg.weights ? interleave<false> : interleave<true>)(seg, panel, upcoming, {0, lines});
                     const bf16* g = seg.rows + panel.kb * kBlock;
                     for (int r = 0; r < rows; r += 32) {
                         const auto block = rows - r > 16 ? nn_block<2> : nn_block<1>;
                         block(g + r * seg.ld, seg.ld, panel.blocks, panel.count, upcoming, {1 + r / 32, lines},
                               c + r * ldc + panel.cb * kBlock, ldc, add);
                     }
                 });
}

}  // namespace

extern const Kernels amx_bf16_kernels;
const Kernels amx_bf16_kernels{
    .enter = enter, .leave = leave, .nt = nt, .few_rows = 0, .nt_few = nullptr, .nn = nn, KTV_ELEMENTWISE};

}  // namespace ktv
