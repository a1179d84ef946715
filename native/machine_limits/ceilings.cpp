#include "ceilings.hpp"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <vector>

#include "instruction_sets.hpp"
#include "ktv/errors.hpp"
#include "memory.hpp"
#include "process.hpp"

namespace ktv {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

int team_size(int threads) {
    if (threads < 1) throw BadInput("threads is " + std::to_string(threads) + ", it takes 1 or more");
    return std::min(threads, allowed_processors());
}

using Line = std::uint64_t __attribute__((vector_size(64)));
constexpr std::size_t kStep = 8 * sizeof(Line);
// Some CPUs reach the memory's rate with their own prefetchers, others only with prefetches two pages ahead, into the first
// or the second cache level.
constexpr std::size_t kAhead = 8192;
enum class Prefetch { none, first_level, second_level };

// The sum keeps the compiler from removing the loads.
template <Prefetch prefetch>
std::uint64_t read(const std::byte* from, std::size_t bytes) {
    Line sum[8] = {};
    for (std::size_t at = 0; at < bytes; at += kStep) {
        const Line* lines = reinterpret_cast<const Line*>(from + at);
        for (int i = 0; i < 8; ++i) {
            const std::byte* later = from + at + kAhead + i * sizeof(Line);
            if (prefetch == Prefetch::first_level) __builtin_prefetch(later, 0, 3);
            if (prefetch == Prefetch::second_level) __builtin_prefetch(later, 0, 2);
            sum[i] += lines[i];
        }
    }
    std::uint64_t total = 0;
    for (const Line& line : sum) {
        for (int lane = 0; lane < 8; ++lane) total += line[lane];
    }
    return total;
}

}  // namespace

double read_rate(int threads, std::size_t bytes, int passes) {
    const int workers = team_size(threads);
    if (passes < 1) throw BadInput("passes is " + std::to_string(passes) + ", it takes 1 or more");
    const std::size_t share = bytes / workers / kStep * kStep;
    if (share == 0) throw BadInput("bytes is " + std::to_string(bytes) + ", too few to share among the threads");
    Process& shared = process();
    const std::lock_guard lock(shared.mutex);
    Team& team = shared.team(workers);
    auto& kept = shared.ceiling;
    const auto begin = [&](int worker) { return kept.block.data() + share * worker; };
    // Kept from call to call, because releasing pages costs time in the kernel or in a virtual machine's host while the bench
    // measures another engine.
    if (kept.workers != workers || kept.share != share) {
        kept = {};
        require_memory({bytes, bytes}, "the memory that the bandwidth is measured on");
        kept = {Block(share * workers + kAhead + kStep), workers, share};
        // Each worker writes its own share first, so that the pages are on its NUMA node.
        team.run([&](int worker) { std::memset(begin(worker), 1, share); });
    }
    std::vector<std::uint64_t> sums(workers * 8);
    double best = 0;
    for (int pass = 0; pass < passes; ++pass) {
        const auto start = Clock::now();
        team.run([&](int worker) {
            constexpr decltype(&read<Prefetch::none>) ways[] = {read<Prefetch::second_level>, read<Prefetch::none>,
                                                                read<Prefetch::first_level>};
            sums[worker * 8] += ways[pass % 3](begin(worker), share);
        });
        best = std::max(best, static_cast<double>(share) * workers / seconds_since(start));
    }
    // Every byte is 1, so the sums are known: this check fails if the compiler removed the loads.
    const std::uint64_t expected = 0x0101010101010101u * (share / 8) * static_cast<std::uint64_t>(passes);
    for (int worker = 0; worker < workers; ++worker) {
        if (sums[worker * 8] != expected) throw BadState("memory read back wrong");
    }
    return best;
}

double multiply_rate(const std::string& isa, int threads, double seconds) {
    const InstructionSet& set = instruction_set(isa);
    const int workers = team_size(threads);
    if (!(seconds > 0)) throw BadInput("seconds is " + std::to_string(seconds) + ", it takes more than 0");
    const std::lock_guard lock(process().mutex);
    std::vector<double> done(workers * 8);
    Team& team = process().team(workers);
    const auto start = Clock::now();
    team.run([&](int worker) {
        set.kernels->enter();
        double flops = 0;
        do {
            flops += set.register_peak();
        } while (seconds_since(start) < seconds);
        set.kernels->leave();
        done[worker * 8] = flops;
    });
    const double took = seconds_since(start);
    double total = 0;
    for (const double flops : done) total += flops;
    return total / took;
}

}  // namespace ktv
