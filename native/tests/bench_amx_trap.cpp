// Nanoseconds per emulated tile instruction: prints the table of ../emulation/README.md. Not a test.
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <csignal>

#include "amx_trap_testing.hpp"

// Median of seven runs, in nanoseconds per call.
double measure(unsigned calls, const std::function<void()>& body) {
    std::vector<double> runs;
    for (unsigned run = 0; run < 7; ++run) {
        const auto start = std::chrono::steady_clock::now();
        for (unsigned call = 0; call < calls; ++call) body();
        runs.push_back(std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count() /
                       calls);
    }
    std::sort(runs.begin(), runs.end());
    return runs[runs.size() / 2];
}

int main() {
    begin();
    Random random{7};
    auto [c, a, b] = Operands(Data::gaussian, random);
    const Shape shape{16, 16, 16};
    constexpr unsigned kCalls = 5000;
    std::printf("ns per instruction, 16 rows of 64 bytes, one trap each unless stated otherwise%s\n",
                hardware ? " (this CPU has AMX: nothing is emulated)" : "");
    const auto report = [](const char* what, double ns) { std::printf("%-34s %9.1f\n", what, ns); };

    // The trap alone: an illegal instruction, and a handler that only skips it.
    struct sigaction action{}, emulator;
    action.sa_sigaction = [](int, siginfo_t*, void* context) {
        static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] += 2;
    };
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, &emulator);
    report("ud2 with an empty handler", measure(kCalls, [] { entry(illegal_ret)(nullptr, 0); }));
    sigaction(SIGILL, &emulator, nullptr);

    load_config(Config::full());
    report("tilezero", measure(kCalls, [] { zero(0); }));
    report("tileloadd", measure(kCalls, [&] { load(1, &a); }));
    report("tilestored", measure(kCalls, [&] { store(0, &c); }));
    load(1, &a);
    load(2, &b);
    report("tdpbf16ps", measure(kCalls, [] { multiply(0, 1, 2); }));
    report("4 tileloadd, 4 tdpbf16ps, 1 trap", measure(kCalls, [&] { entry(run_of_eight)(&a, 64); }) / 8);
    release();
    std::printf("arithmetic alone\n");
    for (const Path path : kPaths) {
        if (!path_available(path)) continue;
        const std::string name = std::string("tdpbf16ps, ") + kPathNames[static_cast<int>(path)];
        report(name.c_str(), measure(path == Path::scalar ? 200 : kCalls, [&] { tdpbf16ps(c, a, b, shape, path); }));
    }
}
