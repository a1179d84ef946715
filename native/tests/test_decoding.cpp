// Blocks of codes in the kernels of every instruction set: unpacked to bf16, and multiplied as codes, which gives the bits
// of the same product by bf16 weights.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "code_values.hpp"
#include "instruction_sets.hpp"
#include "problem.hpp"

using namespace ktv;

namespace {

// Scales around every boundary of an unpacker, and of any size. 0 to the largest finite fp32.
std::vector<float> every_scale(Random& random) {
    std::vector<float> scales{0, 1, 3, 1.00390625f, 1.01171875f, 0.7f, std::numeric_limits<float>::max()};
    for (const int power :
         {-149, -148, -140, -133, -127, -126, -125, -121, -120, -119, -9, 9, 102, 103, 104, 111, 118, 119, 120, 127}) {
        const float at = std::ldexp(1.0f, power);
        for (const float scale : {std::nextafter(at, 0.0f), at, std::nextafter(at, 1e38f), 1.3f * at, 1.9921875f * at})
            scales.push_back(scale);
    }
    for (int i = 0; i < 1500; ++i)
        scales.push_back(std::ldexp(1 + std::abs(random.uniform()), static_cast<int>(random.below(277)) - 149));
    // products of these have ties of both kinds
    for (int i = 0; i < 300; ++i)
        scales.push_back(
            std::ldexp(static_cast<float>(256 + random.below(256)), static_cast<int>(random.below(200)) - 100));
    while (scales.size() % kBlock != 0) scales.push_back(2);
    for (float& scale : scales) scale = std::isinf(scale) ? 1.0f : scale;
    return scales;
}

// Every code in every row, and every scale: a row has a scale of its own, or shares it with the row before.
void test_unpackers(const char* isa, const Kernels& kernels) {
    Random random{3};
    const std::vector<float> scales = every_scale(random);
    for (const Format format : {Format::fp8, Format::int8, Format::int4, Format::mxfp4}) {
        const int bits = WeightFormat{format}.bits(), codes = 1 << bits;
        int wrong = 0;
        for (std::size_t first = 0; first < scales.size(); first += kBlock) {
            for (int turn = 0; turn < codes; turn += kBlock) {
                for (const bool with_zeros : {false, true}) {
                    if (with_zeros && format != Format::int4) continue;
                    alignas(64) std::uint8_t block[kBlockSize] = {};
                    alignas(64) float of_row[kBlock];
                    alignas(64) bf16 found[kBlockSize];
                    std::int8_t zeros[kBlock];
                    const auto code_at = [&](std::size_t i) {
                        const int code = static_cast<int>((turn + i % kBlock + i / kBlock * 5) % codes);
                        return format == Format::fp8 && (code & 0x7f) == 0x7f ? 0 : code;  // NaN is refused
                    };
                    for (std::size_t i = 0; i < kBlockSize; ++i) {
                        if (bits == 8) block[i] = static_cast<std::uint8_t>(code_at(i));
                        else block[i / 2] = static_cast<std::uint8_t>(block[i / 2] | code_at(i) << (i % 2 * 4));
                    }
                    for (int n = 0; n < kBlock; ++n) {
                        of_row[n] = scales[first + (n % 8 == 3 ? n - 1 : n)];
                        zeros[n] = static_cast<std::int8_t>(n % 16 - 8);
                    }
                    kernels.unpack_of(format)(block, of_row, with_zeros ? zeros : nullptr, block, found);
                    for (std::size_t i = 0; i < kBlockSize; ++i) {
                        const std::size_t n = i / kBlock;
                        const float q = static_cast<float>(value_of(format, code_at(i), with_zeros ? zeros[n] : 0));
                        wrong += found[i] != to_bf16(q * of_row[n]);
                    }
                }
            }
        }
        check(wrong == 0, "%s format %d: %d weights are wrong", isa, static_cast<int>(format), wrong);
    }
}

// Some blocks, with scales of their own as they are packed, and the same weights as bf16.
struct Blocks final : CodedBlocks {
    int count;
    std::vector<std::uint8_t> codes;
    std::vector<std::byte> packed;    // of each block: 32 scales, or two of fp8
    std::vector<std::int8_t> points;  // zero points
    std::vector<bf16> weights;

