// The signal handler: which signals it handles, threads, counting, and what AMX refuses.
// The checks are also valid on a CPU with AMX: there they test the oracle.
#include <sched.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <fstream>
#include <optional>
#include <thread>

#include "amx_trap_testing.hpp"

// Run before this process installs the handler itself.
void check_installation() {
    static volatile sig_atomic_t seen = 0;
    const auto skip_two_bytes = [](int, siginfo_t* info, void* context) {
        auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
        if (info->si_addr == reinterpret_cast<void*>(registers[REG_RIP])) seen = seen + 1;
        registers[REG_RIP] += 2;
    };
    const auto use_amx = [] {
        load_config(Config::full());
        zero(3);
        return store_config().rows[3] == 16;
    };
    // Makes it the handler of SIGILL.
    const auto handle = [&] {
        struct sigaction action{};
        action.sa_sigaction = skip_two_bytes;
        action.sa_flags = SA_SIGINFO;
        sigaddset(&action.sa_mask, SIGUSR1);
        sigaction(SIGILL, &action, nullptr);
    };
    check(!amx_trap_installed(), "nothing is installed before the first request");
    Outcome outcome = in_child([] {
        if (!hardware) zero(0);
        return 0;
    });
    check(outcome.killed_by(SIGILL) || hardware, "without the emulator a tile instruction ends the process");

    outcome = in_child([&] {
        if (!amx_trap_install() || !amx_trap_install() || !amx_trap_installed() || !use_amx()) return 1;
        entry(illegal_ret)(nullptr, 0);
        return 2;
    });
    check(outcome.killed_by(SIGILL) && outcome.errors.empty(), "ud2 still kills, without a message");

    outcome = in_child([] {
        amx_trap_install();
        raise(SIGILL);
        return 2;
    });
    check(outcome.killed_by(SIGILL), "a SIGILL that was sent still kills");

    outcome = in_child([&] {
        signal(SIGILL, SIG_IGN);
        if (!amx_trap_install()) return 1;
        raise(SIGILL);
        return use_amx() ? 0 : 2;
    });
    check(outcome.exited_with(0), "a SIGILL that was sent and ignored stays ignored");

    outcome = in_child([&] {
        handle();
        if (!amx_trap_install() || !use_amx()) return 1;
        entry(illegal_ret)(nullptr, 0);
        entry(illegal_ret)(nullptr, 0);
        sigset_t mask;
        pthread_sigmask(SIG_SETMASK, nullptr, &mask);
        if (sigismember(&mask, SIGUSR1) || sigismember(&mask, SIGILL)) return 2;
        return seen == 2 && use_amx() ? 0 : 3;
    });
    check(outcome.exited_with(0), "an earlier handler gets the other illegal instructions");

    outcome = in_child([&] {
        amx_trap_install();
        handle();
        return !amx_trap_installed() && !amx_trap_install() ? 0 : 1;
    });
    check(outcome.exited_with(0), "a later handler is not replaced");

    outcome = in_child([] {
        std::array<bool, 8> good{};
        std::vector<std::jthread> threads;
        for (bool& result : good) threads.emplace_back([&result] { result = amx_trap_install(); });
        threads.clear();
        if (std::ranges::count(good, true) < 8) return 1;
        entry(illegal_ret)(nullptr, 0);
        return 2;
    });
    check(outcome.killed_by(SIGILL), "installing from eight threads at once");
}

std::size_t virtual_pages() {
    std::size_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    return pages;
}

void check_threads() {
    constexpr unsigned kThreads = 4;
    std::array<unsigned, kThreads> wrong{};
    std::vector<std::jthread> threads;
    for (unsigned number = 0; number < kThreads; ++number) {
        threads.emplace_back([number, &wrong] {
            Random random{100 + number};
            for (unsigned trial = 0; trial < 60; ++trial) {
                const Shape shape = random_shape(random);
                auto [dest, a, b] = Operands(Data::integer, random);
                const Tile expected = oracle_bf16(dest, a, b, shape);
                // Between the steps another thread may run.
                multiply_in_tiles(dest, a, b, shape, 0, 1, 2, sched_yield);
                if (!same_bytes(dest, expected)) ++wrong[number];
                if (!matmul_is_right(random)) ++wrong[number];
            }
        });
    }
    threads.clear();
    for (unsigned number = 0; number < kThreads; ++number)
        check(wrong[number] == 0, "thread %u: %u wrong", number, wrong[number]);

    load_config(Config::full());
    std::thread([] { check(store_config().palette == 0, "a new thread begins unconfigured"); }).join();
    check(store_config().palette == 1, "and does not change its parent's tiles");
    release();

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // the sanitizers map memory of their own
    const auto touch = [] { std::thread([] { load_config(Config::full()); }).join(); };
    touch();
    const std::size_t before = virtual_pages();
    constexpr unsigned kCount = 600;
    for (unsigned i = 0; i < kCount; ++i) touch();
    check(virtual_pages() < before + kCount, "a thread's tiles are freed when it ends");
#endif
}

