// Base weights that stay codes: how they are packed, and the one function that makes bf16 blocks of them.
#include <bit>
#include <cstring>

#include "state.hpp"

namespace ktv {
namespace {

// Scales that are packed for the 32 rows of a block. Those of fp8 are two: of its first rows, and of those behind a
// multiple of 128, if there is one inside.
std::size_t packed_scales(Format format) {
    return format == Format::fp8 ? 2 : kBlock;
}

float of_half(std::uint16_t half) {
    const std::uint32_t sign = half & 0x8000u, magnitude = half & 0x7fffu;
    const float tiny = static_cast<float>(magnitude) * 0x1p-24f;
    const auto normal = std::bit_cast<float>((magnitude << 13) + (112u << 23));
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude < 0x400 ? tiny : normal) | sign << 16);
}

// The 32 scales of a block as fp32: where they are packed, or widened to `to`. row0: the block's first row in the whole
// matrix.
const float* widened(const std::byte* from, const WeightFormat& of, int row0, float* to) {
    if (of.format == Format::fp8) {
        float both[2];
        std::memcpy(both, from, sizeof both);
        const int first = of.group_rows() - row0 % of.group_rows();
        for (int n = 0; n < kBlock; ++n) to[n] = both[n >= first];
        return to;
    }
    switch (of.scale) {
        case Scale::bf16:
            for (int n = 0; n < kBlock; ++n) to[n] = to_float(reinterpret_cast<const bf16*>(from)[n]);
            return to;
        case Scale::fp16:
            for (int n = 0; n < kBlock; ++n) to[n] = of_half(reinterpret_cast<const std::uint16_t*>(from)[n]);
            return to;
        case Scale::e8m0:
            for (int n = 0; n < kBlock; ++n) {
                // 2^(code - 127); 2^-127 is subnormal
                const auto code = std::to_integer<std::uint32_t>(from[n]);
                to[n] = std::bit_cast<float>(code == 0 ? 1u << 22 : code << 23);
            }
            return to;
        default:  // fp32
            return reinterpret_cast<const float*>(from);
    }
}

}  // namespace

// The part's slice: rows of gate and up, columns of down.
CodeLayout Layer::State::layout_of(Matrix matrix, int part) const {
    const bool is_down = matrix == Matrix::down;
    const int begin = part * size.I;
    CodeLayout at{};
    at.rows = is_down ? size.H : size.I;
    at.cols = is_down ? size.I : size.H;
    at.row0 = is_down ? 0 : begin;
    at.col0 = is_down ? begin : 0;
    at.stride = format.bytes((is_down ? 1 : 2) * panel(blocks_of(at.cols)));  // rows of gate and of up alternate
    at.first_group = format.group > 0 ? at.col0 / format.group : 0;
    at.groups = format.group > 0 ? (at.col0 + at.cols - 1) / format.group - at.first_group + 1 : 1;
    return at;
}

void Layer::State::carve_codes(Carver& carver, PackedExpert& expert) const {
    std::uint8_t* gate_up = nullptr;
    carver.take(gate_up, size.ib * format.bytes(gate_up_stride()));
    carver.take(expert.codes[static_cast<int>(Matrix::down)].blocks, format.bytes(size.hb * panel(size.ib)));
    if (gate_up) {
        expert.codes[static_cast<int>(Matrix::gate)].blocks = gate_up;
        expert.codes[static_cast<int>(Matrix::up)].blocks = gate_up + format.bytes(panel(size.hb));
    }
    for (const Matrix matrix : {Matrix::gate, Matrix::up, Matrix::down}) {
        PackedCodes& to = expert.codes[static_cast<int>(matrix)];
        // The part with most groups decides, so that all parts take the same memory.
        int groups = 0;
        for (int part = 0; part < config.parts; ++part) groups = std::max(groups, layout_of(matrix, part).groups);
        const std::size_t count = wide(matrix == Matrix::down ? size.hb : size.ib) * groups * kBlock;
        carver.take(to.scales, count / kBlock * packed_scales(format.format) * format.scale_bytes());
        if (format.zeros) carver.take(to.zeros, count);
    }
}

