// Portable kernels: plain loops, for any CPU. The tests compare the others with them.
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.hpp"

namespace ktv {
namespace {

#include "elementwise.inl"

void nt(const NtSegment* segments, int count, int strips, int tokens, float* c) {
    const int groups = (tokens + kGroup - 1) / kGroup;
    bf16 unpacked[kBlockSize];
    for (int strip = 0; strip < strips; ++strip, segments += count, c += groups * kResultSize) {
        std::memset(c, 0, groups * kResultSize * sizeof *c);
        for (int s = 0; s < count; ++s) {
            const NtSegment& seg = segments[s];
            for (int kb = 0; kb < seg.kblocks; ++kb) {
                const bf16* block = seg.chunk(kb, 1, unpacked);
                for (int group = 0; group < groups; ++group) {
                    const bf16* x = seg.tokens + group * seg.group_stride + kb * kPackSize;
                    for (int n = 0; n < kBlock; ++n) {
                        const bf16* w = block + n * kBlock;
                        float* sum = c + group * kResultSize + n * kGroup;
                        for (int pair = 0; pair < kBlock / 2; ++pair) {
                            const float even = to_float(w[2 * pair]), odd = to_float(w[2 * pair + 1]);
                            for (int t = 0; t < kGroup; ++t) {
                                const bf16* two = x + (pair * kGroup + t) * 2;
                                sum[t] += even * to_float(two[0]) + odd * to_float(two[1]);
                            }
                        }
                    }
                }
            }
        }
    }
}

void nn(const NnSegment* segments, int count, int rows, int cblocks, float* c) {
    bf16 unpacked[kBlockSize];
    for (int cb = 0; cb < cblocks; ++cb, c += nn_stride(rows)) {
        std::memset(c, 0, rows * kBlock * sizeof *c);
        for (int s = 0; s < count; ++s) {
            const NnSegment& seg = segments[s];
            for (int kb = 0; kb < seg.kblocks; ++kb) {
                const bf16* block = nullptr;
                if (seg.weights) {
                    block = seg.weights + kb * seg.kblock_stride + cb * kBlockSize;
                } else if (seg.codes) {
                    const CodedBlocks::Place at{kb, seg.column_block + cb};
                    seg.codes->unpack(at, 1, seg.codes->codes_at(at), unpacked);
                    block = unpacked;
                }
                for (int k = 0; k < kBlock; ++k) {
                    const bf16* w =
                        seg.gathered ? seg.gathered[kb * kBlock + k] + seg.column + cb * kBlock : block + k * kBlock;
                    for (int row = 0; row < rows; ++row) {
                        const float g = to_float(seg.rows[row * seg.ld + kb * kBlock + k]);
                        float* sum = c + row * kBlock;
                        for (int j = 0; j < kBlock; ++j) sum[j] += g * to_float(w[j]);
                    }
                }
            }
        }
    }
}

}  // namespace

extern const Kernels scalar_kernels;
const Kernels scalar_kernels{.enter = nothing, .leave = nothing, KTV_SMALL_CALLS, .nt = nt, .nn = nn, KTV_ELEMENTWISE};

}  // namespace ktv
