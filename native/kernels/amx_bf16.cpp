// AMX tiles: tdpbf16ps multiplies 16 x 32 by 32 x 16 bf16 into 16 x 16 fp32.
// x86-64 flags: -mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mprefer-vector-width=512
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.hpp"
#include "tuning.hpp"

namespace ktv {
namespace {

#include "avx512.inl"

#include "decode.inl"

#include "decode_bf16.inl"

constexpr tuning::Amx kTune = tuning::kAmxIntel;  // only Intel's processors have AMX

#include "amx_tiles.inl"

#include "amx_nt.inl"

#include "amx_nn.inl"

int strips(int rows) {
    const int groups = (std::min(rows, kTune.most_rows) + kGroup - 1) / kGroup;
    int count = groups <= kTune.few_groups ? kTune.few_strips : kTune.strips;
    while (count > 2 && count * groups * kResultSize * sizeof(float) > kTune.results) count /= 2;
    return count;
}
int cblocks(int rows) {
    rows = std::min(rows, kTune.most_rows);
    int count = panels_for(rows).cblocks;
    while (count > kPanelBlocks && count * nn_stride(rows) * sizeof(float) > kTune.results) count /= 2;
    return count;
}

}  // namespace

extern const Kernels amx_bf16_kernels;
const Kernels amx_bf16_kernels{.enter = enter,
                               .leave = leave,
                               .strips = strips,
                               .cblocks = cblocks,
                               .most_rows = kTune.most_rows,
                               .nt = nt,
                               .nn = nn,
                               KTV_ELEMENTWISE};

}  // namespace ktv