    Blocks(Format of, bool with_zeros, int how_many, const std::vector<float>& sizes, std::size_t first, Random& random)
        : count(how_many) {
        format = of;
        whole = true;
        const WeightFormat facts{of};
        const int bits = facts.bits();
        for (int k = 0; k < count; ++k) {
            for (int n = 0; n < kBlock; ++n) {
                // int8 has a scale for each row, fp8 one for the block
                const std::size_t at = of == Format::int8 ? n : of == Format::fp8 ? k : k * kBlock + n;
                float scale = sizes[(first + at) % sizes.size()];
                if (of == Format::int4) scale = to_float(to_bf16(scale));
                if (of == Format::int4 && std::isinf(scale)) scale = 1;
                if (of == Format::mxfp4) scale = std::ldexp(1.0f, static_cast<int>((first + at) % 255) - 127);
                const auto put = [&](auto value) {
                    const auto* bytes = reinterpret_cast<const std::byte*>(&value);
                    packed.insert(packed.end(), bytes, bytes + sizeof value);
                };
                if (of == Format::int4) put(to_bf16(scale));
                else if (of == Format::mxfp4) put(static_cast<std::uint8_t>((first + at) % 255));
                else if (of == Format::int8 || n < 2) put(scale);
                const int zero = with_zeros ? random.below(16) - 8 : 0;
                if (with_zeros) points.push_back(static_cast<std::int8_t>(zero));
                for (int i = 0; i < kBlock; ++i) {
                    int code = random.below(1 << bits);
                    if (of == Format::fp8 && (code & 0x7f) == 0x7f) code = 0;  // NaN
                    if (bits == 8 || i % 2 == 0) codes.push_back(static_cast<std::uint8_t>(code));
                    else codes.back() = static_cast<std::uint8_t>(codes.back() | code << 4);
                    weights.push_back(to_bf16(static_cast<float>(value_of(of, code, zero)) * scale));
                }
            }
        }
        blocks = codes.data();
        block_bytes = facts.bytes(kBlockSize);
        scales = packed.data();
        zeros = points.empty() ? nullptr : points.data();
        scale_bytes = packed.size() / count;
        group = kBlock;
        lay(count);
    }
    // As rows of `columns` blocks.
    void lay(int columns) {
        row_bytes = columns * block_bytes;
        groups = columns;
    }
    const bf16* weights_at(Place at) const { return weights.data() + (at.n * groups + at.k) * kBlockSize; }
    void unpack(Place at, int some, const std::uint8_t*, bf16* out) const override {
        std::copy_n(weights_at(at), some * kBlockSize, out);
    }
};

// Compares a product by codes with the same by bf16; multiply(coded, results).
template <typename Multiply>
void compare_products(const Blocks& blocks, std::size_t results, const std::string& what, const Multiply& multiply) {
    std::vector<float> of_bf16(results), of_codes(results);
    multiply(false, of_bf16.data());
    multiply(true, of_codes.data());
    const bool same = std::memcmp(of_bf16.data(), of_codes.data(), results * sizeof(float)) == 0;
    check(same, "format %d zeros %d: %s", static_cast<int>(blocks.format), blocks.zeros != nullptr, what.c_str());
}
// Sets the results of padding rows, which are undefined, to 0.
void clear_padding(float* c, int rows, int columns) {
    for (int i = 0; i < columns; ++i)
        std::fill(c + i * nn_stride(rows) + rows * kBlock, c + (i + 1) * nn_stride(rows), 0.0f);
}

// Few and many rows by codes, with scales of every size, and by the same weights as bf16.
void test_products_of_codes(const char* isa, const Kernels& kernels) {
    Random random{5};
    const std::vector<float> scales = every_scale(random);
    kernels.enter();
    int turn = 0;
    for (std::size_t first = 0; first < scales.size(); first += 37) {
        for (const Format format : {Format::fp8, Format::int8, Format::int4, Format::mxfp4}) {
            for (const bool with_zeros : {false, true}) {
                if (with_zeros && format != Format::int4) continue;
                // chunks of an even and of an odd number of blocks
                const int rows = 1 + turn % 20, count = turn % 5 == 0 ? 10 : 1 + turn % 8;
                ++turn;
                Blocks blocks(format, with_zeros, count, scales, first, random);
                const std::vector<bf16> x = random.bf16s(2 * kPackSize * count, 0x1p-20f);
                const bool few = rows <= kernels.few_rows;
                const std::string of = std::string(isa) + " of " + std::to_string(rows) + " rows";
                compare_products(blocks, rows * kBlock, "nt, " + of, [&](bool coded, float* c) {
                    NtSegment segment{blocks.weights.data(), x.data(), count * kPackSize, count};
                    if (coded) segment.codes = &blocks;
                    std::vector<float> result(2 * kResultSize);
                    (few ? kernels.nt_few : kernels.nt)(&segment, 1, 1, rows, result.data());
                    for (int i = 0; i < rows * kBlock; ++i)  // those of no token are undefined
                        c[i] =
                            result[few ? i : i % rows / kGroup * kResultSize + i / rows * kGroup + i % rows % kGroup];
                });
                // as one k-block of `count` column blocks, and as `count` k-blocks of one
                for (const int columns : {count, 1}) {
                    blocks.lay(columns);
                    const std::string what = "nn of " + std::to_string(columns) + " columns, ";
                    compare_products(blocks, columns * nn_stride(rows), what + of, [&](bool coded, float* c) {
                        NnSegment segment{};
                        segment.rows = x.data();
                        segment.kblocks = count / columns;
                        segment.ld = segment.kblocks * kBlock;
                        if (coded) segment.codes = &blocks;
                        else segment.weights = blocks.weights.data();
                        segment.kblock_stride = columns * kBlockSize;
                        kernels.nn(&segment, 1, rows, columns, c);
                        clear_padding(c, rows, columns);
                    });
                }
            }
        }
    }
    kernels.leave();
}

// As the engine calls them: some strips of two matrices of codes in turn, or both below each other from a column on, each
// with further weights in bf16, by few rows and by more than a call's first chunks have.
void test_calls_with_codes(const char* isa, const Kernels& kernels) {
    Random random{6};
    const std::vector<float> scales = every_scale(random);
    constexpr int strips = 8, columns = 12, kblocks = 10, most = 144;
    const std::vector<bf16> further = random.bf16s(strips * columns * kBlockSize, 1);
    const std::vector<bf16> x = random.bf16s(most * kblocks * kBlock, 0x1p-20f);
    kernels.enter();
    for (const Format format : {Format::fp8, Format::int8, Format::int4, Format::mxfp4}) {
        std::vector<Blocks> both;
        for (const std::size_t first : {60, 200})
            both.emplace_back(format, format == Format::int4 && first == 200, columns * kblocks, scales, first, random);
        for (const int rows : {1, 3, 8, 20, 40, 50, 70, 130}) {
            const std::string of = std::string(isa) + " of " + std::to_string(rows) + " rows";
            const bool few = rows <= kernels.few_rows;
            const int groups = (rows + kGroup - 1) / kGroup;
            for (Blocks& blocks : both) blocks.lay(kblocks);
            for (int at_once = 1; at_once <= strips; at_once *= 2) {
                const std::size_t results = few ? rows * kBlock : groups * kResultSize;
                compare_products(both[0], at_once * results, "nt of several strips, " + of, [&](bool coded, float* c) {
                    std::vector<NtSegment> segments;
                    for (int i = 0; i < at_once; ++i) {
                        const Blocks& blocks = both[i % 2];
                        NtSegment base{nullptr, x.data(), kblocks * kPackSize, kblocks};
                        base.strip = i / 2;
                        if (coded) base.codes = &blocks;
                        else base.weights = blocks.weights_at({i / 2, 0});
                        segments.push_back(base);
                        segments.push_back({further.data() + i * kBlockSize, x.data(), kblocks * kPackSize, 1});
                    }
                    (few ? kernels.nt_few : kernels.nt)(segments.data(), 2, at_once, rows, c);
                    for (std::size_t i = 0; !few && i < at_once * results; ++i) {  // those of no token are undefined
                        if (static_cast<int>(i % results / kResultSize * kGroup + i % kGroup) >= rows) c[i] = 0;
                    }
                });
            }
            for (Blocks& blocks : both) blocks.lay(columns);
            for (const int first : {0, 4}) {
                compare_products(both[0], 8 * nn_stride(rows), "nn of two matrices, " + of, [&](bool coded, float* c) {
                    NnSegment segments[3] = {};
                    for (int i = 0; i < 3; ++i) {
                        NnSegment& segment = segments[i];
                        segment.rows = x.data();
                        segment.kblocks = i < 2 ? kblocks : 1;
                        segment.ld = kblocks * kBlock;
                        segment.kblock_stride = columns * kBlockSize;
                        segment.weights = further.data();
                        if (i == 2) continue;
                        segment.weights = coded ? nullptr : both[i].weights_at({0, first});
                        segment.column_block = first;
                        if (coded) segment.codes = &both[i];
                    }
                    kernels.nn(segments, 3, rows, 8, c);
                    clear_padding(c, rows, 8);
                });
            }
        }
    }
    kernels.leave();
}

}  // namespace

int main() {
    emulate_amx();
    for (const InstructionSet& row : instruction_sets()) {
        if (!row.runs_here()) continue;
        test_unpackers(row.name, *row.kernels);
        test_products_of_codes(row.name, *row.kernels);
        test_calls_with_codes(row.name, *row.kernels);
    }
    return finish();
}
