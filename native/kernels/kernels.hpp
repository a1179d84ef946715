// The functions that each instruction set implements. The rest of the engine is plain C++ without instruction sets.
//
// Layouts (all bf16 unless stated otherwise):
//   weight blocks  [N/32][K/32][32 n][32 k]                  one copy of W serves both directions: natural rows are the
//                                                            A operand of W·x, and two neighbouring rows, interleaved,
//                                                            the B operand of g·W
//   token pack     [group][K/32][16 k-pairs][16 tokens][2]   the B operand of the forward (VNNI order)
//   few tokens     [K/32][token][32 k]                       natural and dense, for an expert with so few rows that dot
//                                                            products along k are faster: Kernels::few_rows
//   rows           [row][K]                                  natural; kernels may read up to a multiple of 16 rows, but
//                                                            no result depends on those beyond the last
// N and K are padded with zeros to multiples of 32, the tokens of a token pack to multiples of 16.
//
// Results lie in the worker's scratch, fp32, so that a tile of AMX is one piece of 1 KB or a half of one piece of 2 KB:
//   nt results     [strip][group][32 n][16 tokens]           a strip is 32 rows of W
//   few results    [strip][token][32 n]
//   nn results     [column block][row][32 columns]           rows padded to a multiple of 16: nn_stride
// Rows of one wide array, a power of two apart, would share a few sets of the first-level cache.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "ktv/bf16.hpp"
#include "ktv/weight_format.hpp"

namespace ktv {

inline constexpr int kBlock = 32;                            // edge of a weight block
inline constexpr int kGroup = 16;                            // tokens in a group
inline constexpr std::size_t kBlockSize = kBlock * kBlock;   // elements of a weight block
inline constexpr std::size_t kPackSize = kBlock * kGroup;    // elements of one k-block of one token pack
inline constexpr std::size_t kResultSize = kBlock * kGroup;  // elements of an nt result of one strip and one group
inline constexpr int kPanelBlocks = 4;                       // the column blocks of an nn call are a multiple of it
inline constexpr int kMostStrips = 16;                       // of W in one nt call
// Elements from one column block of an nn result to the next.
[[gnu::always_inline]] inline constexpr std::size_t nn_stride(int rows) {
    return static_cast<std::size_t>((rows + kGroup - 1) / kGroup) * kGroup * kBlock;
}

// Chunk size when `left` is split into the fewest near-equal chunks of at most `most`. Near-equal, because one chunk
// prefetches the next, and a small last chunk would be slow.
[[gnu::always_inline]] inline int even_chunk(int left, int most) {
    const int chunks = (left + most - 1) / most;
    return (left + chunks - 1) / chunks;
}

// Base weights that stay codes: kernels make bf16 of them as they multiply.
struct CodedBlocks {
    struct Place {
        int n, k;  // row and column of blocks
    };
    // `count` blocks from (n, k) on, along the row -> out, as weight blocks. Prefetches as many codes at `ahead`.
    virtual void unpack(Place at, int count, const std::uint8_t* ahead, bf16* out) const = 0;

    Format format = Format::bf16;
    // Kernels may decode what lies here by themselves: no block has columns of two groups, nor rows of two of fp8's, and
    // int4's scales are bf16.
    bool whole = false;
    const std::uint8_t* blocks = nullptr;        // as Kernels::unpack takes them
    std::size_t row_bytes = 0, block_bytes = 0;  // from one row of blocks to the next, and from block to block
    // For each row of blocks and group of columns, as they are packed: the scales of its 32 rows, fp32 (int8, and two of
    // fp8, the first of which holds for all rows where `whole`), bf16 (int4) or e8m0, and the zero points, or null for 0.
    const std::byte* scales = nullptr;
    const std::int8_t* zeros = nullptr;
    std::size_t scale_bytes = 0;
    int groups = 1;      // of columns
    int group = 0;       // columns of one; 0: all
    int into_group = 0;  // of the first column block: columns before it that belong to its group

