// How base weights are stored. docs/contract.md (Quantised base weights) has the rule that makes numbers of codes.
#pragma once

#include <cstddef>

namespace ktv {

// fp8: e4m3, a scale for 128 x 128 weights. int8: a scale for each row. int4, mxfp4 (e2m1): a scale for `group`
// neighbours in a row.
enum class Format { bf16, fp8, int8, int4, mxfp4 };
inline constexpr int kCodeFormats = 4;  // all but bf16

// The number that a scale is stored as: fp32 for fp8 and int8, e8m0 for mxfp4, any of the others for int4.
enum class Scale { fp32, fp16, bf16, e8m0 };

struct WeightFormat {
    Format format = Format::bf16;
    int group = 0;       // columns that share a scale, for int4 and mxfp4 above 0; 0: all of a row
    bool zeros = false;  // int4 with a zero point for each group
    Scale scale = Scale::fp32;
    bool offset = false;  // int8 is stored as q + 128

    bool quantised() const { return format != Format::bf16; }
    int bits() const { return format == Format::bf16 ? 16 : format == Format::fp8 || format == Format::int8 ? 8 : 4; }
    std::size_t bytes(std::size_t weights) const { return weights * static_cast<std::size_t>(bits()) / 8; }
    // Rows that share a scale.
    int group_rows() const { return format == Format::fp8 ? 128 : 1; }
    std::size_t scale_bytes() const { return scale == Scale::e8m0 ? 1 : scale == Scale::fp32 ? 4 : 2; }
};

}  // namespace ktv
