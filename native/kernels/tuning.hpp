// Numbers that were chosen by measuring, in one place: for each instruction set with prefetches of its own, and where
// it matters for each class of processor, with the figure that chose them.
#pragma once

#include <cstddef>

namespace ktv::tuning {

// Prefetches of a stream of chunks: `chunk` k-blocks are multiplied at once; each line of W is prefetched about `times`
// times, first the next chunk, and then every `step` k-blocks further on.
struct Stream {
    int chunk, times, step;
};

// AVX-512. nt: groups of tokens; few: dot products along k for fewer than 12 tokens, few_to_four for up to 4 of them.
// nn: panels of nn_depth k-blocks, half of that for up to nn_few rows; a line is prefetched nn_times times,
// nn_few_times times by register blocks of up to two rows. nn_depth is also the depth of panels that two operands share,
// where it decides the order of their sums: other depths, other bits.
struct Avx512 {
    Stream nt, few, few_to_four;
    int nn_depth, nn_few, nn_times, nn_few_times;
};
// Chosen on AMD Zen 4, two threads, W cold, where six prefetches of a line were faster than fewer: that processor drops
// those that find its buffers full. The figures were not kept.
inline constexpr Avx512 kAvx512{.nt = {8, 2, 8},
                                .few = {8, 4, 4},
                                .few_to_four = {2, 6, 2},
                                .nn_depth = 8,
                                .nn_few = 4,
                                .nn_times = 2,
                                .nn_few_times = 3};
// Measured on Intel Emerald Rapids, two threads, W cold: with 1 to 4 tokens one prefetch, 8 k-blocks ahead, is 9 to 17
// % faster than the counts above. With more tokens the rate of the dot products decides, not the prefetches.
inline constexpr Avx512 kAvx512Intel = [] {
    Avx512 tune = kAvx512;
    tune.few_to_four = {8, 1, 8};
    return tune;
}();

// AMX. W is the operand that streams from memory: each of its lines is prefetched once, a chunk or some panels ahead.
struct Amx {
    // nt: k-blocks of a chunk with up to few_groups groups of 16 tokens, and with more, where four groups share what is
    // loaded of W (a quad). The 32 KB of a quad's chunk stay in the first-level cache while the strips pass by.
    int chunk, quad_chunk, few_groups;
    int few_strips, strips;  // of W in a call: with up to few_groups groups, and with more
    // Bytes of a call's results, which share the second-level cache with chunks of W and x: more rows, fewer strips.
    std::size_t results;
    int most_rows;  // of a call: with it, an expert's further rows multiply the same strips of W again
    // nn: up to few_rows rows, and more: k-blocks of a panel, column blocks of a call, how many panels ahead W is
    // prefetched, lines of the next chunk of the rows that are prefetched with each k-block.
    struct Panels {
        int depth, cblocks, ahead, row_lines;
    };
    int few_rows;
    Panels few, many;
    int shared_depth;  // of a panel that two operands share, for any number of rows: other depths, other bits
};
// Measured on Intel Emerald Rapids (2 MB of second-level cache), two threads, W cold, at 7168 x 2048 unless stated;
// "before": loops of 2 x 2 tiles that prefetched each line of W six times (nn: three times) and nothing of x. Figures
// of one row come from one burst, except where "then" stands.
//   nt   16 rows: 4 x 1 tiles over two strips 1.68 ms, before 2.23, reading alone 1.75
//        32 and 48 rows: 2 x 2 tiles, each line once, 1.87 and 2.24 ms, before 2.41 and 3.00; nothing else was faster
//        64 and 128 rows: quads with eight strips 2.54 and 3.57 ms, before 3.34 and 6.13; at 2048 x 7168 with 64 rows
//        four strips were best
//        256 rows: 2 x 2 tiles, chunks of 16, x streaming, 16 strips 5.18 ms, quads within 2 % of it; then, before,
//        12.87
//        chunks, one thread: results to and from 512 KB every 8 k-blocks 1601 GFLOP/s, every 4 1202; 16 k-blocks of W
//        and x do not fit the first-level cache, 1404
//   nn   16 rows: panels of 4 by 4 blocks 1.94 ms, before 2.19
//        64 rows: 2.92 ms, before 3.57, with an interleaving by unpacking that gains up to 2 % and is not used here
//        256 rows at 2048 x 7168: panels of 8 by 16 blocks 5.68 ms, before 9.51, with rows packed by chunks, which they
//        are not here; between 96 and 128 rows is not measured
// most_rows is counted, not measured. In a call, an element of x has 32 products with each strip and an element of W one
// with each row; more rows leave room for fewer strips of results. So 2048 rows by 2 strips read a byte for 62
// operations, 512 rows by 8 strips for 171. W is then read again for the next 512 rows, soon enough to come from the
// third level.
// Prefetching two to four chunks ahead gained at most 2 %; every other line, into the first level, or not at all lost.
inline constexpr Amx kAmxIntel{.chunk = 16,
                               .quad_chunk = 8,
                               .few_groups = 3,
                               .few_strips = 2,
                               .strips = 8,
                               .results = 512 * 1024,
                               .most_rows = 512,
                               .few_rows = 128,
                               .few = {.depth = 4, .cblocks = 4, .ahead = 4, .row_lines = 0},
                               .many = {.depth = 8, .cblocks = 16, .ahead = 2, .row_lines = 4},
                               .shared_depth = 4};

}  // namespace ktv::tuning
