// nn with tiles: rows of G natural (A) by panels of W, interleaved in the first-level cache (B). Two tiles of results
// are side by side in a row of an nn result: 16 rows by 32 columns are one piece of 2 KB.

constexpr tuning::Amx::Panels panels_for(int rows) {
    return rows <= kTune.few_rows ? kTune.few : kTune.many;
}

// Walks through the lines of W that are prefetched while one panel is multiplied: of each of `blocks` blocks, `stride`
// apart, the row pairs behind those that were prefetched while the panel was interleaved.
class PanelLines {
  public:
    // `pairs` row pairs at a time, `turns` times for each block.
    PanelLines(const bf16* block, std::size_t stride, int blocks, int first, int pairs, int turns)
        : at_(block + 2 * first * kBlock),
          step_(2 * pairs * kBlock),
          skip_(stride - turns * step_),
          turns_(turns),
          left_(turns),
          blocks_(blocks) {}
    KTV_INLINE const bf16* at() const { return at_; }
    // At the end it stays where it is, and lines that are cached already are prefetched again.
    KTV_INLINE void next() {
        if (blocks_ == 0) return;
        at_ += step_;
        if (--left_ > 0) return;
        left_ = turns_;
        if (--blocks_ > 0) at_ += skip_;
        else at_ -= step_;
    }

  private:
    const bf16* at_;
    std::size_t step_, skip_;
    int turns_, left_, blocks_;
};

// Walks through the next chunk of G, some lines at a time: `blocks` lines of each of its rows.
class RowLines {
  public:
    RowLines() = default;
    RowLines(const bf16* first, std::size_t ld, int rows, int blocks, int lines)
        : row_(first), ld_(ld), rows_(rows), blocks_(blocks), lines_(lines) {}
    KTV_INLINE const bf16* at() const { return row_ + line_ * kBlock; }
    KTV_INLINE void next() {
        line_ += lines_;
        if (line_ < blocks_) return;
        line_ = 0;
        if (rows_ > 1) row_ += ld_, --rows_;
    }

  private:
    const bf16* row_ = nullptr;
    std::size_t ld_ = 0;
    int rows_ = 0, blocks_ = 0, lines_ = 0, line_ = 0;
};

// Results that are still in tiles: of 16 rows, or of 32.
struct Unstored {
    float* c = nullptr;
    bool two = false;
};
constexpr std::size_t kNnRow = kBlock * sizeof(float);  // bytes from row to row of a result

// A pass over a panel: 16 M rows by 32 columns.
struct NnPass {
    const bf16* g;
    std::size_t ld;
    const bf16* panel;
    int blocks;
    float* c;
    bool add;
};

// The results of the pass before are stored between the first products of this one, where the stores cost nothing. With
// each k-block, 2 * pairs lines of W are prefetched, and row_lines of the next chunk of G, which then streams.
template <int M, int pairs, int row_lines>
KTV_PASS void nn_pass(const NnPass& pass, Unstored& before, PanelLines& ahead, RowLines& rows_ahead) {
    const std::size_t stride = pass.ld * sizeof(bf16);
    const bf16 *g = pass.g, *panel = pass.panel;
    const auto load_rows = [&](auto tile, const bf16* from) __attribute__((always_inline)) {
        if constexpr (row_lines > 0) tile_load_streaming<tile.value>(from, stride);
        else tile_load<tile.value>(from, stride);
    };
    const auto result = [&](auto tile, auto first) __attribute__((always_inline)) {
        constexpr std::size_t at = tile.value / 2 * 16 * kBlock + tile.value % 2 * 16;
        if constexpr (first.value) {
            if (before.c && (tile.value < 2 || before.two)) tile_store<tile.value>(before.c + at, kNnRow);
            if constexpr (tile.value < 2 * M) load_result<tile.value>(pass.c + at, kNnRow, pass.add);
        }
    };
    const auto prefetch_part = [&](auto quarter) __attribute__((always_inline)) {
        if constexpr (pairs > 0) prefetch_quarter<2 * pairs, quarter.value>(ahead.at());
        if constexpr (row_lines > 0) prefetch_quarter<row_lines, quarter.value>(rows_ahead.at());
    };
    const auto step = [&](auto first) __attribute__((always_inline)) {
        load_rows(Int<4>(), g);
        tile_load<6>(panel);
        result(Int<0>(), first);
        prefetch_part(Int<0>());
        tile_dot<0, 4, 6>();
        tile_load<7>(panel + kHalf);
        result(Int<1>(), first);
        prefetch_part(Int<1>());
        tile_dot<1, 4, 7>();
        if constexpr (M > 1) load_rows(Int<5>(), g + 16 * pass.ld);
        result(Int<2>(), first);
        prefetch_part(Int<2>());
        if constexpr (M > 1) tile_dot<2, 5, 6>();
        result(Int<3>(), first);
        prefetch_part(Int<3>());
        if constexpr (M > 1) tile_dot<3, 5, 7>();
        g += kBlock, panel += kBlockSize;
        if constexpr (pairs > 0) ahead.next();
        if constexpr (row_lines > 0) rows_ahead.next();
    };
    step(Int<1>());
    for (int kb = 1; kb < pass.blocks; ++kb) step(Int<0>());
    before = {pass.c, M > 1};
}

