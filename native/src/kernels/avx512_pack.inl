// Shared by the AVX-512 and the AMX kernels: 32 rows x 32 columns of W, two neighbouring rows interleaved, as
// [2 halves of 16 columns][16 row pairs][16 columns][2], which is the B operand of either (two tiles of 1 KB).

// The next of as few pieces as `left` takes, none above `most`, all alike: what is fetched during one is the next.
inline int piece(int left, int most) {
    const int pieces = (left + most - 1) / most;
    return (left + pieces - 1) / pieces;
}

// Calls multiply(segment, kb, blocks, add) for each segment's chunks of at most `most` k-blocks; add: not the first.
template <typename Multiply>
inline void visit_chunks(const NtSegment* segments, int count, int most, const Multiply& multiply) {
    bool add = false;
    for (int s = 0; s < count; ++s) {
        for (int kb = 0, blocks; kb < segments[s].kblocks; kb += blocks, add = true) {
            blocks = piece(segments[s].kblocks - kb, most);
            multiply(segments[s], kb, blocks, add);
        }
    }
}

inline constexpr std::size_t kHalf = 16 * 32;  // elements of one half
inline constexpr int kNnBlocks = 8;            // k-blocks interleaved at a time: 16 KB of panel stays in L1

inline void interleave(const bf16* const* row, bf16* panel) {
    const __m512i lower = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
    for (int pair = 0; pair < 16; ++pair) {
        const __m512i a = _mm512_loadu_si512(row[2 * pair]);
        const __m512i b = _mm512_loadu_si512(row[2 * pair + 1]);
        _mm512_store_si512(panel + pair * 32, _mm512_permutex2var_epi16(a, lower, b));
        _mm512_store_si512(panel + kHalf + pair * 32, _mm512_permutex2var_epi16(a, upper, b));
    }
}

inline void interleave_block(const NnSegment& seg, int kb, int cb, bf16* panel) {
    const bf16* row[32];
    if (seg.weights) {
        const bf16* block = seg.weights + kb * seg.kblock_stride + cb * kBlockSize;
        for (int k = 0; k < 32; ++k) row[k] = block + k * kBlock;
    } else {
        for (int k = 0; k < 32; ++k) row[k] = seg.gathered[kb * kBlock + k] + seg.column + cb * kBlock;
    }
    interleave(row, panel);
}

// The blocks of W from (kb, cb) on, down the column, which nn visits next. They are fetched line by line while the
// present ones are multiplied: all at once they would fill the miss buffers, and every load behind them would wait.
class Ahead {
  public:
    Ahead() = default;
    Ahead(const NnSegment& seg, int kb, int cb) {
        if (!seg.weights || kb >= seg.kblocks) return;
        block_ = seg.weights + kb * seg.kblock_stride + cb * kBlockSize;
        stride_ = seg.kblock_stride;
        count_ = seg.kblocks - kb;
    }
    // The i-th of them, or what costs nothing to fetch.
    const bf16* at(int i, const bf16* at_hand) const { return i < count_ ? block_ + i * stride_ : at_hand; }

  private:
    const bf16* block_ = nullptr;
    std::size_t stride_ = 0;
    int count_ = 0;
};

// What nn visits from (kb, cb) of segment s on, or behind its end.
inline Ahead after(const NnSegment* segments, int s, int count, int kb, int cb) {
    if (kb < segments[s].kblocks) return Ahead(segments[s], kb, cb);
    return s + 1 < count ? Ahead(segments[s + 1], 0, 0) : Ahead();
}

// Gathered rows lie far apart, a few lines in each: no hardware prefetcher finds them, and one after the other they
// cost more than the product. All lines of `blocks` k-blocks are asked for at once.
inline void prefetch_gathered(const NnSegment& seg, int kb, int blocks, int cblocks) {
    if (seg.weights) return;
    for (int k = 0; k < blocks * kBlock; ++k) {
        const bf16* row = seg.gathered[kb * kBlock + k] + seg.column;
        for (int cb = 0; cb < cblocks; ++cb)
            _mm_prefetch(reinterpret_cast<const char*>(row + cb * kBlock), _MM_HINT_T0);
    }
}

// One panel: `count` blocks of column block cb, from k-block kb on, interleaved.
struct Panel {
    const bf16* blocks;
    int kb, cb, count;
};

inline bool same_weights(const NnSegment& a, const NnSegment& b) {
    return a.weights == b.weights && a.gathered == b.gathered && a.column == b.column && a.kblocks == b.kblocks;
}

// Makes the panels of W one after the other, and calls multiply(segment, panel, ahead, add) for each segment that has
// it: one after the other they may share W, as the high and the low half of an operand do.
template <typename Multiply>
inline void visit_panels(const NnSegment* segments, int count, int cblocks, const Multiply& multiply) {
    alignas(64) bf16 blocks[kNnBlocks * kBlockSize];
    bool add = false;
    for (int s = 0, sharing; s < count; s += sharing) {
        const NnSegment& seg = segments[s];
        sharing = 1;
        while (s + sharing < count && same_weights(seg, segments[s + sharing])) ++sharing;
        for (int kb = 0, have; kb < seg.kblocks; kb += have, add = true) {
            have = piece(seg.kblocks - kb, kNnBlocks);
            prefetch_gathered(seg, kb, have, cblocks);
            for (int cb = 0; cb < cblocks; ++cb) {
                const bool last = cb + 1 == cblocks;
                for (int i = 0; i < have; ++i) interleave_block(seg, kb + i, cb, blocks + i * kBlockSize);
                Ahead ahead = after(segments, s + sharing - 1, count, last ? kb + have : kb, last ? 0 : cb + 1);
                for (int i = 0; i < sharing; ++i) {
                    multiply(segments[s + i], Panel{blocks, kb, cb, have}, ahead, add || i > 0);
                    ahead = Ahead();
                }
            }
        }
    }
}
