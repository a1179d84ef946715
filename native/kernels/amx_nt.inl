// nt with tiles: W natural (A) by packed tokens (B). A tile of results is 16 rows of W by a group: 1 KB, half of what a
// strip has for a group (kResultSize). k is split into chunks, so that W is read from memory once for all groups.

constexpr std::size_t kTile = 16 * 16;       // elements of a tile of results
constexpr std::size_t kHalfBlock = 16 * 32;  // of 16 rows of a weight block
constexpr std::size_t kTileRow = 64;         // bytes from row to row of each tile here

// Calls multiply(segment, kb, blocks, add) for the chunks of a strip's segments, of at most `most` k-blocks, of codes at
// most kAtOnce. All strips of a call have the same chunks.
template <typename Multiply>
inline void visit_tile_chunks(const NtSegment* segments, int count, int most, const Multiply& multiply) {
    bool add = false;
    for (int s = 0; s < count; ++s) {
        const int of_segment = segments[s].codes ? std::min(most, kAtOnce) : most;
        for (int kb = 0, blocks; kb < segments[s].kblocks; kb += blocks, add = true) {
            blocks = even_chunk(segments[s].kblocks - kb, of_segment);
            multiply(s, kb, blocks, add);
        }
    }
}

// How many strips of a matrix of codes a call has: its next call goes on so many further.
inline int strips_of_codes(const NtSegment* segments, int count, int strips) {
    int same = 0;
    for (int strip = 0; strip < strips; ++strip) same += segments[strip * count].codes == segments->codes;
    return same;
}

// A chunk of a segment's weights as bf16, and the weights that the products prefetch. Of codes, the chunk is decoded to `to`;
// that prefetches the next codes, so the products prefetch nothing: `ahead` is null.
struct TileChunk {
    const bf16 *weights, *ahead;
    TileChunk(const NtSegment& seg, int kb, int blocks, const bf16* next, int next_strip, bf16* to,
              DecodeScratch& scratch) {
        if (!seg.codes) {
            weights = seg.weights + kb * kBlockSize;
            ahead = seg.from(kb + blocks, blocks, next);
            return;
        }
        const CodedRun run{*seg.codes, {seg.strip, kb}, blocks};
        const CodesAhead coming = kb + blocks < seg.kblocks
                                      ? next_codes_of_row(run)
                                      : single(seg.codes->prefetch_scales({seg.strip + next_strip, 0}, blocks));
        decode_blocks<Bf16Kinds>(run, coming, scratch, [&](const auto* coded) { store_blocks(coded, blocks, to); });
        weights = to;
        ahead = nullptr;
    }
};
constexpr std::size_t kDecodedChunk = kAtOnce * kBlockSize;  // elements of a chunk of codes

// What pass `pass` prefetches of a chunk that comes: the lines from here on, `lines` for each of its `blocks` k-blocks.
// In one piece, because pieces of some lines far apart leave the memory idle.
inline const bf16* share_of(const bf16* chunk, int blocks, int lines, int pass) {
    return chunk + std::min(pass * lines, kBlock - lines) * blocks * kBlock;
}

// One group: 4 x 1 tiles, the 64 rows of two strips with the same tokens. Each tile of x serves four products.
template <int lines>
KTV_PASS void two_strips(const bf16* w0, const bf16* w1, const bf16* x, int blocks, const bf16* ahead0,
                         const bf16* ahead1, float* c0, float* c1, bool add) {
    load_result<0>(c0, kTileRow, add);
    load_result<1>(c0 + kTile, kTileRow, add);
    load_result<2>(c1, kTileRow, add);
    load_result<3>(c1 + kTile, kTileRow, add);
    for (int kb = 0; kb < blocks; ++kb) {
        tile_load<6>(x);
        tile_load<4>(w0);
        prefetch_quarter<lines, 0>(ahead0);
        prefetch_quarter<lines, 1>(ahead0);
        tile_load<5>(w0 + kHalfBlock);
        prefetch_quarter<lines, 2>(ahead0);
        prefetch_quarter<lines, 3>(ahead0);
        tile_dot<0, 4, 6>();
        tile_dot<1, 5, 6>();
        tile_load<4>(w1);
        prefetch_quarter<lines, 0>(ahead1);
        prefetch_quarter<lines, 1>(ahead1);
        tile_load<5>(w1 + kHalfBlock);
        prefetch_quarter<lines, 2>(ahead1);
        prefetch_quarter<lines, 3>(ahead1);
        tile_dot<2, 4, 6>();
        tile_dot<3, 5, 6>();
        w0 += kBlockSize, w1 += kBlockSize, x += kPackSize, ahead0 += lines * kBlock, ahead1 += lines * kBlock;
    }
    tile_store<0>(c0);
    tile_store<1>(c0 + kTile);
    tile_store<2>(c1);
    tile_store<3>(c1 + kTile);
}