    [[gnu::always_inline]] int group_of(int k) const { return group == 0 ? 0 : (into_group + k * kBlock) / group; }
    [[gnu::always_inline]] std::size_t scales_of(int n, int group) const {
        return static_cast<std::size_t>(n) * groups + group;
    }
    // Where a block's codes lie. As integers, because the place may be outside the matrix.
    [[gnu::always_inline]] const std::uint8_t* codes_at(Place at) const {
        return reinterpret_cast<const std::uint8_t*>(reinterpret_cast<std::uintptr_t>(blocks) + at.n * row_bytes +
                                                     at.k * block_bytes);
    }
    // Prefetches the scales of `count` blocks from (n, k) on, along the row. Returns where the codes begin, for unpack to
    // prefetch. The blocks may lie outside the matrix.
    [[gnu::always_inline]] const std::uint8_t* prefetch_scales(Place at, int count) const {
        const auto from = reinterpret_cast<std::uintptr_t>(scales);
        const std::uintptr_t end = from + (scales_of(at.n, group_of(at.k + count - 1)) + 1) * scale_bytes;
        for (std::uintptr_t line = (from + scales_of(at.n, group_of(at.k)) * scale_bytes) & ~std::uintptr_t{63};
             line < end; line += 64)
            __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
        return codes_at(at);
    }

  protected:
    ~CodedBlocks() = default;
};

// One summand of nt: C[n][token] += sum_k W[n][k] x[token][k] over one row of weight blocks.
struct NtSegment {
    const bf16* weights;       // [kblocks][32 n][32 k]
    const bf16* tokens;        // [group][..][16][16][2], the segment's first k-block of the first group
    std::size_t group_stride;  // elements between groups of `tokens`; few tokens have none
    int kblocks;
    // Where the worker goes on, if known: the weights of the same strip of its next call, as many k-blocks.
    const bf16* next = nullptr;
    // Instead of weights: row `strip` of blocks of a coded matrix. Such segments are the first of a strip.
    const CodedBlocks* codes = nullptr;
    int strip = 0;
    // Weights of the `blocks` k-blocks from kb on: where they lie, or unpacked to `to`.
    [[gnu::always_inline]] const bf16* chunk(int kb, int blocks, bf16* to) const {
        if (!codes) return weights + kb * kBlockSize;
        codes->unpack({strip, kb}, blocks, codes->prefetch_scales({strip, kb + blocks}, blocks), to);
        return to;
    }
    // The address of `blocks` existing k-blocks that are read from kb on; kb may lie behind the end, in the weights
    // that follow, if any.
    [[gnu::always_inline]] const bf16* from(int kb, int blocks, const bf16* following) const {
        const int last = kblocks - blocks, beyond = kb - kblocks;
        if (beyond < 0) return weights + (kb < last ? kb : last) * kBlockSize;
        return following ? following + (beyond < last ? beyond : last) * kBlockSize : weights;
    }
};

// One summand of nn: C[row][col] += sum_k G[row][k] W[k][col].
struct NnSegment {
    const bf16* rows;  // [row][ld], k contiguous
    std::size_t ld;
    const bf16* weights;  // block (kb, cb) at weights + kb * kblock_stride + cb * kBlockSize; or null:
    std::size_t kblock_stride;
    const bf16* const* gathered;  // row k of W at gathered[k] + column, 32 * kblocks pointers
    std::size_t column;
    int kblocks;
    // Pairs of rows of W at the end of the last k-block that are padding, all zero: kernels may skip them.
    int idle_pairs = 0;
    // For gathered rows: the caller's next product uses the kPanelBlocks column blocks behind these.
    bool goes_on = false;
    // Where the worker goes on, if known: the weights of its next call, with the same stride, as many k-blocks and at
    // least as many column blocks.
    const bf16* next = nullptr;
    // Instead of weights: the column blocks of a coded matrix from column_block on. Such segments come first. Padding of
    // their last k-block may be multiplied: its codes stand for 0.
    const CodedBlocks* codes = nullptr;
    int column_block = 0;
};

struct Kernels {
    // Called by every worker when it enters and leaves a parallel region (tile configuration; stores past the caches).
    void (*enter)();
    void (*leave)();

    // How the engine cuts the products of an expert of so many rows into calls. Bits do not depend on it.
    int (*strips)(int rows);   // strips of an nt call: a power of two, at most kMostStrips
    int (*cblocks)(int rows);  // column blocks of an nn call: a multiple of kPanelBlocks
    int most_rows;             // of one call, a multiple of 16

    // segments [strips][count]: the summands of each strip, of equal lengths in k-blocks and with the same groups of
    // tokens; tokens <= most_rows. c: an nt result, overwritten; tokens beyond the last are undefined. The order of a
    // token's sums depends neither on its place nor on the number of tokens or of strips.
    void (*nt)(const NtSegment* segments, int count, int strips, int tokens, float* c);
    // The same product for 1 to few_rows tokens in the layout of few tokens; c: a few result. The order of a token's
    // sums is again fixed, but differs from that of nt. Null where few_rows is 0.
    int few_rows = 0;
    void (*nt_few)(const NtSegment* segments, int count, int strips, int tokens, float* c) = nullptr;
    // c: an nn result of 32 * cblocks columns, overwritten; 1 to most_rows rows. The order of a row's sums depends
    // neither on its place nor on the number of rows or of column blocks.
    void (*nn)(const NnSegment* segments, int count, int rows, int cblocks, float* c);

