// Shared by the AVX-512 and the AMX kernels: 32 rows x 32 columns of W, two neighbouring rows interleaved, as
// [2 halves of 16 columns][16 row pairs][16 columns][2], which is the B operand of either (two tiles of 1 KB).

#ifdef KTV_STREAM
#error "include avx512_pack.inl before elementwise.inl"
#endif
#define KTV_STREAM(to, lanes) _mm512_stream_ps(to, (__m512)(lanes))
// Other threads' reads behind the region see what was streamed in it.
inline void wait_for_streams() {
    _mm_sfence();
}

// Asks for the line at p, in the first or second level of cache. As asm, for gcc takes a function that does nothing but
// prefetch for one without effect, and leaves out its calls.
template <int level>
[[gnu::always_inline]] inline void prefetch(const void* p) {
    if constexpr (level == 1) asm volatile("prefetcht0 %a0" ::"p"(p));
    else asm volatile("prefetcht1 %a0" ::"p"(p));
}

// Weights that will be read, the nearest first: null, or what a step of arithmetic should fetch of them. They come a
// few lines a step into the second-level cache; all at once, or into the first level, they would fill the miss buffers,
// and every load behind them would wait. A prefetch that finds the buffers full is dropped, so every line is asked for
// several times, from afar and from near: the more often, the less arithmetic there is to hide a miss.
template <int times>
struct Coming {
    const bf16* at[times] = {};
    explicit operator bool() const { return at[0]; }
    [[gnu::always_inline]] Coming operator+(std::size_t elements) const {
        Coming sum;
        for (int i = 0; i < times; ++i) sum.at[i] = at[i] + elements;
        return sum;
    }
};
template <int times>
[[gnu::always_inline]] inline void fetch(const Coming<times>& coming, int lines) {
    for (int line = 0; line < lines; ++line) {
        for (const bf16* from : coming.at) prefetch<2>(from + line * kBlock);
    }
}

// What comes `first` k-blocks after kb, and `step` further on each: as many blocks of each as there are in a chunk.
template <int times>
[[gnu::always_inline]] inline Coming<times> coming_after(const NtSegment& seg, int kb, int first, int step,
                                                         int blocks) {
    Coming<times> coming;
    for (int i = 0; i < times; ++i) coming.at[i] = seg.from(kb + first + i * step, blocks);
    return coming;
}

// Calls multiply(segment, kb, blocks, coming, add) for each segment's chunks of at most `most` k-blocks; add: not the
// first. What comes are `times` windows of a chunk's size: the next chunk, and the others `step` k-blocks further on
// each (at most a chunk), so that the windows of one chunk after the other pass over a line `times` times or nearly.
template <int times, typename Multiply>
inline void visit_chunks(const NtSegment* segments, int count, int most, int step, const Multiply& multiply) {
    bool add = false;
    for (int s = 0; s < count; ++s) {
        for (int kb = 0, blocks; kb < segments[s].kblocks; kb += blocks, add = true) {
            blocks = piece(segments[s].kblocks - kb, most);
            multiply(segments[s], kb, blocks,
                     coming_after<times>(segments[s], kb, blocks, std::min(step, blocks), blocks), add);
        }
    }
}

inline constexpr std::size_t kHalf = 16 * 32;  // elements of one half
inline constexpr int kNnBlocks = 8;            // k-blocks interleaved at a time, at most: 16 KB of panel stays in L1

// Two neighbouring rows of 32 columns, interleaved: the first 16 columns, and the others.
struct RowPair {
    __m512i lower, upper;
};

// A block of W that is yet to be interleaved; its rows lie one after the other, or anywhere.
template <bool gathered>
class RawBlock {
  public:
    // look_ahead: while gathered rows are read, fetch what the caller's next product reads of them, if that is known.
    RawBlock(const NnSegment& seg, int kb, int cb, bool look_ahead) {
        if constexpr (gathered) {
            rows_ = seg.gathered + kb * kBlock;
            column_ = seg.column + static_cast<std::size_t>(cb) * kBlock;
            if (look_ahead && seg.goes_on) ahead_ = kPanelBlocks * kBlock;
        } else {
            block_ = seg.weights + kb * seg.kblock_stride + cb * kBlockSize;
        }
    }
    // Interleaves a pair of rows, and leaves it in the block's place in a panel.
    [[gnu::always_inline]] RowPair interleave(int pair, bf16* panel) const {
        const __m512i lower = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38,
                                               6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
        const __m512i a = _mm512_loadu_si512(row(2 * pair)), b = _mm512_loadu_si512(row(2 * pair + 1));
        if (ahead_ > 0) {
            // As numbers: the next product may have fewer columns than a panel.
            for (int k = 2 * pair; k < 2 * pair + 2; ++k) {
                const auto next = reinterpret_cast<std::uintptr_t>(row(k)) + ahead_ * sizeof(bf16);
                prefetch<2>(reinterpret_cast<const void*>(next));
            }
        }
        const RowPair two{_mm512_permutex2var_epi16(a, lower, b), _mm512_permutex2var_epi16(a, upper, b)};
        _mm512_store_si512(panel + pair * 32, two.lower);
        _mm512_store_si512(panel + kHalf + pair * 32, two.upper);
        return two;
    }