inline void store_unstored(const Unstored& last) {
    tile_store<0>(last.c, kNnRow);
    tile_store<1>(last.c + 16, kNnRow);
    if (!last.two) return;
    tile_store<2>(last.c + 16 * kBlock, kNnRow);
    tile_store<3>(last.c + 16 * kBlock + 16, kNnRow);
}

// How the 16 row pairs of a block that comes are shared: `before` are prefetched while the present panel is
// interleaved, then `each` in each of the first `passes` passes.
struct PanelShare {
    int before, each, passes;
};
constexpr PanelShare panel_share(int passes) {
    constexpr PanelShare shares[] = {{8, 8, 1}, {4, 6, 2}, {4, 4, 3}, {4, 3, 4}, {6, 2, 5}, {4, 2, 6}, {2, 2, 7}};
    return shares[std::min(passes, 7) - 1];
}

template <int row_lines>
auto nn_pass_with(bool two, int pairs) -> decltype(&nn_pass<1, 0, 0>) {
    switch (pairs) {
        case 8:
            return two ? nn_pass<2, 8, row_lines> : nn_pass<1, 8, row_lines>;
        case 6:
            return two ? nn_pass<2, 6, row_lines> : nn_pass<1, 6, row_lines>;
        case 4:
            return two ? nn_pass<2, 4, row_lines> : nn_pass<1, 4, row_lines>;
        case 3:
            return two ? nn_pass<2, 3, row_lines> : nn_pass<1, 3, row_lines>;
        case 2:
            return two ? nn_pass<2, 2, row_lines> : nn_pass<1, 2, row_lines>;
        default:
            return two ? nn_pass<2, 0, row_lines> : nn_pass<1, 0, row_lines>;
    }
}

// Interleaves the whole panel at once, because a tile load right behind the stores of its block would wait for them,
// and interleaving between the products of the panel before cost 5 to 15 %.
void interleave(const NnSegment& seg, const Panel& panel, const BlockColumn& ahead, int pairs) {
    for (int i = 0; i < panel.count; ++i) {
        const RawBlock<false> block(seg, panel.kb + i, panel.cb, false);
        bf16* to = panel.blocks + i * kBlockSize;
        const bf16* coming = ahead.at(i);
        for (int pair = 0; pair < kBlock / 2; ++pair) {
            block.interleave(pair, to);
            if (!coming || pair >= pairs) continue;
            prefetch<2>(coming + 2 * pair * kBlock);
            prefetch<2>(coming + (2 * pair + 1) * kBlock);
        }
    }
}
// The same of gathered rows. Meanwhile it prefetches those of the next chunk, or of the caller's next product: their
// lines are far apart and come from memory, and all at once at the beginning of a chunk they would be waited for.
void interleave_gathered(const NnSegment& seg, const Panel& panel, int cblocks) {
    const int next_kb = panel.kb + panel.count;
    const bool in_call = next_kb < seg.kblocks;
    const bf16* const* rows = seg.gathered + (in_call ? next_kb * kBlock : 0);
    const std::size_t column = seg.column + (panel.cb + (in_call ? 0 : cblocks)) * kBlock;
    const int coming = in_call ? seg.kblocks - next_kb : seg.goes_on ? seg.kblocks : 0;
    for (int i = 0; i < panel.count; ++i) {
        const RawBlock<true> block(seg, panel.kb + i, panel.cb, false);
        bf16* to = panel.blocks + i * kBlockSize;
        for (int pair = 0; pair < kBlock / 2; ++pair) {
            block.interleave(pair, to);
            if (i >= coming) continue;
            for (int k = 2 * pair; k < 2 * pair + 2; ++k) {
                // As integers, because the address may lie beyond the row: the next product may have fewer columns.
                const auto row = reinterpret_cast<std::uintptr_t>(rows[i * kBlock + k]);
                prefetch<2>(reinterpret_cast<const void*>(row + column * sizeof(bf16)));
            }
        }
    }
}

