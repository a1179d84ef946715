// Quantised base weights: a layer of codes has the bits of the bf16 layer of the weights that they stand for, on every
// instruction set, at sizes that are multiples of nothing and with parts that begin inside a block. The weights are made
// by other code here than in the engine.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "code_values.hpp"
#include "instruction_sets.hpp"
#include "problem.hpp"

using namespace ktv;

namespace {

// One matrix [E][rows][cols] as codes, and as the bf16 weights that they stand for.
struct Coded {
    std::vector<std::uint8_t> codes, scales;  // as bytes
    std::vector<std::int8_t> zeros;
    std::vector<bf16> weights;
};

double value_of_half(int half) {
    const int exponent = half >> 10, rest = half & 0x3ff;
    return exponent == 0 ? std::ldexp(rest, -24) : std::ldexp(0x400 + rest, exponent - 25);
}

// Appends the bytes of a drawn scale; returns its value.
float draw_scale(Scale scale, Random& random, std::vector<std::uint8_t>& to) {
    const auto append = [&](auto stored) {
        const auto* bytes = reinterpret_cast<const std::uint8_t*>(&stored);
        to.insert(to.end(), bytes, bytes + sizeof stored);
    };
    const float drawn = 0.01f + 0.05f * std::abs(random.uniform());
    switch (scale) {
        case Scale::fp16: {
            const auto half = static_cast<std::uint16_t>(random.below(0x2c00));  // below 1/16, subnormal ones too
            append(half);
            return static_cast<float>(value_of_half(half));
        }
        case Scale::bf16:
            append(to_bf16(drawn));
            return to_float(to_bf16(drawn));
        case Scale::e8m0: {
            const auto power = static_cast<std::uint8_t>(118 + random.below(8));
            append(power);
            return std::ldexp(1.0f, power - 127);
        }
        default:
            append(drawn / 16);
            return drawn / 16;
    }
}

Coded coded(const WeightFormat& format, int experts, int rows, int cols, Random& random) {
    Coded made;
    const int columns = format.group > 0 ? (cols + format.group - 1) / format.group : 1;
    const int of_rows = (rows + format.group_rows() - 1) / format.group_rows();
    std::vector<float> scales;
    for (int i = 0; i < experts * of_rows * columns; ++i) {
        scales.push_back(draw_scale(format.scale, random, made.scales));
        made.zeros.push_back(static_cast<std::int8_t>(format.zeros ? random.below(16) - 8 : 0));
    }
    const int bits = format.bits();
    for (int i = 0; i < experts * rows * cols; ++i) {
        int code = random.below(1 << bits);
        if (format.format == Format::fp8 && (code & 0x7f) == 0x7f) code = 0;  // NaN
        if (bits == 8 || i % 2 == 0) made.codes.push_back(static_cast<std::uint8_t>(code ^ (format.offset ? 0x80 : 0)));
        else made.codes.back() = static_cast<std::uint8_t>(made.codes.back() | code << 4);
        const int expert = i / (rows * cols), row = i / cols % rows, col = i % cols;
        const int at =
            (expert * of_rows + row / format.group_rows()) * columns + (format.group > 0 ? col / format.group : 0);
        made.weights.push_back(to_bf16(static_cast<float>(value_of(format.format, code, made.zeros[at])) * scales[at]));
    }
    return made;
}

WeightSource source_of(const Coded& from, const WeightFormat& format, int experts, int rows, int cols) {
    WeightSource source{{}, cols, 1, false, {}, {}};
    const std::size_t each = from.zeros.size() / experts;
    for (int e = 0; e < experts; ++e) {
        source.experts.push_back(from.codes.data() + e * format.bytes(std::size_t{1} * rows * cols));
        source.zeros.push_back(from.zeros.data() + e * each);
        source.scales.push_back(from.scales.data() + e * each * format.scale_bytes());
    }
    return source;
}

void test_format(const WeightFormat& format, const Shape& s) {
    Random random{7};
    const Coded gate = coded(format, s.E, s.I, s.H, random), up = coded(format, s.E, s.I, s.H, random),
                down = coded(format, s.E, s.H, s.I, random);
    Problem problem(s);
    problem.gate = gate.weights;
    problem.up = up.weights;
    problem.down = down.weights;
    std::vector<std::int64_t> map(s.E);
    std::iota(map.begin(), map.end(), 0);
    for (const std::string& isa : available_isas()) {
        const auto expected = problem.run(*problem.layer(isa, 1));
        const auto layer = problem.layer(isa, 2);
        layer->load_weights(source_of(gate, format, s.E, s.I, s.H), source_of(up, format, s.E, s.I, s.H),
                            source_of(down, format, s.E, s.H, s.I), map, nullptr, format);
        const auto check_of = [&](bool good, const char* what) {
            check(good, "%s format %d group %d E=%d H=%d I=%d T=%d parts=%d %s", isa.c_str(),
                  static_cast<int>(format.format), format.group, s.E, s.H, s.I, s.T, s.parts, what);
        };
        check_of(problem.run(*layer) == expected, "against bf16");
        check_of(problem.run(*layer) == expected, "twice");
        std::vector<bf16> g(s.I * s.H), u(s.I * s.H), d(s.I * s.H);
        int packed = 0;
        for (int e = 0; e < s.E; ++e) {
            if (!layer->unpack(e, g.data(), u.data(), d.data())) continue;
            ++packed;
            const auto same = [&](const std::vector<bf16>& found, const Coded& wanted) {
                return std::equal(found.begin(), found.end(), wanted.weights.begin() + e * s.I * s.H);
            };
            check_of(same(g, gate) && same(u, up) && same(d, down), "unpacked");
        }
        check_of(packed > 0, "some expert is packed");
    }
}

}  // namespace

int main() {
    emulate_amx();
    const WeightFormat fp8{Format::fp8, 128}, int8{Format::int8}, mxfp4{Format::mxfp4, 32, false, Scale::e8m0};
    for (const WeightFormat& format : {fp8, int8, WeightFormat{Format::int8, 0, false, Scale::fp32, true}}) {
        test_format(format, {3, 2, 97, 47, 7, 3, 1, false});
        test_format(format, {2, 2, 290, 236, 20, 7, 2, false});
        test_format(format, {1, 1, 33, 260, 17, 16, 4, true});
        test_format(format, {1, 1, 288, 96, 150, 3, 1, false});
    }
    const auto int4 = [](int group, bool zeros, Scale scale) {
        return WeightFormat{Format::int4, group, zeros, scale};
    };
    for (const WeightFormat& format : {mxfp4, int4(32, false, Scale::bf16), int4(32, true, Scale::bf16),
                                       int4(32, false, Scale::fp16), int4(32, true, Scale::fp32)}) {
        test_format(format, {3, 2, 96, 64, 7, 3, 2, false});
        test_format(format, {1, 1, 32, 224, 37, 5, 1, false});
        test_format(format, {1, 1, 288, 96, 150, 3, 1, false});
    }
    for (const Scale scale : {Scale::bf16, Scale::fp16, Scale::fp32})
        test_format(int4(128, true, scale), {2, 2, 128, 256, 9, 4, 2, true});
    Problem problem({1, 1, 32, 96, 1, 1, 2, false});
    check(throws<BadInput>([&] {
              problem.layer("scalar", 1)->load_weights({{nullptr}}, {{nullptr}}, {{nullptr}}, {0}, nullptr, mxfp4);
          }),
          "a part that begins inside a group is refused");
    return finish();
}
