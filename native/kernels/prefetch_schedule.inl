// Which weights the AVX-512 and the AMX kernels prefetch, and when. docs/engine.md (Reading the weights) says why.

// Prefetches the line at p into the first or the second cache level. It is asm because gcc treats a function that only
// prefetches as one without effect, and removes calls to it.
template <int level>
[[gnu::always_inline]] inline void prefetch(const void* p) {
    if constexpr (level == 1) asm volatile("prefetcht0 %a0" ::"p"(p));
    else asm volatile("prefetcht1 %a0" ::"p"(p));
}

// Addresses in the weights that later steps read, the nearest first; null where there is nothing to prefetch.
template <int times>
struct Upcoming {
    const bf16* at[times] = {};
    explicit operator bool() const { return at[0]; }
    [[gnu::always_inline]] Upcoming operator+(std::size_t elements) const {
        Upcoming sum;
        for (int i = 0; i < times; ++i) sum.at[i] = at[i] + elements;
        return sum;
    }
};
template <int times>
[[gnu::always_inline]] inline void prefetch_lines(const Upcoming<times>& upcoming, int lines) {
    for (int line = 0; line < lines; ++line) {
        for (const bf16* from : upcoming.at) prefetch<2>(from + line * kBlock);
    }
}

// ---- nt: chunks of k-blocks

// The weights that follow those of strip s where a call multiplies its strips `at_once` at a time.
inline const bf16* following(const NtSegment* segments, int count, int strips, int s, int at_once) {
    return s + at_once < strips ? segments[(s + at_once) * count].weights : segments[s % at_once * count].next;
}

// The blocks `first` k-blocks after kb, and `step` further on each; `blocks` of them, as many as a chunk has.
template <int times>
[[gnu::always_inline]] inline Upcoming<times> upcoming_after(const NtSegment& seg, const bf16* next, int kb, int first,
                                                             int step, int blocks) {
    Upcoming<times> upcoming;
    for (int i = 0; i < times; ++i) upcoming.at[i] = seg.from(kb + first + i * step, blocks, next);
    return upcoming;
}

// Calls multiply(segment, kb, blocks, upcoming, add) for each segment's chunks of at most `most` k-blocks. add is false
// for the first chunk only. `upcoming` has `times` windows of a chunk's size: the next chunk, and the others `step`
// k-blocks further on each (at most a chunk), so that a line lies in the windows of about `times` chunks. `next` follows
// the weights of the first segment, which are the wide ones.
template <int times, typename Multiply>
inline void visit_chunks(const NtSegment* segments, int count, const bf16* next, int most, int step,
                         const Multiply& multiply) {
    bool add = false;
    for (int s = 0; s < count; ++s, next = nullptr) {
        for (int kb = 0, blocks; kb < segments[s].kblocks; kb += blocks, add = true) {
            blocks = even_chunk(segments[s].kblocks - kb, most);
            multiply(segments[s], kb, blocks,
                     upcoming_after<times>(segments[s], next, kb, blocks, std::min(step, blocks), blocks), add);
        }
    }
}

// ---- nn: panels

// The position of a panel: segment, k-block, column block.
struct PanelPosition {
    int s = 0, kb = 0, cb = 0;
};

// Where nn goes on `ahead` k-blocks after a position: down the columns, in the next segment of as many k-blocks, as up's
// after gate's, or `columns` columns further on.
inline PanelPosition position_after(const NnSegment* segments, int count, int columns, int ahead, PanelPosition at) {
    const int kblocks = segments[at.s].kblocks;
    at.kb += ahead;
    if (at.kb < kblocks) return at;
    at.kb -= kblocks;
    if (at.s + 1 < count && segments[at.s + 1].kblocks == kblocks) return {at.s + 1, at.kb, at.cb};
    return {0, at.kb, at.cb + columns};
}
inline bool same_weights(const NnSegment& a, const NnSegment& b) {
    return a.weights == b.weights && a.gathered == b.gathered && a.column == b.column && a.codes == b.codes &&
           a.kblocks == b.kblocks && a.idle_pairs == b.idle_pairs;
}

// How many segments from s on multiply the same W, as the high and the low half of an operand do.
inline int sharing_weights(const NnSegment* segments, int count, int s) {
    int same = 1;
    while (s + same < count && same_weights(segments[s], segments[s + same])) ++same;
    return same;
}