// Decodes and interleaves a whole panel of codes, and prefetches those at `ahead`.
void decode_panel(const NnSegment& seg, const Panel& panel, const CodesAhead& ahead, DecodeScratch& scratch) {
    decode_blocks<Bf16Kinds>({*seg.codes, {panel.kb, seg.column_block + panel.cb}, panel.count, true}, ahead, scratch,
                             [&](const auto* coded) {
                                 for (int i = 0; i < panel.count; ++i) {
                                     bf16* to = panel.blocks + i * kBlockSize;
                                     for (int pair = 0; pair < kBlock / 2; ++pair) {
                                         coded[i].prefetch_rows(2 * pair);
                                         coded[i].interleaved(2 * pair).store(to, pair);
                                     }
                                 }
                             });
}

void nn(const NnSegment* segments, int count, int rows, int cblocks, float* c) {
    constexpr int row_lines = kTune.many.row_lines;
    static_assert(kTune.few.row_lines == 0 && std::max(kTune.few.depth, kTune.many.depth) <= kNnBlocks &&
                  kTune.shared_depth <= kNnBlocks);
    const tuning::Amx::Panels tune = panels_for(rows);
    const PanelDepth depth{tune.depth, kTune.shared_depth};
    const std::size_t result = nn_stride(rows);
    const int passes = (rows + 31) / 32;
    const PanelShare share = panel_share(passes);
    const bool many = tune.row_lines > 0;
    alignas(64) bf16 blocks[kNnBlocks * kBlockSize];
    DecodeScratch scratch;
    Unstored before;
    const auto next = [&](PanelPosition at) { return next_position(segments, count, cblocks, depth, at); };
    // The panel that is prefetched: in this call, or the first ones of the worker's next.
    PanelPosition coming;
    int beyond = 0;  // panels of the next call that have been prefetched
    const auto advance = [&] {
        if (coming.s == count) ++beyond;
        else coming = next(coming);
    };
    for (int i = 0; i < tune.ahead; ++i) advance();
    for (PanelPosition at; at.s < count; at = next(at), advance()) {
        const NnSegment& seg = segments[at.s];
        const Panel panel{blocks, at.kb, at.cb, blocks_at(segments, count, depth, at), kBlock / 2, true};
        if (at.cb == 0 && at.kb == 0) prefetch_gathered(seg, 0, panel.count, cblocks);
        const BlockColumn ahead = coming.s < count ? BlockColumn(segments, count, coming)
                                                   : BlockColumn(segments[0], std::min(beyond, cblocks - 1));
        if (seg.codes) {
            decode_panel(seg, panel, single(next_codes_of_column(segments, count, cblocks, depth, at)), scratch);
        } else if (seg.weights) {
            interleave(seg, panel, ahead, share.before);
        } else {
            interleave_gathered(seg, panel, cblocks);
        }
        const int ahead_blocks = std::min(ahead.count(), panel.count);
        PanelLines lines(ahead_blocks > 0 ? ahead.at(0) : blocks, ahead.stride(), ahead_blocks, share.before,
                         share.each, share.passes);
        bool add = at.s > 0 || at.kb > 0;
        const int same = sharing_weights(segments, count, at.s);
        for (int i = 0; i < same; ++i, add = true) {
            const NnSegment& of = segments[at.s + i];
            const bf16* g = of.rows + at.kb * kBlock;
            // The column blocks of this chunk of G share the prefetches of the next chunk's rows.
            RowLines rows_ahead;
            if (many) {
                const bool ends = at.kb + panel.count == of.kblocks;
                const int next_kb = ends ? 0 : at.kb + panel.count;
                const int each = (rows + cblocks - 1) / cblocks, first = std::min(at.cb * each, rows - 1);
                rows_ahead = RowLines(of.rows + first * of.ld + next_kb * kBlock, of.ld, std::min(each, rows - first),
                                      blocks_at(segments, count, depth, {at.s, next_kb, 0}), row_lines);
            }
            for (int pass = 0; pass < passes; ++pass) {
                const int row = 32 * pass;
                const bool two = rows - row > 16;
                const int pairs = i == 0 && pass < share.passes && ahead_blocks > 0 ? share.each : 0;
                const auto run = many ? nn_pass_with<row_lines>(two, pairs) : nn_pass_with<0>(two, pairs);
                run({g + row * of.ld, of.ld, blocks, panel.count, c + at.cb * result + row * kBlock, add}, before,
                    lines, rows_ahead);
            }
        }
    }
    store_unstored(before);
}