// One strip by one or two groups: 2 x 1 or 2 x 2 tiles.
template <int G, int lines>
KTV_PASS void one_strip_pass(const bf16* w, const bf16* x, std::size_t group_stride, int blocks, const bf16* ahead,
                             float* c, bool add) {
    load_result<0>(c, kTileRow, add);
    if constexpr (G > 1) load_result<1>(c + kResultSize, kTileRow, add);
    load_result<2>(c + kTile, kTileRow, add);
    if constexpr (G > 1) load_result<3>(c + kResultSize + kTile, kTileRow, add);
    for (int kb = 0; kb < blocks; ++kb, w += kBlockSize, x += kPackSize, ahead += lines * kBlock) {
        tile_load<4>(w);
        prefetch_quarter<lines, 0>(ahead);
        tile_load<6>(x);
        prefetch_quarter<lines, 1>(ahead);
        tile_load<5>(w + kHalfBlock);
        prefetch_quarter<lines, 2>(ahead);
        if constexpr (G > 1) tile_load<7>(x + group_stride);
        prefetch_quarter<lines, 3>(ahead);
        tile_dot<0, 4, 6>();
        if constexpr (G > 1) tile_dot<1, 4, 7>();
        tile_dot<2, 5, 6>();
        if constexpr (G > 1) tile_dot<3, 5, 7>();
    }
    tile_store<0>(c);
    if constexpr (G > 1) tile_store<1>(c + kResultSize);
    tile_store<2>(c + kTile);
    if constexpr (G > 1) tile_store<3>(c + kResultSize + kTile);
}

// A chunk of one strip by up to three groups.
static_assert(kTune.few_groups <= 3);
void few_groups(const NtSegment& seg, const TileChunk& chunk, int kb, int blocks, int groups, float* c, bool add) {
    const bf16 *w = chunk.weights, *x = seg.tokens + kb * kPackSize, *ahead = chunk.ahead;
    const auto run = [&](auto all) {
        constexpr int lines = all.value, half = lines / 2;
        if (groups == 1) return one_strip_pass<1, lines>(w, x, seg.group_stride, blocks, ahead, c, add);
        if (groups == 2) return one_strip_pass<2, lines>(w, x, seg.group_stride, blocks, ahead, c, add);
        one_strip_pass<2, half>(w, x, seg.group_stride, blocks, ahead, c, add);
        one_strip_pass<1, half>(w, x + 2 * seg.group_stride, 0, blocks, share_of(ahead, blocks, half, 1),
                                c + 2 * kResultSize, add);
    };
    ahead ? run(Int<kBlock>()) : run(Int<0>());
}

// 16 rows of W by a quad of groups, over a chunk.
struct QuadPass {
    const bf16 *w, *x;
    float* c;
    const bf16 *ahead, *x_ahead;  // what it prefetches: of the same strip's next chunk, and of the next chunk of x
};