  private:
    const bf16* row(int k) const { return gathered ? rows_[k] + column_ : block_ + k * kBlock; }

    const bf16* block_ = nullptr;
    const bf16* const* rows_ = nullptr;
    std::size_t column_ = 0, ahead_ = 0;
};

// The place of a panel: segment, k-block, column block.
struct Place {
    int s = 0, kb = 0, cb = 0;
};

inline bool same_weights(const NnSegment& a, const NnSegment& b) {
    return a.weights == b.weights && a.gathered == b.gathered && a.column == b.column && a.kblocks == b.kblocks &&
           a.idle_pairs == b.idle_pairs;
}

// How many segments from s on multiply the same W, as the high and the low half of an operand do.
inline int sharing(const NnSegment* segments, int count, int s) {
    int same = 1;
    while (s + same < count && same_weights(segments[s], segments[s + same])) ++same;
    return same;
}

// The place that nn visits after `at`, in panels of at most `depth` k-blocks: s is `count` at the end.
inline Place after(const NnSegment* segments, int count, int cblocks, int depth, Place at) {
    if (at.s == count) return at;
    const int kblocks = segments[at.s].kblocks;
    if (++at.cb < cblocks) return at;
    at.cb = 0;
    at.kb += piece(kblocks - at.kb, depth);
    if (at.kb < kblocks) return at;
    return {at.s + sharing(segments, count, at.s), 0, 0};
}

// The blocks of W at a place, down the column.
class Ahead {
  public:
    Ahead() = default;
    Ahead(const NnSegment* segments, int count, Place at) {
        if (at.s == count || !segments[at.s].weights) return;
        const NnSegment& seg = segments[at.s];
        block_ = seg.weights + at.kb * seg.kblock_stride + at.cb * kBlockSize;
        stride_ = seg.kblock_stride;
        count_ = seg.kblocks - at.kb;
    }
    // The i-th of them, or null.
    const bf16* at(int i) const { return i < count_ ? block_ + i * stride_ : nullptr; }

  private:
    const bf16* block_ = nullptr;
    std::size_t stride_ = 0;
    int count_ = 0;
};

// The panels that come next.
struct ComingPanels {
    static constexpr int most = 3;
    Ahead ahead[most];
    // What to fetch of the first `times` of them while the i-th block of the present one is multiplied; where there is
    // nothing more, `at_hand`, which costs little.
    template <int times>
    [[gnu::always_inline]] Coming<times> at(int i, const bf16* at_hand) const {
        static_assert(times <= most);
        Coming<times> coming;
        for (int t = 0; t < times; ++t) {
            const bf16* block = ahead[t].at(i);
            coming.at[t] = block ? block : at_hand;
        }
        return coming;
    }
};

// Gathered rows lie far apart, a few lines in each: no hardware prefetcher finds them, and one after the other they
// cost more than the product. All lines of `blocks` k-blocks are asked for at once.
inline void prefetch_gathered(const NnSegment& seg, int kb, int blocks, int cblocks) {
    if (seg.weights) return;
    for (int k = 0; k < blocks * kBlock; ++k) {
        const bf16* row = seg.gathered[kb * kBlock + k] + seg.column;
        for (int cb = 0; cb < cblocks; ++cb) prefetch<1>(row + cb * kBlock);
    }
}

// `count` blocks of column block cb, from k-block kb on, interleaved at `blocks`; or, as long as they are `raw`, to be
// interleaved there by whoever multiplies them first.
struct Panel {
    bf16* blocks;
    int kb, cb, count;
    int last_pairs;  // pairs of rows of the last block that count; 16 of the others
    bool raw;

    int pairs(int i) const { return i + 1 < count ? kBlock / 2 : last_pairs; }
};

// Visits the panels of W, of at most `depth` k-blocks, one after the other: calls multiply(segment, panel, coming, add)
// for each segment that has it.
template <typename Multiply>
inline void visit_panels(const NnSegment* segments, int count, int cblocks, int depth, const Multiply& multiply) {
    alignas(64) bf16 blocks[kNnBlocks * kBlockSize];
    const auto next = [&](Place at) { return after(segments, count, cblocks, depth, at); };
    for (Place at; at.s < count; at = next(at)) {
        const NnSegment& seg = segments[at.s];
        const int have = piece(seg.kblocks - at.kb, depth);
        const int last_pairs = kBlock / 2 - (at.kb + have == seg.kblocks ? seg.idle_pairs : 0);
        if (at.cb == 0) prefetch_gathered(seg, at.kb, have, cblocks);
        ComingPanels coming;
        Place then = at;
        for (Ahead& ahead : coming.ahead) {
            then = next(then);
            ahead = Ahead(segments, count, then);
        }
        bool add = at.s > 0 || at.kb > 0;
        const int same = sharing(segments, count, at.s);
        for (int i = 0; i < same; ++i, add = true) {
            multiply(segments[at.s + i], Panel{blocks, at.kb, at.cb, have, last_pairs, i == 0}, coming, add);
            coming = ComingPanels();  // once is enough
        }
    }
}