// Most k-blocks of a panel: of a W that one segment multiplies, and of one that several share. These add to a result in
// turn, panel by panel, so `shared` decides the order of a sum and is the same for every number of rows.
struct PanelDepth {
    int alone, shared;
};

// The k-blocks of the panel at a position.
inline int blocks_at(const NnSegment* segments, int count, PanelDepth depth, PanelPosition at) {
    const int most = sharing_weights(segments, count, at.s) > 1 ? depth.shared : depth.alone;
    return even_chunk(segments[at.s].kblocks - at.kb, most);
}

// The position that nn visits after `at`: s is `count` at the end.
inline PanelPosition next_position(const NnSegment* segments, int count, int cblocks, PanelDepth depth,
                                   PanelPosition at) {
    if (at.s == count) return at;
    if (++at.cb < cblocks) return at;
    at.cb = 0;
    at.kb += blocks_at(segments, count, depth, at);
    if (at.kb < segments[at.s].kblocks) return at;
    return {at.s + sharing_weights(segments, count, at.s), 0, 0};
}

// Where the codes of the panel begin that nn visits `cblocks` panels after the one at a position: further down the same
// column of blocks, in the next segment, or, behind the call's last, in the next call's columns. Prefetches their scales.
inline const std::uint8_t* next_codes_of_column(const NnSegment* segments, int count, int cblocks, PanelDepth depth,
                                                PanelPosition at) {
    const NnSegment* seg = &segments[at.s];
    int column = seg->column_block + at.cb;
    at.kb += blocks_at(segments, count, depth, at);
    if (at.kb >= seg->kblocks) {
        at.kb = 0;
        const bool goes_on = at.s + 1 < count && segments[at.s + 1].codes;
        at.s = goes_on ? at.s + 1 : 0;
        seg = &segments[at.s];
        if (!goes_on) column += cblocks;
    }
    const int rows = blocks_at(segments, count, depth, at);
    for (int i = 1; i < rows; ++i) seg->codes->prefetch_scales({at.kb + i, column}, 1);
    return seg->codes->prefetch_scales({at.kb, column}, 1);
}

// The blocks of W from a position on, down the column. None for gathered rows.
class BlockColumn {
  public:
    BlockColumn() = default;
    BlockColumn(const NnSegment* segments, int count, PanelPosition at) {
        if (at.s == count || !segments[at.s].weights) return;
        const NnSegment& seg = segments[at.s];
        block_ = seg.weights + at.kb * seg.kblock_stride + at.cb * kBlockSize;
        stride_ = seg.kblock_stride;
        count_ = seg.kblocks - at.kb;
    }
    // Column block cb of the weights that the next call multiplies.
    BlockColumn(const NnSegment& first, int cb) {
        if (!first.next) return;
        block_ = first.next + cb * kBlockSize;
        stride_ = first.kblock_stride;
        count_ = first.kblocks;
    }
    int count() const { return count_; }
    std::size_t stride() const { return stride_; }
    // The i-th of them, or null.
    const bf16* at(int i) const { return i < count_ ? block_ + i * stride_ : nullptr; }

  private:
    const bf16* block_ = nullptr;
    std::size_t stride_ = 0;
    int count_ = 0;
};

// The panels that nn visits next, the nearest first.
struct UpcomingPanels {
    static constexpr int most = 3;
    BlockColumn column[most];
    // What to prefetch of the first `times` panels while the i-th block of the present one is multiplied. Where they
    // have no block, it is `cached`, whose prefetch costs little.
    template <int times>
    [[gnu::always_inline]] Upcoming<times> at(int i, const bf16* cached) const {
        static_assert(times <= most);
        Upcoming<times> upcoming;
        for (int t = 0; t < times; ++t) {
            const bf16* block = column[t].at(i);
            upcoming.at[t] = block ? block : cached;
        }
        return upcoming;
    }
};

// Prefetches all lines of `blocks` k-blocks of gathered rows at once. The rows lie far apart, with a few lines in each:
// no hardware prefetcher finds them, and one load after the other would cost more than the product.
inline void prefetch_gathered(const NnSegment& seg, int kb, int blocks, int cblocks) {
    if (!seg.gathered) return;
    for (int k = 0; k < blocks * kBlock; ++k) {
        const bf16* row = seg.gathered[kb * kBlock + k] + seg.column;
        for (int cb = 0; cb < cblocks; ++cb) prefetch<1>(row + cb * kBlock);
    }
}