// Passes of one quad of G groups, two to four: 1 x G tiles. The results of a pass are stored between the first products
// of the next, where the stores cost nothing. W streams through the first-level cache, in which the quad's chunk of x
// and the next results stay. With each k-block, `lines` lines of W and x_lines of x are prefetched.
template <int G, int lines, int x_lines>
KTV_PASS void quad_passes(const QuadPass* passes, int count, std::size_t group_stride, int blocks, bool add) {
    float* before = nullptr;
    for (int i = 0; i < count; ++i) {
        const bf16 *w = passes[i].w, *x = passes[i].x, *ahead = passes[i].ahead, *x_ahead = passes[i].x_ahead;
        float* c = passes[i].c;
        const auto prefetch_part = [&](auto quarter) __attribute__((always_inline)) {
            prefetch_quarter<lines, quarter.value>(ahead);
            prefetch_quarter<x_lines, quarter.value>(x_ahead);
        };
        const auto step = [&](auto first) __attribute__((always_inline)) {
            const auto turn = [&](auto j, auto b) __attribute__((always_inline)) {
                if constexpr (j.value < G) {
                    tile_load<b.value>(x + j.value * group_stride);
                    if constexpr (first.value) {
                        if (before) tile_store<j.value>(before + j.value * kResultSize);
                        load_result<j.value>(c + j.value * kResultSize, kTileRow, add);
                    }
                }
                prefetch_part(j);
                if constexpr (j.value < G) tile_dot<j.value, 4, b.value>();
            };
            tile_load_streaming<4>(w);
            turn(Int<0>(), Int<5>());
            turn(Int<1>(), Int<6>());
            turn(Int<2>(), Int<7>());
            turn(Int<3>(), Int<5>());
            w += kBlockSize, x += kPackSize, ahead += lines * kBlock, x_ahead += kPackSize;
        };
        step(Int<1>());
        for (int kb = 1; kb < blocks; ++kb) step(Int<0>());
        before = c;
    }
    tile_store<0>(before);
    tile_store<1>(before + kResultSize);
    if constexpr (G > 2) tile_store<2>(before + 2 * kResultSize);
    if constexpr (G > 3) tile_store<3>(before + 3 * kResultSize);
}

// Lines of W that a pass prefetches for each k-block: its share of a block's 32, where `quads` quads have two passes
// each. The first four of many quads prefetch all.
inline int lines_of_quad(int quads, int quad) {
    return quads == 1 ? 16 : quads == 2 ? 8 : quads == 3 ? 6 : quad < 4 ? 4 : 0;
}

using QuadPasses = decltype(&quad_passes<4, 16, 16>);
template <int G, int lines>
QuadPasses quad_with(int x_lines) {
    return x_lines <= 4   ? quad_passes<G, lines, 4>
           : x_lines <= 8 ? quad_passes<G, lines, 8>
                          : quad_passes<G, lines, 16>;
}
template <int G>
QuadPasses quad_with(int lines, int x_lines) {
    switch (lines) {
        case 16:
            return quad_with<G, 16>(x_lines);
        case 8:
            return quad_with<G, 8>(x_lines);
        case 6:
            return quad_with<G, 6>(x_lines);
        case 4:
            return quad_with<G, 4>(x_lines);
        default:
            return quad_with<G, 0>(x_lines);
    }
}

