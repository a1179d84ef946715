// What the tests of the AMX emulator share: child processes, and whether this CPU has AMX.
#pragma once

#include <cpuid.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>

#include "../emulation/amx_trap.hpp"
#include "amx_trap_code.hpp"
#include "check.hpp"

bool hardware = false;  // this CPU runs tile instructions itself

struct Outcome {
    int status;
    std::string errors;
    bool killed_by(int signal) const { return WIFSIGNALED(status) && WTERMSIG(status) == signal; }
    bool exited_with(int code) const { return WIFEXITED(status) && WEXITSTATUS(status) == code; }
};

// Runs `body` in a child process; its result is the child's exit code.
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

// For main: installs the emulator, which does nothing on a CPU with AMX.
void begin() {
    hardware = request_hardware_amx();
    vector_level = __builtin_cpu_supports("avx512bw") ? 2 : __builtin_cpu_supports("avx") ? 1 : 0;
    check(ktv::emulation::amx_trap_install() && ktv::emulation::amx_trap_installed(), "the emulator installs");
}

// The exit code.
int finish_amx() {
    std::printf("%s\n", hardware ? "on AMX hardware" : "by emulation");
    return finish();
}
