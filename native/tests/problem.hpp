// A whole layer with its inputs, for the tests that compare layers.
#pragma once

#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include "check.hpp"
#include "ktv/layer.hpp"

namespace ktv {

struct Shape {
    int E, k, H, I, T, r, parts;
    bool fp32;
};

struct Problem {
    Shape s;
    std::vector<bf16> gate, up, down, x, grad_output;
    std::vector<std::int64_t> ids;
    std::vector<float> weights;
    std::vector<std::vector<bf16>> lora16;
    std::vector<std::vector<float>> lora32;
    std::vector<int> sizes;

    explicit Problem(const Shape& shape, std::uint64_t seed = 1) : s(shape) {
        Random random{seed};
        gate = random.bf16s(s.E * s.I * s.H, 0.3f);
        up = random.bf16s(s.E * s.I * s.H, 0.3f);
        down = random.bf16s(s.E * s.H * s.I, 0.3f);
        x = random.bf16s(s.T * s.H, 1);
        grad_output = random.bf16s(s.T * s.H, 1);
        for (int i = 0; i < s.T * s.k; ++i) {
            // -1 is an empty slot; a single expert gets every token.
            ids.push_back(s.E == 1 ? 0 : std::int64_t{random.below(s.E + 1)} - 1);
            weights.push_back(random.uniform());
        }
        sizes = {s.E * s.r * s.H, s.E * s.I * s.r, s.E * s.r * s.H, s.E * s.I * s.r, s.E * s.r * s.I, s.E * s.H * s.r};
        for (const int size : sizes) {
            lora16.push_back(random.bf16s(size, 0.3f));
            auto& wide = lora32.emplace_back();
            for (const bf16 v : lora16.back()) wide.push_back(to_float(v) * 1.001f);
        }
    }
    template <typename V>
    static LoraPointers pointers(V& six) {
        constexpr bool fp32 = std::is_same_v<std::decay_t<decltype(six[0][0])>, float>;
        return {six[0].data(), six[1].data(), six[2].data(), six[3].data(), six[4].data(), six[5].data(), fp32};
    }
    std::unique_ptr<Layer> layer(const std::string& isa, int threads, const std::vector<int>& numa_nodes = {}) {
        auto made = std::make_unique<Layer>(
            LayerConfig{s.E, s.k, s.H, s.I, s.r, 2.0f, s.parts, threads, 4096, 2, true, isa, numa_nodes});
        std::vector<std::int64_t> map(s.E);
        std::iota(map.begin(), map.end(), 0);
        const auto source = [&](const std::vector<bf16>& all, int rows, int cols) {
            WeightSource from{{}, cols, 1, false};
            for (int e = 0; e < s.E; ++e) from.experts.push_back(all.data() + e * rows * cols);
            return from;
        };
        made->load_weights(source(gate, s.I, s.H), source(up, s.I, s.H), source(down, s.H, s.I), map);
        made->update_lora(s.fp32 ? pointers(lora32) : pointers(lora16));
        return made;
    }
    std::vector<bf16> forward(Layer& l) const {
        std::vector<bf16> output(x.size());
        l.forward({s.T, x.data(), ids.data(), weights.data(), output.data()});
        return output;
    }
    // Output, grad_input, six LoRA gradients and dw, one after the other. Every buffer has the exact size, so that a
    // sanitizer reports an access beyond it.
    template <typename Between = void (*)()>
    std::vector<float> run(Layer& l, bool accumulate = false, const Between& between = [] {}) {
        std::vector<bf16> output(x.size()), grad_input(x.size());
        std::vector<float> dw(ids.size());
        std::vector<std::vector<bf16>> g16;
        std::vector<std::vector<float>> g32;
        for (const int size : sizes) {
            g16.emplace_back(size, bf16{0x7fc0});  // NaN shows what was not written
            g32.emplace_back(size, std::numeric_limits<float>::quiet_NaN());
        }
        l.forward({s.T, x.data(), ids.data(), weights.data(), output.data(), true});
        between();
        l.backward({s.T, grad_output.data(), grad_input.data(), s.fp32 ? pointers(g32) : pointers(g16), false,
                    dw.data(), accumulate});
        std::vector<float> all;
        for (const auto* v : {&output, &grad_input}) {
            for (const bf16 b : *v) all.push_back(to_float(b));
        }
        for (int i = 0; i < 6; ++i) {
            for (int j = 0; j < sizes[i]; ++j) all.push_back(s.fp32 ? g32[i][j] : to_float(g16[i][j]));
        }
        all.insert(all.end(), dw.begin(), dw.end());
        return all;
    }
};

}  // namespace ktv