// Packs one row of blocks. Beyond the matrix, q is 0: so W is +0 there, as in padded bf16 blocks.
void Layer::State::pack_codes(int slot, int part, Matrix matrix, int row, const PackedCodes& to) const {
    const WeightSource& from = matrix == Matrix::gate ? gate : matrix == Matrix::up ? up : down;
    const CodeLayout at = layout_of(matrix, part);
    const std::size_t whole_cols = matrix == Matrix::down ? config.intermediate : config.hidden;
    const int rows = std::min(kBlock, at.rows - row * kBlock), kblocks = blocks_of(at.cols);
    const auto* codes = static_cast<const std::uint8_t*>(from.experts[slot]);
    const std::size_t row_bytes = format.bytes(kBlock);
    const int zero = format.format == Format::int4 ? 0x88 : 0;
    std::uint8_t* out = to.blocks + row * at.stride;
    for (int kb = 0; kb < kblocks; ++kb) {
        const std::size_t have = format.bytes(std::min(kBlock, at.cols - kb * kBlock));
        for (int n = 0; n < kBlock; ++n, out += row_bytes) {
            const std::size_t taken = n < rows ? have : 0;
            const std::size_t first = (at.row0 + row * kBlock + n) * whole_cols + at.col0 + kb * kBlock;
            if (taken) std::memcpy(out, codes + format.bytes(first), taken);
            for (std::size_t i = 0; format.offset && i < taken; ++i) out[i] ^= 0x80;
            std::memset(out + taken, zero, row_bytes - taken);
        }
    }
    const std::size_t groups = format.group > 0 ? (whole_cols + format.group - 1) / format.group : 1;
    const auto* scales = static_cast<const std::byte*>(from.scales[slot]);
    const auto* zeros = format.zeros ? static_cast<const std::int8_t*>(from.zeros[slot]) : nullptr;
    const std::size_t each = format.scale_bytes(), count = packed_scales(format.format);
    for (int group = 0; group < at.groups; ++group) {
        const std::size_t to_at = wide(row) * at.groups + group;
        const auto place = [&](int n) {
            const int absolute = (at.row0 + row * kBlock + std::min(n, rows - 1)) / format.group_rows();
            return absolute * groups + at.first_group + group;
        };
        for (std::size_t i = 0; i < count; ++i) {
            const int n = count == kBlock ? static_cast<int>(i) : i == 0 ? 0 : kBlock - 1;
            std::memcpy(to.scales + (to_at * count + i) * each, scales + place(n) * each, each);
        }
        for (int n = 0; zeros && n < kBlock; ++n)
            to.zeros[to_at * kBlock + n] = n < rows ? zeros[place(n)] : std::int8_t{0};
    }
}

CodedMatrix::CodedMatrix(const Layer::State& layer, const PackedExpert& expert, int part, Matrix matrix)
    : format_(layer.format), unpack_(layer.kernels.unpack_of(format_.format)) {
    const CodeLayout lies = layer.layout_of(matrix, part);
    const PackedCodes& from = expert.codes[static_cast<int>(matrix)];
    format = format_.format;
    whole = (format_.group == 0 || (format_.group % kBlock == 0 && lies.col0 % kBlock == 0)) &&
            (format != Format::fp8 || lies.row0 % kBlock == 0) &&
            (format != Format::int4 || format_.scale == Scale::bf16);
    blocks = from.blocks;
    row_bytes = lies.stride;
    block_bytes = format_.bytes(kBlockSize);
    scales = from.scales;
    zeros = format_.zeros ? from.zeros : nullptr;
    scale_bytes = packed_scales(format) * format_.scale_bytes();
    groups = lies.groups;
    group = format_.group;
    into_group = lies.col0 - lies.first_group * group;
    row0_ = lies.row0;
}

void CodedMatrix::unpack(Place at, int count, const std::uint8_t* ahead, bf16* out) const {
    const std::uint8_t* codes = codes_at(at);
    alignas(64) float widest[kBlock];
    const float* of_rows = nullptr;
    int present = -1;
    const auto use_group = [&](int now) {
        if (now == present) return;
        present = now;
        of_rows = widened(scales + scales_of(at.n, now) * scale_bytes, format_, row0_ + at.n * kBlock, widest);
    };
    const auto unpack_to = [&](bf16* to) {
        unpack_(codes, of_rows, zeros ? zeros + scales_of(at.n, present) * kBlock : nullptr, ahead, to);
    };
    for (int k = at.k; k < at.k + count; ++k, codes += block_bytes, ahead += block_bytes, out += kBlockSize) {
        use_group(group_of(k));
        unpack_to(out);
        if (group == 0 || present + 1 >= groups) continue;
        // A part may begin inside a group; then a block may have columns of two.
        const int left = group - (into_group + k * kBlock) % group;
        if (left >= kBlock) continue;
        alignas(64) bf16 other[kBlockSize];
        use_group(present + 1);
        unpack_to(other);
        for (int row = 0; row < kBlock; ++row)
            std::memcpy(out + row * kBlock + left, other + row * kBlock + left, (kBlock - left) * sizeof(bf16));
    }
}

std::optional<CodedMatrix> Layer::State::codes_of(const PackedExpert& expert, int part, Matrix matrix) const {
    if (!format.quantised()) return {};
    return CodedMatrix(*this, expert, part, matrix);
}

const bf16* Layer::State::strip(const PackedExpert& expert, Matrix matrix, int n) const {
    if (matrix == Matrix::down) return expert.down + n * panel(size.ib);
    return (matrix == Matrix::up ? expert.up : expert.gate) + n * gate_up_stride();
}

}  // namespace ktv
