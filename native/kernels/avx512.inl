// What the AVX-512 and the AMX kernels share. Include it inside an unnamed namespace, instead of elementwise.inl.

#define KTV_STREAM(to, lanes) _mm512_stream_ps(to, (lanes).part[0])
// Makes streamed data visible to other threads that read it after the parallel region.
inline void wait_for_streams() {
    _mm_sfence();
}

#define KTV_BYTE_SHUFFLES
#include "elementwise.inl"
#include "prefetch_schedule.inl"

// The end of nt_few: adds up the sixteen lanes of each sum, [n][token][16 lanes] -> a few result of T tokens.
template <int T>
KTV_INLINE void add_lanes(const float* sums, float* c) {
    for (int t = 0; t < T; ++t) {
        for (int half = 0; half < kBlock; half += 16) {
            F lanes[16];
            load_transposed(sums + (half * T + t) * 16, T * 16, lanes);
            for (int width = 8; width > 0; width /= 2) {
                for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
            }
            store(c + t * kBlock + half, lanes[0]);
        }
    }
}

// Panels: blocks of W in the layout of the B operand of nn. A block of 32 rows x 32 columns becomes [2 halves of 16
// columns][16 row pairs][16 columns][2], two neighbouring rows interleaved; for AMX that is two tiles of 1 KB.

inline constexpr std::size_t kHalf = 16 * 32;  // elements of one half
inline constexpr int kNnBlocks = 8;            // most k-blocks of a panel: 16 KB, which stays in the first-level cache

// Two neighbouring rows of 32 columns, interleaved: the first 16 columns, and the others.
struct RowPair {
    __m512i lower, upper;
    // To its place in a block of a panel.
    KTV_INLINE void store(bf16* block, int pair) const {
        _mm512_store_si512(block + pair * 32, lower);
        _mm512_store_si512(block + kHalf + pair * 32, upper);
    }
};
KTV_INLINE RowPair interleave_rows(__m512i first, __m512i second) {
    const __m512i lower = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
    return {_mm512_permutex2var_epi16(first, lower, second), _mm512_permutex2var_epi16(first, upper, second)};
}

// A block of W before it is interleaved; its rows are contiguous or gathered.
template <bool gathered>
class RawBlock {
  public:
    // look_ahead: with each gathered row, also prefetch what the caller's next product reads of it, if that is known.
    RawBlock(const NnSegment& seg, int kb, int cb, bool look_ahead) {
        if constexpr (gathered) {
            rows_ = seg.gathered + kb * kBlock;
            column_ = seg.column + static_cast<std::size_t>(cb) * kBlock;
            if (look_ahead && seg.goes_on) ahead_ = kPanelBlocks * kBlock;
        } else {
            block_ = seg.weights + kb * seg.kblock_stride + cb * kBlockSize;
        }
    }
    // Interleaves a pair of rows and stores it at the block's place in a panel.
    [[gnu::always_inline]] RowPair interleave(int pair, bf16* panel) const {
        if (ahead_ > 0) {
            // As integers, because the address may lie beyond the row: the next product may have fewer columns.
            for (int k = 2 * pair; k < 2 * pair + 2; ++k) {
                const auto next = reinterpret_cast<std::uintptr_t>(row(k)) + ahead_ * sizeof(bf16);
                prefetch<2>(reinterpret_cast<const void*>(next));
            }
        }
        const RowPair two = interleave_rows(_mm512_loadu_si512(row(2 * pair)), _mm512_loadu_si512(row(2 * pair + 1)));
        two.store(panel, pair);
        return two;
    }

  private:
    const bf16* row(int k) const { return gathered ? rows_[k] + column_ : block_ + k * kBlock; }

    const bf16* block_ = nullptr;
    const bf16* const* rows_ = nullptr;
    std::size_t column_ = 0, ahead_ = 0;
};

// `count` blocks of column block cb, from k-block kb on, interleaved at `blocks`. While `raw`, the first caller that
// multiplies them interleaves them.
struct Panel {
    bf16* blocks;
    int kb, cb, count;
    int last_pairs;  // row pairs of the last block that are not padding; 16 of the others
    bool raw;

    int pairs(int i) const { return i + 1 < count ? kBlock / 2 : last_pairs; }
};

// Visits the panels of W one after the other: calls multiply(segment, panel, upcoming, add)
// for each segment that multiplies that W. add is false for the first k-blocks of a column block, if nothing has been
// added before.
template <typename Multiply>
inline void visit_panels(const NnSegment* segments, int count, int cblocks, PanelDepth depth, bool added,
                         const Multiply& multiply) {
    alignas(64) bf16 blocks[kNnBlocks * kBlockSize];
    const auto next = [&](PanelPosition at) { return next_position(segments, count, cblocks, depth, at); };
    for (PanelPosition at; at.s < count; at = next(at)) {
        const NnSegment& seg = segments[at.s];
        const int have = blocks_at(segments, count, depth, at);
        const int last_pairs = kBlock / 2 - (at.kb + have == seg.kblocks ? seg.idle_pairs : 0);
        if (at.cb == 0) prefetch_gathered(seg, at.kb, have, cblocks);
        UpcomingPanels upcoming;
        PanelPosition then = at;
        for (BlockColumn& column : upcoming.column) {
            then = next(then);
            column = BlockColumn(segments, count, then);
        }
        bool add = added || at.s > 0 || at.kb > 0;
        const int same = sharing_weights(segments, count, at.s);
        for (int i = 0; i < same; ++i, add = true) {
            multiply(segments[at.s + i], Panel{blocks, at.kb, at.cb, have, last_pairs, i == 0}, upcoming, add);
            upcoming = UpcomingPanels();  // the first segment has prefetched them
        }
    }
}
