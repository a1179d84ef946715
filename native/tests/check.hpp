// What the C++ tests share: checks that are counted, random numbers that repeat, a relative error.
#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "ktv/bf16.hpp"

inline int passed = 0, failed = 0;

// Counts a check, and prints the formatted text when it fails; of many failures the first 40.
[[gnu::format(printf, 2, 3)]] inline bool check(bool good, const char* format, ...) {
    ++(good ? passed : failed);
    if (!good && failed <= 40) {
        va_list arguments;
        va_start(arguments, format);
        std::printf("FAIL ");
        std::vprintf(format, arguments);
        std::printf("\n");
        va_end(arguments);
    }
    return good;
}

template <typename Error, typename Call>
bool throws(const Call& call) {
    try {
        call();
    } catch (const Error&) {
        return true;
    }
    return false;
}

// The exit code.
inline int finish() {
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 ? 0 : 1;
}

// splitmix64: the same numbers on every machine.
struct Random {
    std::uint64_t state;
    std::uint64_t operator()() {
        std::uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return z ^ (z >> 31);
    }
    unsigned below(unsigned n) { return static_cast<unsigned>((*this)() % n); }
    float uniform() { return static_cast<float>((*this)() >> 40) * 0x1p-23f - 1.0f; }  // -1 .. 1
    float gaussian() {
        double sum = 0;
        for (int i = 0; i < 12; ++i) sum += uniform() / 2;
        return static_cast<float>(sum);
    }
    std::vector<ktv::bf16> bf16s(std::size_t count, float scale) {
        std::vector<ktv::bf16> values(count);
        for (auto& v : values) v = ktv::to_bf16(scale * uniform());
        return values;
    }
    void fill(void* memory, std::size_t size) {
        for (std::size_t i = 0; i < size; ++i)
            static_cast<std::uint8_t*>(memory)[i] = static_cast<std::uint8_t>((*this)());
    }
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
