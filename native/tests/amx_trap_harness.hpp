// What the tests of the AMX emulator share: checks, random numbers, child processes.
#pragma once

#include <cpuid.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>

#include "../emulation/amx_trap.hpp"
#include "amx_trap_code.hpp"

int passed = 0, failed = 0;
bool hardware = false;  // this CPU runs tile instructions itself

[[gnu::format(printf, 2, 3)]] bool check(bool good, const char* format, ...) {
    if (good) {
        ++passed;
        return true;
    }
    if (++failed <= 40) {
        va_list arguments;
        va_start(arguments, format);
        std::printf("FAIL ");
        std::vprintf(format, arguments);
        std::printf("\n");
        va_end(arguments);
    }
    return false;
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
    double uniform() { return static_cast<double>((*this)() >> 11) * 0x1p-53; }
    float gaussian() {
        double sum = -6;
        for (int i = 0; i < 12; ++i) sum += uniform();
        return static_cast<float>(sum);
    }
    void fill(void* memory, std::size_t size) {
        for (std::size_t i = 0; i < size; ++i)
            static_cast<std::uint8_t*>(memory)[i] = static_cast<std::uint8_t>((*this)());
    }
};

struct Outcome {
    int status;
    std::string errors;
    bool killed_by(int signal) const { return WIFSIGNALED(status) && WTERMSIG(status) == signal; }
    bool exited_with(int code) const { return WIFEXITED(status) && WEXITSTATUS(status) == code; }
};

// Runs it in a child process whose exit code is what it returns.
Outcome in_child(const std::function<int()>& body) {
    int ends[2];
    if (pipe(ends) != 0) std::abort();
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        const rlimit none{0, 0};
        setrlimit(RLIMIT_CORE, &none);
        dup2(ends[1], STDERR_FILENO);
        close(ends[0]);
        _exit(body());
    }
    close(ends[1]);
    Outcome outcome{};
    char buffer[512];
    for (ssize_t size; (size = read(ends[0], buffer, sizeof buffer)) > 0;) {
        outcome.errors.append(buffer, static_cast<std::size_t>(size));
    }
    close(ends[0]);
    waitpid(child, &outcome.status, 0);
    return outcome;
}

bool request_hardware_amx() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const unsigned needed = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return (d & needed) == needed && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// For main: the emulator is in place from here on, unless the CPU needs none.
void begin() {
    hardware = request_hardware_amx();
    vector_level = __builtin_cpu_supports("avx512bw") ? 2 : __builtin_cpu_supports("avx") ? 1 : 0;
    check(ktv::emulation::amx_trap_install() && ktv::emulation::amx_trap_installed(), "the emulator installs");
}

// The exit code.
int finish() {
    std::printf("%s\n%d passed, %d failed\n", hardware ? "on AMX hardware" : "by emulation", passed, failed);
    return failed == 0 ? 0 : 1;
}
