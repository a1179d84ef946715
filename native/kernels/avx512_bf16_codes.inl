// Few rows by codes, decoded in registers as they are multiplied: nt along k, and nn. The sums have the order that bf16
// weights have, so the bits are the same.

// ---- nt, of few tokens

// Rows n to n + N of some k-blocks by T tokens. sums [n][token][16 lanes].
template <int T, int N, typename Block>
KTV_INLINE void code_dots_block(const Block* blocks, int kblocks, int n, const bf16* x, float* sums, bool add) {
    __m512 sum[N][T];
    sums += n * T * 16;
    for (int i = 0; i < N; ++i) {
        for (int t = 0; t < T; ++t) sum[i][t] = add ? _mm512_load_ps(sums + (i * T + t) * 16) : _mm512_setzero_ps();
    }
    for (int kb = 0; kb < kblocks; ++kb, x += T * kBlock) {
        const Block block = blocks[kb].from(n);
#pragma GCC unroll 8
        for (int i = 0; i < N; i += 2) {
            if (N >= 4) block.prefetch_rows(i);
            else blocks[kb].prefetch_rows(n);
            const Bf16Rows two = block.rows(i);
            for (int t = 0; t < T; ++t) {
                const __m512i token = _mm512_loadu_si512(x + t * kBlock);
                sum[i][t] = dot(sum[i][t], two.first, token);
                sum[i + 1][t] = dot(sum[i + 1][t], two.second, token);
            }
        }
    }
    for (int i = 0; i < N; ++i) {
        for (int t = 0; t < T; ++t) _mm512_store_ps(sums + (i * T + t) * 16, sum[i][t]);
    }
}
template <int T, typename Block>
void code_dots(const Block* blocks, int kblocks, const bf16* x, float* sums, bool add) {
    constexpr int N = T <= 2 ? 8 : T <= 6 ? 4 : 2;
    for (int n = 0; n < kBlock; n += N) code_dots_block<T, N>(blocks, kblocks, n, x, sums, add);
}
template <typename Block, int... less_one>
constexpr auto code_dots_of(std::integer_sequence<int, less_one...>) {
    return std::array{code_dots<less_one + 1, Block>...};
}

// Adds one segment's products to sums, or begins them.
void sum_codes(const NtSegment& seg, int tokens, float* sums, bool add) {
    DecodeScratch scratch;
    for (int kb = 0, some; kb < seg.kblocks; kb += some, add = true) {
        some = even_chunk(seg.kblocks - kb, kAtOnce);
        const bf16* x = seg.tokens + kb * tokens * kBlock;
        const CodedRun run{*seg.codes, {seg.strip, kb}, some};
        decode_blocks<Bf16Kinds>(run, next_codes_of_row(run), scratch, [&](const auto* blocks) {
            using Block = std::remove_cvref_t<decltype(*blocks)>;
            static constexpr auto dots = code_dots_of<Block>(std::make_integer_sequence<int, few_rows>());
            dots[tokens - 1](blocks, some, x, sums, add);
        });
    }
}

// ---- nn, of up to nn_code_rows rows: a k-block of some column blocks at a time, because codes are then read in longer
// pieces. What comes nn_code_ahead k-blocks later is prefetched.

constexpr int nn_code_rows = 4, nn_code_ahead = 2;
static_assert(kPanelBlocks <= kAtOnce);

// R rows of G by C column blocks: several, because a product waits for the one before that adds to the same sum.
template <int R, int C, typename Block>
KTV_INLINE void nn_code_block(const Block* blocks, const bf16* g, std::size_t ld, float* c, bool add) {
    __m512 sum[C][R][2];
    const auto at = [&](int b, int r, int half) { return c + b * nn_stride(R) + r * kBlock + half * 16; };
    for (int b = 0; b < C; ++b) {
        for (int r = 0; r < R; ++r) {
            for (int half = 0; half < 2; ++half)
                sum[b][r][half] = add ? _mm512_loadu_ps(at(b, r, half)) : _mm512_setzero_ps();
        }
    }
    for (int n = 0; n < kBlock; n += 4, g += 4) {
#pragma GCC unroll 2
        for (int i = 0; i < 4; i += 2) {
            RowPair two[C];
            for (int b = 0; b < C; ++b) {
                const Block rest = blocks[b].from(n);
                rest.prefetch_rows(i);
                two[b] = rest.interleaved(i);
            }
            for (int r = 0; r < R; ++r) {
                const __m512i value = broadcast_pair(g + r * ld + i);
                for (int b = 0; b < C; ++b) {
                    sum[b][r][0] = dot(sum[b][r][0], value, two[b].lower);
                    sum[b][r][1] = dot(sum[b][r][1], value, two[b].upper);
                }
            }
        }
    }
    for (int b = 0; b < C; ++b) {
        for (int r = 0; r < R; ++r) {
            for (int half = 0; half < 2; ++half) _mm512_storeu_ps(at(b, r, half), sum[b][r][half]);
        }
    }
}
template <int R, typename Block>
void nn_code_blocks(const Block* blocks, int columns, const bf16* g, std::size_t ld, float* c, bool add) {
    constexpr int C = R == 1 ? 4 : 2;
    int b = 0;
    for (; b + C <= columns; b += C) nn_code_block<R, C>(blocks + b, g, ld, c + b * nn_stride(R), add);
    for (; b < columns; ++b) nn_code_block<R, 1>(blocks + b, g, ld, c + b * nn_stride(R), add);
}

// Multiplies the segments of codes, which come first. Returns their number.
int nn_codes(const NnSegment* segments, int count, int rows, int cblocks, float* c) {
    int coded = 0;
    while (coded < count && segments[coded].codes) ++coded;
    DecodeScratch scratch;
    for (int cb = 0; coded > 0 && cb < cblocks; cb += kPanelBlocks, c += kPanelBlocks * nn_stride(rows)) {
        const int columns = std::min(kPanelBlocks, cblocks - cb);
        for (int s = 0; s < coded; ++s) {
            const NnSegment& seg = segments[s];
            for (int kb = 0; kb < seg.kblocks; ++kb) {
                const auto later = [&](int kblocks) {
                    const PanelPosition then = position_after(segments, coded, kPanelBlocks, kblocks, {s, kb, cb});
                    const NnSegment& next = segments[then.s];
                    return next.codes->prefetch_scales({then.kb, next.column_block + then.cb}, columns);
                };
                const CodedRun run{*seg.codes, {kb, seg.column_block + cb}, columns};
                const CodesAhead ahead{later(nn_code_ahead), later(2 * nn_code_ahead)};
                decode_blocks<Bf16Kinds>(run, ahead, scratch, [&](const auto* blocks) {
                    using Block = std::remove_cvref_t<decltype(*blocks)>;
                    constexpr decltype(&nn_code_blocks<1, Block>) products[nn_code_rows] = {
                        nn_code_blocks<1, Block>, nn_code_blocks<2, Block>, nn_code_blocks<3, Block>,
                        nn_code_blocks<4, Block>};
                    products[rows - 1](blocks, columns, seg.rows + kb * kBlock, seg.ld, c, s > 0 || kb > 0);
                });
            }
        }
    }
    return coded;
}
