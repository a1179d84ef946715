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
    for (int strip = 0; strip < strips; ++strip, segments += count) {
        for (int group = 0; group < groups; ++group) {
            for (int n = 0; n < kBlock; ++n, c += kGroup) {
                float sum[kGroup] = {};
                for (int s = 0; s < count; ++s) {
                    const NtSegment& seg = segments[s];
                    for (int kb = 0; kb < seg.kblocks; ++kb) {
                        const bf16* w = seg.weights + kb * kBlockSize + n * kBlock;
                        const bf16* x = seg.tokens + group * seg.group_stride + kb * kPackSize;
                        for (int pair = 0; pair < kBlock / 2; ++pair) {
                            const float even = to_float(w[2 * pair]), odd = to_float(w[2 * pair + 1]);
                            for (int t = 0; t < kGroup; ++t) {
                                const bf16* two = x + (pair * kGroup + t) * 2;
                                sum[t] += even * to_float(two[0]) + odd * to_float(two[1]);
                            }
                        }
                    }
                }
                std::memcpy(c, sum, sizeof sum);
            }
        }
    }
}

void nn(const NnSegment* segments, int count, int rows, int cblocks, float* c) {
    for (int cb = 0; cb < cblocks; ++cb, c += nn_stride(rows)) {
        for (int row = 0; row < rows; ++row) {
            float sum[kBlock] = {};
            for (int s = 0; s < count; ++s) {
                const NnSegment& seg = segments[s];
                for (int k = 0; k < seg.kblocks * kBlock; ++k) {
                    const bf16* w = seg.weights ? seg.weights + (k / kBlock) * seg.kblock_stride + cb * kBlockSize +
                                                      (k % kBlock) * kBlock
                                                : seg.gathered[k] + seg.column + cb * kBlock;
                    const float g = to_float(seg.rows[row * seg.ld + k]);
                    for (int j = 0; j < kBlock; ++j) sum[j] += g * to_float(w[j]);
                }
            }
            std::memcpy(c + row * kBlock, sum, sizeof sum);
        }
    }
}

}  // namespace

extern const Kernels scalar_kernels;
const Kernels scalar_kernels{.enter = nothing, .leave = nothing, KTV_SMALL_CALLS, .nt = nt, .nn = nn, KTV_ELEMENTWISE};

}  // namespace ktv