void check_count() {
    load_config(Config::full());
    Tile tile{};
    const std::uint64_t before = amx_trap_count();
    errno = 42;
    entry(run_of_eight)(&tile, 64);
    check(errno == 42, "errno changes");
    check(amx_trap_count() - before == (hardware ? 0 : 8), "eight instructions in one trap count as eight");
    release();
}

void check_refusals() {
    static Tile tile{};
    const auto refuses = [](
                             const char* expected, const std::optional<Config>& config, void (*body)() = [] {}) {
        const Outcome outcome = in_child([&] {
            if (config) load_config(*config);
            body();
            return 0;
        });
        const bool died = outcome.killed_by(SIGILL) || (hardware && outcome.killed_by(SIGSEGV));
        check(died, "not refused: %s", expected);
        if (hardware) return;
        const bool one_line = outcome.errors.find('\n') == outcome.errors.size() - 1;
        check(one_line && outcome.errors.find(expected) != std::string::npos, "expected '%s', got '%s'", expected,
              outcome.errors.c_str());
    };
    const auto tdp = [] { multiply(0, 1, 2); };
    Config config;

    refuses("tilezero tmm3", {}, [] { zero(3); });
    refuses("#UD: no tile is configured, ldtilecfg must come first", {}, [] { load(0, &tile); });
    refuses("#UD: no tile is configured", {}, tdp);
    refuses("#UD: no tile is configured", Config::full(), [] {
        release();
        store(1, &tile);
    });
    config = Config::full();
    config.palette = 2;
    refuses("ldtilecfg at 0x", config);
    refuses("#GP: palette 2, there are 0 and 1", config);
    for (const unsigned byte : {2u, 15u, 32u, 47u, 56u, 63u}) {
        config = Config::full();
        reinterpret_cast<std::uint8_t*>(&config)[byte] = 1;
        refuses("#GP: bytes 2-15, 32-47 and 56-63 of the configuration must be zero", config);
    }
    refuses("#GP: tmm7 has 17 rows of 64 bytes", Config::full().set(7, 17, 64));
    refuses("#GP: tmm0 has 16 rows of 65 bytes", Config::full().set(0, 16, 65));
    refuses("#GP: tmm4 has 0 rows of 64 bytes: both must be zero, or neither", Config::full().set(4, 0, 64));
    refuses("#GP: tmm4 has 3 rows of 0 bytes", Config::full().set(4, 3, 0));
    refuses("tileloadd tmm2 at 0x", Config::full().set(2, 0, 0), [] { load(2, &tile); });
    refuses("#UD: tmm2 has no rows", Config::full().set(2, 0, 0), [] { zero(2); });
    refuses("#UD: rows of tmm1 have 7 bytes, no multiple of 4", Config::full().set(1, 5, 7), [] { store(1, &tile); });
    config = Config::full();
    config.start_row = 16;
    refuses("#UD: start_row is 16, tmm0 has 16 rows", config, [] { load(0, &tile); });
    refuses("#UD: the address must be encoded with a SIB byte", Config::full(), [] { entry(no_sib)(&tile, 0); });
    for (unsigned number = 0; number < 5; ++number) {
        const Outcome outcome = in_child([number] {
            load_config(Config::full());
            entry(malformed, number)(&tile, 64);
            return 0;
        });
        check(outcome.killed_by(SIGILL) && outcome.errors.empty(), "malformed instruction %u is no AMX", number);
    }
    refuses("#UD: there is no tmm8", Config::full(), [] { entry(tmm_eight)(&tile, 0); });
    refuses("tdpbf16ps tmm0, tmm0, tmm1 at 0x", Config::full(), [] { entry(same_tile_twice)(nullptr, 0); });
    refuses("#UD: its three tiles must differ", Config::full(), [] { entry(same_tile_twice)(nullptr, 0); });
    refuses("#UD: tmm0 has 16 rows, tmm1 has 8: they must be equal", Config::full().set(1, 8, 64), tdp);
    refuses("#UD: rows of tmm1 have 8 4-byte elements, tmm2 has 16 rows", Config::full().set(1, 16, 32), tdp);
    refuses("#UD: rows of tmm0 have 32 bytes, of tmm2 64", Config::full().set(0, 16, 32), tdp);
    refuses("#UD: rows of tmm2 have 30 bytes, no multiple of 4", Config::full().set(2, 16, 30), tdp);
    refuses("tdpbf16ps tmm5, tmm6, tmm7 at 0x", Config::full().set(6, 1, 64), [] { multiply(5, 6, 7); });
}

int main() {
    hardware = request_hardware_amx();
    check_installation();
    begin();
    check_threads();
    check_count();
    check_refusals();
    return finish_amx();
}