// Four groups or more, dealt evenly to quads: all strips pass by a quad's chunk of x while it is in the first-level
// cache.
void nt_quads(const NtSegment* segments, int count, int strips, int groups, float* c) {
    const int quads = (groups + 3) / 4;
    alignas(64) bf16 decoded[kMostStrips * kDecodedChunk];
    DecodeScratch scratch;
    const int next_strip = strips_of_codes(segments, count, strips);
    visit_tile_chunks(segments, count, kTune.quad_chunk, [&](int s, int kb, int blocks, bool add) {
        const bf16 *weights[kMostStrips], *aheads[kMostStrips];
        for (int strip = 0; strip < strips; ++strip) {
            const NtSegment& seg = segments[strip * count + s];
            const TileChunk chunk(seg, kb, blocks, s == 0 ? seg.next : nullptr, next_strip,
                                  decoded + strip * kDecodedChunk, scratch);
            weights[strip] = chunk.weights;
            aheads[strip] = chunk.ahead;
        }
        for (int quad = 0, first = 0, size; quad < quads; ++quad, first += size) {
            size = (groups - first + quads - quad - 1) / (quads - quad);
            const int lines = aheads[0] ? lines_of_quad(quads, quad) : 0;
            // The quad's lines of the next chunk of x, shared by its passes.
            const int share = (size * kGroup + 2 * strips - 1) / (2 * strips);
            const int x_lines = share <= 4 ? 4 : share <= 8 ? 8 : 16;
            QuadPass passes[2 * kMostStrips];
            for (int i = 0; i < 2 * strips; ++i) {
                const int strip = i / 2, half = i % 2;
                const NtSegment& seg = segments[strip * count + s];
                const bf16* x = seg.tokens + first * seg.group_stride;
                // After the last chunk comes the first one, with the worker's next strips. A shorter chunk is
                // prefetched with the end of this one.
                const int next_kb = kb + blocks < seg.kblocks ? std::min(kb + blocks, seg.kblocks - blocks) : 0;
                const int line = std::min(i * x_lines, size * kGroup - x_lines);
                passes[i] = {weights[strip] + half * kHalfBlock, x + kb * kPackSize,
                             c + (strip * groups + first) * kResultSize + half * kTile,
                             share_of(aheads[strip], blocks, lines, 2 * quad + half),
                             x + line / kGroup * seg.group_stride + next_kb * kPackSize + line % kGroup * kBlock};
            }
            const auto run = size == 4   ? quad_with<4>(lines, x_lines)
                             : size == 3 ? quad_with<3>(lines, x_lines)
                                         : quad_with<2>(lines, x_lines);
            run(passes, 2 * strips, segments[s].group_stride, blocks, add);
        }
    });
}

void nt(const NtSegment* segments, int count, int strips, int tokens, float* c) {
    const int groups = (tokens + kGroup - 1) / kGroup;
    if (groups > kTune.few_groups) return nt_quads(segments, count, strips, groups, c);
    const std::size_t result = groups * kResultSize;
    alignas(64) bf16 decoded[2 * kDecodedChunk];
    DecodeScratch scratch;
    const int next_strip = strips_of_codes(segments, count, strips);
    int strip = 0;
    for (; groups == 1 && strip + 1 < strips; strip += 2) {
        const NtSegment *a = segments + strip * count, *b = a + count;
        float *c0 = c + strip * result, *c1 = c0 + result;
        visit_tile_chunks(a, count, kTune.chunk, [&](int s, int kb, int blocks, bool add) {
            const bf16* next[2] = {};
            if (s == 0) {
                next[0] = following(segments, count, strips, strip, 2);
                next[1] = following(segments, count, strips, strip + 1, 2);
            }
            const TileChunk of_a(a[s], kb, blocks, next[0], next_strip, decoded, scratch),
                of_b(b[s], kb, blocks, next[1], next_strip, decoded + kDecodedChunk, scratch);
            if (a[s].tokens == b[s].tokens) {
                const auto pass = of_a.ahead ? two_strips<kBlock> : two_strips<0>;
                return pass(of_a.weights, of_b.weights, a[s].tokens + kb * kPackSize, blocks, of_a.ahead, of_b.ahead,
                            c0, c1, add);
            }
            few_groups(a[s], of_a, kb, blocks, groups, c0, add);
            few_groups(b[s], of_b, kb, blocks, groups, c1, add);
        });
    }
    for (; strip < strips; ++strip) {
        const NtSegment* a = segments + strip * count;
        visit_tile_chunks(a, count, kTune.chunk, [&](int s, int kb, int blocks, bool add) {
            const bf16* next = s == 0 ? following(segments, count, strips, strip, 1) : nullptr;
            few_groups(a[s], TileChunk(a[s], kb, blocks, next, next_strip, decoded, scratch), kb, blocks, groups,
                       c + strip * result, add);
        });
    }
}
