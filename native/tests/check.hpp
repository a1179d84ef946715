// The few lines that the C++ tests share: checks that count, and random numbers that repeat.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "ktv/bf16.hpp"

namespace check {

inline int passed = 0, failed = 0;

inline bool that(bool ok, const std::string& what) {
    ok ? ++passed : ++failed;
    if (!ok) std::printf("FAIL %s\n", what.c_str());
    return ok;
}

inline int finish() {
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 ? 0 : 1;
}

class Random {
  public:
    explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
    std::uint64_t next() {
        state_ ^= state_ << 13;
        state_ ^= state_ >> 7;
        return state_ ^= state_ << 17;
    }
    int below(int n) { return static_cast<int>(next() % static_cast<std::uint64_t>(n)); }
    float uniform() { return static_cast<float>(next() >> 40) * 0x1p-23f - 1.0f; }  // -1 .. 1
    std::vector<ktv::bf16> bf16s(std::size_t count, float scale) {
        std::vector<ktv::bf16> values(count);
        for (auto& v : values) v = ktv::to_bf16(scale * uniform());
        return values;
    }

  private:
    std::uint64_t state_;
};

// |a - b| / |b|
template <typename A, typename B>
double rel_l2(const A& a, const B& b) {
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
        const double d = double(a[i]) - double(b[i]);
        difference += d * d;
        norm += double(b[i]) * double(b[i]);
    }
    return norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm);
}

}  // namespace check