    // rows[16] (null = zeros) of `k` elements -> one group of a token pack, k padded with zeros to 32 * kblocks.
    void (*pack_tokens)(const bf16* const* rows, int k, int kblocks, bf16* pack);
    // h = silu(g) * u for one block of 32 rows of I: g, u: nt results of one strip -> packs, one k-block a group. When
    // keep_g is not null, also g and u, transposed to [row][keep_ld] fp32; both start at a cache line, and keep_ld is a
    // multiple of 16.
    void (*silu_mul)(const float* g, const float* u, int groups, bf16* pack, std::size_t group_stride, float* keep_g,
                     float* keep_u, std::size_t keep_ld);
    // The same for few tokens: g, u [tokens][32] fp32 -> pack [tokens][32].
    void (*silu_mul_few)(const float* g, const float* u, int tokens, bf16* pack, float* keep_g, float* keep_u,
                         std::size_t keep_ld);
    // c: an nn result with `stride` elements from one of its `cblocks` column blocks to the next, dO Wd + s (dO Bd) Ad
    // without the routing weight; g, u [rows][ld] fp32. Writes grad_g, grad_u, h [rows][ld] bf16 and the partial sums
    // of <grad_h, h> over these columns to dot[rows].
    void (*silu_mul_grad)(const float* c, std::size_t stride, int rows, int cblocks, const float* weight,
                          const float* g, const float* u, std::size_t ld, bf16* grad_g, bf16* grad_u, bf16* h,
                          float* dot);
    // c: an nt result of one strip (columns of the output) -> sum[token[i]][0..32) += weight[i] * c[.][i], sum rows ld
    // apart, fp32.
    void (*add_transposed)(const float* c, int rows, const std::int32_t* token, const float* weight, float* sum,
                           std::size_t ld);
    // c: an nn result -> sum[token[i]][0..32 * cblocks) += weight[i] * c[i]; null weights are 1.
    void (*add_rows)(const float* c, std::size_t stride, int rows, int cblocks, const std::int32_t* token,
                     const float* weight, float* sum, std::size_t ld);
    // out[i] = bf16(sum over parts of in[p][i]), the parts in order.
    void (*round_sum)(const float* const* in, int parts, std::size_t count, bf16* out);
    // c: an nn result of `cols` columns -> out [cols][rows], its transpose.
    void (*transpose)(const float* c, std::size_t stride, int rows, int cols, float* out);
    // `bytes` bytes -> state [16], by which two equally long pieces of memory are told apart. A change within one word
    // of 8 bytes always changes the state: one sum has the word itself as a term, and every later step is a bijection
    // of the state. Other changes are missed with a chance of about 2^-64: a second sum has the products of the halves
    // of the words, as XXH3 has, with other keys for neighbours.
    void (*fingerprint)(const std::uint8_t* data, std::size_t bytes, std::uint64_t* state);
    // A block of codes [32 n][32 k], 8 or 4 bits each (the even one of a byte in its low half), of the row's scale
    // [32 n], finite and not below 0, and of int4's zero point [32 n], null for 0 -> out [32 n][32 k]. By format; int4's q
    // is its code less 8. Prefetches as many bytes at `ahead`.
    using Unpack = void (*)(const std::uint8_t* codes, const float* scales, const std::int8_t* zeros,
                            const std::uint8_t* ahead, bf16* out);
    Unpack unpack[kCodeFormats];
    Unpack unpack_of(Format format) const { return unpack[static_cast<int>(format) - 1]; }
};

// Stripes of 64 bytes that are added before the sums are mixed, and a key for each.
inline constexpr int kFingerprintStripes = 16;
inline constexpr auto kFingerprintKeys = [] {
    std::array<std::uint64_t[8], kFingerprintStripes> keys{};
    std::uint64_t seed = 0;
    for (auto& key : keys) {
        for (std::uint64_t& word : key) {  // splitmix64
            std::uint64_t z = seed += 0x9e3779b97f4a7c15;
            z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
            z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
            word = z ^ (z >> 31);
        }
    }
    return keys;
}();

}  // namespace ktv
